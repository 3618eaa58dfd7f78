"""Train and export the small models of `models/` on the 8x8 digits that scikit-learn carries.

    python tools/train_digits.py cnn|vit|vit_un|all --out models

writes `digits_<name>.onnx`, `digits_calibration.npz` and `digits_test.npz`, and prints the row of
`models/README.md` for each model. Everything is seeded and runs on one thread: on one machine the
same versions give the same bytes. Other processors sum in another order, so their weights differ
in the last digits.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from digits_networks import DigitsCNN, VisionTransformer
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import nn
from torch_export import export_dynamo, export_legacy, save
from train_loop import Recipe, fit

from qpass.torch import UnifiedNorm

SEED = 20240
CALIBRATION, TEST = 128, 449  # samples; the other 1220 of the 1797 are for training
MEAN, STD = 0.3053, 0.3760  # of pixel / 16 over the whole data set, rounded
BATCH = 61  # divides 1220
INPUT, OUTPUT = "image", "logits"

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Some of the digits: images (n, 1, 8, 8), standardised, and their classes (n,)."""

    images: Images
    labels: Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How one model is built, trained and exported."""

    build: Callable[[], nn.Module]
    export: Callable[[nn.Module, torch.Tensor], onnx.ModelProto]
    recipe: Recipe


VIT_RECIPE = Recipe(epochs=100, batch=BATCH, learning_rate=1e-3)
WARMUP = 200  # a tenth of the 2,000 iterations; the paper's 4,000 are for 100,000 and more


def unified_norm(channels: int) -> nn.Module:
    """Return the norm of `digits_vit_un`."""
    return UnifiedNorm(channels, warmup=WARMUP, filtration=True)


JOBS: dict[str, Job] = {
    "cnn": Job(
        build=DigitsCNN,
        export=lambda module, sample: export_legacy(
            module, sample, input_name=INPUT, output_name=OUTPUT, opset=17
        ),
        recipe=Recipe(epochs=20, batch=BATCH, learning_rate=4e-3),
    ),
    "vit": Job(
        build=VisionTransformer,
        export=lambda module, sample: export_dynamo(
            module, sample, input_name=INPUT, output_name=OUTPUT
        ),
        recipe=VIT_RECIPE,
    ),
    "vit_un": Job(
        build=lambda: VisionTransformer(norm=unified_norm),
        export=lambda module, sample: export_dynamo(
            module, sample, input_name=INPUT, output_name=OUTPUT
        ),
        recipe=VIT_RECIPE,
    ),
}


def load_splits() -> tuple[Split, Split, Split]:
    """Return the seeded, disjoint splits for training, calibration and test."""
    digits = load_digits()
    images = ((digits.images / 16.0 - MEAN) / STD).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    order = np.random.RandomState(SEED).permutation(len(images))  # a stream that NumPy has frozen
    calibration, test, train = np.split(order, [CALIBRATION, CALIBRATION + TEST])
    parts = [Split(images=images[part], labels=labels[part]) for part in (train, calibration, test)]
    return parts[0], parts[1], parts[2]


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move half of the images by up to a pixel along both axes, filling with the background."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-MEAN / STD)
    offsets = torch.randint(0, 3, (2, count), generator=generator)
    offsets[:, torch.rand(count, generator=generator) < 0.5] = 1  # 1: stay in place
    rows = offsets[0][:, None, None] + torch.arange(height)[None, :, None]
    columns = offsets[1][:, None, None] + torch.arange(width)[None, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def train(job: Job, split: Split, *, seed: int = SEED) -> nn.Module:
    """Train a model of `JOBS`; return the module in evaluation mode."""
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    return fit(job.build, images, labels, job.recipe, seed=seed, augment=shifted)[0]


def measure_accuracy(path: Path, split: Split) -> float:
    """Return the share of images that the exported file classifies correctly in onnxruntime."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run([OUTPUT], {INPUT: split.images})[0])
    return float(np.mean(logits.argmax(axis=1) == split.labels))


def save_samples(path: Path, **arrays: npt.NDArray[np.generic]) -> None:
    """Write an `.npz` whose keys are input names; the file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=[*JOBS, "all"])
    parser.add_argument("--out", type=Path, default=Path("models"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)

    training, calibration, test = load_splits()
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_samples(arguments.out / "digits_calibration.npz", **{INPUT: calibration.images})
    save_samples(arguments.out / "digits_test.npz", **{INPUT: test.images}, labels=test.labels)
    for name in JOBS if arguments.model == "all" else [arguments.model]:
        start = time.perf_counter()
        module = train(JOBS[name], training)
        path = arguments.out / f"digits_{name}.onnx"
        save(JOBS[name].export(module, torch.from_numpy(test.images[:2])), path)
        accuracy = measure_accuracy(path, test)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(
            f"| `{path.name}` | {accuracy:.2%} | {path.stat().st_size} | `{digest}` |", flush=True
        )
        print(f"  trained and exported in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
