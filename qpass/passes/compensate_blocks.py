"""Block-wise compensation at run time: QwT and NBC.

What it does
    Walks the residual blocks in execution order. For each, it fits what is missing of the block's
    output as a function of the block's input, and adds the ops that compute it to the graph. What
    lies behind sees the corrected output. ``qwt`` fits a linear map, ``nbc`` one between
    logarithms.
What it costs
    Unlike channel-wise compensation, which folds away, this runs: a matrix of weights and two
    (qwt) or sixteen (nbc) ops a block. The result says how much.
Why it never makes things worse
    Samples are held out. A block keeps a map only where it lowers the error on samples that it was
    not fitted to (each part of the samples is left out once), and the whole is kept only where the
    model's outputs are surely closer to the float model's on samples that nothing was fitted to.
Preconditions
    `insert_qdq` has run, biases are still float. Names of the two graphs agree.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from qpass.graph import Graph, Node
from qpass.passes.block_fit import BlockFit, IntegerSpecs, Method, fit_block
from qpass.passes.block_graph import (
    DEQUANTIZE,
    QUANTIZE,
    Place,
    attach,
    bias_before,
    find_place,
    shift,
)
from qpass.passes.block_linear import RIDGES, Kind
from qpass.passes.block_rows import collect_rows
from qpass.passes.blocks import Block, find_blocks
from qpass.passes.fold_affine import Site, fold
from qpass.passes.held_out import count_held
from qpass.passes.model_gate import Verdict
from qpass.passes.model_verdict import model_verdict
from qpass.program import Progress
from qpass.report.model import PassReport, Refusal
from qpass.stream import Pair, Step, Stream
from qpass.submodel import Feeds
from qpass.units import split_into_units

KEEP_SHARE: Final = 8  # of the memory budget: rows, and moments
KEEP_BYTES: Final = 64 << 20  # of rows at most: more of them change no fit


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """What happened to one block.

    `r2` is the share of the squared error of the block's output that the map removes beyond the
    best offset, and `gain` the share that it removes in all, on samples that it was not fitted to.
    """

    name: str
    kind: Kind
    r2: float
    gain: float
    integer: bool
    nodes: tuple[str, ...]  # ops that compute, without Q and DQ
    parameters: int
    macs: int  # a sample


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCompensation:
    """Result of `compensate_blocks`; `method` is "none" when nothing surely helped.

    `added_nodes` counts the ops that compute, `added_macs` are those of a sample.
    """

    report: PassReport
    blocks: tuple[BlockReport, ...]
    added_nodes: int
    added_parameters: int
    added_macs: int
    method: Literal["qwt", "nbc", "none"]
    verdict: Verdict | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """What was done at one block."""

    place: Place
    fit: BlockFit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    method: Method
    integer: IntegerSpecs | None
    memory_bytes: int
    first_held: int
    ridges: Sequence[float]


@dataclass(slots=True, kw_only=True)
class _Walk:
    changes: list[_Change] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def compensate_blocks(
    reference: Graph,
    quantized: Graph,
    batches: Sequence[Feeds],
    *,
    method: Method = "qwt",
    integer: IntegerSpecs | None = None,
    memory_bytes: int = 1 << 30,
    holdout: float = 0.25,
    ridges: Sequence[float] = RIDGES,
    threads: int | None = None,
    progress: Progress | None = None,
    aim: Graph | None = None,
    judges: Sequence[Feeds] = (),
) -> BlockCompensation:
    """Add a compensation to every residual block of `quantized` where it helps.

    Args:
        reference: the float graph; not changed.
        quantized: the same graph after `insert_qdq`, biases in float; changed in place.
        batches: calibration inputs by name; the last ones are held out.
        method: ``qwt`` or ``nbc``.
        integer: the integers of the target; None: the maps of QwT run in float.
        memory_bytes: activations above this go to files.
        holdout: share of the batches that judge; at least one.
        ridges: see `solve_gated_linear`.
        threads: threads of each session.
        progress: told after each block.
        aim: graph to come close to, see `Stream`; None: `reference`.
        judges: batches that no pass was fitted to, which judge the model; without them those held
            out do, which judge each block.
    """
    begin = time.perf_counter()
    found = find_blocks(reference)
    refusals = list(found.refusals)
    held = count_held(batches, holdout)
    if held < 1:
        reason = "there is only one batch: nothing could be held out to judge by"
        refusals.append(Refusal(rule=method, where="model", reason=reason))
        return _nothing(refusals, None, begin)
    if not found.blocks:
        reason = "the model has no residual block"
        refusals.append(Refusal(rule=method, where="model", reason=reason))
        return _nothing(refusals, None, begin)
    options = _Options(
        method=method,
        integer=integer,
        memory_bytes=memory_bytes,
        first_held=len(batches) - held,
        ridges=ridges,
    )
    ends = frozenset(block.add for block in found.blocks)
    with Stream(
        reference,
        quantized.copy(),
        batches,
        memory_bytes=memory_bytes,
        threads=threads,
        stage=f"compensate ({method})",
        progress=progress,
        units=split_into_units(reference, ends),
        aim=aim,
    ) as stream:
        walk = _walk(stream, {block.output: block for block in found.blocks}, options)
        refusals += walk.refusals
        if not walk.changes:
            return _nothing(refusals, None, begin, tuple(walk.blocks))
        verdict = model_verdict(
            stream, quantized, first_held=options.first_held, judges=judges, threads=threads
        )
    if not verdict.helps:
        reason = f"no sure improvement: {verdict.sentence}"
        refusals.append(Refusal(rule=method, where="model", reason=reason))
        return _nothing(refusals, verdict, begin, tuple(walk.blocks))
    for change in walk.changes:
        _apply(reference, quantized, change)
    return BlockCompensation(
        report=PassReport(
            name="compensate_blocks",
            changed=len(walk.changes),
            refusals=tuple(refusals),
            seconds=time.perf_counter() - begin,
        ),
        blocks=tuple(walk.blocks),
        added_nodes=sum(len(block.nodes) for block in walk.blocks),
        added_parameters=sum(block.parameters for block in walk.blocks),
        added_macs=sum(block.macs for block in walk.blocks),
        method=method,
        verdict=verdict,
    )


def _nothing(
    refusals: list[Refusal],
    verdict: Verdict | None,
    begin: float,
    blocks: tuple[BlockReport, ...] = (),
) -> BlockCompensation:
    return BlockCompensation(
        report=PassReport(
            name="compensate_blocks",
            changed=0,
            refusals=tuple(refusals),
            seconds=time.perf_counter() - begin,
        ),
        blocks=blocks,
        added_nodes=0,
        added_parameters=0,
        added_macs=0,
        method="none",
        verdict=verdict,
    )


def _walk(stream: Stream, blocks: Mapping[str, Block], options: _Options) -> _Walk:
    """Fit and add the map of every block of the stream's quantized graph."""
    walk = _Walk()
    for step in stream:
        block = blocks.get(step.unit.tap or "")
        if block is None:
            continue
        done = _compensate_block(stream, step, block, options)
        if isinstance(done, str):
            walk.refusals.append(Refusal(rule=options.method, where=block.add, reason=done))
            continue
        walk.changes.append(done[0])
        walk.blocks.append(done[1])
    return walk


