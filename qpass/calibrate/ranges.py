"""Ranges of activations from their statistics: minmax, percentile, entropy, mse and auto.

`mse` and `auto` minimize the expected squared error of `qpass.calibrate.density`, on the histogram
that is weighted by `importance` where there is one: then it is the error behind the readers.
`entropy` is the search of S. Migacz, "8-bit inference with TensorRT" (2017), with the integer grid
of the spec in place of 128 magnitudes, so that it also serves asymmetric ranges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.density import Density, Grid
from qpass.calibrate.stats import TensorStats
from qpass.errors import RecipeError
from qpass.qparams import TensorSpec

Array = NDArray[Any]
Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)

PERCENTILE: Final = 99.999
# Ranges down to this share of the largest are tried; bins are no finer than 1/4096 of it.
SMALLEST_SHARE: Final = 2.0**-10
GRID: Final = 24
ZOOM_GRID: Final = 9
ZOOMS: Final = 3
# Relative difference of two estimates that is no reason to leave minmax: it clips nothing.
TIE: Final = 1e-3
# A range that clips more of the elements is none: two spikes at its end would be alike.
MOST_CLIPPED: Final = 0.1
# What the entropy search takes an empty cell to hold, in elements: log(0) has no value.
EMPTY_CELL: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeChoice:
    """The real range of a tensor; `mse` is the expected squared error per element.

    `method` is what found the range: with auto the winner, "fixed" where the spec pins it.
    """

    low: float
    high: float
    method: str
    mse: float


def solve_range(
    stats: TensorStats, spec: TensorSpec, method: str = "auto", *, percentile: float = PERCENTILE
) -> RangeChoice:
    """Choose the range of a tensor.

    Args:
        stats: what calibration saw.
        spec: what the tensor becomes; its granularity is not looked at, the range is of the tensor.
        method: one of `METHODS`, or auto: the one with the smallest expected error; minmax if
            nothing is better than it.
        percentile: for that method, percent of the elements below the upper end (and above the
            lower end of the other side).

    Returns:
        The range, which includes 0; of a symmetric spec the larger end counts.

    Raises:
        RecipeError: unknown method, or percentile not in (50, 100].
    """
    if method != "auto" and method not in METHODS:
        raise RecipeError(f"there is no method {method!r}", fix=f"auto, {', '.join(METHODS)}")
    if not 50.0 < percentile <= 100.0:
        raise RecipeError(f"percentile {percentile} is not in (50, 100]")
    density = Density(stats, weighted=True)
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if spec.fixed is not None:
        return _choice(density, spec, "fixed", spec.fixed)
    if low == high:
        return RangeChoice(low=0.0, high=0.0, method="minmax", mse=0.0)
    minmax = _choice(density, spec, "minmax", (low, high))
    if method == "minmax":
        return minmax
    counted = Density(stats, weighted=False)
    if np.count_nonzero(counted.mass) <= 1:
        # One value beside zero (a mask, a constant): minmax represents both exactly.
        return minmax if method == "auto" else replace(minmax, method=method)
    choices = []
    if method in ("percentile", "mse", "auto"):
        ends = _percentile(counted, stats, percentile / 100)
        choices.append(_choice(density, spec, "percentile", ends))
    if method in ("entropy", "mse", "auto"):
        choices.append(_choice(density, spec, "entropy", _entropy(counted, spec, low, high)))
    if method in ("percentile", "entropy"):
        return choices[-1]
    choices.append(_choice(density, spec, "mse", _search(density, spec, low, high)))
    best = min(choices, key=lambda choice: choice.mse)
    if method == "auto":
        return best if best.mse < minmax.mse * (1 - TIE) else minmax
    # The grid of the search is finite: what another method found may be better.
    return replace(min(minmax, best, key=lambda choice: choice.mse), method="mse")


def rated_range(
    stats: TensorStats, spec: TensorSpec, method: str, ends: tuple[float, float]
) -> RangeChoice:
    """Return a range that something else has found, with its expected error."""
    return _choice(Density(stats, weighted=True), spec, method, ends)


def estimated_sqnr_db(stats: TensorStats, low: float, high: float, spec: TensorSpec) -> float:
    """Return the expected signal to quantization noise ratio in dB; +inf without noise."""
    density = Density(stats, weighted=True)
    noise = float(density.error(Grid.of(spec, np.array([low]), np.array([high])))[0])
    if noise <= 0.0:
        return math.inf
    return 10 * math.log10(max(density.signal, np.finfo(np.float64).tiny) / noise)


def histogram_view(stats: TensorStats, bins: int = 128) -> tuple[Array, Array]:
    """Return (edges float64 [n + 1], counts int64 [n]) with n <= max(bins, 2) equal bins."""
    histogram = stats.histogram
    while len(histogram.counts) > max(bins, 2):
        histogram = histogram.coarsen(histogram.exponent + 1)
    numbers = histogram.first_bin + np.arange(len(histogram.counts) + 1)
    return numbers * histogram.width, histogram.counts


def _choice(
    density: Density, spec: TensorSpec, method: str, ends: tuple[float, float]
) -> RangeChoice:
    grid = Grid.of(spec, np.array([ends[0]]), np.array([ends[1]]))
    mse = float(density.error(grid)[0]) / max(density.total, np.finfo(np.float64).tiny)
    return RangeChoice(low=float(ends[0]), high=float(ends[1]), method=method, mse=mse)


def _percentile(density: Density, stats: TensorStats, share: float) -> tuple[float, float]:
    zeros = stats.histogram.zeros
    low = min(density.quantile(1 - share, zeros), 0.0)
    high = max(density.quantile(share, zeros), 0.0)
    if low == high:  # all but a few elements are 0
        return min(stats.low, 0.0), max(stats.high, 0.0)
    return low, high


def _search(density: Density, spec: TensorSpec, low: float, high: float) -> tuple[float, float]:
    """Return the range of the smallest error: a grid of shares of both ends, then finer ones."""
    together = spec.symmetric or low == 0.0 or high == 0.0
    below = above = np.geomspace(SMALLEST_SHARE, 1.0, GRID)
    for zoom in range(ZOOMS + 1):
        pairs = (below, above) if together else _pairs(below, above)
        error = density.error(Grid.of(spec, low * pairs[0], high * pairs[1]))
        # The last of equals: the widest range.
        best = len(error) - 1 - int(np.argmin(error[::-1]))
        chosen = float(pairs[0][best]), float(pairs[1][best])
        if zoom < ZOOMS:
            below, above = _around(below, chosen[0]), _around(above, chosen[1])
    return low * chosen[0], high * chosen[1]


def _pairs(below: Array, above: Array) -> tuple[Array, Array]:
    return np.repeat(below, len(above)), np.tile(above, len(below))


def _around(shares: Array, chosen: float) -> Array:
    """Return a finer grid between the neighbours of the chosen share; it keeps the chosen one."""
    ratio = shares[1] / shares[0]
    finer = chosen * np.geomspace(1 / ratio, ratio, ZOOM_GRID)
    finer[ZOOM_GRID // 2] = chosen
    return np.minimum(finer, 1.0)


def _entropy(density: Density, spec: TensorSpec, low: float, high: float) -> tuple[float, float]:
    """Return the range of the smallest Kullback-Leibler divergence; the widest of equals."""
    shares = np.geomspace(SMALLEST_SHARE, 1.0, 2 * GRID)
    below = above = shares
    if not spec.symmetric and low < 0.0 < high:
        ones = np.ones_like(shares)
        below = np.concatenate([shares, ones, shares])
        above = np.concatenate([ones, shares, shares])
    grid = Grid.of(spec, low * below, high * above)
    divergence = _divergence(density, grid, spec.qmax - spec.qmin + 1)
    ties = np.flatnonzero(divergence <= divergence.min())
    best = ties[np.argmax(grid.top[ties] - grid.bottom[ties])]
    return float(low * below[best]), float(high * above[best])


def _divergence(density: Density, grid: Grid, levels: int) -> Array:
    """Return KL(P | Q) of each candidate.

    P is the histogram with clipped elements moved into the outermost bins of the range; Q spreads
    what the range holds of each integer's cell evenly over the bins of it that are not empty.
    Elements that are exactly 0 are in neither: they are represented as they are.
    """
    counts, bins = density.mass, len(density.mass)
    if levels >= 2 * bins:  # cells finer than bins: only clipping counts, so nothing is clipped
        return np.where(grid.top - grid.bottom < (grid.top - grid.bottom).max(), np.inf, 0.0)
    mass = np.pad(np.cumsum(counts), (1, 0))
    filled = np.pad(np.cumsum(counts > 0), (1, 0))
    plogp = np.pad(np.cumsum(_xlogx(counts)), (1, 0))
    # Cell borders in bins: half-way between the integers, and the ends of the range.
    middle = grid.bottom[:, None] + (np.arange(1, levels) - 0.5) * grid.scale[:, None]
    first = np.floor(grid.bottom / density.width)[:, None]
    last = np.ceil(grid.top / density.width)[:, None]
    borders = np.hstack([first, np.rint(middle / density.width), last]) - density.first
    borders = np.clip(borders, 0, bins).astype(np.int64)
    start, stop = borders[:, 0], np.maximum(borders[:, -1], borders[:, 0] + 1)
    stop = np.minimum(stop, bins)
    start = np.minimum(start, stop - 1)
    held = np.diff(mass[borders], axis=1)
    height = held / np.maximum(np.diff(filled[borders], axis=1), 1)
    cross = np.sum(held * np.log(np.maximum(height, EMPTY_CELL)), axis=1)
    own = plogp[stop] - plogp[start]
    total = mass[-1]
    for outside, end, cell in (
        (mass[start], start, np.argmax(borders[:, 1:] > start[:, None], axis=1)),
        (total - mass[stop], stop - 1, np.argmax(borders[:, 1:] >= stop[:, None], axis=1)),
    ):
        own = own - _xlogx(counts[end]) + _xlogx(counts[end] + outside)
        at_end = np.take_along_axis(height, cell[:, None], axis=1)[:, 0]
        cross = cross + outside * np.log(np.maximum(at_end, EMPTY_CELL))
    inside = np.maximum(mass[stop] - mass[start], EMPTY_CELL)
    result = (own - cross) / max(total, 1.0) + np.log(inside / max(total, 1.0))
    return np.where(inside < (1 - MOST_CLIPPED) * total, np.inf, result)


def _xlogx(values: Array) -> Array:
    result: Array = values * np.log(np.maximum(values, 1.0))
    return result
