"""Channel-wise affine compensation (CWAC): undo the mean effect of quantization for nothing.

What it does
    Walks the linear ops in execution order. For each, it fits the gain and offset per channel that
    bring its output closest to the float model, and folds them into the weight scale and the bias.
    What lies behind sees the corrected output, so errors of earlier layers are met as well.
Where it aims
    ``global``: at the float model's own activations. ``local``: at what the float op makes of the
    quantized input. The last linear op of a residual branch aims at the float *sum* minus the
    quantized skip, so that the error of the skip is corrected where the branch joins it.
Why it never makes things worse
    Samples are held out. A channel keeps a correction only where it helps on samples it was not
    fitted to, and the whole is kept only where the model's outputs are surely closer to the float
    model's on samples that nothing was fitted to; else offsets alone are tried, else nothing is
    done.
Preconditions
    `insert_qdq` has run, biases are still float. Names of the two graphs agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from qpass.graph import Constant, Graph, Node
from qpass.passes.channel_affine import (
    Array,
    ChannelAffine,
    GatedAffine,
    PairMoments,
    merge_all,
    solve_gated,
)
from qpass.passes.fold_affine import Site, find_site, fold
from qpass.passes.model_gate import Verdict, judge
from qpass.passes.output_range import Extremes, Stretch, output_range, solve_stretch, stretch_range
from qpass.program import Progress
from qpass.report.model import PassReport, Refusal
from qpass.stream import Pair, Step, Stream
from qpass.submodel import Feeds, Submodel
from qpass.verify.metrics import CAP_DB

Method = Literal["cwac", "bias"]
Aim = Literal["global", "local"]
GROUPS: Final = 8  # groups of samples a batch, to see how much channels differ between samples
POSITIONS: Final = 1024  # of a feature map, that enter the sums


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCompensation:
    """What happened to one linear op; SQNR of its output on held-out samples, against its aim."""

    name: str
    op: str
    sqnr_db_before: float
    sqnr_db_after: float
    gain_and_offset: int  # channels
    offset_only: int
    unchanged: int
    residual: bool  # aimed at the sum behind it
    range_changed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """Result of `compensate`: `method` is what was kept, "none" when nothing surely helped.

    `verdict` is that of the method kept, else of the last one tried; None when nothing was tried.
    """

    report: PassReport
    layers: tuple[LayerCompensation, ...]
    method: Literal["cwac", "bias", "none"]
    verdict: Verdict | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    method: Method
    target: Aim
    first_held: int  # number of the first batch that is held out
    ridge: float
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """What was changed at one linear op."""

    linear: str
    affine: ChannelAffine
    stretch: Stretch | None


@dataclass(slots=True, kw_only=True)
class _Measured:
    """Sums of one unit: by group of samples to fit, in one for those held out."""

    held: PairMoments
    fit: list[PairMoments] = field(default_factory=list)
    extremes: Extremes = field(default_factory=Extremes)


@dataclass(slots=True, kw_only=True)
class _Walk:
    """What one walk over the model did to its own copy of the quantized graph."""

    changes: list[_Change] = field(default_factory=list)
    layers: list[LayerCompensation] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def compensate(
    reference: Graph,
    quantized: Graph,
    batches: Sequence[Feeds],
    *,
    method: Method = "cwac",
    target: Aim = "global",
    memory_bytes: int = 1 << 30,
    holdout: float = 0.25,
    ridge: float = 1e-4,
    confidence: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Compensation:
    """Fold the best correction of every linear op into `quantized`, where it helps.

    Args:
        reference: the float graph; not changed.
        quantized: the same graph after `insert_qdq`, biases in float; changed in place.
        batches: calibration inputs by name; the last ones are held out.
        method: ``cwac`` fits gain and offset (and falls back to offsets), ``bias`` offsets alone.
        target: see the docstring of the module.
        memory_bytes: activations above this go to files.
        holdout: share of the batches that judge; at least one.
        ridge: pull of the gains towards 1, see `solve_channel_affine`.
        confidence: standard errors by which a channel's correction has to help, see `solve_gated`.
        threads: threads of each session.
        progress: told after each unit.
    """
    begin = time.perf_counter()
    held = min(max(1, round(holdout * len(batches))), len(batches) - 1)
    if held < 1:
        reason = "there is only one batch: nothing could be held out to judge by"
        refusals = [Refusal(rule="compensate", where="model", reason=reason)]
        return _nothing(refusals, None, begin)
    first_held = len(batches) - held
    plain: list[dict[str, Array]] = []
    verdict: Verdict | None = None
    refusals = []
    methods: tuple[Method, ...] = ("cwac", "bias") if method == "cwac" else ("bias",)
    for candidate in methods:
        options = _Options(
            method=candidate,
            target=target,
            first_held=first_held,
            ridge=ridge,
            confidence=confidence,
        )
        with Stream(
            reference,
            quantized.copy(),
            batches,
            memory_bytes=memory_bytes,
            threads=threads,
            stage=f"compensate ({candidate})",
            progress=progress,
        ) as stream:
            walk = _walk(stream, options)
            outputs = list(stream.outputs())[first_held:]
            wanted = [of_float for of_float, _ in outputs]
            if not plain:
                whole = Submodel(quantized, batches[0], list(wanted[0]), threads=threads)
                plain = [whole.run(batch) for batch in batches[first_held:]]
            verdict = judge(wanted, plain, [corrected for _, corrected in outputs])
        if verdict.helps:
            _replay(reference, quantized, walk.changes)
            report = PassReport(
                name="compensate",
                changed=len(walk.changes),
                refusals=(*refusals, *walk.refusals),
                seconds=time.perf_counter() - begin,
            )
            return Compensation(
                report=report, layers=tuple(walk.layers), method=candidate, verdict=verdict
            )
        reason = f"no sure improvement: {verdict.sentence}"
        refusals.append(Refusal(rule=f"compensate {candidate}", where="model", reason=reason))
    return _nothing(refusals, verdict, begin)


def _nothing(refusals: list[Refusal], verdict: Verdict | None, begin: float) -> Compensation:
    report = PassReport(
        name="compensate",
        changed=0,
        refusals=tuple(refusals),
        seconds=time.perf_counter() - begin,
    )
    return Compensation(report=report, layers=(), method="none", verdict=verdict)


def _walk(stream: Stream, options: _Options) -> _Walk:
    """Fit and fold every linear op of the stream's quantized graph."""
    walk = _Walk()
    graph = stream.quantized
    nodes = {node.name: node for node in graph.nodes}
    originals = {node.name: node for node in stream.reference.nodes}
    places = {node.name: i for i, node in enumerate(stream.reference.nodes)}
    for step in stream:
        if step.unit.linear is None:
            continue
        original = originals[step.unit.linear]
        site = find_site(graph, nodes, original)
        if isinstance(site, str):
            walk.refusals.append(Refusal(rule="compensate", where=original.name, reason=site))
            continue
        walk.refusals.extend(
            Refusal(rule="compensate", where=original.name, reason=reason)
            for reason in site.reasons
        )
        skip = None
        if options.target == "global":
            skip = _skip_of(stream.reference, nodes, places, original)
        measured = _measure(step, site, skip, options)
        solved = solve_gated(
            measured.fit,
            ridge=options.ridge,
            gain="none" if options.method == "bias" else site.gain,
            offset=site.offset,
            confidence=options.confidence,
        )
        stretch = None
        if solved.gain_and_offset or solved.offset_only:
            place = output_range(graph, site.tap)
            if place is not None:
                stretch = solve_stretch(place, measured.extremes, solved.affine)
            change = _Change(linear=original.name, affine=solved.affine, stretch=stretch)
            walk.changes.append(change)
            _apply(graph, site, change)
        walk.layers.append(
            _layer(
                site,
                measured.held,
                solved,
                residual=skip is not None,
                range_changed=stretch is not None,
            )
        )
    return walk


