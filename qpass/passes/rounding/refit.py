"""Move a float weight so that it gives the wanted output from the *quantized* input.

Quantization before an op has changed its input from ``x`` to ``x + d``. The weights that are best
now are those of a ridge regression of the wanted output on the new input, pulled to the old ones::

    w + (H + lambda I)^-1 (G - H w)          lambda = ridge * trace(H) / inputs

with the sums `H` and `G` of `InputSums`. It is the first step of ERQ (Zhong et al., ICML 2024) and
what lets one layer of a unit make up for the layers before it. How far the sums can be trusted
differs from layer to layer: a few ridges compete on rows that were not summed up, and the old
weights win where none of them helps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.passes.rounding.gptq import damped
from qpass.passes.rounding.hessian import InputSums

Array = NDArray[Any]
RIDGES: Final = (1.0, 0.1, 0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRows:
    """Rows that nothing is fitted to, float64 [groups, rows, inputs] and [.., rows, outputs].

    `weights` are those of the rows, float64 [rows].
    """

    inputs: Array
    wanted: Array
    weights: Array

    def error(self, weight: Array, sums: InputSums) -> Array:
        """Return the mean squared error of each output, [groups, outputs], with its best offset.

        The offset is that of the rows in `sums`, where the op can take one.
        """
        rest = self.wanted - self.inputs @ weight
        if sums.centered:
            rest -= sums.offset(weight)[:, None]
        share = self.weights / self.weights.sum()
        error: Array = np.einsum("n,gno->go", share, np.square(rest))
        return error


def solve_refit(weight: Array, sums: InputSums, ridge: float) -> Array:
    """Return the refitted weight, float64 [groups, inputs, outputs]; dead inputs keep theirs."""
    rest = sums.xt - sums.xx @ weight
    change: Array = np.linalg.solve(damped(sums.xx, ridge), rest)
    return weight + change


def choose_refit(
    weight: Array, sums: InputSums, held: HeldRows, ridges: tuple[float, ...] = RIDGES
) -> tuple[Array, float | None]:
    """Return the weight that is best on the held rows, and its ridge (None: the old weight).

    Args:
        weight: float64 [groups, inputs, outputs].
        sums: of the rows to fit to.
        held: rows to judge by.
        ridges: from strong to weak; the search ends where a weaker one is worse.
    """
    best, chosen = weight, None
    error = float(held.error(weight, sums).sum())
    for ridge in ridges:
        candidate = solve_refit(weight, sums, ridge)
        found = float(held.error(candidate, sums).sum())
        if not found < error:
            break
        best, chosen, error = candidate, ridge, found
    return best, chosen
