"""Give a QDQ graph the idioms that engines need before they run it in integers.

What it does
    int32 biases: the bias of Conv and Gemm becomes DequantizeLinear(int32, x_scale * w_scale).
    MatMul biases: a one-dimensional bias of the Add behind an integer MatMul gets more dimensions.
Why it is correct
    The int32 bias is exact to half a step of the accumulator, far below a step of the output; its
    scale is the product of the float32 scales, computed in float64. Leading dimensions of 1 do not
    change a broadcast to a tensor of at least that rank.
Preconditions
    `insert_qdq` has run. Which idioms are wanted comes as options, not as the name of an engine.
"""

from __future__ import annotations

import numpy as np

from qpass.dtypes import INT32
from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes.insert_qdq import dequantize_node
from qpass.qparams import QParams
from qpass.report.model import PassReport, Refusal

BIAS_MAX = 2**31 - 1


def lower_biases(graph: Graph) -> PassReport:
    """Store the biases of integer Conv and Gemm nodes as int32."""
    changed, refusals = 0, []
    for node in list(graph.nodes):
        if node.op not in ("Conv", "Gemm") or len(node.inputs) < 3:
            continue
        bias, x, w = node.inputs[2], _dequantizer(graph, node, 0), _dequantizer(graph, node, 1)
        if not isinstance(bias, Constant) or x is None or w is None:
            continue
        x_scale, w_scale = (array_of(dq.inputs[1]).astype(np.float64) for dq in (x, w))
        values = array_of(bias).astype(np.float64)
        if w_scale.ndim > 1 or values.ndim != 1:
            refusals.append(
                Refusal(rule="int32 bias", where=node.name, reason="scale or bias is not a vector")
            )
            continue
        scale = np.broadcast_to(x_scale * w_scale, values.shape)
        integers = np.rint(values / scale)
        if np.abs(integers).max(initial=0.0) > BIAS_MAX:
            refusals.append(
                Refusal(rule="int32 bias", where=node.name, reason="the bias does not fit in int32")
            )
            continue
        numbers = QParams(
            scale=np.array(scale, np.float32),
            zero_point=np.zeros(values.shape, np.int32),
            storage=INT32,
            qmin=INT32.qmin,
            qmax=INT32.qmax,
            axis=0,
        )
        stored = graph.constant(f"{bias.name}_quantized", integers.astype(np.int32))
        restored = graph.variable(f"{bias.name}_dequantized", np.dtype(np.float32), bias.shape)
        graph.add(dequantize_node(graph, stored, restored, numbers, bias.name), before=node)
        graph.set_input(node, 2, restored)
        changed += 1
    return PassReport(name="lower_biases", changed=changed, refusals=tuple(refusals))


def raise_matmul_biases(graph: Graph, rank: int) -> PassReport:
    """Write the bias behind integer MatMuls with `rank` dimensions.

    onnxruntime's MatMulAddFusion turns MatMul + Add(vector) into a float Gemm where shapes are
    static; a bias of shape [1, 1, N] is out of its pattern.
    """
    changed, refusals = 0, []
    for node in list(graph.nodes):
        if node.op != "MatMul" or _dequantizer(graph, node, 1) is None:
            continue
        for add, index in graph.consumers(node.outputs[0]):
            bias = add.inputs[1 - index] if add.op == "Add" else None
            if not isinstance(bias, Constant) or len(bias.shape) >= rank:
                continue
            shape = node.outputs[0].shape
            if shape is None or len(shape) < rank:
                reason = "the rank of the product is unknown" if shape is None else "rank is 2"
                refusals.append(Refusal(rule="MatMul bias", where=add.name, reason=reason))
                continue
            values = array_of(bias)
            raised = values.reshape((1,) * (rank - values.ndim) + values.shape)
            graph.set_input(add, 1 - index, graph.constant(bias.name, raised))
            changed += 1
    return PassReport(name="raise_matmul_biases", changed=changed, refusals=tuple(refusals))


def _dequantizer(graph: Graph, node: Node, index: int) -> Node | None:
    producer = graph.producer(node.inputs[index])
    return producer if producer is not None and producer.op == "DequantizeLinear" else None
