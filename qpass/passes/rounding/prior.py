"""Draw the Hessian of a convolution that few rows have made towards one with fewer unknowns.

With fewer rows than a handful for each input, the sum of ``x x^T`` says much that holds for these
rows only. Damping forgets all of what inputs have in common alike. But an input of a convolution is
a channel at a place under the kernel, and most of what inputs have in common is that of their
channels times that of their places: a Kronecker product, in which each number is an average over
many entries of the sum. A Hessian between the two, ``(1 - share) H + share C x T``, is that of
Ledoit and Wolf (2004) with the product of KFC (Grosse and Martens, 2016) for its target.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.passes.rounding.layout import Layout

Array = NDArray[Any]
# Shares that compete on held-out rows, and the damping beside them: the product is smooth by
# itself. More was not better where rows are fewest (1.4 for each input).
SHARES: Final = (0.4, 0.8)
DAMPING: Final = 0.1


def has_product(layout: Layout) -> bool:
    """True where inputs are places of several channels; a single channel is its own product."""
    taps = layout.columns_per_channel
    return taps > 1 and layout.inputs > taps


def toward_product(hessian: Array, taps: int, share: float) -> Array:
    """Return the Hessian between itself and its Kronecker product.

    Args:
        hessian: symmetric, not negative, float64 [groups, inputs, inputs]; inputs count channel,
            then place.
        taps: places under the kernel.
        share: of the product, from 0 to 1.

    Returns:
        float64 of the same shape; not negative, for both parts are, and with the same trace.
    """
    groups, inputs, _ = hessian.shape
    result: Array = (1.0 - share) * hessian
    if not share:
        return result
    by_place = hessian.reshape(groups, inputs // taps, taps, inputs // taps, taps)
    channels = np.einsum("gatbt->gab", by_place)
    places = np.einsum("gatau->gtu", by_place)
    # tr(C x T) = tr(C) tr(T), and each of these is the trace of the Hessian.
    whole = np.trace(channels, axis1=1, axis2=2)
    scale = np.where(whole > 0.0, share / np.where(whole > 0.0, whole, 1.0), 0.0)
    target = result.reshape(by_place.shape)
    for one in range(taps):  # in place: with 4,608 inputs a matrix has 170 MB
        for two in range(taps):
            part = (scale * places[:, one, two])[:, None, None] * channels
            target[:, :, one, :, two] += part
    return result
