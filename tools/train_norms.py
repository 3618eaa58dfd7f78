"""Train one vision transformer with several norms, same recipe and seeds, and compare.

    python tools/train_norms.py digits --out out/norms
    python tools/train_norms.py fashion --data fashion_mnist.npz --out out/norms

writes the accuracy of each run to `<pair>.json` and its weights to `<pair>_<norm>_<seed>.pt`;
runs that are in the file already are not repeated. `fashion` reads Fashion-MNIST as one `.npz` with
`train_x` and `test_x` (n, 28, 28) uint8, `train_y` and `test_y`. The norm `converted` is not
trained: it is the run with `layer` with its norms swapped, fine-tuned without labels.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_networks import VisionTransformer
from torch import nn
from train_digits import SEED, VIT_RECIPE, load_splits, shifted
from train_loop import Augment, Recipe, fit

from qpass.torch import UnifiedNorm, convert_layernorm, finetune_unified

MAIN = ("layer", "unified", "batch")
ABLATIONS = ("unified_unfiltered", "unified_unsmoothed")
CONVERTED = "converted"
FINETUNE_EPOCHS = 10


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all tokens of all samples, channels last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens, channels) to the same shape."""
        y: torch.Tensor = super().forward(x.flatten(0, -2)).reshape(x.shape)
        return y


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One data set, and the network and recipe for it."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    network: dict[str, int]
    recipe: Recipe
    augment: Augment | None = None

    @property
    def warmup(self) -> int:
        """A tenth of the iterations; the paper's 4,000 are for 100,000 and more."""
        return self.recipe.epochs * -(-len(self.train[0]) // self.recipe.batch) // 10

    def norm(self, name: str) -> Callable[[int], nn.Module]:
        """Return the maker of the norm called `name`."""
        unified: dict[str, dict[str, Any]] = {
            "unified": {"filtration": True},
            "unified_unfiltered": {},  # smoothing only
            "unified_unsmoothed": {"window": 1},  # the plain statistic of each batch
        }
        if name in unified:
            return lambda channels: UnifiedNorm(channels, warmup=self.warmup, **unified[name])
        return {"layer": nn.LayerNorm, "batch": TokenBatchNorm}[name]

    def build(self, norm: str) -> nn.Module:
        """Return the untrained network."""
        return VisionTransformer(**self.network, norm=self.norm(norm))


def load_digits_pair() -> Pair:
    """Return the pair behind `models/digits_vit*.onnx`."""
    train, _, test = load_splits()
    return Pair(
        train=(torch.from_numpy(train.images), torch.from_numpy(train.labels)),
        test=(torch.from_numpy(test.images), torch.from_numpy(test.labels)),
        network={},
        recipe=VIT_RECIPE,
        augment=shifted,
    )


def load_fashion_pair(path: Path) -> Pair:
    """Return the larger pair: 16 patches of 7x7, width 96, three blocks."""
    with np.load(path) as file:
        data = {key: file[key] for key in ("train_x", "train_y", "test_x", "test_y")}
    mean, std = data["train_x"].mean(), data["train_x"].std()

    def part(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = ((data[f"{name}_x"] - mean) / std).astype(np.float32)[:, None]
        return torch.from_numpy(images), torch.from_numpy(data[f"{name}_y"].astype(np.int64))

    return Pair(
        train=part("train"),
        test=part("test"),
        network={"size": 28, "patch": 7, "width": 96, "depth": 3},
        recipe=Recipe(epochs=2, batch=75, learning_rate=1e-3),
    )


def accuracy(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images that are classified correctly."""
    with torch.no_grad():
        found = torch.cat([module(part).argmax(1) for part in images.split(500)])
    return float((found == labels).float().mean())


def run(pair: Pair, norm: str, seed: int, weights: Path) -> dict[str, Any]:
    """Train and test one network; return its row."""
    start = time.perf_counter()
    module, loss = fit(
        lambda: pair.build(norm), *pair.train, pair.recipe, seed=seed, augment=pair.augment
    )
    torch.save(module.state_dict(), weights)
    norms = [part for part in module.modules() if isinstance(part, UnifiedNorm)]
    return {
        "norm": norm,
        "seed": seed,
        "accuracy": accuracy(module, *pair.test),
        "loss": loss,
        "filtered": sum(int(part.skipped) for part in norms),
        "iterations": sum(int(part.iterations) for part in norms),
        "seconds": time.perf_counter() - start,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlabelled:
    """The images of a pair in batches, in another order at each iteration."""

    pair: Pair
    generator: torch.Generator

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield batches, augmented as for training."""
        images, augment = self.pair.train[0], self.pair.augment
        order = torch.randperm(len(images), generator=self.generator)
        for chosen in order.split(self.pair.recipe.batch):
            batch = images[chosen]
            yield batch if augment is None else augment(batch, self.generator)


def convert(pair: Pair, seed: int, trained: Path, weights: Path) -> dict[str, Any]:
    """Swap the norms of a trained LayerNorm network and fine-tune it; return its row."""
    start = time.perf_counter()
    teacher = pair.build("layer")
    teacher.load_state_dict(torch.load(trained, weights_only=True))
    teacher.eval()
    student = copy.deepcopy(teacher)
    convert_layernorm(student, filtration=True)
    loader = Unlabelled(pair=pair, generator=torch.Generator().manual_seed(seed))
    done = finetune_unified(student, teacher, loader, epochs=FINETUNE_EPOCHS)
    torch.save(student.state_dict(), weights)
    norms = [part for part in student.modules() if isinstance(part, UnifiedNorm)]
    return {
        "norm": CONVERTED,
        "seed": seed,
        "accuracy": accuracy(student, *pair.test),
        "loss": done.losses[-1],
        "filtered": sum(int(part.skipped) for part in norms),
        "iterations": sum(int(part.iterations) for part in norms),
        "seconds": time.perf_counter() - start,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return mean and standard deviation (n - 1) over seeds, in percent."""
    lines = [
        "| norm | seeds | accuracy | of each seed | batches filtered |",
        "|---|---|---|---|---|",
    ]
    for norm in (*MAIN, *ABLATIONS, CONVERTED):
        of_norm = [row for row in rows if row["norm"] == norm]
        if not of_norm:
            continue
        found = [100 * row["accuracy"] for row in of_norm]
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        seen = sum(row["iterations"] for row in of_norm)
        filtered = f"{sum(row['filtered'] for row in of_norm) / seen:.1%}" if seen else ""
        each = ", ".join(f"{value:.2f}" for value in found)
        mean = f"{statistics.mean(found):.2f}{spread}"
        lines.append(f"| {norm} | {len(found)} | {mean} | {each} | {filtered} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pair", choices=["digits", "fashion"])
    parser.add_argument("--data", type=Path, help="Fashion-MNIST as .npz")
    parser.add_argument("--norms", nargs="+", default=MAIN, choices=[*MAIN, *ABLATIONS, CONVERTED])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/norms"))
    arguments = parser.parse_args()
    if arguments.pair == "fashion" and arguments.data is None:
        parser.error("fashion needs --data")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)

    is_digits = arguments.pair == "digits"
    pair = load_digits_pair() if is_digits else load_fashion_pair(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path: Path = arguments.out / f"{arguments.pair}.json"
    record = {"recipe": asdict(pair.recipe), "warmup": pair.warmup, "network": pair.network}
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {(row["norm"], row["seed"]) for row in rows}
    for seed in range(SEED, SEED + arguments.seeds):
        for norm in arguments.norms:
            if (norm, seed) in done:
                continue
            weights = arguments.out / f"{arguments.pair}_{norm}_{seed}.pt"
            if norm == CONVERTED:
                trained = arguments.out / f"{arguments.pair}_layer_{seed}.pt"
                rows.append(convert(pair, seed, trained, weights))
            else:
                rows.append(run(pair, norm, seed, weights))
            path.write_text(json.dumps({**record, "runs": rows}, indent=1) + "\n")
            print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
