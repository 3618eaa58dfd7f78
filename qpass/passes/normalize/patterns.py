"""How chains of simple ops are read: products with their factors, roots, and the op they end in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from qpass.graph import Graph, Node, Tensor
from qpass.passes.normalize.folding import FoldResult, integers_of, rank_of, scalar_of

# Constants of exported chains are rounded: sqrt(2) to 1.4142, sqrt(2 / pi) to 0.7979. What these
# four digits change in GELU stays below 4e-6 of its value; constants of three digits are not taken.
CLOSE: Final = 2e-5
PRODUCT_DEPTH: Final = 5  # the longest product of an exported chain has four levels


def is_close(value: float | None, wanted: float) -> bool:
    """True when a constant of a chain is `wanted`, written with at least four digits."""
    return value is not None and math.isclose(value, wanted, rel_tol=CLOSE)


def maker_of(graph: Graph, tensor: Tensor, op: str) -> Node | None:
    """Return the node that makes `tensor` when it is an `op`."""
    maker = graph.producer(tensor)
    return maker if maker is not None and maker.op == op else None


def scaled_sources(graph: Graph, tensor: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield (source, factor) for each way to read `tensor` as source * factor."""
    maker = graph.producer(tensor)
    if maker is None or maker.op not in ("Mul", "Div") or len(maker.inputs) != 2:
        return
    for index in (0, 1):
        factor = scalar_of(maker.inputs[1 - index])
        if factor is not None and maker.op == "Mul":
            yield maker.inputs[index], factor
        if factor and maker.op == "Div" and index == 0:
            yield maker.inputs[0], 1.0 / factor


def factors_of(
    graph: Graph, tensor: Tensor, *, whole: Tensor | None = None, depth: int = PRODUCT_DEPTH
) -> list[Any]:
    """Split a product into its factors: tensors, and floats for scalar constants.

    Args:
        graph: the graph of `tensor`.
        tensor: the product.
        whole: a tensor that is not split further, though it may be a product itself.
        depth: how many levels of Mul, Pow and Div are looked through.
    """
    value = scalar_of(tensor)
    if value is not None:
        return [value]
    maker = graph.producer(tensor)
    if maker is None or depth == 0 or tensor is whole:
        return [tensor]
    if maker.op == "Mul":
        parts = [factors_of(graph, t, whole=whole, depth=depth - 1) for t in maker.inputs]
        return parts[0] + parts[1]
    number = scalar_of(maker.inputs[1]) if maker.op in ("Pow", "Div") else None
    if not number:
        return [tensor]
    base = factors_of(graph, maker.inputs[0], whole=whole, depth=depth - 1)
    if maker.op == "Div":
        return [*base, 1.0 / number]
    return base * int(number) if number in (2.0, 3.0) else [tensor]


def split_factors(factors: list[Any]) -> tuple[float, list[Tensor]]:
    """Return the product of the floats, and the tensors."""
    numbers = [value for value in factors if isinstance(value, float)]
    return math.prod(numbers), [value for value in factors if not isinstance(value, float)]


def trailing_axes(node: Node) -> int | None:
    """Return over how many last axes a reduction with keepdims goes, None for any other."""
    axes, rank = integers_of(node, "axes", 1), rank_of(node.inputs[0])
    if not axes or not node.attrs.get("keepdims", 1):
        return None
    if any(axis >= 0 for axis in axes):
        if rank is None:
            return None
        axes = [axis % rank - rank for axis in axes]
    return len(axes) if sorted(axes) == list(range(-len(axes), 0)) else None


def is_supported(graph: Graph, result: FoldResult, op: str, since: int, node: Node) -> bool:
    """True when the opset of the model has `op`; otherwise the refusal is noted."""
    if graph.opset < since:
        reason = f"{op} needs opset {since}, the model has {graph.opset}"
        result.refuse(f"recognize {op}", node, reason)
        return False
    return True


def replace_chain(
    graph: Graph, last: Node, op: str, inputs: list[Tensor], attrs: dict[str, Any]
) -> None:
    """Let a new node write the output of `last`, under its name.

    What led to `last` stays until `Graph.remove_unused`, for others may read it.
    """
    out = last.outputs[0]
    graph.remove(last)
    node = graph.make(op, inputs, [out], name=f"{last.name}_{op}", attrs=attrs)
    graph.add(node, before=last)
    node.name, node.extra = last.name, last.extra
