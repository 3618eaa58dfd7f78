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


def descend(weight: Array, hessian: Array, integers: Array, grid: Grid, *, sweeps: int = 1) -> int:
    """Go over all inputs, changing `integers` in place; return how many moves that were.

    Args:
        weight: float64 [groups, inputs, outputs].
        hessian: symmetric float64 [groups, inputs, inputs].
        integers: float64, of the shape of `weight`.
        grid: scales and bounds.
        sweeps: how often, at most: a sweep without a move is the last.
    """
    inputs = weight.shape[1]
    error = weight - grid.values(integers)
    slope = np.empty_like(error)  # of half the squared error, downwards
    total = 0
    for sweep in range(sweeps):
        moved = 0
        for begin in range(0, inputs, BLOCK):
            end = min(inputs, begin + BLOCK)
            if not sweep:
                slope[:, begin:end] = hessian[:, begin:end] @ error
            old = error[:, begin:end].copy()
            count = _descend_block(
                slope[:, begin:end].copy(), hessian, error, integers, grid, begin
            )
            if not count:
                continue
            moved += count
            # Slopes behind the block are not there yet in the first sweep, and nobody reads those
            # before it after the last one.
            rows = slice(0 if sweep < sweeps - 1 else end, inputs if sweep else end)
            steps = old - error[:, begin:end]
            # Few outputs move once most integers are in place.
            outputs = np.flatnonzero(steps.any(axis=(0, 1)))
            slope[:, rows, outputs] -= hessian[:, rows, begin:end] @ steps[:, :, outputs]
        total += moved
        if not moved:
            break
    return total


def _descend_block(
    slope: Array, hessian: Array, error: Array, integers: Array, grid: Grid, begin: int
) -> int:
    """Go over the inputs from `begin` on for which there are slopes; those are used up."""
    end = begin + slope.shape[1]
    inner = hessian[:, begin:end, begin:end]
    moved = 0
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
