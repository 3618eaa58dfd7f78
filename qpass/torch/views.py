"""Views of calibration samples: other inputs that the float model can be asked about.

What it does
    A hundred samples are learned by heart long before the outputs of others get better. What is
    wanted needs no label, only the float model, and that can be asked about any input. So each step
    of a training sees its samples another way: pictures (four axes, up to four channels) as a
    random part of themselves, stretched to the full size and often mirrored; and half of the time
    every sample mixed with another one (Zhang et al., mixup, ICLR 2018). Parts and ratios of sides
    are those of Szegedy et al. (CVPR 2015), but not below 40 % of the picture.
What has none
    Tokens and other integers: between two of them lies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

__all__ = ["Views", "has_views", "shuffled"]

Array = NDArray[Any]
Feeds = Mapping[str, Array]
CHANNELS: Final = 4  # a picture has at most so many
SIDE: Final = 32  # and at least so many pixels a side
SMALLEST: Final = 0.4  # share of the picture that a part has at least
RATIO: Final = 4 / 3  # largest ratio of the sides of a part
MIXED: Final = 0.5  # share of the steps that mix samples


def has_views(batches: Sequence[Feeds]) -> bool:
    """True when all inputs are finite floats whose first axis counts the samples of a batch."""
    return all(
        len({array.shape[:1] for array in batch.values()}) == 1
        and all(a.ndim and a.dtype.kind == "f" and np.isfinite(a).all() for a in batch.values())
        for batch in batches
    )


def shuffled(count: int, random: torch.Generator) -> Iterator[int]:
    """Yield numbers below `count` without end; each once before any comes again."""
    while True:
        yield from torch.randperm(count, generator=random).tolist()


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a picture: top, left, height and width as shares of it."""

    top: float
    left: float
    height: float
    width: float
    mirrored: bool


class Views:
    """Batches with the shapes of those given; the same generator gives the same ones."""

    def __init__(self, batches: Sequence[Feeds], random: torch.Generator) -> None:
        """Make views of `batches`, for which `has_views` holds."""
        self._batches, self._random = batches, random
        self._order = shuffled(len(batches), random)

    def draw(self) -> dict[str, Array]:
        """Return the next batch, float32 by name; each is used once before any is used again."""
        batch = self._seen(self._batches[next(self._order)])
        if self._uniform() < MIXED:
            batch = self._mixed(batch)
        return {name: tensor.numpy() for name, tensor in batch.items()}

    def _mixed(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        number = int(torch.randint(len(self._batches), (), generator=self._random))
        other = self._batches[number]
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        if {name: array.shape for name, array in other.items()} != shapes:
            return batch
        partner = self._seen(other)
        samples = len(next(iter(batch.values())))
        share = torch.rand(samples, generator=self._random)
        return {
            name: torch.lerp(partner[name], tensor, share.reshape(-1, *[1] * (tensor.ndim - 1)))
            for name, tensor in batch.items()
        }

    def _seen(self, batch: Feeds) -> dict[str, torch.Tensor]:
        """Return parts of the pictures of a batch; pictures of one sample share theirs."""
        parts = [self._part() for _ in range(len(next(iter(batch.values()))))]
        found = {}
        for name, array in batch.items():
            tensor = torch.from_numpy(array.astype(np.float32))
            if _is_picture(array):
                cut = [_cut(one[None], part) for one, part in zip(tensor, parts, strict=True)]
                tensor = torch.cat(cut)
            found[name] = tensor
        return found

    def _part(self) -> _Part:
        area = SMALLEST + (1.0 - SMALLEST) * self._uniform()
        ratio = math.exp((2.0 * self._uniform() - 1.0) * math.log(RATIO))
        height, width = min(1.0, math.sqrt(area / ratio)), min(1.0, math.sqrt(area * ratio))
        return _Part(
            top=(1.0 - height) * self._uniform(),
            left=(1.0 - width) * self._uniform(),
            height=height,
            width=width,
            mirrored=self._uniform() < 0.5,
        )

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self._random))


def _is_picture(array: Array) -> bool:
    return array.ndim == 4 and array.shape[1] <= CHANNELS and min(array.shape[2:]) >= SIDE


def _cut(picture: torch.Tensor, part: _Part) -> torch.Tensor:
    """Return a part of a picture [1, channels, height, width], stretched to its full size."""
    height, width = picture.shape[2:]
    rows, columns = max(1, round(part.height * height)), max(1, round(part.width * width))
    top, left = round(part.top * height), round(part.left * width)
    top, left = min(top, height - rows), min(left, width - columns)
    cut = picture[:, :, top : top + rows, left : left + columns]
    full = functional.interpolate(cut, size=(height, width), mode="bilinear", antialias=True)
    return full.flip(-1) if part.mirrored else full
