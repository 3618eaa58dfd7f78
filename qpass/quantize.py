"""From a float graph, a plan and its numbers to the integer graph of a target."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from qpass.choose import QTable
from qpass.graph import Graph
from qpass.passes.check_biases import check_bias_scales
from qpass.passes.dynamic import make_dynamic
from qpass.passes.insert_qdq import insert_qdq
from qpass.passes.lower import lower_biases, raise_matmul_biases, sum_before_norm
from qpass.passes.part_activations import part_activations
from qpass.passes.weight_only import gather_blocks, half_scales, part_transposes
from qpass.plan import Plan
from qpass.program import Policy
from qpass.report.model import PassReport
from qpass.targets.schema import Target


def build_quantized(
    reference: Graph,
    plan: Plan,
    qtable: QTable,
    target: Target,
    policy: Policy,
    *,
    rounding: Callable[[Graph], PassReport] | None = None,
    compensation: Callable[[Graph], PassReport] | None = None,
    block_compensation: Callable[[Graph], PassReport] | None = None,
    tuning: Callable[[Graph], PassReport] | None = None,
) -> tuple[Graph, tuple[PassReport, ...]]:
    """Build the integer graph; `reference` is not changed and shares its large constants.

    The passes and their order are all here. `rounding`, `compensation`, `block_compensation` and
    `tuning` work on the graph in this order, while its biases are still float.
    """
    graph = reference.copy()
    rank = target.matmul_bias_rank
    steps: list[Callable[[], PassReport]] = [lambda: insert_qdq(graph, plan, qtable.qparams)]
    if rounding is not None:
        steps.append(lambda: rounding(graph))
    if compensation is not None:
        steps.append(lambda: compensation(graph))
    if block_compensation is not None:
        steps.append(lambda: block_compensation(graph))
    if tuning is not None:
        steps.append(lambda: tuning(graph))
    if policy.activations == "dynamic":
        steps.append(lambda: make_dynamic(graph, plan.integer_nodes()))
    if target.bias == "int32":
        steps.append(lambda: lower_biases(graph))
    if rank is not None:
        steps.append(lambda: raise_matmul_biases(graph, rank))
    if target.sum_before_norm:
        steps.append(lambda: sum_before_norm(graph))
    if target.straight_gemms and any(node.precision == "weights" for node in plan.nodes):
        steps.append(lambda: part_transposes(graph))
    if target.parts_activations:
        steps.append(lambda: part_activations(graph))
    if target.gathers_blocks:
        steps.append(lambda: gather_blocks(graph))
    if any(decision.spec.half_scale for decision in plan.decisions):
        steps.append(lambda: half_scales(graph))
    reports = []
    for step in steps:
        begin = time.perf_counter()
        report = step()
        reports.append(timed(report, time.perf_counter() - begin))
    graph.sort()
    check_bias_scales(graph)
    return graph, tuple(reports)


def timed(report: PassReport, seconds: float) -> PassReport:
    """Return `report` with its time filled in; a pass may know of more, spent before."""
    return replace(report, seconds=max(report.seconds, seconds))
