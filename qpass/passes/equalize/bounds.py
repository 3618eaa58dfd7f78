"""How small the scales of a site may be, so that a Clip on the way clips nothing that was seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate import TensorStats
from qpass.passes.equalize.site import Site

Array = NDArray[Any]

# A channel that reaches less of the Clip's end than one level of 8 bits has nothing to gain from
# all of it, and what it may reach on other inputs is known least.
SMALLEST: Final = 2.0**-8


def smallest_scales(site: Site, stats: Mapping[str, TensorStats]) -> Array | None:
    """Return the smallest scale of each group, float64 [groups]; None for a site without bounds.

    It is the largest share of the Clip's end that a channel of the group has reached, and at least
    `SMALLEST`; a group without a Clip has 0. Where the channels were not measured it is 1.

    Args:
        site: with `Bound.labels` that have one element for each channel, or are not measured.
        stats: of the graph that the site was found in.
    """
    if not site.bounds:
        return None
    floor = np.zeros(site.groups + 1)
    for bound in site.bounds:
        labels, known = bound.labels.ravel(), stats.get(bound.tensor)
        share = np.ones(labels.size)
        low, high = (None, None) if known is None else (known.channel_low, known.channel_high)
        if low is not None and high is not None and low.size == labels.size:
            share = np.maximum(_share(-low, -bound.low), _share(high, bound.high))
        # Scales are float32 numbers: the next one above still lets everything through.
        share = np.nextafter(share.astype(np.float32), np.float32(np.inf)).astype(np.float64)
        np.maximum.at(floor, labels, np.clip(share, SMALLEST, 1.0))
    return floor[1:]


def _share(size: Array, end: float) -> Array:
    """Return how much of the way from 0 to `end` is reached; a channel that was not seen: all."""
    if end == 0.0:  # 0 is 0 with every scale
        return np.zeros(size.shape)
    share = np.where(np.isfinite(size), np.maximum(size, 0.0) / end, 1.0)
    return np.asarray(share)
