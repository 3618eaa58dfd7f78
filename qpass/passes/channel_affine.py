"""The best gain and offset per channel, in closed form from sums that stream and merge.

With ``a`` the quantized and ``t`` the wanted output of one channel, least squares gives::

    gain = (cov(a, t) + p) / (var(a) + p)        offset = mean(t) - gain * mean(a)

where the prior ``p = ridge * mean over channels of var(a)`` pulls the gain of channels that hardly
vary towards 1. A held-out part of the samples then decides, channel by channel, between gain and
offset, the offset alone (gain 1) and nothing: on the samples of the fit an improvement is certain
and means nothing.

The sums are taken about the mean of each chunk and merged with the formula of Chan, Golub and
LeVeque (1979), so that a large mean costs no digits. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.errors import InternalError

Array = NDArray[Any]
GainKind = Literal["channel", "tensor", "none"]

# Channels with less than this share of the mean variance are constant: only an offset makes sense.
DEAD_SHARE: Final = 1e-8
# Elements per chunk: two float64 copies of it stay in the cache of a core.
CHUNK: Final = 1 << 15
# Parts in turn left out of the fit to judge by.
FOLDS: Final = 4


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

    ``m_aa = sum (a - mean_a)^2``, ``m_at`` and ``m_tt`` likewise: sums, not means.
    """

    count: int
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
    def of(cls, a: Array, t: Array, *, axis: int) -> PairMoments:
        """Measure one batch.

        Args:
            a: what the correction will be applied to, any shape, float.
            t: what it should become, the same shape.
            axis: the axis of the channels.

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
        for left, right in _chunks(a.reshape(shape), t.reshape(shape)):
            total = total.merge(cls._of_chunk(left, right))
        return total

    @classmethod
    def _of_chunk(cls, a: Array, t: Array) -> PairMoments:
        a, t = a.astype(np.float64), t.astype(np.float64)
        count = a.shape[0] * a.shape[2]
        mean_a, mean_t = (x.sum(axis=(0, 2)) / count for x in (a, t))
        a -= mean_a[:, None]
        t -= mean_t[:, None]
        return cls(
            count=count,
            mean_a=mean_a,
            mean_t=mean_t,
            m_aa=np.einsum("rci,rci->c", a, a),
            m_at=np.einsum("rci,rci->c", a, t),
            m_tt=np.einsum("rci,rci->c", t, t),
        )

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
        gain, count = affine.gain, max(self.count, 1)
        spread = gain * gain * self.m_aa - 2.0 * gain * self.m_at + self.m_tt
        bias = gain * self.mean_a + affine.offset - self.mean_t
        error: Array = np.maximum(spread, 0.0) / count + bias * bias
        return error

    def signal(self) -> Array:
        """Return the mean of ``t^2`` of each channel."""
        signal: Array = self.m_tt / max(self.count, 1) + self.mean_t * self.mean_t
        return signal


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedAffine:
    """A correction and how many channels got what; `unusable` held NaN or infinity."""

    affine: ChannelAffine
    gain_and_offset: int
    offset_only: int
    unchanged: int
    unusable: int


def solve_channel_affine(
    moments: PairMoments,
    *,
    ridge: float = 1e-4,
    clip: tuple[float, float] = (0.5, 2.0),
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
    finite = moments.finite
    count = max(moments.count, 1)
    aa, at = moments.m_aa / count, moments.m_at / count
    if not offset:
        aa = aa + moments.mean_a * moments.mean_a
        at = at + moments.mean_a * moments.mean_t
    aa, at = np.where(finite, aa, 0.0), np.where(finite, at, 0.0)
    mean = float(aa.mean()) if aa.size else 0.0
    gains = np.ones(aa.shape)
    if gain != "none" and mean > 0.0:
        prior = ridge * mean
        if gain == "channel":
            alive = aa > DEAD_SHARE * mean
            np.divide(at + prior, aa + prior, out=gains, where=alive)
        else:
            gains = np.full(aa.shape, (at.mean() + prior) / (mean + prior))
        gains = np.clip(gains, *clip)
    gains = np.where(finite, gains, 1.0)
    offsets = moments.mean_t - gains * moments.mean_a if offset else np.zeros(aa.shape)
    return ChannelAffine(gain=gains, offset=np.where(finite, offsets, 0.0))


def solve_gated(
    groups: Sequence[PairMoments],
    *,
    ridge: float = 1e-4,
    clip: tuple[float, float] = (0.5, 2.0),
    gain: GainKind = "channel",
    offset: bool = True,
    confidence: float = 1.0,
) -> GatedAffine:
    """Fit on some groups of samples, judge on the others, and keep what helps there.

    Each channel takes the richest of nothing, offset alone, and gain with offset that lowers the
    error on groups it was not fitted to by more than `confidence` standard errors, against the
    poorer ones. The numbers then come from all groups. A single gain for the tensor is judged over
    all channels, since it cannot be left out of one.
    """
    whole = merge_all(groups)
    finite = whole.finite

    def solve(moments: PairMoments, kind: GainKind) -> ChannelAffine:
        return solve_channel_affine(moments, ridge=ridge, clip=clip, gain=kind, offset=offset)

    if len(groups) < 2:
        return GatedAffine(
            affine=ChannelAffine.identity(finite.size),
            gain_and_offset=0,
            offset_only=0,
            unchanged=finite.size,
            unusable=0,
        )
    folds = min(FOLDS, len(groups))
    shares = np.array([g.count for g in groups]) / max(whole.count, 1)
    errors = np.zeros((3, len(groups), finite.size))
    for fold in range(folds):
        others = merge_all([g for i, g in enumerate(groups) if i % folds != fold])
        kinds = (ChannelAffine.identity(finite.size), solve(others, "none"), solve(others, gain))
        for i in range(fold, len(groups), folds):
            for kind, affine in enumerate(kinds):
                errors[kind, i] = groups[i].error(affine) * shares[i] * len(groups)
    errors = np.where(finite, errors, 0.0)
    shifted = _surely_positive(errors[0] - errors[1], confidence)
    best_plain = np.where(shifted, errors[1], errors[0])
    drop = best_plain - errors[2]
    if gain == "tensor":
        scaled = np.broadcast_to(
            _surely_positive(drop.sum(axis=1, keepdims=True), confidence), finite.shape
        )
    else:
        scaled = _surely_positive(drop, confidence) & finite
    full, shift = solve(whole, gain), solve(whole, "none")
    affine = ChannelAffine(
        gain=np.where(scaled, full.gain, 1.0),
        offset=np.select([scaled, shifted], [full.offset, shift.offset], 0.0),
    )
    changed = scaled | shifted
    return GatedAffine(
        affine=affine,
        gain_and_offset=int(np.count_nonzero(affine.gain != 1.0)),
        offset_only=int(np.count_nonzero(changed & (affine.gain == 1.0))),
        unchanged=int(np.count_nonzero(~changed & finite)),
        unusable=int(np.count_nonzero(~changed & ~finite)),
    )


def _surely_positive(drops: Array, confidence: float) -> Array:
    """True where the mean over the groups (axis 0) is above `confidence` standard errors."""
    error = drops.std(axis=0, ddof=1) / np.sqrt(drops.shape[0])
    positive: Array = drops.mean(axis=0) > confidence * error
    return positive


def merge_all(groups: Sequence[PairMoments]) -> PairMoments:
    """Merge at least one group."""
    total = groups[0]
    for group in groups[1:]:
        total = total.merge(group)
    return total


def _chunks(a: Array, t: Array) -> Iterator[tuple[Array, Array]]:
    """Cut two [rows, channels, inner] arrays into pieces of about `CHUNK` elements.

    All pieces hold every channel: a piece of the channels would need a merge of its own.
    """
    rows, channels, inner = a.shape
    if channels * inner > CHUNK:
        width = max(1, CHUNK // channels)
        for row in range(rows):
            for start in range(0, inner, width):
                part = (slice(row, row + 1), slice(None), slice(start, start + width))
                yield a[part], t[part]
        return
    height = max(1, CHUNK // max(channels * inner, 1))
    for row in range(0, rows, height):
        yield a[row : row + height], t[row : row + height]
