"""Gemm in one form: alpha and beta 1, transA 0, an explicit bias; MatMul of matrices is Gemm.

Conv and ConvTranspose get their explicit bias here too.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qpass.graph import Constant, Graph, array_of
from qpass.passes.normalize.folding import (
    FoldResult,
    constant_of,
    given_input,
    other_input,
    rank_of,
    sole_reader,
    write_constant,
)
from qpass.passes.normalize.linear_folding import (
    BIASED,
    channels_of,
    is_per_channel,
    write_bias,
)

GEMM: Final = "one form of Gemm"
MATMUL: Final = "MatMul to Gemm"


def matmul_to_gemm(graph: Graph) -> FoldResult:
    """Turn a two-dimensional MatMul with constant weights, and the Add behind it, into Gemm."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op != "MatMul":
            continue
        left, weight = node.inputs
        if isinstance(left, Constant) and not isinstance(weight, Constant):
            result.refuse(MATMUL, node, "the constant is the left operand")
        if not isinstance(weight, Constant) or len(weight.shape) != 2:
            continue
        if rank_of(left) != 2 or weight.dtype not in (np.float32, np.float64):
            continue
        node.op = "Gemm"
        bias = np.zeros(channels_of(node))
        add = sole_reader(graph, node.outputs[0])
        operand = other_input(add, node.outputs[0]) if add is not None and add.op == "Add" else None
        values = None if operand is None else constant_of(operand)
        row = values is not None and values.ndim <= 2 and is_per_channel(node, values)
        if add is not None and values is not None and row:
            bias = bias + values.ravel()
            graph.replace_uses(add.outputs[0], node.outputs[0])
            graph.remove(add)
        write_bias(graph, node, bias)
        result.changed += 1
    return result


def normalize_gemm(graph: Graph) -> FoldResult:
    """Fold alpha and beta of Gemm into its constants."""
    result = FoldResult()
    for node in graph.nodes:
        if node.op != "Gemm":
            continue
        if node.attrs.get("transA", 0):
            result.refuse(GEMM, node, "transA is 1")
        scales = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
        if scales == (1.0, 1.0):
            continue
        bias = given_input(node, 2)
        if not isinstance(node.inputs[1], Constant) or not isinstance(bias, Constant | None):
            result.refuse(GEMM, node, "alpha or beta is not 1, and weight or bias is not constant")
            continue
        for index, scale in zip((1, 2), scales, strict=True):
            if given_input(node, index) is not None and scale != 1.0:
                values = array_of(node.inputs[index])
                scaled = (values.astype(np.float64) * scale).astype(values.dtype)
                write_constant(graph, node, index, scaled)
        node.attrs.pop("alpha", None)
        node.attrs.pop("beta", None)
        result.changed += 1
    return result


def give_biases(graph: Graph) -> FoldResult:
    """Write an explicit bias of one value per channel where a linear op has a slot for it."""
    result = FoldResult()
    for node in graph.nodes:
        if node.op not in BIASED or not isinstance(node.inputs[1], Constant):
            continue
        bias, channels = given_input(node, 2), channels_of(node)
        if bias is None:
            write_bias(graph, node, np.zeros(channels))
            result.changed += 1
        elif isinstance(bias, Constant) and tuple(bias.shape) != (channels,):
            values = array_of(bias)
            if is_per_channel(node, values):
                write_bias(graph, node, np.broadcast_to(values.ravel(), (channels,)))
                result.changed += 1
            else:
                result.refuse(GEMM, node, "the bias is not one value for each channel")
    return result
