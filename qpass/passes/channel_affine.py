"""The best gain and offset per channel, in closed form from sums that stream and merge.

With ``a`` the quantized and ``t`` the wanted output of one channel, least squares gives::

    gain = (cov(a, t) + p) / (var(a) + p)        offset = mean(t) - gain * mean(a)

where the prior ``p = ridge * mean over channels of var(a)`` pulls the gain of channels that hardly
vary towards 1. With moments of several groups of samples the fit also knows how sure it is of each
number, and `solve_shrunk` draws what is unsure towards what the channels have in common: a gain
towards the gain of the others, a shift of the mean towards none.

The sums are taken about the mean of each chunk and merged with the formula of Chan, Golub and
LeVeque (1979), so that a large mean costs no digits. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.errors import InternalError
from qpass.passes.shrink import shrink

Array = NDArray[Any]
GainKind = Literal["channel", "tensor", "none"]
FitKind = Literal["ls", "mm"]

# Channels with less than this share of the mean variance are constant: only an offset makes sense.
DEAD_SHARE: Final = 1e-8
# Elements per chunk. Measured with chunks of 2^15 to 2^18 on maps of 14 to 56 pixels.
CHUNK: Final = 1 << 17
# Groups that together have no more are measured in one go: calls of numpy cost more than the cache.
GROUPED: Final = 1 << 17
CLIP: Final = (0.5, 2.0)  # smallest and largest gain


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAffine:
    """Correction ``y -> gain * y + offset``, float64, one entry per channel; gains are positive."""

    gain: Array
    offset: Array

    @classmethod
    def identity(cls, channels: int) -> ChannelAffine:
        """Change nothing."""
        return cls(gain=np.ones(channels), offset=np.zeros(channels))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMoments:
    """First and second moments of pairs (a, t), float64, one entry per channel.

    ``m_aa = sum (a - mean_a)^2``, ``m_at`` and ``m_tt`` likewise: sums, not means. Where pairs have
    weights all sums have them, and `count` is the sum of the weights.
    """

    count: float
    mean_a: Array
    mean_t: Array
    m_aa: Array
    m_at: Array
    m_tt: Array

    @classmethod
    def empty(cls, channels: int) -> PairMoments:
        """Return the moments of nothing."""
        zeros = np.zeros(channels)
        return cls(count=0, mean_a=zeros, mean_t=zeros, m_aa=zeros, m_at=zeros, m_tt=zeros)

    @classmethod
    def of(cls, a: Array, t: Array, *, axis: int, weights: Array | None = None) -> PairMoments:
        """Measure one batch.

        Args:
            a: what the correction will be applied to, any shape, float.
            t: what it should become, the same shape.
            axis: the axis of the channels.
            weights: of all places, the shape of `a` without its last axis, which then has to be
                that of the channels; None: all count the same.

        Raises:
            InternalError: the shapes differ.
        """
        if a.shape != t.shape:
            raise InternalError(f"pairs of shape {a.shape} and {t.shape}")
        axis %= a.ndim
        channels = a.shape[axis]
        inner = int(np.prod(a.shape[axis + 1 :], dtype=np.int64))
        shape = (-1, channels, inner)
        total = cls.empty(channels)
        for left, right, some in _chunks(a.reshape(shape), t.reshape(shape), weights):
            counts = None if some is None else some[None]
            total = total.merge(cls._of_each(left[None], right[None], counts)[0])
        return total

    @classmethod
    def of_groups(
        cls, a: Array, t: Array, *, axis: int, most: int, weights: Array | None = None
    ) -> list[PairMoments]:
        """Measure one batch as groups of samples: at most `most`, cut along the first axis.

        The arguments are those of `of`.

        Raises:
            InternalError: the shapes differ.
        """
        if a.shape != t.shape:
            raise InternalError(f"pairs of shape {a.shape} and {t.shape}")
        axis %= a.ndim
        if axis == 0:  # the channels: no samples to cut
            return [cls.of(a, t, axis=axis)]
        parts = max(1, min(most, len(a)))
        if len(a) % parts or not 0 < a.size <= GROUPED:
            pairs = zip(np.array_split(a, parts), np.array_split(t, parts), strict=True)
            some = [None] * parts if weights is None else np.array_split(weights, parts)
            return [
                cls.of(*pair, axis=axis, weights=own) for pair, own in zip(pairs, some, strict=True)
            ]
        inner = int(np.prod(a.shape[axis + 1 :], dtype=np.int64))
        shape = (parts, -1, a.shape[axis], inner)
        counts = None if weights is None else weights.reshape(parts, -1)
        return cls._of_each(a.reshape(shape), t.reshape(shape), counts)

    @classmethod
    def _of_each(cls, a: Array, t: Array, weights: Array | None) -> list[PairMoments]:
        """Measure arrays [groups, rows, channels, inner]; weights are [groups, rows], inner is 1.

        Products with ones add up: many times faster than sums along an axis or ``einsum``.
        """
        groups, rows, channels, inner = a.shape
        count = rows * inner
        counts = np.full(groups, count) if weights is None else weights.sum(axis=1)
        ones = np.ones(count) if weights is None else weights[:, None, :]
        if inner == 1:  # channels stay the last axis, as they lie
            center, spread = (groups, 1, channels), (groups, rows, channels)
            a, t = (x.reshape(spread).astype(np.float64) for x in (a, t))
        else:
            center, spread = (groups, channels, 1), (groups, channels, count)
            a, t = (
                x.transpose(0, 2, 1, 3).astype(np.float64, order="C").reshape(spread)
                for x in (a, t)
            )

        def summed(x: Array) -> Array:
            total: Array = ones @ x if inner == 1 else x @ ones
            return total if weights is None else total[:, 0]

        with np.errstate(invalid="ignore"):  # infinities of both signs
            mean_a, mean_t = (summed(x) / counts[:, None] for x in (a, t))
        # NaN goes through all that follows without a word, and `finite` tells.
        mean_a, mean_t = (np.where(np.isfinite(m), m, np.nan) for m in (mean_a, mean_t))
        a -= mean_a.reshape(center)
        t -= mean_t.reshape(center)
        sums = (mean_a, mean_t, summed(a * a), summed(a * t), summed(t * t))
        return [
            cls(count=total, mean_a=ma, mean_t=mt, m_aa=aa, m_at=cross, m_tt=tt)
            for total, ma, mt, aa, cross, tt in zip(counts.tolist(), *sums, strict=True)
        ]

    def merge(self, other: PairMoments) -> PairMoments:
        """Return the moments of both sets of pairs; the order does not matter."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        share = other.count / count
        weight = self.count * share
        d_a, d_t = other.mean_a - self.mean_a, other.mean_t - self.mean_t
        return PairMoments(
            count=count,
            mean_a=self.mean_a + share * d_a,
            mean_t=self.mean_t + share * d_t,
            m_aa=self.m_aa + other.m_aa + weight * d_a * d_a,
            m_at=self.m_at + other.m_at + weight * d_a * d_t,
            m_tt=self.m_tt + other.m_tt + weight * d_t * d_t,
        )

    @property
    def finite(self) -> Array:
        """True for the channels that held no NaN and no infinity."""
        sums = self.mean_a + self.mean_t + self.m_aa + self.m_at + self.m_tt
        finite: Array = np.isfinite(sums)
        return finite

    def error(self, affine: ChannelAffine) -> Array:
        """Return the mean of ``(gain * a + offset - t)^2`` of each channel."""
        return _error(self, max(self.count, 1), affine)

    def signal(self) -> Array:
        """Return the mean of ``t^2`` of each channel."""
        signal: Array = self.m_tt / max(self.count, 1) + self.mean_t * self.mean_t
        return signal


