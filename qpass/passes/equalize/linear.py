"""Questions about single linear ops."""

from __future__ import annotations

from qpass.graph import Constant, Graph, Node
from qpass.passes.affine.absorb import LinearReader
from qpass.units import is_weighted


def channels_of(node: Node) -> int | None:
    """Return the number of input channels of a linear op with constant weights, else None."""
    if not is_weighted(node):
        return None
    shape, groups = node.inputs[1].shape, int(node.attrs.get("group", 1))
    if node.op == "Conv":
        return int(shape[1]) * groups
    if node.op == "Gemm":
        return int(shape[1 if node.attrs.get("transB", 0) else 0])
    return int(shape[0] if node.op == "ConvTranspose" else shape[-2])


def rows_sum_to_one(graph: Graph, node: Node) -> bool:
    """True when a softmax over the last axis makes the left operand of a MatMul."""
    left = node.inputs[0]
    maker = graph.producer(left)
    if maker is None or maker.op != "Softmax" or left.shape is None:
        return False
    return int(maker.attrs.get("axis", -1)) % len(left.shape) == len(left.shape) - 1


def has_bias(graph: Graph, reader: LinearReader) -> bool:
    """True when an offset costs no new node: Conv and Gemm take a bias, MatMul needs its Add."""
    node = reader.node
    if node.op != "MatMul":
        return True
    uses = graph.consumers(node.outputs[0])
    if len(uses) != 1 or uses[0][0].op != "Add":
        return False
    add, index = uses[0]
    return isinstance(add.inputs[1 - index], Constant)
