"""Coordinate descent over roundings: every integer moves to where the error is lowest.

With ``e = w - q`` the error of one output is ``e^T H e``. With all other integers fixed its lowest
point in input ``i`` is ``e_i = -(sum over k != i of H_ik e_k) / H_ii``, and the nearest integer to
it is the best one, for the error is a parabola there. No move raises the error (QuantEase, Behdin
et al., 2023). All outputs and groups move at once.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.passes.rounding.grid import Grid

Array = NDArray[Any]
BLOCK: Final = 128  # inputs between two large matrix products


def squared_error(weight: Array, hessian: Array, values: Array) -> Array:
    """Return ``e^T H e`` for each group and output, float64 [groups, outputs]."""
    error = weight - values
    total: Array = np.einsum("gio,gio->go", error, hessian @ error)
    return total


def descend(weight: Array, hessian: Array, integers: Array, grid: Grid) -> int:
    """Go once over all inputs, changing `integers` in place; return how many moved.

    Args:
        weight: float64 [groups, inputs, outputs].
        hessian: symmetric float64 [groups, inputs, inputs].
        integers: float64, of the shape of `weight`.
        grid: scales and bounds.
    """
    inputs = weight.shape[1]
    error = weight - grid.values(integers)
    moved = 0
    for begin in range(0, inputs, BLOCK):
        end = min(inputs, begin + BLOCK)
        slope = hessian[:, begin:end] @ error
        inner = hessian[:, begin:end, begin:end]
        for place in range(end - begin):
            i = begin + place
            scale, _ = grid.row(i)
            curvature = inner[:, place, place][:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                distance = slope[:, place] / (curvature * scale)
            # An input that is always zero has no curvature and keeps its integer.
            distance = np.where(curvature > 0.0, distance, 0.0)
            old = integers[:, i]
            new = np.clip(old + np.rint(distance), grid.qmin, grid.qmax)
            change = new - old
            count = int(np.count_nonzero(change))
            if not count:
                continue
            moved += count
            integers[:, i] = new
            step = change * scale
            error[:, i] -= step
            # The slopes of inputs before this one are not needed any more.
            slope[:, place:] -= inner[:, place:, place][:, :, None] * step[:, None, :]
    return moved
