"""Fold what is per channel and constant behind a linear op into its weights and bias.

With y = W x + b and a chain of per-channel affine ops behind it, which is a * y + c as a whole:
W' = a W, b' = a b + c. BatchNormalization at inference is a = scale / sqrt(var + epsilon),
c = bias - a * mean. The chain is put together in float64 and rounded once, to the dtype of W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes.normalize.folding import (
    Array,
    FoldResult,
    constant_of,
    given_input,
    other_input,
    rank_of,
    sole_reader,
    write_constant,
)

BIASED: Final = ("Conv", "ConvTranspose", "Gemm")
RULE: Final = "fold affine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """a * y + c with one `gain` and one `offset` for each output channel, in float64."""

    gain: Array
    offset: Array

    def then(self, gain: Array, offset: Array) -> Affine:
        """Return this affine followed by another."""
        return Affine(gain=gain * self.gain, offset=gain * self.offset + offset)


def fold_affine_into_linear(graph: Graph) -> FoldResult:
    """Fold BatchNormalization, Mul, Div, Add and Sub behind linear ops with constant weights."""
    result = FoldResult()
    for node in list(graph.nodes):
        weight = node.inputs[1] if node.op in (*BIASED, "MatMul") else None
        if not isinstance(weight, Constant) or len(weight.shape) < 2:
            continue
        if node.op == "MatMul" and len(weight.shape) != 2:
            continue
        readers, affine = _affine_chain(graph, node)
        plain_bias = node.op == "MatMul" and [reader.op for reader in readers] == ["Add"]
        if not readers or plain_bias:
            continue
        reason = _obstacle(node, affine)
        if reason:
            result.refuse(RULE, readers[0], reason)
            continue
        _scale_weight(graph, node, affine.gain)
        if node.op == "MatMul":
            _leave_one_add(graph, readers, affine.offset)
        else:
            write_bias(graph, node, _folded_bias(node, affine))
            _drop_chain(graph, node, readers)
        result.changed += 1
    return result


def takes_batch_norm(graph: Graph, node: Node) -> bool:
    """True when a BatchNormalization stands behind `node` that could be folded."""
    readers, affine = _affine_chain(graph, node)
    return any(r.op == "BatchNormalization" for r in readers) and not _obstacle(node, affine)


def explain_batch_norms(graph: Graph) -> FoldResult:
    """Say why a BatchNormalization stays; the ones behind linear ops are gone already."""
    result = FoldResult()
    for node in graph.nodes:
        if node.op == "BatchNormalization":
            maker = graph.producer(node.inputs[0])
            reason = "no linear op makes its input"
            if node.attrs.get("training_mode", 0):
                reason = "it is in training mode"
            elif maker is not None and maker.op in (*BIASED, "MatMul"):
                reason = f"the output of {maker.name} has other readers, or numbers of the two are"
                reason += " not constant or not finite"
            result.refuse("fold BatchNormalization", node, reason)
    return result


def channels_of(node: Node) -> int:
    """Return how many output channels a linear op with constant weights has."""
    shape = node.inputs[1].shape
    if node.op == "ConvTranspose":
        return int(shape[1]) * int(node.attrs.get("group", 1))
    if node.op == "Conv" or node.attrs.get("transB", 0):
        return int(shape[0])
    return int(shape[1])


def is_per_channel(node: Node, values: Array) -> bool:
    """True when a bias is one value, or a row of one value for each channel."""
    row = values.shape[:-1] == (1,) * (values.ndim - 1)
    return bool(values.size == 1 or (row and values.shape[-1] == channels_of(node)))


def write_bias(graph: Graph, node: Node, values: Array) -> None:
    """Give a Conv, ConvTranspose or Gemm this bias, in the dtype of its weight."""
    values = values.astype(node.inputs[1].dtype)
    if given_input(node, 2) is not None:
        write_constant(graph, node, 2, values)
    else:
        graph.set_input(node, 2, graph.constant(f"{node.name}_bias", values))


def _affine_chain(graph: Graph, node: Node) -> tuple[list[Node], Affine]:
    """Return the affine ops behind `node` that nothing else hangs on, and their product."""
    channels, current = channels_of(node), node.outputs[0]
    readers: list[Node] = []
    affine = Affine(gain=np.ones(channels), offset=np.zeros(channels))
    while (reader := sole_reader(graph, current)) is not None:
        index = 0 if reader.inputs[0] is current else 1
        step = _affine_of(node, reader, index, channels)
        if step is None:
            break
        affine = affine.then(*step)
        readers.append(reader)
        current = reader.outputs[0]
    return readers, affine


def _affine_of(node: Node, reader: Node, index: int, channels: int) -> tuple[Array, Array] | None:
    """Return (gain, offset) per channel when `reader` is a constant affine, else None."""
    if reader.op == "BatchNormalization":
        return _affine_of_batch_norm(node, reader) if index == 0 else None
    if reader.op not in ("Mul", "Div", "Add", "Sub"):
        return None
    operand = other_input(reader, reader.inputs[index])
    values = None if operand is None else constant_of(operand)
    vector = None if values is None else _per_channel(node, values, channels)
    if vector is None:
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    if reader.op == "Mul":
        return vector, zeros
    if reader.op == "Div":
        return (1.0 / vector, zeros) if index == 0 and (vector != 0).all() else None
    if reader.op == "Add":
        return ones, vector
    return (ones, -vector) if index == 0 else (-ones, vector)


def _affine_of_batch_norm(node: Node, reader: Node) -> tuple[Array, Array] | None:
    numbers = [constant_of(tensor) for tensor in reader.inputs[1:5]]
    if reader.attrs.get("training_mode", 0) or any(value is None for value in numbers):
        return None
    if node.op == "MatMul":  # its channels are the last axis, those of BatchNormalization axis 1
        return None
    scale, bias, mean, variance = (np.asarray(value) for value in numbers)
    with np.errstate(invalid="ignore", divide="ignore"):  # `_obstacle` looks at the result
        gain = scale / np.sqrt(variance + reader.attrs.get("epsilon", 1e-5))
        return gain, bias - gain * mean


def _per_channel(node: Node, values: Array, channels: int) -> Array | None:
    """Return a constant as one value per output channel when it broadcasts like that."""
    last = node.op in ("Gemm", "MatMul")
    rank = rank_of(node.outputs[0]) if last else len(node.inputs[1].shape)
    if values.ndim > (1 if rank is None else rank):
        return None
    rank = values.ndim if rank is None else rank
    shape = (1,) * (rank - values.ndim) + values.shape
    axis = rank - 1 if last else 1
    if any(size != 1 for i, size in enumerate(shape) if i != axis):
        return None
    if values.size not in (1, channels):
        return None
    return np.broadcast_to(values.ravel(), (channels,)).astype(np.float64)


def _obstacle(node: Node, affine: Affine) -> str:
    weight = node.inputs[1]
    if weight.dtype not in (np.float32, np.float64):
        return f"the weight of {node.name} is {weight.dtype}"
    bias = given_input(node, 2)
    if bias is not None:
        values = constant_of(bias)
        if values is None or not is_per_channel(node, values):
            return f"the bias of {node.name} is not one constant for each channel"
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)) != (1, 1):
        return f"{node.name} has alpha or beta"
    if not (np.isfinite(affine.gain).all() and np.isfinite(affine.offset).all()):
        return "gain or offset is not finite"
    largest = max(
        np.abs(_scaled_weight(node, affine.gain)).max(initial=0.0),
        np.abs(_folded_bias(node, affine)).max(initial=0.0),
    )
    return "" if largest <= np.finfo(weight.dtype).max else "what it is folded to is not finite"


def _scaled_weight(node: Node, gain: Array) -> Array:
    values = array_of(node.inputs[1]).astype(np.float64)
    if node.op == "ConvTranspose":
        groups = int(node.attrs.get("group", 1))
        rows, columns = values.shape[:2]
        split = values.reshape(groups, rows // groups, columns, *values.shape[2:])
        shaped = gain.reshape(groups, 1, columns, *([1] * (values.ndim - 2)))
        scaled: Array = (split * shaped).reshape(values.shape)
        return scaled
    axis = 0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1
    product: Array = values * gain.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return product


def _scale_weight(graph: Graph, node: Node, gain: Array) -> None:
    if (gain != 1.0).any():
        dtype = node.inputs[1].dtype
        write_constant(graph, node, 1, _scaled_weight(node, gain).astype(dtype))


def _folded_bias(node: Node, affine: Affine) -> Array:
    tensor = given_input(node, 2)
    bias = np.zeros(1) if tensor is None else array_of(tensor).astype(np.float64)
    folded: Array = affine.gain * bias.ravel() + affine.offset
    return folded


def _drop_chain(graph: Graph, node: Node, readers: list[Node]) -> None:
    """Let the readers of the chain read the linear op."""
    graph.replace_uses(readers[-1].outputs[0], node.outputs[0])
    for reader in readers:
        graph.remove(reader)


def _leave_one_add(graph: Graph, readers: list[Node], offset: Array) -> None:
    """MatMul has no bias: the first Add or Sub of the chain, if there is one, takes it."""
    kept = next((reader for reader in readers if reader.op in ("Add", "Sub")), None)
    for reader in readers:
        if reader is not kept:
            index = 0 if isinstance(reader.inputs[1], Constant) else 1
            graph.replace_uses(reader.outputs[0], reader.inputs[index])
            graph.remove(reader)
    if kept is not None:
        index = 1 if isinstance(kept.inputs[1], Constant) else 0
        values = offset.astype(kept.inputs[index].dtype)
        kept.op = "Add"
        write_constant(graph, kept, index, values)
