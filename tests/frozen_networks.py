"""Networks with activation scales of their own: quantized, and as they would be with float weights.

Scales are powers of two, so that numbers on their grid stay exact in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qpass.choose import choose_qtable
from qpass.graph import Constant, Graph
from qpass.passes.insert_qdq import insert_qdq
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.qparams import QParams, choose_qparams
from qpass.targets import Target
from qpass.weights_float import weights_float
from tests.planning import ORT
from tests.rounded import numbers_of
from tests.small_models import Array, Feeds, feeds_of, policy_of, run_each


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A graph with all activation scales frozen: quantized, and the network to aim at."""

    reference: Graph
    graph: Graph
    aim: Graph
    plan: Plan
    numbers: Mapping[str, QParams]  # of the weights, by linear op
    activations: Mapping[str, QParams]  # by decision


def frozen(
    reference: Graph, precision: str, target: Target = ORT, *, coarse: float = 1.0
) -> Frozen:
    """Freeze the extremes of a few samples, with steps that are powers of two times `coarse`."""
    first = make_plan(reference, target, policy_of(precision, low_bit_edges=True))
    ranges = coarse_ranges(reference, first, feeds_of(reference, 8), coarse)
    policy = policy_of(precision, low_bit_edges=True, ranges=ranges)
    plan = make_plan(reference, target, policy)
    table = choose_qtable(reference, plan, {})
    graph = reference.copy()
    insert_qdq(graph, plan, table.qparams)
    return Frozen(
        reference=reference,
        graph=graph,
        aim=weights_float(reference, plan, [d for d in plan.activations() if d.pinned]),
        plan=plan,
        numbers=numbers_of(plan, table),
        activations={d.key: table.qparams[d.key] for d in plan.activations()},
    )


def coarse_ranges(
    reference: Graph, plan: Plan, feeds: Sequence[Feeds], coarse: float
) -> dict[str, tuple[float, float]]:
    """Return the range of each activation, one for all that share a scale.

    Of a tensor with two quantizers the narrower one counts.
    """
    wide_first = sorted(plan.activations(), key=lambda d: -d.spec.bits)
    leaders = {d.group: d.tensor for d in reversed(list(plan.activations())) if d.group}
    leader = {d.tensor: leaders[d.group] for d in plan.activations() if d.group}
    specs = {d.tensor: d.spec for d in wide_first}
    model = reference.to_model(taps=list(specs))
    seen = run_each(model, feeds)
    ranges = {}
    for name, spec in specs.items():
        values = np.concatenate(
            [
                (one if name in one else batch)[name].ravel()
                for one, batch in zip(seen, feeds, strict=True)
            ]
        )
        numbers = choose_qparams(spec, float(values.min()), float(values.max()))
        scale = float(np.exp2(np.ceil(np.log2(float(numbers.scale))))) * coarse
        zero = int(numbers.zero_point)
        ranges[name] = (spec.qmin - zero) * scale, (spec.qmax - zero) * scale
    return {name: ranges[leader.get(name, name)] for name in ranges}


def with_float_weights(case: Frozen) -> Graph:
    """Return the quantized graph with the float constant in place of each weight's DQ."""
    graph = case.graph.copy()
    for original in case.reference.nodes:
        node = graph.node(original.name)
        for index, tensor in enumerate(original.inputs):
            maker = graph.producer(node.inputs[index])
            if isinstance(tensor, Constant) and maker is not None:
                graph.set_input(node, index, graph.constant(tensor.name, tensor.values))
    graph.remove_unused()
    return graph


def outputs(graph: Graph, feeds: Sequence[Feeds]) -> Array:
    """Return the first output for all batches, as the file says."""
    name = graph.outputs[0].name
    return np.concatenate([found[name] for found in run_each(graph.to_model(), feeds)])


def on_the_grid(reference: Graph, precision: str, target: Target = ORT) -> Graph:
    """Return a copy with weights and biases that the integers of a precision hold exactly."""
    case = frozen(reference, precision, target)
    numbers = case.numbers
    specs = {edge.node: d.spec for d in case.plan.weights() for edge in d.edges or ()}
    graph = reference.copy()
    for node in graph.nodes:
        if node.name not in numbers:
            continue
        own, weight = numbers[node.name], np.array(node.inputs[1].values)
        axis = None if own.axis is None else own.axis % weight.ndim
        others = tuple(i for i in range(weight.ndim) if i != axis)
        largest = np.abs(weight).max(axis=others, keepdims=True)
        step = np.exp2(np.ceil(np.log2(largest / own.qmax))).astype(np.float32)
        integers = np.rint(weight / step)
        if specs[node.name].symmetric:
            integers = np.where(np.abs(weight) == largest, np.sign(weight) * own.qmax, integers)
        else:  # the ends of each channel are those of the type
            low, high = (end(weight, axis=others, keepdims=True) for end in (np.min, np.max))
            integers = np.where(
                weight == high, own.qmax, np.where(weight == low, own.qmin, integers)
            )
        graph.set_input(node, 1, graph.constant(node.inputs[1].name, integers * step))
        if len(node.inputs) > 2:
            bias = np.rint(node.inputs[2].values * 4.0) / np.float32(4.0)
            graph.set_input(node, 2, graph.constant(node.inputs[2].name, bias))
    return graph
