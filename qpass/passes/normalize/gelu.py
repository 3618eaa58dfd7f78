"""GELU, written out with Erf or Tanh, becomes Gelu.

    erf form    0.5 x (1 + erf(x / sqrt 2))
    tanh form   0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

The factor 0.5 stands anywhere: at x, at the sum, inside of the sum, or at the end.
Reference: Hendrycks and Gimpel, Gaussian Error Linear Units, https://arxiv.org/abs/1606.08415
"""

from __future__ import annotations

import math
from typing import Final

from qpass.graph import Graph, Node, Tensor
from qpass.passes.normalize.folding import FoldResult, other_input, scalar_of, sole_reader
from qpass.passes.normalize.patterns import (
    factors_of,
    is_close,
    is_supported,
    maker_of,
    replace_chain,
    scaled_sources,
    split_factors,
)

GELU_OPSET: Final = 20
TANH_INNER: Final = math.sqrt(2.0 / math.pi)
TANH_CUBIC: Final = 0.044715


def recognize_gelu(graph: Graph) -> FoldResult:
    """Replace the chains around Erf and Tanh that are GELU by one node."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op not in ("Erf", "Tanh") or not node.outputs:
            continue
        x = _erf_source(graph, node) if node.op == "Erf" else _tanh_source(graph, node)
        last = None if x is None else _last_node(graph, node, x)
        if x is None or last is None or not is_supported(graph, result, "Gelu", GELU_OPSET, last):
            continue
        replace_chain(graph, last, "Gelu", [x], _attributes(node))
        result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def _attributes(core: Node) -> dict[str, str]:
    return {"approximate": "tanh"} if core.op == "Tanh" else {}


def _last_node(graph: Graph, core: Node, x: Tensor) -> Node | None:
    """Return the node where 0.5 x (1 + core) is complete, None when it never is."""
    weight, current = 1.0, core.outputs[0]
    reader = sole_reader(graph, current)
    if reader is not None and reader.op == "Mul":
        other = other_input(reader, current)
        factor = None if other is None else scalar_of(other)
        if factor is None:
            return None
        weight, current = factor, reader.outputs[0]
        reader = sole_reader(graph, current)
    other = other_input(reader, current) if reader is not None and reader.op == "Add" else None
    if reader is None or other is None or not is_close(scalar_of(other), weight):
        return None
    number, multiplied = weight, False  # what stands before (1 + core) so far, and whether x does
    while not (multiplied and is_close(number, 0.5)):
        current = reader.outputs[0]
        reader = sole_reader(graph, current)
        other = None if reader is None else other_input(reader, current)
        if reader is None or other is None or reader.op not in ("Mul", "Div"):
            return None
        factor, tensors = split_factors(factors_of(graph, other, whole=x))
        if reader.op == "Div":
            if tensors or not factor or reader.inputs[0] is not current:
                return None
            factor = 1.0 / factor
        if tensors:
            if multiplied or len(tensors) != 1 or tensors[0] is not x:
                return None
            multiplied = True
        number *= factor
    return reader


def _erf_source(graph: Graph, node: Node) -> Tensor | None:
    for source, factor in scaled_sources(graph, node.inputs[0]):
        if is_close(factor, math.sqrt(0.5)):
            return source
    return None


def _tanh_source(graph: Graph, node: Node) -> Tensor | None:
    """Return x of tanh(sqrt(2 / pi) (x + 0.044715 x^3)), in the forms that exporters write."""
    for inner, factor in scaled_sources(graph, node.inputs[0]):
        add = maker_of(graph, inner, "Add") if is_close(factor, TANH_INNER) else None
        for index in (0, 1) if add is not None else ():
            assert add is not None
            x, cubic = add.inputs[index], add.inputs[1 - index]
            weight, cube = split_factors(factors_of(graph, cubic, whole=x))
            if is_close(weight, TANH_CUBIC) and len(cube) == 3 and all(t is x for t in cube):
                return x
    return _factored_tanh_source(graph, node)


def _factored_tanh_source(graph: Graph, node: Node) -> Tensor | None:
    """Return x of tanh(x sqrt(2 / pi) (1 + 0.044715 x^2)), with the factors in any place."""
    number, tensors = split_factors(factors_of(graph, node.inputs[0]))
    if len(tensors) != 2:
        return None
    for index in (0, 1):
        x, add = tensors[index], maker_of(graph, tensors[1 - index], "Add")
        for side in (0, 1) if add is not None else ():
            assert add is not None
            base = scalar_of(add.inputs[side])
            weight, square = split_factors(factors_of(graph, add.inputs[1 - side], whole=x))
            if base is None or len(square) != 2 or any(t is not x for t in square):
                continue
            inner, cubic = number * base, number * weight
            if is_close(inner, TANH_INNER) and is_close(cubic, TANH_INNER * TANH_CUBIC):
                return x
    return None
