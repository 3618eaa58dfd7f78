"""The histogram as a density, and the quantization error of a range under it: pure numpy, float64.

Elements are taken as spread evenly over their bin (the outermost bins end at `low` and `high`),
those that are exactly 0 as a point. For the representable range [bottom, top] of scale s::

    sum over x of   (x - bottom)**2    below bottom, (x - top)**2 above top    clipping
                    x**2               where |x| < s / 2, which becomes 0
                    s**2 / 12          elsewhere: the mean square of even noise of width s

The middle line is what tells a tensor that is mostly near 0 from one that fills its range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.stats import TensorStats
from qpass.qparams import TensorSpec, choose_qparams

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Scale and representable range of many candidates, float64 [candidates]."""

    scale: Array
    bottom: Array
    top: Array

    @classmethod
    def of(cls, spec: TensorSpec, low: Array, high: Array) -> Grid:
        """Return what `choose_qparams` makes of each of the ranges [low, high]."""
        # Candidates take the place of channels, so that one call serves all of them.
        row = replace(spec, granularity="per_channel", axis=0, block_size=None)
        if spec.fixed is not None:
            row = replace(row, fixed=None)
            low, high = (np.full_like(low, bound) for bound in spec.fixed)
        qparams = choose_qparams(row, low, high)
        scale = qparams.scale.astype(np.float64)
        zero_point = qparams.zero_point.astype(np.float64)
        bottom, top = (bound - zero_point for bound in (qparams.qmin, qparams.qmax))
        return cls(scale=scale, bottom=bottom * scale, top=top * scale)


class Density:
    """Mass of the elements that are not exactly 0, with its moments up to any point."""

    def __init__(self, stats: TensorStats, *, weighted: bool) -> None:
        """Take the weighted histogram if there is one and it is wanted and not all zero."""
        histogram = stats.histogram
        mass, zeros = histogram.counts, float(histogram.zeros)
        if weighted and histogram.weights is not None and histogram.weights.sum() > 0:
            mass, zeros = histogram.weights, histogram.zero_weight
        self.total = float(mass.sum())
        self.mass = mass.astype(np.float64)
        # Sums of products leave a rounding error where bin 0 holds nothing but zeros.
        self.mass[-histogram.first_bin] = max(self.mass[-histogram.first_bin] - zeros, 0.0)
        self.width, self.first = histogram.width, histogram.first_bin
        edges = (self.first + np.arange(len(mass) + 1)) * self.width
        self.edges = np.clip(edges, min(stats.low, 0.0), max(stats.high, 0.0))
        left, span = self.edges[:-1], np.diff(self.edges)
        bins = _moments(self.mass, left, span, np.ones_like(left))
        self._before = np.pad(np.cumsum(bins, axis=1), ((0, 0), (1, 0)))

    def up_to(self, point: Array) -> Array:
        """Return sum of 1, x and x**2 over all x below each point: [3, points]."""
        with np.errstate(invalid="ignore"):
            number = np.floor(point / self.width) - self.first
        index = np.clip(number, 0, len(self.mass) - 1).astype(np.int64)
        left = self.edges[index]
        span = self.edges[index + 1] - left
        # A bin without width is a point: it lies below whatever is not below it.
        share = np.where(span > 0, (point - left) / np.where(span > 0, span, 1.0), point >= left)
        inside = _moments(self.mass[index], left, span, np.clip(share, 0.0, 1.0))
        result: Array = self._before[:, index] + inside
        return result

    @property
    def signal(self) -> float:
        """Sum of x**2."""
        return float(self._before[2, -1])

    def error(self, grid: Grid) -> Array:
        """Return the expected sum of squared errors of each candidate."""
        everything = self._before[:, -1:]
        below, above = self.up_to(grid.bottom), everything - self.up_to(grid.top)
        half = grid.scale / 2
        centre = self.up_to(np.minimum(half, grid.top)) - self.up_to(np.maximum(-half, grid.bottom))
        rounded = (everything - below - above - centre)[0]
        error = _squares_about(below, grid.bottom) + _squares_about(above, grid.top)
        result: Array = (
            error + np.maximum(centre[2], 0.0) + np.maximum(rounded, 0.0) * (grid.scale**2 / 12)
        )
        return result

    def quantile(self, share: float, zeros: float) -> float:
        """Return the value below which `share` of all elements lie; `zeros` of them are 0."""
        mass = self.mass.copy()
        mass[-self.first] += zeros
        cumulative = np.pad(np.cumsum(mass), (1, 0))
        return float(np.interp(share * cumulative[-1], cumulative, self.edges))


def _moments(mass: Array, left: Array, span: Array, share: Array) -> Array:
    """Return sum of 1, x, x**2 over the first `share` of an even mass on [left, left + span]."""
    first = left + share * span / 2
    second = left * (left + share * span) + (share * span) ** 2 / 3
    result: Array = mass * share * np.stack([np.ones_like(left), first, second])
    return result


def _squares_about(moments: Array, point: Array) -> Array:
    """Return sum of (x - point)**2 from the moments of x, kept from rounding below 0."""
    zeroth, first, second = moments
    result: Array = np.maximum(second - point * (2 * first - point * zeroth), 0.0)
    return result
