"""Fold what is per channel and constant behind a linear op into its weights and bias.

With y = W x + b and a per-channel affine a * y + c: W' = a W, b' = a b + c. BatchNormalization at
inference is a = scale / sqrt(var + epsilon), c = bias - a * mean. Computed in float64, rounded to
float32 once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes.normalize.folding import (
    FoldResult,
    constant_of,
    other_input,
    rank_of,
    sole_reader,
)

Array = NDArray[Any]
BIASED = ("Conv", "ConvTranspose", "Gemm")


def fold_affine_into_linear(graph: Graph) -> FoldResult:
    """Fold BatchNormalization, Mul, Div, Add and Sub behind Conv, ConvTranspose and Gemm."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op not in BIASED or not isinstance(node.inputs[1], Constant):
            continue
        while (reader := sole_reader(graph, node.outputs[0])) is not None:
            affine = _affine_of(node, reader)
            if affine is None:
                break
            reason = _obstacle(node)
            if reason:
                result.refuse("fold affine", reader, reason)
                break
            _apply(graph, node, *affine)
            graph.replace_uses(reader.outputs[0], node.outputs[0])
            graph.remove(reader)
            result.changed += 1
    return result


def explain_batch_norms(graph: Graph) -> FoldResult:
    """Say why a BatchNormalization stays; the ones behind Conv and Gemm are gone already."""
    result = FoldResult()
    for node in graph.nodes:
        if node.op == "BatchNormalization":
            maker = graph.producer(node.inputs[0])
            reason = "no linear op with constant weights makes its input"
            if maker is not None and maker.op in BIASED:
                reason = f"{maker.name} has other readers, or its weights are not constant"
            result.refuse("fold BatchNormalization", node, reason)
    return result


def _obstacle(node: Node) -> str:
    if len(node.inputs) > 2 and node.inputs[2].name and not isinstance(node.inputs[2], Constant):
        return f"the bias of {node.name} is not constant"
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)) != (1, 1):
        return f"{node.name} has alpha or beta"
    return ""


def _channels(node: Node) -> int:
    weight = node.inputs[1]
    if node.op == "ConvTranspose":
        return int(weight.shape[1]) * int(node.attrs.get("group", 1))
    if node.op == "Gemm":
        return int(weight.shape[0 if node.attrs.get("transB", 0) else 1])
    return int(weight.shape[0])


def _affine_of(node: Node, reader: Node) -> tuple[Array, Array] | None:
    """Return (gain, offset) per channel when `reader` is a constant affine, else None."""
    channels, y = _channels(node), node.outputs[0]
    if reader.op == "BatchNormalization":
        if reader.attrs.get("training_mode", 0) or reader.inputs[0] is not y:
            return None
        numbers = [constant_of(tensor) for tensor in reader.inputs[1:5]]
        if any(value is None for value in numbers):
            return None
        scale, bias, mean, variance = (np.asarray(value) for value in numbers)
        gain = scale / np.sqrt(variance + reader.attrs.get("epsilon", 1e-5))
        return gain, bias - gain * mean
    if reader.op not in ("Mul", "Div", "Add", "Sub"):
        return None
    operand = other_input(reader, y)
    values = None if operand is None else constant_of(operand)
    vector = None if values is None else _per_channel(node, values, channels)
    if vector is None:
        return None
    first = reader.inputs[0] is y
    ones, zeros = np.ones(channels), np.zeros(channels)
    if reader.op == "Mul":
        return vector, zeros
    if reader.op == "Div":
        return (1.0 / vector, zeros) if first and (vector != 0).all() else None
    if reader.op == "Add":
        return ones, vector
    return (ones, -vector) if first else (-ones, vector)


def _per_channel(node: Node, values: Array, channels: int) -> Array | None:
    """Return a constant as one value per output channel when it broadcasts like that."""
    rank = 2 if node.op == "Gemm" else len(node.inputs[1].shape)
    if values.ndim > rank:
        return None
    shape = (1,) * (rank - values.ndim) + values.shape
    axis = rank - 1 if node.op == "Gemm" else 1
    if any(size != 1 for i, size in enumerate(shape) if i != axis):
        return None
    if shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(values.ravel(), (channels,)).astype(np.float64)


