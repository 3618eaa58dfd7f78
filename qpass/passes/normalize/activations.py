"""HardSwish, written out, becomes one op; SiLU is named; a mean over an image becomes pooling."""

from __future__ import annotations

from typing import Final

from qpass.graph import Graph, Node, Tensor
from qpass.passes.normalize.folding import (
    FoldResult,
    given_input,
    integers_of,
    other_input,
    rank_of,
    scalar_of,
)
from qpass.passes.normalize.patterns import (
    is_close,
    is_supported,
    maker_of,
    replace_chain,
    scaled_sources,
)

HARD_SWISH_OPSET: Final = 14


def is_silu(graph: Graph, node: Node) -> bool:
    """True when `node` computes x * sigmoid(x): the Mul behind a Sigmoid, or Swish (opset 24)."""
    if node.op == "Swish":
        return bool(node.attrs.get("alpha", 1.0) == 1.0)
    if node.op != "Mul":
        return False
    for index in (0, 1):
        gate = maker_of(graph, node.inputs[index], "Sigmoid")
        if gate is not None and gate.inputs[0] is node.inputs[1 - index]:
            return True
    return False


def recognize_hard_swish(graph: Graph) -> FoldResult:
    """Recognize x * HardSigmoid(x) and x * clip(x + 3, 0, 6) / 6, divided at any place."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op not in ("Mul", "Div") or not node.outputs:
            continue
        x = _gated_source(graph, node) or _divided_source(graph, node)
        if x is not None and is_supported(graph, result, "HardSwish", HARD_SWISH_OPSET, node):
            replace_chain(graph, node, "HardSwish", [x], {})
            result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def _gated_source(graph: Graph, node: Node) -> Tensor | None:
    """Return x when `node` is x * gate(x)."""
    for index in (0, 1) if node.op == "Mul" else ():
        x: Tensor = node.inputs[index]
        if _is_hard_gate(graph, node.inputs[1 - index], x):
            return x
    return None


def _divided_source(graph: Graph, node: Node) -> Tensor | None:
    """Return x when `node` is (x * clip(x + 3, 0, 6)) / 6, or (x / 6) * clip(x + 3, 0, 6)."""
    for source, factor in scaled_sources(graph, node.outputs[0]):
        product = maker_of(graph, source, "Mul") if is_close(factor, 1 / 6) else None
        for index in (0, 1) if product is not None else ():
            assert product is not None
            x: Tensor = product.inputs[index]
            if _is_relu6_of_shift(graph, product.inputs[1 - index], x):
                return x
    for index in (0, 1) if node.op == "Mul" else ():
        for source, factor in scaled_sources(graph, node.inputs[index]):
            sixth = is_close(factor, 1 / 6)
            if sixth and _is_relu6_of_shift(graph, node.inputs[1 - index], source):
                return source
    return None


def _is_hard_gate(graph: Graph, gate: Tensor, x: Tensor) -> bool:
    """True for HardSigmoid(x) with slope 1/6, and for clip(x + 3, 0, 6) / 6."""
    maker = maker_of(graph, gate, "HardSigmoid")
    if maker is not None:
        slope, shift = maker.attrs.get("alpha", 0.2), maker.attrs.get("beta", 0.5)
        return maker.inputs[0] is x and is_close(slope, 1 / 6) and is_close(shift, 0.5)
    return any(
        is_close(factor, 1 / 6) and _is_relu6_of_shift(graph, source, x)
        for source, factor in scaled_sources(graph, gate)
    )


def _is_relu6_of_shift(graph: Graph, tensor: Tensor, x: Tensor) -> bool:
    """True when `tensor` is clip(x + 3, 0, 6)."""
    clip = maker_of(graph, tensor, "Clip")
    low, high = (None, None) if clip is None else (given_input(clip, 1), given_input(clip, 2))
    if clip is None or low is None or high is None:
        return False
    add = maker_of(graph, clip.inputs[0], "Add")
    three = other_input(add, x) if add is not None and any(t is x for t in add.inputs) else None
    return (
        three is not None
        and scalar_of(three) == 3.0
        and scalar_of(low) == 0.0
        and scalar_of(high) == 6.0
    )


def recognize_global_average_pool(graph: Graph) -> FoldResult:
    """Turn ReduceMean over the spatial axes of an image into GlobalAveragePool."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op != "ReduceMean" or rank_of(node.inputs[0]) != 4:
            continue
        axes = integers_of(node, "axes", 1)
        if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            continue
        keep, out = node.attrs.get("keepdims", 1), node.outputs[0]
        graph.drop_input(node, 1)
        node.op, node.attrs = "GlobalAveragePool", {}
        if not keep:
            shape = None if out.shape is None else [*out.shape, 1, 1]
            pooled = graph.variable(f"{node.name}_pooled", out.dtype, shape)
            graph.set_output(node, 0, pooled)
            flatten = graph.make("Flatten", [pooled], [out], name=f"{node.name}_flatten")
            graph.add(flatten, after=node)
        result.changed += 1
    return result
