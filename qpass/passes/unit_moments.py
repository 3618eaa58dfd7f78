"""Run a unit in both graphs and gather what the fit of its linear op needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from qpass.passes.attention_scores import ScoreSums
from qpass.passes.channel_affine import Array, PairMoments, merge_all
from qpass.passes.fold_affine import Site
from qpass.passes.output_range import Extremes
from qpass.passes.row_weights import NormedSum, Weights
from qpass.stream import Pair, Step

GROUPS: Final = 8  # groups of samples a batch, to see how much channels differ between samples
POSITIONS: Final = 256  # of a feature map, that enter the sums


@dataclass(slots=True, kw_only=True)
class Measured:
    """Sums of one unit: by group of samples to fit, in one for those held out."""

    held: PairMoments
    fit: list[PairMoments] = field(default_factory=list)
    extremes: Extremes = field(default_factory=Extremes)


def measure(
    step: Step,
    site: Site,
    skip: Pair | None,
    *,
    normed_sum: NormedSum | None = None,
    local: bool,
    first_held: int,
    scores: Sequence[ScoreSums] = (),
) -> Measured:
    """Run the unit and collect what the fit needs.

    Args:
        step: the unit.
        site: of its linear op.
        skip: what is added behind the last linear op of a residual branch: the sum is aimed at.
        normed_sum: that sum, where a norm reads it: rows to fit count by the size of its tokens.
        local: aim at what the float op makes of the quantized input.
        first_held: number of the first batch that nothing is fitted to.
        scores: of attentions, whose operands are fetched and summed up on the way.
    """
    measured = Measured(held=PairMoments.empty(site.channels))
    skips = () if skip is None else (skip,)
    operands = [pair for sums in scores for pair in sums.pairs]
    thin = partial(thinned, axis=site.axis)
    weighted = None if normed_sum is None or skip is None else Weights(normed_sum)
    for tap in step.taps(site.tap, local=local, also=(*skips, *operands), keep=True):
        got, floating = thin(tap.quantized), thin(tap.float)
        wanted = floating if tap.local is None else thin(tap.local)
        weights = None
        for skip_float, skip_quantized in tap.also[: len(skips)]:
            wanted = wanted + (thin(skip_float) - thin(skip_quantized))
            if weighted is not None:
                weights = thin(weighted.of(tap.float, skip_float))[..., 0]
        groups = PairMoments.of_groups(got, wanted, axis=site.axis, most=GROUPS, weights=weights)
        fetched = tap.also[len(skips) :]
        for sums, query, key in zip(scores, fetched[::2], fetched[1::2], strict=True):
            sums.update(query, key, held=tap.batch >= first_held)
        measured.extremes.update(got, floating, axis=site.axis)
        if tap.batch < first_held:
            measured.fit.extend(groups)
        else:  # for the report, which says what the plain error is
            if weights is not None:
                groups = [PairMoments.of(got, wanted, axis=site.axis)]
            measured.held = measured.held.merge(merge_all(groups))
    return measured


def thinned(x: Array, *, axis: int) -> Array:
    """Return at most about `POSITIONS` positions of each map, as [N, C, P] or [N, P, C].

    The stride has no common factor with the width, so that it does not keep to some columns: the
    borders of a map, where padding shows, get their share.

    Args:
        x: [N, C, ...] or [N, ..., C]; with fewer than four axes it is returned as it is.
        axis: that of the channels, 1 or -1.
    """
    if x.ndim < 4:
        return x
    last = axis % x.ndim == x.ndim - 1
    flat = x.reshape(len(x), -1, x.shape[-1]) if last else x.reshape(*x.shape[:2], -1)
    positions, width = (flat.shape[1], x.shape[-2]) if last else (flat.shape[2], x.shape[-1])
    stride = -(-positions // POSITIONS)
    while stride > 1 and math.gcd(stride, width) > 1:
        stride += 1
    return flat[:, ::stride] if last else flat[..., ::stride]