def solve_channel_affine(
    moments: PairMoments,
    *,
    ridge: float = 1e-4,
    clip: tuple[float, float] = CLIP,
    gain: GainKind = "channel",
    offset: bool = True,
) -> ChannelAffine:
    """Solve the least squares of the module's docstring, channel by channel.

    Args:
        moments: of the pairs to fit.
        ridge: weight of gain 1, in units of the mean variance over the channels.
        clip: smallest and largest gain.
        gain: ``tensor`` is one gain for all channels (one weight scale), ``none`` is gain 1.
        offset: False fits through the origin, for ops that cannot take a bias.
    """
    return solve_shrunk([moments], ridge=ridge, clip=clip, gain=gain, offset=offset)


def solve_shrunk(
    groups: Sequence[PairMoments] | Groups,
    *,
    ridge: float = 1e-4,
    clip: tuple[float, float] = CLIP,
    gain: GainKind = "channel",
    offset: bool = True,
    fit: FitKind = "ls",
) -> ChannelAffine:
    """Fit all groups and shrink each number by its sampling error (see `shrink`).

    The errors come from how the groups differ (the sandwich estimate with groups as clusters):
    values of one sample are anything but independent. One group has no error to tell, and its fit
    is plain.

    Args:
        groups: moments of the pairs to fit, one for each group of samples.
        ridge: as for `solve_channel_affine`.
        clip: smallest and largest gain.
        gain: as for `solve_channel_affine`.
        offset: as for `solve_channel_affine`.
        fit: ``ls`` is least squares. ``mm`` matches the standard deviation instead: its error is
            larger, but the output keeps its size, where least squares shrink what they cannot
            explain.
    """
    stack = groups if isinstance(groups, Groups) else Groups(groups)
    whole = stack.whole
    finite, count = whole.finite, max(whole.count, 1)
    sums = stack.about(*((whole.mean_a, whole.mean_t) if offset else (0.0, 0.0)))
    sums = _Centred(*(np.where(finite, part, 0.0) for part in (sums.aa, sums.at, sums.tt)))
    aa, at, tt = (part.sum(axis=0) for part in (sums.aa, sums.at, sums.tt))
    mean = float(aa.mean()) if aa.size else 0.0
    prior, gains = ridge * mean, np.ones(aa.shape)
    cluster = len(stack) / (len(stack) - 1) if len(stack) > 1 else 0.0
    if gain == "tensor" and mean > 0.0:
        gains = np.full(aa.shape, (at.mean() + prior) / (mean + prior))
    elif gain == "channel" and mean > 0.0:
        alive = aa > DEAD_SHARE * mean
        wide = np.where(alive, aa + prior, 1.0)
        if fit == "mm":
            ratio = (tt + prior) / wide
            gains = np.sqrt(ratio)
            scores = (sums.tt / np.where(ratio > 0.0, ratio, 1.0) - sums.aa) / (2.0 * wide)
            scores = scores * gains
        else:
            gains = (at + prior) / wide
            scores = (sums.at - gains * sums.aa) / wide
        # The prior's own share of the scores is that of gain 1, spread over the groups.
        scores -= scores.mean(axis=0)
        shrunk = shrink(gains[alive], cluster * (scores[:, alive] ** 2).sum(axis=0))
        gains = np.ones(aa.shape)
        gains[alive] = shrunk
    gains = np.where(finite, np.clip(gains, *clip), 1.0)
    if not offset:
        return ChannelAffine(gain=gains, offset=np.zeros(aa.shape))
    # In units of what is left after the fit, so that channels of all sizes can be compared.
    shifts = np.where(finite, whole.mean_t - whole.mean_a, 0.0)
    left = np.sqrt(np.maximum(tt - 2.0 * gains * at + gains * gains * aa, 0.0) / count)
    unit = np.where(left > 0.0, left, 1.0)
    shares = stack.count / count
    scores = shares * (stack.mean_t - gains * stack.mean_a)
    scores = np.where(finite, scores - shares * (whole.mean_t - gains * whole.mean_a), 0.0)
    shifts = unit * shrink(shifts / unit, cluster * ((scores / unit) ** 2).sum(axis=0), center=0.0)
    offsets = (1.0 - gains) * whole.mean_a + shifts
    return ChannelAffine(gain=gains, offset=np.where(finite, offsets, 0.0))