def _apply(graph: Graph, node: Node, gain: Array, offset: Array) -> None:
    weight = node.inputs[1]
    values = array_of(weight).astype(np.float64)
    if node.op == "ConvTranspose":
        groups = int(node.attrs.get("group", 1))
        rows, columns = values.shape[:2]
        split = values.reshape(groups, rows // groups, columns, *values.shape[2:])
        shaped = gain.reshape(groups, 1, columns, *([1] * (values.ndim - 2)))
        values = (split * shaped).reshape(values.shape)
    else:
        axis = 1 if node.op == "Gemm" and not node.attrs.get("transB", 0) else 0
        values = values * gain.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    # A new constant: the old one may belong to other nodes as well.
    graph.set_input(node, 1, graph.constant(weight.name, values.astype(np.float32)))
    bias = constant_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
    total = gain * (
        np.zeros(len(gain)) if bias is None else np.broadcast_to(bias.ravel(), gain.shape)
    )
    set_bias(graph, node, (total + offset).astype(np.float32))


def set_bias(graph: Graph, node: Node, values: Array) -> None:
    """Give a Conv, ConvTranspose or Gemm this bias."""
    name = f"{node.name}_bias"
    if len(node.inputs) > 2:
        name = node.inputs[2].name or name
    graph.set_input(node, 2, graph.constant(name, values))


def give_biases(graph: Graph) -> FoldResult:
    """Write an explicit zero bias where Conv or Gemm has none, and fold alpha and beta of Gemm."""
    result = FoldResult()
    for node in graph.nodes:
        if node.op == "Gemm" and isinstance(node.inputs[1], Constant):
            result.changed += _fold_alpha_beta(graph, node)
        if node.op in ("Conv", "Gemm") and isinstance(node.inputs[1], Constant):
            channels = _channels(node)
            bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
            if bias is None:
                set_bias(graph, node, np.zeros(channels, np.float32))
                result.changed += 1
            elif isinstance(bias, Constant) and tuple(bias.shape) != (channels,):
                values = array_of(bias)
                if values.size in (1, channels):
                    full = np.broadcast_to(values.ravel(), (channels,))
                    set_bias(graph, node, np.array(full, np.float32))
                    result.changed += 1
    return result


def _fold_alpha_beta(graph: Graph, node: Node) -> int:
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if (alpha, beta) == (1.0, 1.0) or (bias is not None and not isinstance(bias, Constant)):
        return 0
    weight = array_of(node.inputs[1]).astype(np.float64) * alpha
    graph.set_input(node, 1, graph.constant(node.inputs[1].name, weight.astype(np.float32)))
    if bias is not None:
        values = array_of(bias).astype(np.float64) * beta
        graph.set_input(node, 2, graph.constant(bias.name, values.astype(np.float32)))
    node.attrs.pop("alpha", None)
    node.attrs.pop("beta", None)
    return 1


def matmul_to_gemm(graph: Graph) -> FoldResult:
    """Turn a two-dimensional MatMul with constant weights, and the Add behind it, into Gemm."""
    result = FoldResult()
    for node in list(graph.nodes):
        weight = node.inputs[1] if node.op == "MatMul" else None
        if not isinstance(weight, Constant) or len(weight.shape) != 2:
            continue
        if rank_of(node.inputs[0]) != 2 or weight.dtype != np.float32:
            continue
        add = sole_reader(graph, node.outputs[0])
        operand = other_input(add, node.outputs[0]) if add is not None and add.op == "Add" else None
        values = None if operand is None else constant_of(operand)
        columns = int(weight.shape[1])
        node.op = "Gemm"
        bias = np.zeros(columns, np.float32)
        row = values is not None and (values.ndim < 2 or values.shape[:-1] == (1,))
        if add is not None and values is not None and row and values.size in (1, columns):
            bias = np.array(np.broadcast_to(values.ravel(), (columns,)), np.float32)
            graph.replace_uses(add.outputs[0], node.outputs[0])
            graph.remove(add)
        set_bias(graph, node, bias)
        result.changed += 1
    return result
