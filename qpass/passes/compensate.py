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
    Samples are held out. Channels keep a correction only where it helps there, and the whole is
    kept only where the model's outputs are closer to the float model's there; else offsets alone
    are tried, else nothing is done.
Preconditions
    `insert_qdq` has run, biases are still float. Names of the two graphs agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from qpass.graph import Constant, Graph, Node
from qpass.passes.channel_affine import Array, GatedAffine, PairMoments, merge_all, solve_gated
from qpass.passes.fold_affine import Site, find_site, fold
from qpass.program import Progress
from qpass.report.model import PassReport, Refusal
from qpass.stream import Pair, Step, Stream
from qpass.submodel import Feeds, Submodel
from qpass.verify.metrics import CAP_DB, ErrorMeter

Method = Literal["cwac", "bias"]
Target = Literal["global", "local"]
GROUPS: Final = 8
POSITIONS: Final = 1024


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """Result of `compensate`: `method` is what was kept, "none" when nothing helped."""

    report: PassReport
    layers: tuple[LayerCompensation, ...]
    method: Literal["cwac", "bias", "none"]
    sqnr_db_before: float  # of the model's outputs on held-out samples, mean over outputs
    sqnr_db_after: float


@dataclass(slots=True, kw_only=True)
class _Walk:
    """One walk over the model with one method, on its own copy of the quantized graph."""

    folds: list[tuple[str, GatedAffine]] = field(default_factory=list)
    layers: list[LayerCompensation] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    sqnr_db: float = -math.inf


