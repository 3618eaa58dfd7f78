"""What a unit is given and what it should give, batch by batch: numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch.

    quantized, floating
        What the unit reads, by name, in both graphs.
    wanted
        What each target should be.
    counts
        How much its errors count: as many samples, to be broadcast over the other axes.
    """

    quantized: Feeds
    floating: Feeds
    wanted: tuple[Array, ...]
    counts: tuple[Array, ...]


def part_of(batch: Batch, samples: Array) -> Batch:
    """Return the samples of a batch with these numbers."""
    quantized = {name: array[samples] for name, array in batch.quantized.items()}
    return Batch(
        quantized=quantized,
        floating={
            name: quantized[name] if array is batch.quantized[name] else array[samples]
            for name, array in batch.floating.items()
        },
        wanted=tuple(array[samples] for array in batch.wanted),
        counts=tuple(array[samples] for array in batch.counts),
    )


def joined(batches: Sequence[Batch]) -> list[tuple[float, Batch]]:
    """Join the samples of batches of one shape; return each with its share of the batches.

    Samples of other lengths or sizes cannot lie in one array: they stay apart.
    """
    alike: dict[tuple[tuple[int, ...], ...], list[Batch]] = {}
    for batch in batches:
        alike.setdefault(_sizes(batch), []).append(batch)
    return [(len(group) / len(batches), _join(group)) for group in alike.values()]


def _sizes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of one sample of everything in a batch."""
    feeds = (*batch.quantized.values(), *batch.floating.values())
    return tuple(array.shape[1:] for array in (*feeds, *batch.wanted, *batch.counts))


def _join(batches: Sequence[Batch]) -> Batch:
    def join(feeds: Sequence[Feeds]) -> Feeds:
        return {name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]}

    quantized = join([batch.quantized for batch in batches])
    floating = join([batch.floating for batch in batches])
    for name in quantized:
        if batches[0].floating[name] is batches[0].quantized[name]:
            floating = {**floating, name: quantized[name]}
    wanted, counts = (
        tuple(np.concatenate(parts) for parts in zip(*each, strict=True))
        for each in ([b.wanted for b in batches], [b.counts for b in batches])
    )
    return Batch(quantized=quantized, floating=floating, wanted=wanted, counts=counts)
