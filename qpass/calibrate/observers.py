"""Observers: what a tensor looked like, in fixed memory and one look at each element.

Bounds are exact over all elements. Histogram and moments look at a grid of *positions* (pixels,
tokens) with all channels of each, so that channels keep their proportions: at most `limit` elements
of a sample (one position at the least). The grid depends on the shape and the number of the sample
only, hence neither on batches nor on shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.stats import EMPTY, Histogram, TensorStats, merge, window_for
from qpass.errors import InternalError, NotFiniteError

__all__ = ["ELEMENTS_PER_SAMPLE", "TensorObserver", "TensorStats"]

Array = NDArray[Any]

ELEMENTS_PER_SAMPLE: Final = 8192
# Rows shorter than this are folded together before a reduction over them: numpy pays per row.
_FOLD_BELOW: Final = 512


class TensorObserver:
    """Accumulates `TensorStats` of one tensor.

    Args:
        tensor: name, for messages.
        axis: channel axis of the tensor, or None.
        importance: [channels] float64 >= 0; also keep a histogram weighted by it.
        mask_below: elements <= this are left out of everything (attention masks).
        limit: elements of a sample that histogram and moments look at.
    """

    def __init__(
        self,
        tensor: str,
        *,
        axis: int | None = None,
        importance: Array | None = None,
        mask_below: float | None = None,
        limit: int = ELEMENTS_PER_SAMPLE,
    ) -> None:
        """Start with nothing seen."""
        if importance is not None and axis is None:
            raise InternalError(f"{tensor}: importance needs a channel axis")
        self.tensor, self.axis, self.limit = tensor, axis, limit
        self.mask_below = mask_below
        self.importance = None if importance is None else np.asarray(importance, np.float64)
        self._stats: TensorStats | None = None
        self._samples = 0

    def update(self, array: Array, samples: Sequence[int] | None = None) -> None:
        """Look at the values of a batch.

        Args:
            array: float array; axis 0 holds the samples when its length is a multiple of theirs.
            samples: number of each sample in the batch; by default it is one sample, the next.

        Raises:
            NotFiniteError: NaN or infinity.
            InternalError: not a float tensor, or not as many channels as weights.
        """
        numbers = [self._samples] if samples is None else samples
        self._samples += len(numbers)
        # ml_dtypes' bfloat16 has kind "V"; other kinds are integers, bools and text.
        if array.dtype.kind not in "fV":
            raise InternalError(f"{self.tensor} is {array.dtype}: only floats are observed")
        wide = array.dtype in (np.float32, np.float64)
        values = np.ascontiguousarray(array if wide else array.astype(np.float32))
        if values.size:
            self._look(_view(values, self.axis, len(numbers)), numbers)

    def merge(self, other: TensorObserver) -> None:
        """Add what another observer of the same tensor saw."""
        self._samples += other._samples
        if other._stats is not None:
            self.add(other._stats)

    def add(self, stats: TensorStats) -> None:
        """Add statistics that were gathered elsewhere or earlier."""
        self._stats = stats if self._stats is None else merge(self._stats, stats)

    def result(self) -> TensorStats:
        """Return the statistics; they are those of no element when there was none."""
        return EMPTY if self._stats is None else self._stats

    def _look(self, view: Array, numbers: Sequence[int]) -> None:
        if self.importance is not None and len(self.importance) != view.shape[2]:
            raise InternalError(
                f"{self.tensor}: {len(self.importance)} weights for {view.shape[2]} channels"
            )
        # Written so that NaN is kept: it must be found, not masked.
        keep = None if self.mask_below is None else ~(view <= self.mask_below)
        channel_low, channel_high = _bounds(view, keep)
        count = view.size if keep is None else int(np.count_nonzero(keep))
        if count == 0:
            return
        low, high = float(channel_low.min()), float(channel_high.max())
        if not np.isfinite(low) or not np.isfinite(high):
            raise NotFiniteError(
                f"tensor {self.tensor} is not finite: its values are within [{low}, {high}]",
                fix="the float model overflows on this sample: check it and its preprocessing",
            )
        picked = _pick(view, numbers, self.limit)
        kept = None if self.mask_below is None else picked > self.mask_below
        histogram, sampled = self._count(picked, kept, low, high)
        stats = TensorStats(
            count=count, low=low, high=high, sampled=int(sampled.sum()), histogram=histogram
        )
        if self.axis is not None:
            wide = (picked if kept is None else np.where(kept, picked, 0)).astype(np.float64)
            stats = replace(
                stats,
                channel_axis=self.axis,
                channel_low=channel_low,
                channel_high=channel_high,
                channel_sampled=sampled,
                channel_sum=wide.sum(axis=(0, 1, 3)),
                channel_square_sum=np.einsum("nacb,nacb->c", wide, wide),
            )
        self.add(stats)

    def _count(
        self, picked: Array, kept: Array | None, low: float, high: float
    ) -> tuple[Histogram, Array]:
        """Return the histogram of the picked elements, and how many there are by channel."""
        exponent, first, bins = window_for(low, high)
        zero = picked == 0
        channels = picked.shape[2]
        per_channel = picked.size // channels
        sampled = np.full(channels, per_channel, np.int64)
        weights = None
        if self.importance is not None:
            weights = np.broadcast_to(self.importance[:, None], picked.shape)
        if kept is not None:
            sampled = kept.sum(axis=(0, 1, 3), dtype=np.int64)
            zero &= kept
            picked = picked[kept]
            weights = None if weights is None else weights[kept]
        # A multiplication by a power of two is exact, so bins are the same in any precision.
        numbers = np.floor(picked * picked.dtype.type(2.0**-exponent)).astype(np.int32)
        numbers = numbers.ravel() - np.int32(first)
        weighted, zero_weight = None, 0.0
        if weights is not None and self.importance is not None:
            weighted = np.bincount(numbers, weights.ravel(), minlength=bins)
            zero_weight = float(zero.sum(axis=(0, 1, 3)) @ self.importance)
        histogram = Histogram(
            exponent=exponent,
            first_bin=first,
            counts=np.bincount(numbers, minlength=bins).astype(np.int64, copy=False),
            zeros=int(np.count_nonzero(zero)),
            weights=weighted,
            zero_weight=zero_weight,
        )
        return histogram, sampled


def _view(values: Array, axis: int | None, samples: int) -> Array:
    """Return `values` as [samples, outer positions, channels, inner positions]."""
    shape, rank = values.shape, values.ndim
    if axis is None or not -rank <= axis < rank:
        samples = samples if rank and shape[0] % samples == 0 else 1
        return values.reshape(samples, 1, 1, -1)
    axis %= rank
    samples = samples if axis and shape[0] % samples == 0 else 1
    inner = math.prod(shape[axis + 1 :])
    return values.reshape(samples, -1, shape[axis], inner)


def _pick(view: Array, numbers: Sequence[int], limit: int) -> Array:
    """Return the grid of positions of each sample, all channels of them."""
    _, outer, channels, inner = view.shape
    length, rest = max(outer, inner), channels * min(outer, inner)
    stride = -(-length // max(limit // rest, 1))
    if stride == 1:
        return view
    # Odd, because rows of images are multiples of powers of two: the grid then visits all columns.
    stride = min(stride | 1, length)
    # As many positions whatever the start, and starts so far that the last position is reached.
    reach = (length // stride - 1) * stride + 1
    picked = []
    for row, number in zip(view, numbers, strict=False):
        start = number % (length - reach + 1)
        span = slice(start, start + reach, stride)
        picked.append(row[:, :, span] if inner >= outer else row[span])
    return np.stack(picked)


def _bounds(view: Array, keep: Array | None) -> tuple[Array, Array]:
    """Return minimum and maximum by channel, float64; NaN where there is one."""
    if keep is not None:
        low = np.where(keep, view, np.inf).min(axis=(0, 1, 3))
        high = np.where(keep, view, -np.inf).max(axis=(0, 1, 3))
    elif view.shape[3] > 1:
        low, high = view.min(axis=3).min(axis=(0, 1)), view.max(axis=3).max(axis=(0, 1))
    else:
        rows = view.reshape(-1, view.shape[2])
        low, high = _over_rows(np.minimum, rows), _over_rows(np.maximum, rows)
    return low.astype(np.float64), high.astype(np.float64)


def _over_rows(function: np.ufunc, rows: Array) -> Array:
    """Reduce [rows, channels] over the rows; several short rows are taken as one long row."""
    count, channels = rows.shape
    fold = max(min(_FOLD_BELOW // channels, count), 1)
    whole = count - count % fold
    folded = function.reduce(rows[:whole].reshape(-1, fold * channels), axis=0)
    result: Array = function.reduce(folded.reshape(fold, channels), axis=0)
    if whole < count:
        result = function(result, function.reduce(rows[whole:], axis=0))
    return result
