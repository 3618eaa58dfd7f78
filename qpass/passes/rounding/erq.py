"""Round half of the inputs, correct the other half in closed form, and so on (ERQ).

Half of the inputs that are still float are rounded to nearest; coordinate descent then improves
their integers among themselves. The float rest makes up for the error ``e`` of the half: the ridge
solution is ``w_rest += (H_rest + lambda I)^-1 H_(rest, half) e_half``. A half, a quarter, an eighth
and so on are rounded until nothing is left.

Source: Zhong et al., "ERQ: error reduction for post-training quantization of vision transformers"
(ICML 2024, TPAMI 2025), the part for the weights; `refit` is the part for the activations. Ours
takes the inputs with the most energy first, and moves integers as long as that helps instead of
flipping a hundred candidates.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.passes.rounding.descend import descend
from qpass.passes.rounding.gptq import SWEEPS, Factor, refine
from qpass.passes.rounding.grid import Grid

Array = NDArray[Any]
LAST_INPUTS: Final = 4  # so few inputs are rounded at once


def solve_erq(weight: Array, factor: Factor, grid: Grid, *, sweeps: int = SWEEPS) -> Array:
    """Return the integers of `weight`, float64 [groups, inputs, outputs].

    Args:
        weight: float64 [groups, inputs, outputs].
        factor: of the Hessian of the inputs; its damping is the lambda of the ridge.
        grid: scales and bounds.
        sweeps: of coordinate descent in each half, and over all inputs at the end, at most.
    """
    order = factor.order[:, ::-1]  # most energy first
    group = np.arange(len(weight))[:, None, None]
    wanted = np.take_along_axis(weight, order[:, :, None], axis=1)
    hessian = factor.hessian[group, order[:, :, None], order[:, None, :]]
    integers = np.empty_like(wanted)
    begin, inputs = 0, weight.shape[1]
    while begin < inputs:
        left = inputs - begin
        end = inputs if left <= LAST_INPUTS else begin + (left + 1) // 2
        part = grid.take(order[:, begin:end])
        own = hessian[:, begin:end, begin:end]
        chosen = part.nearest(wanted[:, begin:end])
        descend(wanted[:, begin:end], own, chosen, part, sweeps=sweeps)
        integers[:, begin:end] = chosen
        if end < inputs:
            error = wanted[:, begin:end] - part.values(chosen)
            pull = hessian[:, end:, begin:end] @ error
            wanted[:, end:] += np.linalg.solve(hessian[:, end:, end:], pull)
        begin = end
    result = np.empty_like(integers)
    np.put_along_axis(result, order[:, :, None], integers, axis=1)
    result = np.where(factor.dead[:, :, None], grid.nearest(weight), result)
    return refine(weight, factor, result, grid, sweeps=sweeps)
