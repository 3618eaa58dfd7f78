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
_STEPS: Final = 60  # halving the bracket alone takes 40 for twelve digits; five are usual
_CLOSE: Final = 1e-12  # share by which the weighted squares may miss what they should be


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

    def look(tau: float) -> tuple[float, float, float]:
        """Return the centre, the weighted squares about it, and minus their derivative."""
        weight = 1.0 / (tau + variances)
        middle = float((weight * estimates).sum() / weight.sum()) if center is None else center
        squares = weight * (estimates - middle) ** 2
        return middle, float(squares.sum()), float((weight * squares).sum())

    middle, squares, slope = look(0.0)
    if squares <= freedom:
        return middle, 0.0
    # About any centre between the extremes, and any tau above this, the squares are too small.
    at = estimates if center is None else np.append(estimates, center)
    low, high = 0.0, float((at.max() - at.min()) ** 2 * estimates.size / freedom)
    tau = 0.0
    for _ in range(_STEPS):
        # Newton's step for 1 / squares, which is a straight line where all variances are the same.
        tau += squares * (squares - freedom) / (freedom * slope)
        if not low < tau < high:
            tau = 0.5 * (low + high)
        middle, squares, slope = look(tau)
        if abs(squares - freedom) <= _CLOSE * freedom:
            break
        low, high = (tau, high) if squares > freedom else (low, tau)
    return middle, tau
