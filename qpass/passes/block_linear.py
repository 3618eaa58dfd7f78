"""The best linear map from the input of a block to the error of its output, in closed form.

With ``x`` the rows of the input and ``t`` the wanted minus the actual rows of the output::

    W = (G + lambda I)^-1 C      G = sum (x - mean)(x - mean)^T      C = sum (x - mean)(t - mean)^T
    b = mean(t) - mean(x) W      lambda = ridge * trace(G) / d

Inputs of a trained network are nearly dependent, so without lambda W is free to grow along what the
samples do not show, and such maps have made models worse than no map at all. A map is therefore
judged by samples that it was not fitted to: each part of the samples is left out once, and what
counts is the squared error that is left there.

Grouped convolutions have one such problem for each group of channels; `groups` is 1 for tokens.
Sums are taken about the mean of each chunk and merged with the formula of Chan, Golub and LeVeque
(1979); everything is float64. The map is that of QwT (Fu et al., "Quantization without Tears").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.errors import InternalError

Array = NDArray[Any]
Kind = Literal["linear", "offset", "none"]

GROUP_WIDTH: Final = 64  # input channels of one group, as in QwT for ResNets
CHUNK_ROWS: Final = 4096  # rows that are float64 at a time
# The smallest is what published failures ask for; larger ones win where the error is mostly noise.
RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMap:
    """``x -> x W + b``: weight [groups, inputs, outputs] of one group, offset [channels], float64.

    Input channel ``i`` of group ``g`` is channel ``g * inputs + i``, and so for the outputs.
    """

    weight: Array
    offset: Array

    @classmethod
    def nothing(cls, shape: tuple[int, int, int]) -> LinearMap:
        """Return the map to zero for a weight of `shape`."""
        return cls(weight=np.zeros(shape), offset=np.zeros(shape[0] * shape[2]))

    def __call__(self, x: Array) -> Array:
        """Apply the map to [rows, channels]."""
        groups, inputs, _ = self.weight.shape
        parts = x.reshape(-1, groups, inputs).transpose(1, 0, 2).astype(np.float64)
        out: Array = (parts @ self.weight).transpose(1, 0, 2).reshape(len(x), -1) + self.offset
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossMoments:
    """First and second moments of pairs of rows (x, t), by group of channels, float64.

    ``m_xx`` [groups, inputs, inputs], ``m_xt`` [groups, inputs, outputs] and ``m_tt``
    [groups, outputs] are sums about the means, not averages.
    """

    count: int
    mean_x: Array
    mean_t: Array
    m_xx: Array
    m_xt: Array
    m_tt: Array

    @classmethod
    def empty(cls, groups: int, inputs: int, outputs: int) -> CrossMoments:
        """Return the moments of nothing; channels are counted per group."""
        return cls(
            count=0,
            mean_x=np.zeros((groups, inputs)),
            mean_t=np.zeros((groups, outputs)),
            m_xx=np.zeros((groups, inputs, inputs)),
            m_xt=np.zeros((groups, inputs, outputs)),
            m_tt=np.zeros((groups, outputs)),
        )

    @classmethod
    def of(cls, x: Array, t: Array, *, groups: int = 1) -> CrossMoments:
        """Measure rows.

        Args:
            x: input of the map, [rows, channels], float.
            t: what it should give, [rows, channels], float.
            groups: number of groups of neighbouring channels.

        Raises:
            InternalError: the rows do not match, or the groups do not divide the channels.
        """
        if x.ndim != 2 or t.ndim != 2 or len(x) != len(t):
            raise InternalError(f"pairs of shape {x.shape} and {t.shape}")
        if x.shape[1] % groups or t.shape[1] % groups:
            raise InternalError(f"{groups} groups of {x.shape[1]} and {t.shape[1]} channels")
        total = cls.empty(groups, x.shape[1] // groups, t.shape[1] // groups)
        for start in range(0, len(x), CHUNK_ROWS):
            piece = slice(start, start + CHUNK_ROWS)
            total = total.merge(cls._of_chunk(x[piece], t[piece], groups))
        return total

    @classmethod
    def _of_chunk(cls, x: Array, t: Array, groups: int) -> CrossMoments:
        # [groups, rows, channels], always a copy: one matrix product for each group.
        x, t = (
            np.array(a.reshape(len(a), groups, -1).transpose(1, 0, 2), np.float64, order="C")
            for a in (x, t)
        )
        mean_x, mean_t = x.mean(axis=1), t.mean(axis=1)
        x -= mean_x[:, None]
        t -= mean_t[:, None]
        turned = x.transpose(0, 2, 1)
        return cls(
            count=x.shape[1],
            mean_x=mean_x,
            mean_t=mean_t,
            m_xx=turned @ x,
            m_xt=turned @ t,
            m_tt=np.square(t).sum(axis=1),
        )

    def merge(self, other: CrossMoments) -> CrossMoments:
        """Return the moments of both sets of rows; the order does not matter."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        share = other.count / count
        weight = self.count * share
        d_x, d_t = other.mean_x - self.mean_x, other.mean_t - self.mean_t
        return CrossMoments(
            count=count,
            mean_x=self.mean_x + share * d_x,
            mean_t=self.mean_t + share * d_t,
            m_xx=self.m_xx + other.m_xx + weight * d_x[:, :, None] * d_x[:, None, :],
            m_xt=self.m_xt + other.m_xt + weight * d_x[:, :, None] * d_t[:, None, :],
            m_tt=self.m_tt + other.m_tt + weight * d_t * d_t,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the weight: groups, inputs, outputs."""
        groups, inputs, outputs = self.m_xt.shape
        return groups, inputs, outputs

    @property
    def finite(self) -> bool:
        """True when the rows held no NaN and no infinity."""
        parts = (self.mean_x, self.mean_t, self.m_xx, self.m_xt, self.m_tt)
        return all(bool(np.isfinite(part).all()) for part in parts)

    def error(self, linear: LinearMap) -> float:
        """Return the sum over rows and channels of ``(x W + b - t)^2``."""
        w = linear.weight
        spread = self.m_tt.sum() - 2.0 * (w * self.m_xt).sum() + (w * (self.m_xx @ w)).sum()
        bias = np.einsum("gi,gio->go", self.mean_x, w) - self.mean_t
        bias += linear.offset.reshape(bias.shape)
        return float(max(spread, 0.0) + self.count * np.square(bias).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedLinear:
    """A map, the ridge that it was fitted with, and its worth on rows it was not fitted to.

    r2
        Share of the squared error, as it is after the best offset alone, that the map removes.
    r2_offset
        Share of the squared error, as it is, that the best offset alone removes.
    gain
        Share of the squared error, as it is, that the whole map removes.
    """

    kind: Kind
    linear: LinearMap
    ridge: float
    r2: float
    r2_offset: float
    gain: float


def solve_linear(moments: CrossMoments, *, ridge: float = 1e-4) -> LinearMap:
    """Solve the least squares of the module's docstring.

    Args:
        moments: of the rows to fit.
        ridge: lambda in units of the mean variance of the inputs; 0 is ordinary least squares.

    Raises:
        numpy.linalg.LinAlgError: `ridge` is 0 and the inputs are exactly dependent.
    """
    groups, inputs, outputs = moments.shape
    weight = np.zeros((groups, inputs, outputs))
    for group in range(groups):
        gram = moments.m_xx[group]
        mean = np.trace(gram) / inputs
        if mean > 0.0:
            weight[group] = np.linalg.solve(
                gram + ridge * mean * np.eye(inputs), moments.m_xt[group]
            )
    return with_best_offset(moments, weight)


def with_best_offset(moments: CrossMoments, weight: Array) -> LinearMap:
    """Return the map with this weight whose mean error is 0."""
    offset = moments.mean_t - np.einsum("gi,gio->go", moments.mean_x, weight)
    return LinearMap(weight=weight, offset=offset.ravel())


def solve_gated_linear(
    parts: Sequence[CrossMoments], *, ridges: Sequence[float] = RIDGES, extra: float = 0.0
) -> GatedLinear:
    """Fit on some parts of the samples, judge on the others, and keep what helps there.

    The richest of nothing, an offset, and a map with offset wins that lowers the squared error of
    the parts left out against the poorer ones; of the ridges the one with the smallest error there.
    The numbers then come from all parts.

    Args:
        parts: moments of disjoint sets of samples, at least two for anything but nothing.
        ridges: see `solve_linear`; the first one wins a draw.
        extra: mean squared error for each output that running the map in integers adds.
    """
    whole = merge_all(parts)
    nothing = LinearMap.nothing(whole.shape)
    if len(parts) < 2 or not whole.finite:
        worst = -math.inf
        return GatedLinear(
            kind="none", linear=nothing, ridge=ridges[0], r2=worst, r2_offset=worst, gain=worst
        )
    plain = shifted = 0.0
    mapped = np.full(len(ridges), extra * whole.count * nothing.offset.size)
    for i, left_out in enumerate(parts):
        others = merge_all([part for k, part in enumerate(parts) if k != i])
        plain += left_out.error(nothing)
        shifted += left_out.error(with_best_offset(others, nothing.weight))
        mapped += [left_out.error(solve_linear(others, ridge=ridge)) for ridge in ridges]
    best = int(mapped.argmin())
    r2, r2_offset, gain = (
        _share(before, float(after))
        for before, after in ((shifted, mapped[best]), (plain, shifted), (plain, mapped[best]))
    )
    if r2 > 0.0 and gain > 0.0:
        kind: Kind = "linear"
        linear = solve_linear(whole, ridge=ridges[best])
    elif r2_offset > 0.0:
        kind, linear = "offset", with_best_offset(whole, nothing.weight)
    else:
        kind, linear = "none", nothing
    return GatedLinear(
        kind=kind, linear=linear, ridge=ridges[best], r2=r2, r2_offset=r2_offset, gain=gain
    )


def merge_all(parts: Sequence[CrossMoments]) -> CrossMoments:
    """Merge at least one part."""
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def group_count(inputs: int, outputs: int) -> int:
    """Return the number of groups of a 1x1 convolution that compensates a block.

    As many as divide both channel counts and leave at least `GROUP_WIDTH` inputs to each, which is
    ``inputs / 64`` for the usual widths.
    """
    most = max(1, inputs // GROUP_WIDTH)
    common = math.gcd(inputs, outputs)
    return max(groups for groups in range(1, most + 1) if common % groups == 0)


def _share(before: float, after: float) -> float:
    if before > 0.0:
        return 1.0 - after / before
    return 0.0 if after == 0.0 else -math.inf
