"""Least squares for a norm by channel, and ridge regression for what reads it: streamed moments.

All sums are in float64 about a pivot row, so that a large mean does not eat the variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RIDGE: Final = 1e-2  # of the mean diagonal of the second moments, as ERQ proposes


class ChannelMoments:
    """First and second moments of x and y by channel, over all rows added so far."""

    def __init__(self, x: Array, y: Array) -> None:
        """Take the pivots from the first row of `x` and `y`, [rows, channels]; add nothing."""
        self.count = 0
        self.pivots = x[0].copy(), y[0].copy()
        self._sums = np.zeros((5, x.shape[1]))

    def add(self, x: Array, y: Array) -> None:
        """Add rows, [rows, channels] each."""
        x, y = x - self.pivots[0], y - self.pivots[1]
        self.count += len(x)
        self._sums += [v.sum(axis=0) for v in (x, y, x * x, x * y, y * y)]

    def central(self) -> tuple[Array, Array, Array, Array, Array]:
        """Return mean x, mean y, variance x, covariance, variance y by channel."""
        x, y, xx, xy, yy = self._sums / self.count
        var_x, var_y = np.maximum(xx - x * x, 0.0), np.maximum(yy - y * y, 0.0)
        return x + self.pivots[0], y + self.pivots[1], var_x, xy - x * y, var_y


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFit:
    """y = gain * x + offset by channel; `r2` is the share of the variance of y it explains.

    `mean` is the mean of y, and of the fit.
    """

    gain: Array
    offset: Array
    mean: Array
    r2: float


def solve_static_norm(moments: ChannelMoments) -> StaticFit:
    """Fit gain and offset of each channel by least squares.

    R2 is the mean over the channels of y that vary; a channel that does not is met by its offset.
    """
    mean_x, mean_y, var_x, cov, var_y = moments.central()
    gain = np.divide(cov, var_x, out=np.zeros_like(cov), where=var_x > 0)
    r2 = np.divide(cov * cov, var_x * var_y, out=np.zeros_like(cov), where=(var_x * var_y) > 0)
    varies = var_y > 0
    explained = float(r2[varies].mean()) if varies.any() else 1.0
    return StaticFit(gain=gain, offset=mean_y - gain * mean_x, mean=mean_y, r2=explained)


class CrossMoments:
    """Second moments of the fitted norm with itself and with the real one, about their means."""

    def __init__(self, fit: StaticFit) -> None:
        """Start with nothing added."""
        self._fit = fit
        self.own = np.zeros((fit.mean.size, fit.mean.size))  # fitted with fitted
        self.cross = np.zeros_like(self.own)  # fitted (rows) with real (columns)

    def add(self, x: Array, y: Array) -> None:
        """Add rows, [rows, channels] each."""
        fitted = self._fit.gain * x + self._fit.offset - self._fit.mean
        self.own += fitted.T @ fitted
        self.cross += fitted.T @ (y - self._fit.mean)


def solve_refit(own: Array, cross: Array, ridge: float = RIDGE) -> Array:
    """Return K such that W' = W + K W makes of the fitted norm what W made of the real one.

    It is the minimum over W' of |fitted W' - real W|^2 + damping |W' - W|^2, for every W at once.

    Args:
        own: second moments of the fitted norm about its mean, [channels, channels].
        cross: of the fitted norm (rows) with the real one (columns).
        ridge: damping as a share of the mean diagonal of `own`.
    """
    size = len(own)
    damping = ridge * float(np.trace(own)) / size
    if damping <= 0.0:
        return np.zeros_like(own)
    return np.asarray(np.linalg.solve(own + damping * np.eye(size), cross - own), np.float64)