def compensate(
    reference: Graph,
    quantized: Graph,
    batches: Sequence[Feeds],
    *,
    method: Method = "cwac",
    target: Target = "global",
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
        method: gain and offset, or the offset alone.
        target: see the docstring of the module.
        memory_bytes: activations above this go to files.
        holdout: share of the batches that judge; at least one.
        ridge: pull of the gains towards 1, see `solve_channel_affine`.
        threads: threads of each session.
        progress: told after each unit.
    """
    held = min(max(1, round(holdout * len(batches))), len(batches) - 1)
    if held < 1:
        reason = "there is only one batch: nothing could be held out to judge by"
        refusal = Refusal(rule="compensate", where="model", reason=reason)
        report = PassReport(name="compensate", changed=0, refusals=(refusal,))
        return Compensation(
            report=report, layers=(), method="none", sqnr_db_before=math.nan, sqnr_db_after=math.nan
        )
    first_held = len(batches) - held
    refusals: list[Refusal] = []
    before: float | None = None
    methods: tuple[Method, ...] = ("cwac", "bias") if method == "cwac" else ("bias",)
    for candidate in methods:
        trial = quantized.copy()
        with Stream(
            reference,
            trial,
            batches,
            memory_bytes=memory_bytes,
            threads=threads,
            stage=f"compensate ({candidate})",
            progress=progress,
        ) as stream:
            walk = _walk(stream, candidate, target, first_held, ridge, confidence)
            wanted = [outputs for outputs, _ in stream.outputs()][first_held:]
            walk.sqnr_db = _sqnr_db(wanted, [got for _, got in stream.outputs()][first_held:])
            if before is None:
                before = _plain_sqnr_db(quantized, batches[first_held:], wanted, threads)
        if walk.sqnr_db > before:
            _apply(reference, quantized, walk.folds)
            report = PassReport(
                name="compensate",
                changed=len(walk.folds),
                refusals=(*refusals, *walk.refusals),
            )
            return Compensation(
                report=report,
                layers=tuple(walk.layers),
                method=candidate,
                sqnr_db_before=before,
                sqnr_db_after=walk.sqnr_db,
            )
        reason = (
            f"the outputs on held-out samples would be at {walk.sqnr_db:.2f} dB "
            f"instead of {before:.2f} dB"
        )
        refusals.append(Refusal(rule=f"compensate {candidate}", where="model", reason=reason))
    assert before is not None
    return Compensation(
        report=PassReport(name="compensate", changed=0, refusals=tuple(refusals)),
        layers=(),
        method="none",
        sqnr_db_before=before,
        sqnr_db_after=before,
    )


def _walk(
    stream: Stream, method: Method, target: Target, first_held: int, ridge: float, confidence: float
) -> _Walk:
    """Fit and fold every linear op of the stream's quantized graph."""
    walk = _Walk()
    nodes = {node.name: node for node in stream.quantized.nodes}
    originals = {node.name: node for node in stream.reference.nodes}
    places = {node.name: i for i, node in enumerate(stream.reference.nodes)}
    for step in stream:
        if step.unit.linear is None:
            continue
        original = originals[step.unit.linear]
        site = find_site(stream.quantized, nodes, original)
        if isinstance(site, str):
            walk.refusals.append(Refusal(rule="compensate", where=original.name, reason=site))
            continue
        walk.refusals.extend(
            Refusal(rule="compensate", where=original.name, reason=reason)
            for reason in site.reasons
        )
        skip = _skip_of(stream, nodes, places, original) if target == "global" else None
        fit, held = _measure(step, site, skip, target, first_held)
        solved = solve_gated(
            fit,
            ridge=ridge,
            gain="none" if method == "bias" else site.gain,
            offset=site.offset,
            confidence=confidence,
        )
        if solved.gain_and_offset or solved.offset_only:
            fold(stream.quantized, site, solved.affine)
            walk.folds.append((original.name, solved))
        walk.layers.append(_layer(site, held, solved, residual=skip is not None))
    return walk


def _apply(reference: Graph, quantized: Graph, folds: list[tuple[str, GatedAffine]]) -> None:
    """Repeat the folds of a walk on the caller's graph."""
    nodes = {node.name: node for node in quantized.nodes}
    originals = {node.name: node for node in reference.nodes}
    for name, solved in folds:
        site = find_site(quantized, nodes, originals[name])
        assert isinstance(site, Site)
        fold(quantized, site, solved.affine)


def _measure(
    step: Step, site: Site, skip: Pair | None, target: Target, first_held: int
) -> tuple[list[PairMoments], PairMoments]:
    """Run the unit; return the moments of the batches to fit and of those held out."""
    fit, held = list[PairMoments](), PairMoments.empty(site.channels)
    also = () if skip is None else (skip,)
    for tap in step.taps(site.tap, local=target == "local", also=also):
        got = thinned(tap.quantized)
        wanted = thinned(tap.float if tap.local is None else tap.local)
        for skip_float, skip_quantized in tap.also:
            wanted = wanted + (thinned(skip_float) - thinned(skip_quantized))
        parts = min(GROUPS, len(got))
        groups = [
            PairMoments.of(*pair, axis=site.axis)
            for pair in zip(np.array_split(got, parts), np.array_split(wanted, parts), strict=True)
        ]
        if tap.batch < first_held:
            fit.extend(groups)
        else:
            held = held.merge(merge_all(groups))
    return fit, held


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
    stream: Stream, nodes: dict[str, Node], places: dict[str, int], linear: Node
) -> Pair | None:
    """Return the other operand of the residual Add behind `linear`, if it is known by then.

    Of two branches that meet, the one that runs later is the one to correct the sum.
    """
    graph, out = stream.reference, linear.outputs[0]
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
    if maker is not None and places[maker.name] > places[linear.name]:
        return None
    twin = nodes.get(add.name)
    if twin is None or other.shape != out.shape:
        return None
    return Pair(float_name=other.name, quantized_name=twin.inputs[1 - index].name)


def _layer(
    site: Site, held: PairMoments, solved: GatedAffine, *, residual: bool
) -> LayerCompensation:
    identity = type(solved.affine).identity(site.channels)
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
    )


def _ratio_db(signal: float, noise: float) -> float:
    if noise <= 0.0 or signal <= 0.0:
        return CAP_DB if noise <= 0.0 else -CAP_DB
    return min(CAP_DB, 10.0 * math.log10(signal / noise))


def _plain_sqnr_db(
    quantized: Graph, batches: Sequence[Feeds], wanted: Sequence[Feeds], threads: int | None
) -> float:
    names = list(wanted[0])
    whole = Submodel(quantized, batches[0], names, threads=threads)
    return _sqnr_db(wanted, [whole.run(batch) for batch in batches])


def _sqnr_db(wanted: Sequence[Feeds], got: Sequence[Feeds]) -> float:
    """Return the mean over the outputs of their SQNR over all batches."""
    values = []
    for name in wanted[0]:
        meter = ErrorMeter()
        for left, right in zip(wanted, got, strict=True):
            meter.update(left[name], right[name])
        values.append(meter.sqnr_db)
    return float(np.mean(values))
