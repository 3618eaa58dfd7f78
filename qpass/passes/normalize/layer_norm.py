"""Normalization over the last axes, written out, becomes one op.

    LayerNormalization   (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * gain + bias
    RMSNormalization      x         / sqrt(mean(x^2)          + epsilon) * gain

Axes come as attribute or as input; squares as Mul or Pow; the root as Sqrt or Pow, in the
denominator of Div or behind Reciprocal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Graph, Node, Tensor, array_of
from qpass.passes.normalize.folding import (
    Array,
    FoldResult,
    constant_of,
    other_input,
    rank_of,
    scalar_of,
    sole_reader,
)
from qpass.passes.normalize.patterns import (
    factors_of,
    is_supported,
    maker_of,
    replace_chain,
    trailing_axes,
)

OPSETS: Final = {"LayerNormalization": 17, "RMSNormalization": 23}


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalized:
    """What a chain normalizes: `x` over its last `axes` axes."""

    x: Tensor
    epsilon: Tensor
    axes: int
    op: str


def recognize_layer_norm(graph: Graph) -> FoldResult:
    """Replace the chains that normalize over the last axes by one node."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op not in ("Div", "Mul") or not node.outputs:
            continue
        found = _normalized(graph, node)
        if found is None or not is_supported(graph, result, found.op, OPSETS[found.op], node):
            continue
        shape = None if found.x.shape is None else found.x.shape[-found.axes :]
        if shape is None or not all(isinstance(size, int) for size in shape):
            reason = "the sizes of the normalized axes are not known"
            result.refuse(f"recognize {found.op}", node, reason)
            continue
        _write(graph, node, found, tuple(shape))
        result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def _normalized(graph: Graph, node: Node) -> Normalized | None:
    """Return what `node` normalizes when it divides by the root of a mean square."""
    for numerator, power in _divisions(graph, node):
        add = maker_of(graph, power, "Add")
        for index in (0, 1) if add is not None else ():
            assert add is not None
            epsilon, mean = add.inputs[1 - index], maker_of(graph, add.inputs[index], "ReduceMean")
            axes = None if mean is None else trailing_axes(mean)
            if mean is None or axes is None or scalar_of(epsilon) is None:
                continue
            squared = factors_of(graph, mean.inputs[0], whole=numerator)
            if len(squared) != 2:
                continue
            x = _centred_source(graph, numerator, axes)
            if x is not None:
                same = all(_centred_source(graph, factor, axes) is x for factor in squared)
                op = "LayerNormalization"
            else:
                x, op = numerator, "RMSNormalization"
                same = all(factor is x for factor in squared)
            if same:
                return Normalized(x=x, epsilon=epsilon, axes=axes, op=op)
    return None


def _divisions(graph: Graph, node: Node) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (a, v) for each way to read `node` as a / sqrt(v)."""
    if node.op == "Div":
        power = _under_root(graph, node.inputs[1], 0.5)
        if power is not None:
            yield node.inputs[0], power
        return
    for index in (0, 1):
        power = _under_inverse_root(graph, node.inputs[1 - index])
        if power is not None:
            yield node.inputs[index], power


def _under_root(graph: Graph, tensor: Tensor, exponent: float) -> Tensor | None:
    """Return v when `tensor` is v to the power of `exponent` (0.5: or Sqrt)."""
    maker = graph.producer(tensor)
    if maker is None:
        return None
    if maker.op == "Pow" and scalar_of(maker.inputs[1]) == exponent:
        power: Tensor = maker.inputs[0]
        return power
    return maker.inputs[0] if maker.op == "Sqrt" and exponent == 0.5 else None


def _under_inverse_root(graph: Graph, tensor: Tensor) -> Tensor | None:
    maker = graph.producer(tensor)
    if maker is not None and maker.op == "Reciprocal":
        return _under_root(graph, maker.inputs[0], 0.5)
    if maker is not None and maker.op == "Div" and scalar_of(maker.inputs[0]) == 1.0:
        return _under_root(graph, maker.inputs[1], 0.5)
    return _under_root(graph, tensor, -0.5)


def _centred_source(graph: Graph, tensor: Tensor | float, axes: int) -> Tensor | None:
    """Return x when `tensor` is x minus its mean over the last `axes` axes."""
    subtract = None if isinstance(tensor, float) else maker_of(graph, tensor, "Sub")
    mean = None if subtract is None else maker_of(graph, subtract.inputs[1], "ReduceMean")
    if subtract is None or mean is None or trailing_axes(mean) != axes:
        return None
    x: Tensor = subtract.inputs[0]
    return x if mean.inputs[0] is x else None


def _write(graph: Graph, node: Node, found: Normalized, shape: tuple[int, ...]) -> None:
    """Write the op, with the constant gain and bias behind the chain if they are there."""
    dtype = array_of(found.epsilon).dtype
    last = node
    parameters = {"Mul": np.ones(shape, dtype)}
    if found.op == "LayerNormalization":
        parameters["Add"] = np.zeros(shape, dtype)
    for op in parameters:
        reader = sole_reader(graph, last.outputs[0])
        operand = None if reader is None else other_input(reader, last.outputs[0])
        values = None if operand is None else constant_of(operand)
        if reader is None or values is None or reader.op != op or not _fits(values, shape, found.x):
            continue
        parameters[op] = np.array(np.broadcast_to(_row(values, shape), shape), dtype)
        last = reader
    names = {"Mul": "scale", "Add": "B"}
    constants = [graph.constant(f"{last.name}_{names[op]}", v) for op, v in parameters.items()]
    attrs = {"axis": -found.axes, "epsilon": float(array_of(found.epsilon).ravel()[0])}
    replace_chain(graph, last, found.op, [found.x, *constants], attrs)


def _row(values: Array, shape: tuple[int, ...]) -> Array:
    """Return `values` without the leading ones that go beyond `shape`."""
    extra = max(0, values.ndim - len(shape))
    return values.reshape(values.shape[extra:])


def _fits(values: Array, shape: tuple[int, ...], x: Tensor) -> bool:
    """True when `values` repeat along all axes but the normalized ones, and broadcast to them."""
    extra = values.ndim - len(shape)
    if extra > 0 and (values.ndim > (rank_of(x) or 0) or set(values.shape[:extra]) != {1}):
        return False
    sizes = values.shape[max(0, extra) :]
    return all(size in (1, full) for size, full in zip(sizes[::-1], shape[::-1], strict=False))
