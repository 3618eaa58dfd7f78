"""Fit and fold corrections where it is not a linear op that makes what the next one reads.

What it does
    Walks the ops between two linear ops. A norm (see `fold_consumer`) gets the gain and offset per
    channel that bring its output closest to the float model's, by the fit and the gate that linear
    ops have; they go into its constants. Where nodes may be added (`runtime_affine`), other tensors
    get theirs as Mul and Add.
Why it helps
    Errors of earlier layers that grew into the residual stream differ from channel to channel, and
    a correction at the output of the next linear op can only meet their mixture.
Preconditions
    The walk stands at the unit: what the ops read is final.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from qpass.graph import LINEAR_OPS, Graph, Node
from qpass.passes.attention import without_means
from qpass.passes.channel_affine import Array, ChannelAffine, GainKind, PairMoments, merge_all
from qpass.passes.channel_gate import solve_gated
from qpass.passes.fold_affine import Site
from qpass.passes.fold_consumer import NormSite, find_norm_site, fold_into_norm
from qpass.passes.output_range import Extremes, Stretch, output_range, solve_stretch, stretch_range
from qpass.passes.runtime_affine import (
    CONFIDENCE,
    LEAST_DB,
    RuntimeChange,
    RuntimePlace,
    find_runtime_place,
)
from qpass.report.model import Refusal
from qpass.stream import Pair, Step, Stream

GROUPS = 8  # groups of samples a batch
NORM_RULE = "compensate norm"
RUNTIME_RULE = "compensate at run time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """What to do between linear ops, and how to judge it."""

    norms: bool
    runtime_ops: bool
    gains: bool  # False: offsets alone
    first_held: int  # number of the first batch that is held out
    ridge: float
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NormChange:
    """A correction of one norm; `apply` puts it into any copy of the quantized graph."""

    node: str
    affine: ChannelAffine
    stretch: Stretch | None

    def apply(self, graph: Graph) -> None:
        """Fold it, and move the range of the Q behind the norm."""
        site = find_norm_site(graph, graph.node(self.node))
        assert isinstance(site, NormSite)
        fold_into_norm(graph, site, self.affine)
        place = None if self.stretch is None else output_range(graph, site.tap)
        if place is not None and self.stretch is not None:
            stretch_range(graph, place, self.stretch)


@dataclass(slots=True)
class _Sums:
    fit: list[PairMoments] = field(default_factory=list)
    held: list[PairMoments] = field(default_factory=list)
    extremes: Extremes = field(default_factory=Extremes)


def nodes_of_units(stream: Stream) -> list[list[str]]:
    """Return the names of the nodes of each unit of a walk, in execution order."""
    names = iter([node.name for node in stream.reference.nodes])
    return [list(islice(names, unit.nodes)) for unit in stream.units]


def correct_between(
    step: Step, graph: Graph, nodes: Mapping[str, Node], names: Sequence[str], how: Between
) -> tuple[list[NormChange | RuntimeChange], list[Refusal]]:
    """Correct what the nodes `names` make, in order; `graph` is changed.

    Args:
        step: the unit that they belong to.
        graph: the quantized graph of the walk.
        nodes: its nodes by name.
        names: nodes of the unit, in execution order.
        how: see `Between`.
    """
    changes: list[NormChange | RuntimeChange] = []
    refusals: list[Refusal] = []
    for name in names:
        node = nodes.get(name)
        if node is None or node.op in LINEAR_OPS:
            continue
        site = find_norm_site(graph, node) if how.norms else None
        found: NormChange | RuntimeChange | str | None
        if isinstance(site, NormSite):
            found = _correct_norm(step, graph, site, how)
        elif site is not None:
            found = site
        elif how.runtime_ops:
            found = _correct_at_runtime(step, graph, node, how)
        else:
            continue
        if isinstance(found, str):
            rule = RUNTIME_RULE if site is None else NORM_RULE
            refusals.append(Refusal(rule=rule, where=name, reason=found))
        elif found is not None:
            changes.append(found)
    return changes, refusals


def _correct_norm(step: Step, graph: Graph, site: NormSite, how: Between) -> NormChange | None:
    pair = Pair(float_name=step.output_of(site.name), quantized_name=site.tap)
    sums = _measure(step, [pair], site.axis, how.first_held)
    solved = solve_gated(
        sums.fit,
        ridge=how.ridge,
        confidence=how.confidence,
        gain="channel" if site.scaled and how.gains else "none",
        offset=site.offset,
    )
    if not (solved.gain_and_offset or solved.offset_only):
        return None
    place = output_range(graph, site.tap)
    stretch = None if place is None else solve_stretch(place, sums.extremes, solved.affine)
    change = NormChange(node=site.name, affine=solved.affine, stretch=stretch)
    change.apply(graph)
    return change


def correct_linear_at_runtime(
    step: Step,
    graph: Graph,
    site: Site,
    how: Between,
    *,
    skip: Pair | None,
    cancelled: Array | None,
) -> tuple[list[RuntimeChange], list[Refusal]]:
    """Add what the constants of a linear op could not take, where that surely helps.

    Args:
        step: the unit that ends in the op.
        graph: the quantized graph of the walk; changed.
        site: of the op; what it can take has been folded.
        how: see `Between`.
        skip: what is added behind the last linear op of a residual branch: the sum is aimed at.
        cancelled: channels whose offset means nothing (keys of an attention).
    """
    if not how.runtime_ops or (site.gain == "channel" and site.offset):
        return [], []
    gain: GainKind = "none" if site.gain == "channel" else "channel"
    found = _correct_at_runtime(
        step, graph, site.node, how, skip=skip, gain=gain, cancelled=cancelled
    )
    if isinstance(found, str):
        return [], [Refusal(rule=RUNTIME_RULE, where=site.linear, reason=found)]
    return ([] if found is None else [found]), []


def _correct_at_runtime(
    step: Step,
    graph: Graph,
    node: Node,
    how: Between,
    *,
    skip: Pair | None = None,
    gain: GainKind = "channel",
    cancelled: Array | None = None,
) -> RuntimeChange | str | None:
    """Return what was added behind `node`, why nothing was, or None: this is no place for it."""
    place = find_runtime_place(graph, node)
    if not isinstance(place, RuntimePlace):
        return place
    pair = Pair(float_name=step.output_of(node.name), quantized_name=place.tap)
    pairs = [pair, *([] if skip is None else [skip])]
    sums = _measure(step, pairs, place.axis, how.first_held)
    if cancelled is not None:
        sums.fit = [without_means(moments, cancelled) for moments in sums.fit]
    kind = gain if how.gains else "none"
    solved = solve_gated(sums.fit, ridge=how.ridge, gain=kind, confidence=CONFIDENCE)
    if not (solved.gain_and_offset or solved.offset_only):
        return "no channel would surely get better"
    held = merge_all(sums.held)
    identity = ChannelAffine.identity(place.channels)
    before, after = (float(np.nansum(held.error(a))) for a in (identity, solved.affine))
    saved = 10.0 * math.log10(before / after) if before > 0.0 and after > 0.0 else 0.0
    if not saved >= LEAST_DB:
        return f"its error would fall by {saved:.2f} dB on held-out samples, not {LEAST_DB}"
    change = RuntimeChange(place=place, affine=solved.affine)
    change.apply(graph)
    return change


def _measure(step: Step, pairs: Sequence[Pair], axis: int, first_held: int) -> _Sums:
    """Sum up a tensor and, where there is a second pair, what is added to it."""
    sums = _Sums()
    for batch, ((floating, got), *others) in enumerate(step.look(pairs)):
        sums.extremes.update(got, floating, axis=axis)
        wanted = floating
        for skip_float, skip_quantized in others:
            wanted = wanted + (skip_float - skip_quantized)
        into = sums.fit if batch < first_held else sums.held
        into += PairMoments.of_groups(got, wanted, axis=axis, most=GROUPS)
    return sums
