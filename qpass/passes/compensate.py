"""Channel-wise affine compensation (CWAC): undo the mean effect of quantization for nothing.

What it does
    Walks the linear ops in execution order. For each, it fits the gain and offset per channel that
    bring its output closest to the float model, and folds them into the weight scale and the bias.
    What lies behind sees the corrected output, so errors of earlier layers are met as well.
Where it aims
    ``global``: at the activations of the float model, or of another graph (`aim`). ``local``: at
    what its op makes of the quantized input. The last linear op of a residual branch aims at the
    float *sum* minus the quantized skip, so that the error of the skip is corrected where the
    branch joins it. Queries and keys then get gains for the scores that they make together (see
    `attention_scores`).
Why it never makes things worse
    Samples are held out. A channel loses a correction that hurts on samples it was not fitted to
    (see `channel_gate`), and the whole is kept only where the model's outputs are surely closer to
    the float model's on samples that nothing was fitted to; else offsets alone are tried (not
    where the rounding of the weights has brought some already), else nothing is done.
Preconditions
    `insert_qdq` has run, biases are still float. Names of the two graphs agree.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

from qpass.graph import Graph, Node
from qpass.passes.attention import Shapes, key_channels, without_means
from qpass.passes.attention_scores import Scores, find_scores, with_scores
from qpass.passes.channel_affine import Array, ChannelAffine, FitKind
from qpass.passes.channel_gate import CONFIDENCE, solve_gated
from qpass.passes.compensation import Compensation, LayerCompensation, layer_of
from qpass.passes.correct_between import (
    Between,
    NormChange,
    correct_between,
    correct_linear_at_runtime,
    nodes_of_units,
)
from qpass.passes.correct_input import InputChange, correct_input
from qpass.passes.fold_affine import Site, find_site, fold
from qpass.passes.held_out import count_held
from qpass.passes.model_gate import GATED_CONFIDENCE, Verdict
from qpass.passes.model_verdict import model_verdict
from qpass.passes.output_range import Stretch, output_range, solve_stretch, stretch_range
from qpass.passes.refit import joined, refit
from qpass.passes.residual import skip_of
from qpass.passes.row_weights import find_normed_sum
from qpass.passes.runtime_affine import RuntimeChange
from qpass.passes.scale_matters import scale_matters
from qpass.passes.unit_moments import measure
from qpass.program import Progress
from qpass.report.model import PassReport, Refusal
from qpass.stream import Stream
from qpass.submodel import Feeds

Method = Literal["cwac", "bias"]
Aim = Literal["global", "local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    method: Method
    target: Aim
    first_held: int  # number of the first batch that is held out
    between: Between
    keys: Mapping[str, Array]  # channels whose offset a softmax cancels, by linear op
    scores: Mapping[str, Sequence[Scores]]  # products that the gains are fitted to, likewise
    ridge: float
    confidence: float
    fit: FitKind

    def fit_of(self, graph: Graph, linear: Node) -> FitKind:
        return "mm" if self.fit == "mm" and scale_matters(graph, linear) else "ls"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """What was changed at one linear op."""

    linear: str
    affine: ChannelAffine
    stretch: Stretch | None


Change: TypeAlias = _Change | NormChange | RuntimeChange | InputChange


@dataclass(slots=True, kw_only=True)
class _Walk:
    """What one walk over the model did to its own copy of the quantized graph."""

    changes: list[Change] = field(default_factory=list)
    layers: list[LayerCompensation] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def add(self, changes: Sequence[Change], refusals: Sequence[Refusal]) -> None:
        self.changes.extend(changes)
        self.refusals.extend(refusals)


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
    confidence: float = CONFIDENCE,
    fit: FitKind = "ls",
    runtime_ops: bool = False,
    baseline: Graph | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    aim: Graph | None = None,
    judges: Sequence[Feeds] = (),
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
        fit: ``mm`` keeps the size of what a Softmax or the user reads (see `scale_matters`) instead
            of the least squares, which shrink it by what they cannot explain.
        runtime_ops: also add Mul and Add nodes where no constant can take a correction.
        baseline: what the result has to beat, a graph whose offsets are corrected: offsets alone
            are then not tried again. None: `quantized` as it comes.
        threads: threads of each session.
        progress: told after each unit.
        aim: graph to come close to, see `Stream`; None: `reference`.
        judges: batches that no pass was fitted to, which judge the model; without them those held
            out do, which judge each channel.
    """
    begin = time.perf_counter()
    held = count_held(batches, holdout)
    if held < 1:
        reason = "there is only one batch: nothing could be held out to judge by"
        refusals = [Refusal(rule="compensate", where="model", reason=reason)]
        return _nothing(refusals, None, begin)
    first_held = len(batches) - held
    verdict: Verdict | None = None
    refusals = []
    shapes = Shapes(graph=reference, sample=batches[0])
    keys = key_channels(reference, shapes)
    products = find_scores(reference, shapes) if target == "global" else {}
    fallback: tuple[Method, ...] = ("bias",) if method == "cwac" and baseline is None else ()
    methods: tuple[Method, ...] = (method, *fallback)
    for candidate in methods:
        options = _Options(
            method=candidate,
            target=target,
            first_held=first_held,
            between=Between(
                norms=target == "global",
                runtime_ops=runtime_ops and target == "global",
                gains=candidate == "cwac",
                first_held=first_held,
                ridge=ridge,
                confidence=confidence,
            ),
            keys=keys,
            scores=products if candidate == "cwac" else {},
            ridge=ridge,
            confidence=confidence,
            fit=fit,
        )
        with Stream(
            reference,
            quantized.copy(),
            batches,
            memory_bytes=memory_bytes,
            threads=threads,
            stage=f"compensate ({candidate})",
            progress=progress,
            aim=aim,
        ) as stream:
            walk = _walk(stream, options)
            verdict = model_verdict(
                stream,
                quantized if baseline is None else baseline,
                first_held=first_held,
                judges=judges,
                threads=threads,
            )
        if verdict.helps_by(GATED_CONFIDENCE):
            _replay(reference, quantized, walk.changes)
            report = PassReport(
                name="compensate",
                changed=len(walk.changes),
                refusals=(*refusals, *walk.refusals),
                seconds=time.perf_counter() - begin,
            )
            return Compensation(
                report=report,
                layers=tuple(walk.layers),
                method=candidate,
                verdict=verdict,
                runtime_ops=tuple(
                    change.sentence for change in walk.changes if isinstance(change, RuntimeChange)
                ),
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
    for step, names in zip(stream, nodes_of_units(stream), strict=True):
        middle = names.index(step.unit.linear) if step.unit.linear in names else len(names)
        walk.add(*correct_between(step, graph, nodes, names[:middle], options.between))
        if step.unit.linear is None:
            continue
        original = originals[step.unit.linear]
        if options.between.norms and options.between.gains:
            walk.add(
                *correct_input(
                    step,
                    graph,
                    nodes,
                    stream.aims[original.name],
                    first_held=options.first_held,
                    ridge=options.ridge,
                )
            )
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
            skip = skip_of(stream.reference, nodes, places, original, stream.aims)
        look = partial(
            measure,
            step,
            site,
            skip,
            normed_sum=None if skip is None else find_normed_sum(stream.reference, original),
            local=options.target == "local",
            first_held=options.first_held,
        )
        scores = [
            found.sums(nodes, stream.aims)
            for found in options.scores.get(original.name, ())
            if found.product.name in nodes
        ]
        measured = look(scores=scores)
        cancelled = options.keys.get(original.name)
        if cancelled is not None:
            measured.fit = [without_means(m, cancelled) for m in measured.fit]
        solved = solve_gated(
            measured.fit,
            ridge=options.ridge,
            gain="none" if options.method == "bias" else site.gain,
            offset=site.offset,
            confidence=options.confidence,
            fit=options.fit_of(stream.reference, original),
        )
        solved, refused = with_scores(scores, site, solved)
        walk.refusals.extend(refused)
        whole = ChannelAffine.identity(site.channels)
        if solved.gain_and_offset or solved.offset_only:
            parts = refit(graph, site, measured.fit, solved.affine, look, cancelled=cancelled)
            whole = joined(parts)
            place = output_range(graph, site.tap)
            stretch = None if place is None else solve_stretch(place, measured.extremes, whole)
            for part in parts:
                moved = stretch if part is parts[-1] else None
                change = _Change(linear=original.name, affine=part, stretch=moved)
                walk.changes.append(change)
                _apply(graph, site, change)
        if site.predictable and not options.between.runtime_ops:
            after = site.at_tap(whole)
            step.settle(after.gain, after.offset, axis=site.axis)
        walk.layers.append(layer_of(site, measured.held, solved, residual=skip is not None))
        walk.add(
            *correct_linear_at_runtime(
                step, graph, site, options.between, skip=skip, cancelled=cancelled
            )
        )
        walk.add(*correct_between(step, graph, nodes, names[middle + 1 :], options.between))
    return walk


def _apply(graph: Graph, site: Site, change: _Change) -> None:
    fold(graph, site, change.affine)
    if change.stretch is not None:
        place = output_range(graph, site.tap)
        assert place is not None
        stretch_range(graph, place, change.stretch)


def _replay(reference: Graph, quantized: Graph, changes: Sequence[Change]) -> None:
    """Repeat the changes of a walk on the caller's graph."""
    nodes = {node.name: node for node in quantized.nodes}
    originals = {node.name: node for node in reference.nodes}
    for change in changes:
        if isinstance(change, NormChange | RuntimeChange | InputChange):
            change.apply(quantized)
            continue
        site = find_site(quantized, nodes, originals[change.linear])
        assert isinstance(site, Site)
        _apply(quantized, site, change)
