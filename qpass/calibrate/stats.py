"""Statistics of one tensor as frozen data that merges: `TensorStats` and its `Histogram`.

A histogram has bins ``[i * 2**exponent, (i + 1) * 2**exponent)``; bin 0 starts at zero. The
exponent is the smallest one whose bins cover zero, `low` and `high` with at most `MAX_BINS` bins:
a function of the range alone. To coarsen is to halve the bin numbers, which is exact for powers of
two. So counts of merged parts equal the counts of the whole, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Part of every cache key: raise it whenever the same samples would give other statistics.
STATS_VERSION: Final = 1
MAX_BINS: Final = 4096
MIN_EXPONENT: Final = -120  # 2**120 is still a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts by bin of the looked-at elements; `weights` are sums of `importance` instead.

    `zeros` of the elements (and `zero_weight` of the weight) of bin 0 are exactly 0: they have no
    rounding error, whatever the scale.
    """

    exponent: int
    first_bin: int
    counts: Array  # int64 [bins]
    zeros: int
    weights: Array | None = None  # float64 [bins]
    zero_weight: float = 0.0

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def coarsen(self, exponent: int) -> Histogram:
        """Return the same counts in bins of width 2**exponent, which is not below the present."""
        shift = min(exponent - self.exponent, 62)
        if shift == 0:
            return self
        numbers = (self.first_bin + np.arange(len(self.counts))) >> shift
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
        return replace(
            self,
            exponent=exponent,
            first_bin=int(numbers[0]),
            counts=np.add.reduceat(self.counts, starts),
            weights=None if self.weights is None else np.add.reduceat(self.weights, starts),
        )

    def pad(self, first_bin: int, bins: int) -> Histogram:
        """Return the same counts in a window of `bins` bins from `first_bin` that covers them."""
        before = self.first_bin - first_bin
        after = bins - before - len(self.counts)
        if before == 0 and after == 0:
            return self
        return replace(
            self,
            first_bin=first_bin,
            counts=np.pad(self.counts, (before, after)),
            weights=None if self.weights is None else np.pad(self.weights, (before, after)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStats:
    """What calibration knows of one tensor; arrays have one entry per channel.

    `count`, `low`, `high`, `channel_low` and `channel_high` are exact over all elements. The
    histogram and the moments are of `sampled` elements (`channel_sampled` in each channel). A
    channel of which all elements are masked has low = +inf and high = -inf.
    """

    count: int
    low: float
    high: float
    sampled: int
    histogram: Histogram
    channel_axis: int | None = None
    channel_low: Array | None = None  # float64
    channel_high: Array | None = None
    channel_sampled: Array | None = None  # int64
    channel_sum: Array | None = None  # float64 sums of float32 values and of their squares: a
    channel_square_sum: Array | None = None  # square is exact there, so no pivot is needed

    @property
    def channel_mean(self) -> Array | None:
        """Mean by channel, float64; 0 where nothing was seen."""
        return self._per_element(self.channel_sum)

    @property
    def channel_second_moment(self) -> Array | None:
        """Mean of the square by channel (about zero, not about the mean), float64."""
        return self._per_element(self.channel_square_sum)

    def _per_element(self, sums: Array | None) -> Array | None:
        if sums is None or self.channel_sampled is None:
            return None
        result: Array = sums / np.maximum(self.channel_sampled, 1)
        return result

    def to_arrays(self) -> dict[str, Array]:
        """Return the fields as numpy arrays without objects; None is left out."""
        histogram = self.histogram
        fields: dict[str, Any] = {
            "integers": np.array(
                [self.count, self.sampled, histogram.exponent, histogram.first_bin, histogram.zeros]
            ),
            "floats": np.array([self.low, self.high, histogram.zero_weight]),
            "counts": histogram.counts,
            "weights": histogram.weights,
            "axis": self.channel_axis,
            **{name: getattr(self, name) for name in _CHANNEL_FIELDS},
        }
        return {key: np.asarray(value) for key, value in fields.items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> TensorStats:
        """Return what `to_arrays` was called on.

        Raises:
            KeyError, ValueError: the arrays are not those of `to_arrays`.
        """
        count, sampled, exponent, first_bin, zeros = (int(v) for v in arrays["integers"])
        low, high, zero_weight = (float(v) for v in arrays["floats"])
        axis = arrays.get("axis")
        histogram = Histogram(
            exponent=exponent,
            first_bin=first_bin,
            counts=arrays["counts"],
            zeros=zeros,
            weights=arrays.get("weights"),
            zero_weight=zero_weight,
        )
        return cls(
            count=count,
            low=low,
            high=high,
            sampled=sampled,
            histogram=histogram,
            channel_axis=None if axis is None else int(axis),
            **{name: arrays.get(name) for name in _CHANNEL_FIELDS},
        )


_CHANNEL_FIELDS: Final = (
    "channel_low",
    "channel_high",
    "channel_sampled",
    "channel_sum",
    "channel_square_sum",
)


EMPTY: Final = TensorStats(
    count=0,
    low=0.0,
    high=0.0,
    sampled=0,
    histogram=Histogram(exponent=MIN_EXPONENT, first_bin=0, counts=np.zeros(1, np.int64), zeros=0),
)


def exponent_for(low: float, high: float) -> int:
    """Return the exponent of the bin width for values in [low, high]."""
    low, high = min(low, 0.0), max(high, 0.0)
    span = high - low
    if span == 0.0:
        return MIN_EXPONENT
    exponent = max(math.frexp(span)[1] - MAX_BINS.bit_length(), MIN_EXPONENT)
    while _window(low, high, exponent)[1] > MAX_BINS:
        exponent += 1
    return exponent


def _window(low: float, high: float, exponent: int) -> tuple[int, int]:
    """Return (first bin, number of bins) of the bins that cover zero, low and high."""
    first = math.floor(math.ldexp(min(low, 0.0), -exponent))
    return first, math.floor(math.ldexp(max(high, 0.0), -exponent)) - first + 1


def window_for(low: float, high: float) -> tuple[int, int, int]:
    """Return (exponent, first bin, number of bins) of a histogram for values in [low, high]."""
    exponent = exponent_for(low, high)
    return exponent, *_window(low, high, exponent)


def merge(a: TensorStats, b: TensorStats) -> TensorStats:
    """Return the statistics of the elements of `a` and `b` together.

    Associative and commutative, with `EMPTY` as its neutral element: exactly for counts, bounds
    and bins, to rounding for float64 sums. Where the numbers of
    channels differ (axes of free length, such as tokens) the sum has no channels.
    """
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    if _channels(a) != _channels(b):
        a, b = _without_channels(a), _without_channels(b)
    low, high = min(a.low, b.low), max(a.high, b.high)
    exponent, first, bins = window_for(low, high)
    left, right = (s.histogram.coarsen(exponent).pad(first, bins) for s in (a, b))
    return TensorStats(
        count=a.count + b.count,
        low=low,
        high=high,
        sampled=a.sampled + b.sampled,
        histogram=Histogram(
            exponent=exponent,
            first_bin=first,
            counts=left.counts + right.counts,
            zeros=left.zeros + right.zeros,
            weights=_apply(np.add, left.weights, right.weights),
            zero_weight=left.zero_weight + right.zero_weight,
        ),
        channel_axis=a.channel_axis,
        channel_low=_apply(np.minimum, a.channel_low, b.channel_low),
        channel_high=_apply(np.maximum, a.channel_high, b.channel_high),
        channel_sampled=_apply(np.add, a.channel_sampled, b.channel_sampled),
        channel_sum=_apply(np.add, a.channel_sum, b.channel_sum),
        channel_square_sum=_apply(np.add, a.channel_square_sum, b.channel_square_sum),
    )


def _channels(stats: TensorStats) -> tuple[int | None, int | None]:
    channels = None if stats.channel_low is None else len(stats.channel_low)
    return stats.channel_axis, channels


def _without_channels(stats: TensorStats) -> TensorStats:
    histogram = replace(stats.histogram, weights=None, zero_weight=0.0)
    nothing: dict[str, Any] = dict.fromkeys(_CHANNEL_FIELDS)
    return replace(stats, histogram=histogram, channel_axis=None, **nothing)


def _apply(function: np.ufunc, left: Array | None, right: Array | None) -> Array | None:
    if left is None or right is None:
        return None
    result: Array = function(left, right)
    return result
