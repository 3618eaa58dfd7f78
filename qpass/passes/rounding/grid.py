"""The integers that a weight matrix can take, and which of them are nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.passes.rounding.layout import Layout
from qpass.qparams import QParams, expand

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Scales, zero points and bounds for a weight matrix [groups, inputs, outputs].

    `scale` and `zero_point` are float64 [groups, inputs or 1, outputs]: one row holds for all
    inputs.
    """

    scale: Array
    zero_point: Array
    qmin: int
    qmax: int

    def nearest(self, weight: Array) -> Array:
        """Round to nearest, half to even; integers as float64."""
        integers: Array = np.clip(
            np.rint(weight / self.scale) + self.zero_point, self.qmin, self.qmax
        )
        return integers

    def values(self, integers: Array) -> Array:
        """Return what the integers stand for."""
        values: Array = (integers - self.zero_point) * self.scale
        return values

    def row(self, index: int) -> tuple[Array, Array]:
        """Return scale and zero point of one input, [groups, outputs]."""
        index = index if self.scale.shape[1] > 1 else 0
        return self.scale[:, index], self.zero_point[:, index]

    def take(self, order: Array) -> Grid:
        """Return the grid of the inputs `order` [groups, some inputs]."""
        if self.scale.shape[1] == 1:
            return self
        scale, zero_point = (
            np.take_along_axis(a, order[:, :, None], axis=1) for a in (self.scale, self.zero_point)
        )
        return replace(self, scale=scale, zero_point=zero_point)


def grid_of(numbers: QParams, layout: Layout) -> Grid:
    """Return the grid of a weight from its numbers: per tensor, per channel or per block."""
    scale, zero_point = (
        layout.matrix(np.broadcast_to(expand(a, numbers, layout.shape), layout.shape))
        for a in (numbers.scale.astype(np.float64), numbers.zero_point.astype(np.float64))
    )
    if (scale == scale[:, :1]).all() and (zero_point == zero_point[:, :1]).all():
        scale, zero_point = scale[:, :1], zero_point[:, :1]
    return Grid(scale=scale, zero_point=zero_point, qmin=numbers.qmin, qmax=numbers.qmax)