def _compensate_block(
    stream: Stream, step: Step, block: Block, options: _Options
) -> tuple[_Change, BlockReport] | str:
    """Fit one block and edit the stream's graph; return why not where nothing helps."""
    graph = stream.quantized
    nodes = {node.name: node for node in graph.nodes}
    place = find_place(graph, nodes, block, integer=options.integer is not None)
    if isinstance(place, str):
        return place
    limit = options.memory_bytes // KEEP_SHARE
    rows = collect_rows(
        step.taps(place.sum, also=(Pair(float_name=place.x_float, quantized_name=place.x),)),
        axis=block.axis,
        first_held=options.first_held,
        batches=len(stream.batches),
        keep_bytes=min(limit, KEEP_BYTES),
        moments_bytes=limit,
    )
    if isinstance(rows, str):
        return rows
    free_offset = _bias_of(stream.reference, graph, nodes, place) is not None
    fit = fit_block(
        options.method,
        place,
        rows,
        integer=options.integer,
        ridges=options.ridges,
        has_bias=free_offset,
    )
    if isinstance(fit, str):
        return fit
    change = _Change(place=place, fit=fit)
    report = BlockReport(
        name=block.add,
        kind=fit.kind,
        r2=fit.r2,
        gain=fit.gain,
        integer=fit.integer,
        nodes=_apply(stream.reference, graph, change),
        parameters=0 if fit.mapped is None else fit.mapped.parameters(free_offset=free_offset),
        macs=fit.macs_per_row * rows.rows_per_sample,
    )
    return change, report


def _apply(reference: Graph, graph: Graph, change: _Change) -> tuple[str, ...]:
    """Edit the graph; return the names of the ops that compute which it has got."""
    nodes = {node.name: node for node in graph.nodes}
    place, fit = change.place, change.fit
    add = nodes[place.block.add]
    site = _bias_of(reference, graph, nodes, place)
    if fit.kind == "offset":
        assert site is not None
        fold(graph, site, shift(fit.offset))
        return ()
    assert fit.mapped is not None
    z = fit.mapped.build(graph, graph.tensors()[place.x], add, site)
    attach(graph, add, z, numbers=fit.numbers)
    graph.sort()
    return tuple(
        node.name
        for node in graph.nodes
        if node.name not in nodes and node.op not in (QUANTIZE, DEQUANTIZE)
    )


def _bias_of(
    reference: Graph, graph: Graph, nodes: Mapping[str, Node], place: Place
) -> Site | None:
    """Return the bias that can take an offset of the block's output, if there is one."""
    if place.integer_sum or place.block.axis != -1 or place.block.last is None:
        return None
    return bias_before(graph, nodes, reference.node(place.block.last), nodes[place.block.add])
