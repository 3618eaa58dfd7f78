# mypy: disallow-subclassing-any=False
# (torch is untyped to mypy here, see pyproject.toml, so nn.Module counts as Any.)
"""Write `tests/data/tiny_legacy.onnx` and `tests/data/tiny_dynamo.onnx`: one module, two exporters.

    python tools/make_test_exports.py --out tests/data

The module holds what exporters spell in different ways: BatchNorm, SiLU, HardSwish, LayerNorm,
GELU, attention. The legacy file is of opset 13, where LayerNorm, GELU and HardSwish are chains of
simple ops; the dynamo file has the default opset of that exporter and its own spelling. Both
compute the same function, so a test may compare what a pass makes of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch_export import export_dynamo, export_legacy, save

SEED = 7
WIDTH = 16
INPUT, OUTPUT = "image", "logits"


class Tiny(nn.Module):
    """(batch, 3, 8, 8) -> convolutions -> 16 tokens of width 16 -> attention -> (batch, 5)."""

    def __init__(self) -> None:
        """Build the layers, then give the norms the non-trivial statistics of a trained net."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, WIDTH, 2, stride=2, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.Hardswish(),
        )
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, 5)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.5, 0.5)
                    module.running_var.uniform_(0.25, 2.0)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map (batch, 3, 8, 8) to (batch, 5)."""
        tokens = self.features(image).flatten(2).transpose(1, 2)
        tokens = tokens + self.attend(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        logits: torch.Tensor = self.head(tokens.mean(dim=1))
        return logits

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Self-attention of two heads on (batch, 16, WIDTH), written out."""
        q, k, v = (
            part.reshape(-1, 16, 2, WIDTH // 2).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) * (WIDTH // 2) ** -0.5, dim=-1)
        y: torch.Tensor = self.proj((weights @ v).transpose(1, 2).reshape(-1, 16, WIDTH))
        return y


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data"))
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    module, sample = Tiny().eval(), torch.randn(2, 3, 8, 8)
    legacy = export_legacy(module, sample, input_name=INPUT, output_name=OUTPUT, opset=13)
    dynamo = export_dynamo(module, sample, input_name=INPUT, output_name=OUTPUT)
    for name, model in (("tiny_legacy.onnx", legacy), ("tiny_dynamo.onnx", dynamo)):
        save(model, out / name)
        print(f"{name}: {(out / name).stat().st_size} bytes, {len(model.graph.node)} nodes")


if __name__ == "__main__":
    main()
