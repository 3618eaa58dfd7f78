"""Correct a linear op whose gains need new integers: fold, look again, keep the better.

What it does
    Gains per channel that the scales cannot take go into the float weight, which is rounded again
    (see `requantize`). The new rounding has another mean effect than the old one, so the offset is
    fitted once more to what the op gives now. Compared on the same samples with what an offset
    alone would have done, the better of the two stays.
Why it is not certain to help
    The fit promises an error for exact gains; rounding adds its own, and a scale that all channels
    share may have had to grow for one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from qpass.graph import Graph, Node, Tensor
from qpass.passes.attention import without_means
from qpass.passes.channel_affine import Array, ChannelAffine, PairMoments, merge_all
from qpass.passes.channel_gate import solve_gated
from qpass.passes.fold_affine import Site, fold


class Measured(Protocol):
    """What was measured of the output of a site: moments by group of samples."""

    fit: list[PairMoments]


def refit(
    graph: Graph,
    site: Site,
    before: Sequence[PairMoments],
    affine: ChannelAffine,
    measure: Callable[[], Measured],
    *,
    cancelled: Array | None = None,
) -> tuple[ChannelAffine, ...]:
    """Return the corrections to fold at `site`, in order; the graph is as it was.

    Args:
        graph: the quantized graph of the walk.
        site: where; without a `rounding` there is nothing to look at again.
        before: moments of its output as it is.
        affine: the gains and offsets that were fitted to them.
        measure: gives the moments of the output as the graph is when it is called.
        cancelled: channels whose offset means nothing, see `without_means`.
    """
    if site.rounding is None or not (affine.gain != 1.0).any():
        return (affine,)
    plain = solve_gated(before, gain="none", offset=site.offset).affine
    saved = _constants_of(site)
    fold(graph, site, affine)
    after = measure().fit
    if cancelled is not None:
        after = [without_means(moments, cancelled) for moments in after]
    again = solve_gated(after, gain="none", offset=site.offset).affine
    for node, inputs in saved:
        graph.drop_input(node, len(inputs))
        for index, tensor in enumerate(inputs):
            if node.inputs[index] is not tensor:
                graph.set_input(node, index, tensor)
    if _error(after, again) < _error(before, plain):
        return (affine, again) if again.offset.any() else (affine,)
    return (plain,)


def joined(parts: Sequence[ChannelAffine]) -> ChannelAffine:
    """Return one correction that does what `parts` do one after the other."""
    whole = parts[0]
    for part in parts[1:]:
        offset = part.gain * whole.offset + part.offset
        whole = ChannelAffine(gain=part.gain * whole.gain, offset=offset)
    return whole


def _error(groups: Sequence[PairMoments], affine: ChannelAffine) -> float:
    return float(np.nansum(merge_all(groups).error(affine)))


def _constants_of(site: Site) -> list[tuple[Node, list[Tensor]]]:
    nodes = [site.node, site.gain_slot.node]
    if site.bias_slot is not None:
        nodes.append(site.bias_slot.node)
    return [(node, list(node.inputs)) for node in nodes]
