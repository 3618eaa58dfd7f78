"""Graphs after `insert_qdq`, biases still float: what rounding and compensation work on.

And how close such a graph is to the float one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qpass.choose import QTable
from qpass.graph import Graph
from qpass.passes.insert_qdq import insert_qdq
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.qparams import QParams
from qpass.targets import load_target
from qpass.verify.metrics import sqnr_db
from tests.small_models import feeds_of, minmax, policy_of, run_each


def quantized_at(
    reference: Graph, precision: str, *, low_bit_edges: bool = True
) -> tuple[Graph, QTable, Plan]:
    """Return the graph with min/max numbers, rounded to nearest."""
    policy = policy_of(precision, low_bit_edges=low_bit_edges)
    plan = make_plan(reference, load_target("ort-x86"), policy)
    table = minmax(reference, plan, feeds_of(reference, 8))
    graph = reference.copy()
    insert_qdq(graph, plan, table.qparams)
    return graph, table, plan


def numbers_of(plan: Plan, table: QTable) -> Mapping[str, QParams]:
    """Return the numbers of the weights by name of the op."""
    return {
        edge.node: table.qparams[decision.key]
        for decision in plan.weights()
        if decision.kind == "weight"
        for edge in decision.edges or ()
    }


def fidelity(reference: Graph, graph: Graph) -> float:
    """Return the SQNR in dB on samples that nobody has seen."""
    unseen, name = feeds_of(reference, 24, seed=99), reference.outputs[0].name
    wanted, got = (
        np.concatenate([found[name] for found in run_each(one.to_model(), unseen)])
        for one in (reference, graph)
    )
    return sqnr_db(wanted, got)
