"""The levels of each layer that a search for bits chooses from, and what each weighs and rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.bits import raised
from qpass.choose import QTable
from qpass.dtypes import storage_for
from qpass.embeddings import embeddings, tied_tables, weight_place
from qpass.graph import Constant, Node, array_of
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.program import Policy, Precision
from qpass.qparams import QParams, fake_quantize
from qpass.range_stage import qtable_of
from qpass.run import Run
from qpass.sensitivity import LayerError, Rounded, Rounder
from qpass.units import is_weighted

Array = NDArray[Any]

FLOAT_BITS: Final = 32
FREE_BIT: Final = 2.0**-16  # what a bit counts that the file does not store, in bytes
STORED: Final = 4  # bits of the smallest type that weights are stored in


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A plan with each layer at one of its levels, and its numbers."""

    policy: Policy
    plan: Plan
    qtable: QTable


def levels_of(run: Run) -> dict[str, list[Precision | None]]:
    """Return the levels of every layer that the plan quantizes, lowest first.

    Layers whose bits the user has set keep them. Weights of 2 and 3 bits may have the 4 that they
    are stored in. Where bytes are the cost, two more kinds of ops are layers. Embeddings: what a
    look-up reads takes no time worth counting; one that is tied to another layer has the bits of
    the plan, for its table is not its own. Products of activations of less than 8 bits may have 8:
    nothing of them is in the file, so the first bits go there.
    """
    assert run.graph is not None
    assert run.plan is not None
    planned = {node.name: node for node in run.plan.nodes}
    weighted = {node.name for node in run.graph.nodes if is_weighted(node)}
    tables: set[str] = set()
    if run.options.mixed_cost == "size":
        tied = {**tied_tables(run.graph, weighted), **run.policy.tied}
        tables = embeddings(run.graph).keys() - tied.keys()
    found: dict[str, list[Precision | None]] = {}
    for node in run.graph.nodes:
        bits = planned[node.name].bits
        if not bits:
            continue
        lowest = Precision.parse(bits)
        high = raised(lowest)
        # Bits of activations weigh nothing in the file, so they come before those of weights.
        between = replace(lowest, activation=high.activation)
        stored = raised(between, STORED)
        own: list[Precision | None] = list(dict.fromkeys([lowest, between, stored, high]))
        if node.name in weighted | tables:
            own.append(None)
        elif run.options.mixed_cost != "size" or not is_product(node) or len(own) == 1:
            continue
        else:
            own = [lowest, high]  # of activations alone: weights of a product are none
        found[node.name] = own if run.policy.own_bits(node.name) is None else [lowest]
    return found


def is_product(node: Node) -> bool:
    """True for a MatMul of two activations."""
    return node.op == "MatMul" and not any(isinstance(t, Constant) for t in node.inputs)


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


def elements_of(node: Node) -> int:
    """Return the number of weights of a layer; 0 of a product of activations."""
    return 0 if is_product(node) else int(np.prod(node.inputs[weight_place(node)].shape))


def rounder_of(
    levels: Mapping[str, Sequence[Precision | None]], drafts: Sequence[Draft]
) -> Rounder:
    """Return a function that rounds a layer as a plan with this level would do it."""
    keys = [_keys(draft.plan) for draft in drafts]
    resident = [
        {d.tensor: d.key for d in draft.plan.activations() if d.edges is None} for draft in drafts
    ]

    def rounded(node: Node, level: Precision) -> Rounded:
        number, place = levels[node.name].index(level), weight_place(node)
        table, own, everywhere = drafts[number].qtable.qparams, keys[number], resident[number]
        weight: Array | None = None
        places: tuple[int, ...] = (0, 1)
        if not is_product(node):
            weight = array_of(node.inputs[place])
            weight = fake_quantize(weight, table[own[node.name, place]])
            places = (1 - place,)
        if level.activation is None:
            return Rounded(weight=weight)
        names = {p: own.get((node.name, p), everywhere.get(node.inputs[p].name)) for p in places}
        inputs = {
            p: partial(_rounded, numbers=table[key]) for p, key in names.items() if key is not None
        }
        return Rounded(weight=weight, inputs=inputs)

    return rounded


def _rounded(values: Array, numbers: QParams) -> Array:
    return fake_quantize(values, numbers)


def _keys(plan: Plan) -> dict[tuple[str, int], str]:
    return {(e.node, e.index): d.key for d in plan.decisions for e in d.edges or ()}


def sizes_of(node: Node, layer: LayerError) -> Array:
    """Return the bytes of a layer's weight at each level, scales not counted.

    Bits of activations, and those of weights that the file has no smaller type for, count next to
    nothing, so that few are kept where they do.
    """
    weights = [
        FLOAT_BITS if level is None else storage_for(level.weight, signed=True).bits
        for level in layer.levels
    ]
    activations = [
        FLOAT_BITS if level is None or level.activation is None else level.activation
        for level in layer.levels
    ]
    wanted = [FLOAT_BITS if level is None else level.weight for level in layer.levels]
    rest = (np.array(activations, np.float64) + wanted) * FREE_BIT
    return np.array(weights, np.float64) * elements_of(node) / 8.0 + rest
