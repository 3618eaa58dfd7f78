"""The levels of each layer that a search for bits chooses from, and what each weighs and rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.bits import raised
from qpass.choose import QTable
from qpass.dtypes import storage_for
from qpass.embeddings import embeddings, tied_tables, weight_place
from qpass.graph import Node, array_of
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.program import Policy, Precision
from qpass.qparams import fake_quantize
from qpass.range_stage import qtable_of
from qpass.run import Run
from qpass.sensitivity import LayerError
from qpass.units import is_weighted

Array = NDArray[Any]

FLOAT_BITS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A plan with each layer at one of its levels, and its numbers."""

    policy: Policy
    plan: Plan
    qtable: QTable


def levels_of(run: Run) -> dict[str, list[Precision | None]]:
    """Return the levels of every layer that the plan quantizes, lowest first.

    Layers whose bits the user has set keep them. Embeddings are layers where bytes are the cost:
    what a look-up reads takes no time worth counting, and one that is tied to another layer has the
    bits of the plan, for its table is not its own.
    """
    assert run.graph is not None
    assert run.plan is not None
    planned = {node.name: node for node in run.plan.nodes}
    weighted = {node.name for node in run.graph.nodes if is_weighted(node)}
    free: set[str] = set()
    if run.options.mixed_cost == "size":
        free = embeddings(run.graph).keys() - tied_tables(run.graph, weighted).keys()
    found: dict[str, list[Precision | None]] = {}
    for node in run.graph.nodes:
        bits = planned[node.name].bits
        if not bits or node.name not in weighted | free:
            continue
        lowest = Precision.parse(bits)
        if run.policy.own_bits(node.name) is not None:
            found[node.name] = [lowest]
            continue
        found[node.name] = list(dict.fromkeys([lowest, raised(lowest), None]))
    return found


def drafts_of(run: Run, levels: Mapping[str, Sequence[Precision | None]]) -> list[Draft]:
    """Return a plan and its numbers for each number of a level, layers with fewer at their last."""
    assert run.graph is not None
    drafts: list[Draft] = []
    for number in range(max((len(own) for own in levels.values()), default=0)):
        bits = {name: own[min(number, len(own) - 1)] for name, own in levels.items()}
        given = {name: level for name, level in bits.items() if level is not None}
        if not given:
            break
        policy = replace(run.policy, node_bits=given)
        plan = make_plan(run.graph, run.target, policy)
        qtable = qtable_of(run, plan)
        drafts.append(Draft(policy=policy, plan=plan, qtable=qtable))
    return drafts


def weight_of(node: Node) -> Array:
    """Return the weight of a layer."""
    return array_of(node.inputs[weight_place(node)])


def rounder_of(
    levels: Mapping[str, Sequence[Precision | None]], drafts: Sequence[Draft]
) -> Callable[[Node, Precision], tuple[Array, Callable[[Array], Array]]]:
    """Return a function that rounds a layer as a plan with this level would do it."""
    keys = [_keys(draft.plan) for draft in drafts]
    resident = [
        {d.tensor: d.key for d in draft.plan.activations() if d.edges is None} for draft in drafts
    ]

    def rounded(node: Node, level: Precision) -> tuple[Array, Callable[[Array], Array]]:
        number, place = levels[node.name].index(level), weight_place(node)
        table = drafts[number].qtable.qparams
        weight = fake_quantize(weight_of(node), table[keys[number][node.name, place]])
        if level.activation is None:
            return weight, lambda x: x
        key = keys[number].get((node.name, 0), resident[number].get(node.inputs[0].name))
        if key is None:
            return weight, lambda x: x
        return weight, lambda x: fake_quantize(x, table[key])

    return rounded


def _keys(plan: Plan) -> dict[tuple[str, int], str]:
    return {(e.node, e.index): d.key for d in plan.decisions for e in d.edges or ()}


def sizes_of(node: Node, layer: LayerError) -> Array:
    """Return the bytes of a layer's weight at each level, scales not counted."""
    elements = weight_of(node).size
    bits = [
        FLOAT_BITS if level is None else storage_for(level.weight, signed=True).bits
        for level in layer.levels
    ]
    return np.array(bits, np.float64) * elements / 8.0