def _apply(graph: Graph, site: Site, change: _Change) -> None:
    fold(graph, site, change.affine)
    if change.stretch is not None:
        place = output_range(graph, site.tap)
        assert place is not None
        stretch_range(graph, place, change.stretch)


def _replay(reference: Graph, quantized: Graph, changes: list[_Change]) -> None:
    """Repeat the changes of a walk on the caller's graph."""
    nodes = {node.name: node for node in quantized.nodes}
    originals = {node.name: node for node in reference.nodes}
    for change in changes:
        site = find_site(quantized, nodes, originals[change.linear])
        assert isinstance(site, Site)
        _apply(quantized, site, change)


def _measure(step: Step, site: Site, skip: Pair | None, options: _Options) -> _Measured:
    """Run the unit and collect what the fit needs."""
    measured = _Measured(held=PairMoments.empty(site.channels))
    also = () if skip is None else (skip,)
    for tap in step.taps(site.tap, local=options.target == "local", also=also):
        got, floating = thinned(tap.quantized), thinned(tap.float)
        wanted = floating if tap.local is None else thinned(tap.local)
        for skip_float, skip_quantized in tap.also:
            wanted = wanted + (thinned(skip_float) - thinned(skip_quantized))
        parts = min(GROUPS, len(got))
        groups = [
            PairMoments.of(*pair, axis=site.axis)
            for pair in zip(np.array_split(got, parts), np.array_split(wanted, parts), strict=True)
        ]
        measured.extremes.update(got, floating, axis=site.axis)
        if tap.batch < options.first_held:
            measured.fit.extend(groups)
        else:
            measured.held = measured.held.merge(merge_all(groups))
    return measured


