"""Chains that exporters write for one op become that op.

LayerNormalization, GELU (erf and tanh form), HardSwish, and ReduceMean over the spatial axes. The
new node takes the name and the output of the last node of its chain. What is not recognized stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.normalize.folding import (
    FoldResult,
    constant_of,
    other_input,
    rank_of,
    scalar_of,
    sole_reader,
)

SQRT_2: Final = math.sqrt(2.0)
TANH_INNER: Final = math.sqrt(2.0 / math.pi)
TANH_CUBIC: Final = 0.044715
# Constants of exported chains are rounded to float32, some to four digits (0.7978846 or 0.79788).
CLOSE: Final = 1e-4


def _is(value: float | None, wanted: float) -> bool:
    return value is not None and math.isclose(value, wanted, rel_tol=CLOSE)


def _maker(graph: Graph, tensor: Tensor, op: str) -> Node | None:
    maker = graph.producer(tensor)
    return maker if maker is not None and maker.op == op else None


def _scaled(graph: Graph, tensor: Tensor) -> Iterator[tuple[Tensor, float]]:
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


def _replace(
    graph: Graph, last: Node, op: str, inputs: list[Tensor], attrs: dict[str, Any]
) -> None:
    """Let a new node write the output of `last`; what led to it goes when nobody reads it."""
    out, name = last.outputs[0], last.name
    anchor_inputs = [tensor for tensor in inputs if tensor.name]
    node = graph.make(op, anchor_inputs, [], name=f"{name}_{op}", attrs=attrs)
    graph.add(node, before=last)
    graph.remove(last)
    list.append(node.outputs, out)
    list.append(out.inputs, node)
    node.name = name


def recognize_gelu(graph: Graph) -> FoldResult:
    """Recognize 0.5 x (1 + erf(x / sqrt 2)) and the tanh form, however the factors are placed."""
    result = FoldResult()
    if graph.opset < 20:
        return result
    for node in list(graph.nodes):
        if node.op in ("Erf", "Tanh") and node.outputs:
            found = _gelu_tail(graph, node)
            if found is not None:
                x, last = found
                attrs = {"approximate": "tanh"} if node.op == "Tanh" else {}
                _replace(graph, last, "Gelu", [x], attrs)
                result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def _gelu_tail(graph: Graph, node: Node) -> tuple[Tensor, Node] | None:
    """Return (x, last node) of the chain around an Erf or Tanh."""
    x = _erf_source(graph, node) if node.op == "Erf" else _tanh_source(graph, node)
    add = sole_reader(graph, node.outputs[0])
    if x is None or add is None or add.op != "Add":
        return None
    one = other_input(add, node.outputs[0])
    if one is None or not _is(scalar_of(one), 1.0):
        return None
    half_left, gate, tail, current = 0.5, False, add, add.outputs[0]
    while not (gate and half_left == 1.0):
        reader = sole_reader(graph, current)
        other = None if reader is None else other_input(reader, current)
        if reader is None or other is None or reader.op not in ("Mul", "Div"):
            return None
        factor = scalar_of(other)
        if factor is not None:
            factor = 1.0 / factor if reader.op == "Div" and factor else factor
            if not _is(factor, half_left) or (
                reader.op == "Div" and reader.inputs[0] is not current
            ):
                return None
            half_left = 1.0
        elif reader.op == "Mul" and not gate:
            if other is not x:
                halved = [s for s, f in _scaled(graph, other) if s is x and _is(f, half_left)]
                if not halved:
                    return None
                half_left = 1.0
            gate = True
        else:
            return None
        tail, current = reader, reader.outputs[0]
    return x, tail


def _erf_source(graph: Graph, node: Node) -> Tensor | None:
    for source, factor in _scaled(graph, node.inputs[0]):
        if _is(factor, 1.0 / SQRT_2):
            return source
    return None


def _tanh_source(graph: Graph, node: Node) -> Tensor | None:
    """Return x of tanh(sqrt(2 / pi) (x + 0.044715 x^3)), in the forms that exporters write."""
    for inner, factor in _scaled(graph, node.inputs[0]):
        if _is(factor, TANH_INNER):
            add = _maker(graph, inner, "Add")
            for index in (0, 1) if add is not None else ():
                assert add is not None
                x, cubic = add.inputs[index], add.inputs[1 - index]
                if any(
                    _is_cube(graph, s, x) and _is(f, TANH_CUBIC) for s, f in _scaled(graph, cubic)
                ):
                    return x
                if _is_scaled_cube(graph, cubic, x):
                    return x
    return _factored_tanh_source(graph, node)


def _factored_tanh_source(graph: Graph, node: Node) -> Tensor | None:
    """Return x of tanh(x * sqrt(2 / pi) * (1 + 0.044715 x^2)), with the factors in any place."""
    factors = _product(graph, node.inputs[0])
    number = math.prod(value for value in factors if isinstance(value, float))
    tensors = [value for value in factors if not isinstance(value, float)]
    if len(tensors) != 2:
        return None
    for index in (0, 1):
        x, add = tensors[index], _maker(graph, tensors[1 - index], "Add")
        if add is None:
            continue
        for side in (0, 1):
            base, rest = scalar_of(add.inputs[side]), _product(graph, add.inputs[1 - side])
            weight = math.prod(value for value in rest if isinstance(value, float))
            squares = [value for value in rest if not isinstance(value, float)]
            if base is None or len(squares) != 2 or any(s is not x for s in squares):
                continue
            if _is(number * base, TANH_INNER) and _is(number * weight, TANH_INNER * TANH_CUBIC):
                return x
    return None


def _product(graph: Graph, tensor: Tensor, depth: int = 5) -> list[Any]:
    """Split a product into its factors: tensors, and floats for scalar constants."""
    value = scalar_of(tensor)
    if value is not None:
        return [value]
    maker = graph.producer(tensor)
    if maker is not None and depth > 0:
        if maker.op == "Mul":
            parts = [_product(graph, factor, depth - 1) for factor in maker.inputs]
            return parts[0] + parts[1]
        power = scalar_of(maker.inputs[1]) if maker.op == "Pow" else None
        if power in (2.0, 3.0):
            return _product(graph, maker.inputs[0], depth - 1) * int(power or 0)
    return [tensor]


def _is_cube(graph: Graph, tensor: Tensor, x: Tensor) -> bool:
    factors = _product(graph, tensor)
    return len(factors) == 3 and all(factor is x for factor in factors)


def _is_scaled_cube(graph: Graph, tensor: Tensor, x: Tensor) -> bool:
    factors = _product(graph, tensor)
    numbers = [value for value in factors if isinstance(value, float)]
    rest = [value for value in factors if not isinstance(value, float)]
    return len(rest) == 3 and all(f is x for f in rest) and _is(math.prod(numbers), TANH_CUBIC)


def recognize_hard_swish(graph: Graph) -> FoldResult:
    """Recognize x * HardSigmoid(x) and x * clip(x + 3, 0, 6) / 6."""
    result = FoldResult()
    if graph.opset < 14:
        return result
    for node in list(graph.nodes):
        if node.op == "Mul" and len(node.inputs) == 2 and node.outputs:
            for index in (0, 1):
                x, gate = node.inputs[index], node.inputs[1 - index]
                if _is_hard_gate(graph, gate, x):
                    _replace(graph, node, "HardSwish", [x], {})
                    result.changed += 1
                    break
        if node.op in ("Div", "Mul") and node.outputs:
            source = _divided_hard_swish(graph, node)
            if source is not None:
                _replace(graph, node, "HardSwish", [source], {})
                result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def _is_hard_gate(graph: Graph, gate: Tensor, x: Tensor) -> bool:
    """True for HardSigmoid(x) with slope 1/6, and for clip(x + 3, 0, 6) / 6."""
    maker = _maker(graph, gate, "HardSigmoid")
    if maker is not None:
        slope, shift = maker.attrs.get("alpha", 0.2), maker.attrs.get("beta", 0.5)
        return maker.inputs[0] is x and _is(slope, 1 / 6) and _is(shift, 0.5)
    return any(
        _is(factor, 1 / 6) and _is_relu6_of_shift(graph, source, x)
        for source, factor in _scaled(graph, gate)
    )


def _is_relu6_of_shift(graph: Graph, tensor: Tensor, x: Tensor) -> bool:
    clip = _maker(graph, tensor, "Clip")
    if clip is None or len(clip.inputs) < 3:
        return False
    add = _maker(graph, clip.inputs[0], "Add")
    three = None if add is None else other_input(add, x)
    return (
        three is not None
        and add is not None
        and any(t is x for t in add.inputs)
        and _is(scalar_of(three), 3.0)
        and scalar_of(clip.inputs[1]) == 0.0
        and _is(scalar_of(clip.inputs[2]), 6.0)
    )


def _divided_hard_swish(graph: Graph, node: Node) -> Tensor | None:
    """Return x of (x * clip(x + 3, 0, 6)) / 6."""
    for source, factor in _scaled(graph, node.outputs[0]):
        product = _maker(graph, source, "Mul")
        if product is None or not _is(factor, 1 / 6):
            continue
        if sole_reader(graph, source) is not node:
            continue
        for index in (0, 1):
            x: Tensor = product.inputs[index]
            if _is_relu6_of_shift(graph, product.inputs[1 - index], x):
                return x
    return None


def recognize_layer_norm(graph: Graph) -> FoldResult:
    """Recognize (x - m) / sqrt(mean((x - m)^2) + epsilon) * gain + bias over the last axis."""
    result = FoldResult()
    if graph.opset < 17:
        return result
    for node in list(graph.nodes):
        if node.op == "Div" and node.outputs:
            found = _normalized(graph, node)
            if found is not None and _write_layer_norm(graph, node, *found):
                result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def _normalized(graph: Graph, node: Node) -> tuple[Tensor, float] | None:
    """Return (x, epsilon) when `node` divides the centred x by its standard deviation."""
    root = _maker(graph, node.inputs[1], "Sqrt")
    add = None if root is None else _maker(graph, root.inputs[0], "Add")
    if add is None:
        return None
    for index in (0, 1):
        epsilon = scalar_of(add.inputs[1 - index])
        variance = _maker(graph, add.inputs[index], "ReduceMean")
        if epsilon is None or variance is None or not _over_last_axis(variance):
            continue
        factors = _product(graph, variance.inputs[0])
        subtract = _maker(graph, node.inputs[0], "Sub")
        if subtract is None or len(factors) != 2:
            continue
        centred = [_maker(graph, f, "Sub") for f in factors if not isinstance(f, float)]
        if len(centred) != 2 or any(c is None or not _same_centre(c, subtract) for c in centred):
            continue
        mean = _maker(graph, subtract.inputs[1], "ReduceMean")
        x: Tensor = subtract.inputs[0]
        if mean is not None and mean.inputs[0] is x and _over_last_axis(mean):
            return x, epsilon
    return None


def _same_centre(one: Node, other: Node) -> bool:
    if one is other:
        return True
    same = all(a is b for a, b in zip(one.inputs, other.inputs, strict=True))
    return same or (
        one.inputs[0] is other.inputs[0] and one.inputs[1].inputs == other.inputs[1].inputs
    )


def _over_last_axis(node: Node) -> bool:
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], Constant):
        axes = array_of(node.inputs[1]).tolist()
    rank = rank_of(node.inputs[0])
    last = (
        axes is not None and len(axes) == 1 and axes[0] in (-1, None if rank is None else rank - 1)
    )
    return bool(last and node.attrs.get("keepdims", 1))


def _write_layer_norm(graph: Graph, div: Node, x: Tensor, epsilon: float) -> bool:
    width = None if x.shape is None else x.shape[-1]
    if not isinstance(width, int):
        return False
    gain, bias, last = np.ones(width, np.float32), np.zeros(width, np.float32), div
    for op in ("Mul", "Add"):
        reader = sole_reader(graph, last.outputs[0])
        operand = None if reader is None else other_input(reader, last.outputs[0])
        values = None if operand is None else constant_of(operand)
        if (
            reader is None
            or reader.op != op
            or values is None
            or values.shape not in ((width,), ())
        ):
            continue
        row = np.array(np.broadcast_to(values, (width,)), np.float32)
        gain, bias = (row, bias) if op == "Mul" else (gain, row)
        last = reader
    inputs = [x, graph.constant(f"{last.name}_scale", gain), graph.constant(f"{last.name}_B", bias)]
    _replace(graph, last, "LayerNormalization", inputs, {"axis": -1, "epsilon": float(epsilon)})
    return True


def recognize_global_average_pool(graph: Graph) -> FoldResult:
    """Turn ReduceMean over the spatial axes of an image into GlobalAveragePool."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op != "ReduceMean" or rank_of(node.inputs[0]) != 4:
            continue
        axes = node.attrs.get("axes")
        if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], Constant):
            axes = array_of(node.inputs[1]).tolist()
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
