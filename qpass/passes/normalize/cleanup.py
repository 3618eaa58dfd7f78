"""Nodes that do nothing go; names of graph outputs stay."""

from __future__ import annotations

import numpy as np
from onnx import helper

from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes.normalize.folding import FoldResult


def remove_no_ops(graph: Graph) -> FoldResult:
    """Remove Identity, Dropout, and Cast, Transpose, Reshape, Pad, Concat that change nothing."""
    result = FoldResult()
    for node in list(graph.nodes):
        if not node.outputs or not _does_nothing(node):
            continue
        source, out = node.inputs[0], node.outputs[0]
        if graph.is_output(out):
            maker = graph.producer(source)
            if maker is None or graph.is_output(source) or source.name in graph.captured:
                continue  # an input or constant that is an output as well needs the node
        if out.name in graph.captured:
            continue
        graph.replace_uses(out, source)
        graph.remove(node)
        result.changed += 1
    return result


def _does_nothing(node: Node) -> bool:
    source, out = node.inputs[0] if node.inputs else None, node.outputs[0]
    if source is None or not source.name:
        return False
    if node.op == "Identity":
        return True
    if node.op == "Dropout":
        mask_used = len(node.outputs) > 1 and bool(node.outputs[1].outputs)
        training = len(node.inputs) > 2 and node.inputs[2].name
        return not mask_used and not training
    if node.op == "Cast":
        to = helper.tensor_dtype_to_np_dtype(node.attrs["to"])
        return source.dtype is not None and np.dtype(source.dtype) == to
    if node.op == "Transpose":
        permutation = node.attrs.get("perm")
        return permutation is not None and list(permutation) == sorted(permutation)
    if node.op in ("Reshape", "Expand"):
        shapes = (source.shape, out.shape)
        return all(
            shape is not None and all(isinstance(size, int) for size in shape) for shape in shapes
        ) and list(source.shape) == list(out.shape)
    if node.op == "Pad" and len(node.inputs) > 1 and isinstance(node.inputs[1], Constant):
        return not array_of(node.inputs[1]).any()
    return node.op == "Concat" and len(node.inputs) == 1