@dataclass(frozen=True, slots=True)
class _Centred:
    """Second moments [groups, channels] about one place."""

    aa: Array
    at: Array
    tt: Array


class Groups:
    """Moments of several groups of samples, as arrays [groups, channels] for all at once."""

    def __init__(self, moments: Sequence[PairMoments]) -> None:
        """Stack them; at least one."""
        self._moments = moments
        self.count = np.array([[m.count] for m in moments], np.float64)
        fields = zip(*((m.mean_a, m.mean_t, m.m_aa, m.m_at, m.m_tt) for m in moments), strict=True)
        self.mean_a, self.mean_t, self.m_aa, self.m_at, self.m_tt = map(np.array, fields)

    def __len__(self) -> int:
        return len(self._moments)

    def some(self, picked: slice) -> Groups:
        """Return some of them."""
        return Groups(self._moments[picked])

    def without(self, picked: slice) -> Groups:
        """Return the others."""
        left_out = set(range(len(self))[picked])
        return Groups([m for i, m in enumerate(self._moments) if i not in left_out])

    @cached_property
    def whole(self) -> PairMoments:
        """All of them merged; as `PairMoments.merge` in turn, at once."""
        if len(self) == 1:
            return self._moments[0]
        count = sum(m.count for m in self._moments)
        shares = self.count / max(count, 1)
        mean_a, mean_t = ((shares * means).sum(axis=0) for means in (self.mean_a, self.mean_t))
        about = self.about(mean_a, mean_t)
        aa, at, tt = (part.sum(axis=0) for part in (about.aa, about.at, about.tt))
        return PairMoments(count=count, mean_a=mean_a, mean_t=mean_t, m_aa=aa, m_at=at, m_tt=tt)

    def about(self, mid_a: Array | float, mid_t: Array | float) -> _Centred:
        """Return the second moments of each group about one place."""
        d_a, d_t = self.mean_a - mid_a, self.mean_t - mid_t
        return _Centred(
            self.m_aa + self.count * d_a * d_a,
            self.m_at + self.count * d_a * d_t,
            self.m_tt + self.count * d_t * d_t,
        )

    def error(self, affine: ChannelAffine) -> Array:
        """Return `PairMoments.error` of each group: [groups, channels]."""
        return _error(self, np.maximum(self.count, 1.0), affine)


