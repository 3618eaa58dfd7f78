"""Ranges of weights with few levels and a zero point: which consecutive integers serve a channel.

What it does
    Few levels around zero are a poor fit for a channel whose weights lie on one side of it, as
    those of most depthwise kernels do: half of the levels hold nothing. So every zero point of the
    type is tried, each with shares of the scale that would clip nothing, and the smallest squared
    error of rounding to nearest wins. Zero is always one of the levels.
Source
    Asymmetric weights by channel with a search of the range are what published results with few
    bits begin with (Li et al., BRECQ, ICLR 2021). With 3 bits the depthwise kernels of mobilenet_v2
    lose 2 to 6 dB less than in symmetric ranges, matrices of vit_tiny 0.4 dB; with 4 bits whole
    models gain 0.4 to 1 dB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.qparams import MIN_SCALE, TensorSpec

Array = NDArray[Any]
SHARES: Final = np.linspace(0.5, 1.0, 21)
# Where the error is smooth, in long rows of 16 levels, these tell which zero points are worth a
# closer look: hardly a row ends elsewhere than with all shares, in a third of the time.
COARSE: Final = (0.6, 0.8, 1.0)
LONG: Final = 64
MANY_LEVELS: Final = 4  # bits
FEW_BITS: Final = 4  # up to here zero points are searched
FEW_BITS_OF_BLOCKS: Final = 3  # of 4 bits in blocks of 32 the extremes are hard to beat
AT_ONCE: Final = 1 << 15  # values: they are looked at a hundred times, and fit a cache


def has_windows(spec: TensorSpec) -> bool:
    """Return True where `solve_windows` finds better ranges than shares of min/max."""
    few = FEW_BITS_OF_BLOCKS if spec.granularity == "per_block" else FEW_BITS
    return not spec.symmetric and spec.bits <= few


def parts_of(rows: Array) -> Iterator[slice]:
    """Yield all rows in slices that fit a cache."""
    count = max(1, AT_ONCE // rows.shape[1])
    return (slice(begin, begin + count) for begin in range(0, len(rows), count))


def solve_windows(rows: Array, spec: TensorSpec) -> tuple[Array, Array]:
    """Return for each row the range with the smallest squared error found, float64 [rows] each.

    Args:
        rows: weights that share a scale, float64 [rows, values].
        spec: asymmetric; `choose_qparams` finds the zero point again in the range.
    """
    found = [_solve(rows[part], spec) for part in parts_of(rows)]
    low, high = (np.concatenate(ends) for ends in zip(*found, strict=True))
    return low, high


def _solve(rows: Array, spec: TensorSpec) -> tuple[Array, Array]:
    search = _Search(rows, spec)
    coarse = spec.bits >= MANY_LEVELS and rows.shape[1] > LONG
    for zero_point in range(spec.qmin, spec.qmax + 1):
        search.consider(np.full(len(rows), zero_point), COARSE if coarse else SHARES[::-1])
    if coarse:
        found = search.zero_point
        for aside in (0, -1, 1):
            search.consider(np.clip(found + aside, spec.qmin, spec.qmax), SHARES[::-1])
    first, last = spec.qmin - search.zero_point, spec.qmax - search.zero_point
    return first * search.scale, last * search.scale


class _Search:
    """The best zero point and scale of each row among those that were considered."""

    def __init__(self, rows: Array, spec: TensorSpec) -> None:
        self._rows, self._spec = rows, spec
        self._low, self._high = rows.min(axis=1), rows.max(axis=1)
        # One value far on the short side of a window should be clipped, not make the step its size.
        largest = np.maximum(-self._low, self._high)
        self._limit = np.maximum(largest / max(spec.qmax - spec.qmin >> 1, 1), MIN_SCALE)
        self._error = np.full(len(rows), np.inf)
        self.zero_point = np.zeros(len(rows), np.int64)
        self.scale = self._limit

    def consider(self, zero_point: Array, shares: Iterable[float]) -> None:
        """Take for each row a zero point, and a share of the scale that clips nothing, if better.

        Args:
            zero_point: integers [rows].
            shares: the same for all rows.
        """
        first, last = self._spec.qmin - zero_point, self._spec.qmax - zero_point
        # 0 on the side where the window ends: what lies there is clipped in any case.
        below = np.where(first < 0, self._low / np.minimum(first, -1), 0.0)
        above = np.where(last > 0, self._high / np.maximum(last, 1), 0.0)
        widest = np.clip(np.maximum(below, above), MIN_SCALE, self._limit)
        for share in shares:
            scale = widest * share
            values = np.rint(self._rows / scale[:, None])
            np.maximum(values, first[:, None], out=values)
            np.minimum(values, last[:, None], out=values)
            values *= scale[:, None]
            error = np.square(np.subtract(values, self._rows, out=values)).sum(axis=1)
            better = error < self._error
            self._error = np.where(better, error, self._error)
            self.zero_point = np.where(better, zero_point, self.zero_point)
            self.scale = np.where(better, scale, self.scale)
