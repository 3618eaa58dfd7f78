"""From a torch module to an integer model, with both exporters of torch.

    pip install qpass[torch]
    python examples/export_and_optimize.py [--target ort-x86] [--out out/example]

The network is untrained and its images are synthetic: this shows the calls, not an accuracy. Put
your own module in place of `Network` and your own `DataLoader` in place of `make_loader`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import qpass
from qpass.report.model import EngineReport, Report

SIZE = 64  # pixels; large enough for the speed to mean something


class Network(nn.Module):
    """A convolutional stage and a perceptron over its pixels, in the style of current CNNs."""

    def __init__(self, width: int = 64) -> None:
        """Build the layers; inputs are (batch, 3, SIZE, SIZE), outputs (batch, 10)."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        tokens = self.features(image).flatten(2).transpose(1, 2)
        tokens = tokens + self.mlp(self.norm(tokens))
        return self.head(tokens.mean(dim=1))


class Waves(Dataset):
    """Synthetic images: plane waves of random direction, length and colour; seeded by the index."""

    def __len__(self) -> int:
        """64 images."""
        return 64

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return one sample: the name of the model's input, and its value without batch axis."""
        random = np.random.default_rng(index)
        y, x = np.meshgrid(np.linspace(0, 1, SIZE), np.linspace(0, 1, SIZE), indexing="ij")
        turns, phases = random.uniform(-8, 8, (3, 2, 1, 1)), random.uniform(0, 1, (3, 1, 1))
        waves = np.sin(2 * np.pi * (turns[:, 0] * x + turns[:, 1] * y + phases))
        return {"image": waves.astype(np.float32)}


def make_loader() -> DataLoader:
    """Return an iterable of batches, each a dict from input name to a (8, 3, SIZE, SIZE) array."""

    def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    return DataLoader(Waves(), batch_size=8, collate_fn=collate)


def export(module: nn.Module, path: Path, *, dynamo: bool) -> None:
    """Write the module as ONNX with a dynamic batch axis."""
    sample = torch.zeros(2, 3, SIZE, SIZE)
    if dynamo:
        torch.onnx.export(
            module,
            (sample,),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["image"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    else:
        torch.onnx.export(
            module,
            (sample,),
            path,
            dynamo=False,
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            input_names=["image"],
            output_names=["logits"],
        )


def describe(engine: EngineReport) -> str:
    """Return one line on what an engine made of the model."""
    speed = "not measured" if engine.speedup is None else f"{engine.speedup:.2f}x of float"
    fidelity = "not measured" if engine.sqnr_db is None else f"{engine.sqnr_db:.1f} dB"
    return (
        f"  {engine.name} {engine.version}: speed {speed}, SQNR {fidelity}, "
        f"{engine.integer_ops} of {engine.planned_integer_ops} planned ops in integers"
    )


def main() -> None:
    """Export with each exporter, optimize each file, print what the reports found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="ort-x86")
    parser.add_argument("--out", type=Path, default=Path("out/example"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    module = Network().eval()
    for exporter in ("legacy", "dynamo"):
        source = arguments.out / f"network_{exporter}.onnx"
        result = arguments.out / f"network_{exporter}.int8.onnx"
        export(module, source, dynamo=exporter == "dynamo")
        report: Report = qpass.optimize(
            source, data=make_loader(), target=arguments.target, output=result
        )
        print(f"{exporter}: {report.output}, {report.sizes.ratio:.0%} of the size")
        for engine in report.engines:
            print(describe(engine))
        if not report.ok:
            print("  failed:", ", ".join(gate.name for gate in report.gates if not gate.passed))


if __name__ == "__main__":
    main()