def merge_all(groups: Sequence[PairMoments]) -> PairMoments:
    """Merge at least one group; as `PairMoments.merge` in turn, at once."""
    return groups[0] if len(groups) == 1 else Groups(groups).whole


def _error(sums: PairMoments | Groups, count: Array | float, affine: ChannelAffine) -> Array:
    gain = affine.gain
    spread = gain * gain * sums.m_aa - 2.0 * gain * sums.m_at + sums.m_tt
    bias = gain * sums.mean_a + affine.offset - sums.mean_t
    error: Array = np.maximum(spread, 0.0) / count + bias * bias
    return error


def _chunks(
    a: Array, t: Array, weights: Array | None
) -> Iterator[tuple[Array, Array, Array | None]]:
    """Cut two [rows, channels, inner] arrays into pieces of about `CHUNK` elements.

    All pieces hold every channel: a piece of the channels would need a merge of its own.
    """
    rows, channels, inner = a.shape
    if channels * inner > CHUNK and weights is None:
        width = max(1, CHUNK // channels)
        for row in range(rows):
            for start in range(0, inner, width):
                part = (slice(row, row + 1), slice(None), slice(start, start + width))
                yield a[part], t[part], None
        return
    flat = None if weights is None else weights.ravel()
    height = max(1, CHUNK // max(channels * inner, 1))
    for row in range(0, rows, height):
        piece = slice(row, row + height)
        yield a[piece], t[piece], None if flat is None else flat[piece]