def thinned(x: Array) -> Array:
    """Return at most about `POSITIONS` positions of each map of a [N, C, ...] array, as [N, C, P].

    The stride has no common factor with the width, so that it does not keep to some columns: the
    borders of a map, where padding shows, get their share.
    """
    if x.ndim < 4:
        return x
    flat = x.reshape(*x.shape[:2], -1)
    stride = -(-flat.shape[-1] // POSITIONS)
    while stride > 1 and math.gcd(stride, x.shape[-1]) > 1:
        stride += 1
    return flat[..., ::stride]


def _skip_of(
    graph: Graph, nodes: Mapping[str, Node], places: Mapping[str, int], linear: Node
) -> Pair | None:
    """Return the other operand of the residual Add behind `linear`, if it is known by then.

    Of two branches that meet, the one that runs later is the one to correct the sum.
    """
    out = linear.outputs[0]
    while True:
        readers = graph.consumers(out)
        if len(readers) != 1 or graph.is_output(out):
            return None
        add, index = readers[0]
        if add.op != "Add":
            return None
        other = add.inputs[1 - index]
        if not isinstance(other, Constant):
            break
        out = add.outputs[0]
    maker = graph.producer(other)
    twin = nodes.get(add.name)
    later = maker is not None and places[maker.name] > places[linear.name]
    if later or twin is None or twin.op != "Add" or other.shape is None or other.shape != out.shape:
        return None
    return Pair(float_name=other.name, quantized_name=twin.inputs[1 - index].name)


def _layer(
    site: Site, held: PairMoments, solved: GatedAffine, *, residual: bool, range_changed: bool
) -> LayerCompensation:
    identity = ChannelAffine.identity(site.channels)
    signal = float(np.nansum(held.signal()))
    before, after = (float(np.nansum(held.error(a))) for a in (identity, solved.affine))
    return LayerCompensation(
        name=site.linear,
        op=site.op,
        sqnr_db_before=_ratio_db(signal, before),
        sqnr_db_after=_ratio_db(signal, after),
        gain_and_offset=solved.gain_and_offset,
        offset_only=solved.offset_only,
        unchanged=solved.unchanged + solved.unusable,
        residual=residual,
        range_changed=range_changed,
    )


def _ratio_db(signal: float, noise: float) -> float:
    if noise <= 0.0 or signal <= 0.0:
        return CAP_DB if noise <= 0.0 else -CAP_DB
    return min(CAP_DB, 10.0 * math.log10(signal / noise))
