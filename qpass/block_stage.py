"""Compensation of a whole run: what folds away first, what runs on top of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from qpass.choose import QTable
from qpass.graph import Graph
from qpass.passes.block_fit import IntegerSpecs
from qpass.passes.compensate_blocks import compensate_blocks
from qpass.program import Precision
from qpass.report.model import PassReport
from qpass.run import Run
from qpass.targets.schema import Target, with_bits

Built = tuple[QTable, Graph, tuple[PassReport, ...]]
Pass = Callable[[Graph], PassReport]
BLOCK_METHODS: Final = ("qwt", "nbc")  # methods whose ops run


def build_compensated(
    run: Run, build: Callable[[Pass | None, Pass | None], Built], fold: Pass
) -> Built:
    """Build the quantized graph with the compensation that the user asked for.

    A correction of channels can take away what made a block's error predictable. Where nothing
    helps on top of it, the blocks are tried alone, and the better one of the two stays.

    Args:
        run: its compensations are filled in.
        build: makes the graph with the given channel-wise and block-wise passes.
        fold: the channel-wise pass.
    """
    if run.options.compensate not in BLOCK_METHODS:
        return build(fold, None)

    def add(graph: Graph) -> PassReport:
        return _compensate_blocks(run, graph)

    built = build(fold, add)
    folded, added = run.compensation, run.block_compensation
    assert folded is not None
    assert added is not None
    if added.method != "none" or folded.method == "none" or folded.verdict is None:
        return built
    alone = build(None, add)
    assert run.block_compensation is not None
    verdict = run.block_compensation.verdict
    better = verdict is not None and verdict.helps and verdict.after_db > folded.verdict.after_db
    if verdict is None or not better:
        run.block_compensation = added
        return built
    run.compensation = None
    note = (
        f"{run.options.compensate} alone: {verdict.after_db:.1f} dB on held-out samples, "
        f"{folded.method} {folded.verdict.after_db:.1f} dB, and nothing on top of that"
    )
    run.notes = [*(old for old in run.notes if old != note), note]
    return alone


def _compensate_blocks(run: Run, graph: Graph) -> PassReport:
    assert run.graph is not None
    result = compensate_blocks(
        run.graph,
        graph,
        run.batches,
        method="nbc" if run.options.compensate == "nbc" else "qwt",
        integer=integer_specs(run.target, run.policy.precision),
        aim=run.aim,
        judges=run.judges,
        memory_bytes=run.options.memory_bytes // 2,
        threads=run.options.jobs,
        progress=run.progress,
    )
    run.block_compensation = result
    return result.report


def integer_specs(target: Target, precision: Precision) -> IntegerSpecs:
    """Return the integers that `target` computes a compensation with.

    Weights have 8 bits at any precision: there are few of them, and what they correct is small.
    """
    weights = {}
    for op in ("MatMul", "Conv"):
        rule = target.rule_for(op)
        weights[op] = None if rule is None or rule.role != "linear" else rule.weight
    matmul = weights["MatMul"]
    if matmul is not None and not target.per_channel_matmul:
        matmul = replace(matmul, granularity="per_tensor", axis=None)
    return IntegerSpecs(
        activation=with_bits(target.activation, precision.activation or 8),
        matmul=matmul,
        conv=weights["Conv"],
    )
