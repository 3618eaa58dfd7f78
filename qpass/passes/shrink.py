"""Shrink many noisy estimates towards what they have in common (empirical Bayes).

Each of C channels has an estimate with a known sampling variance. If the true values scatter about
a common centre with variance ``tau``, the estimate with the least expected squared error is::

    centre + tau / (tau + variance) * (estimate - centre)

Channels that were measured well keep their estimate, the others lean on the rest. ``tau`` comes
from the estimates themselves: it is the value at which their weighted squares about the centre are
as large as they should be (Paule and Mandel, 1982; with a free centre this is their consensus
value).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_FEWEST: Final = 3  # estimates that say something about their scatter
_HALVINGS: Final = 40  # of the bracket of tau: to twelve digits of its width


def shrink(estimates: Array, variances: Array, *, center: float | None = None) -> Array:
    """Return the shrunk estimates, float64 [C].

    Args:
        estimates: one number per channel.
        variances: their sampling variances; where one is not finite or 0, its estimate stays.
        center: what they scatter about; None: their common value, which is estimated as well.
    """
    known = np.isfinite(estimates) & np.isfinite(variances) & (variances > 0.0)
    if np.count_nonzero(known) < _FEWEST:
        return estimates
    value, spread = estimates[known], variances[known]
    middle, tau = solve_prior(value, spread, center=center)
    shrunk = estimates.astype(np.float64)
    shrunk[known] = middle + tau / (tau + spread) * (value - middle)
    return shrunk


def solve_prior(
    estimates: Array, variances: Array, *, center: float | None = None
) -> tuple[float, float]:
    """Return centre and variance of the distribution that the true values come from.

    Args:
        estimates: finite, at least two.
        variances: their sampling variances, finite and positive.
        center: as for `shrink`.
    """
    freedom = estimates.size - (center is None)

    def middle(tau: float) -> float:
        if center is not None:
            return center
        weight = 1.0 / (tau + variances)
        return float((weight * estimates).sum() / weight.sum())

    def excess(tau: float) -> float:
        squares = (estimates - middle(tau)) ** 2 / (tau + variances)
        return float(squares.sum()) - freedom

    if excess(0.0) <= 0.0:
        return middle(0.0), 0.0
    # About any centre between the extremes, and any tau above this, the squares are too small.
    at = estimates if center is None else np.append(estimates, center)
    low, high = 0.0, float((at.max() - at.min()) ** 2 * estimates.size / freedom)
    for _ in range(_HALVINGS):
        tau = 0.5 * (low + high)
        low, high = (tau, high) if excess(tau) > 0.0 else (low, tau)
    return middle(high), high
