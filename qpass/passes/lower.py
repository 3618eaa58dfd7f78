"""Give a QDQ graph the idioms that engines need before they run it in integers.

What it does
    int32 biases: the bias of Conv, ConvTranspose and Gemm becomes
    DequantizeLinear(int32, x_scale * w_scale), with one scale where the weight has one.
    MatMul biases: a one-dimensional bias of the Add behind an integer MatMul gets more dimensions.
    Residual sums: the Add in front of a LayerNormalization becomes Sum.
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
    """Store the biases of integer Conv, ConvTranspose and Gemm nodes as int32."""
    changed, refusals = 0, []
    for node in list(graph.nodes):
        if node.op not in ("Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 3:
            continue
        bias, x, w = node.inputs[2], _dequantizer(graph, node, 0), _dequantizer(graph, node, 1)
        if not isinstance(bias, Constant) or x is None or w is None:
            continue
        x_scale, w_scale = (array_of(dq.inputs[1]).astype(np.float64) for dq in (x, w))
        values = array_of(bias).astype(np.float64)
        if x_scale.ndim or values.ndim != 1 or w_scale.shape not in ((), values.shape):
            reason = "the bias is not a vector with one value for each scale"
            refusals.append(Refusal(rule="int32 bias", where=node.name, reason=reason))
            continue
        scale = x_scale * w_scale
        integers = np.rint(values / scale)
        if np.abs(integers).max(initial=0.0) > BIAS_MAX:
            refusals.append(
                Refusal(rule="int32 bias", where=node.name, reason="the bias does not fit in int32")
            )
            continue
        numbers = QParams(
            scale=np.array(scale, np.float32),
            zero_point=np.zeros(scale.shape, np.int32),
            storage=INT32,
            qmin=INT32.qmin,
            qmax=INT32.qmax,
            axis=0 if scale.ndim else None,
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


def sum_before_norm(graph: Graph) -> PassReport:
    """Write the residual Add in front of each LayerNormalization as Sum, which is the same.

    onnxruntime 1.31 fuses Add and LayerNormalization into SkipLayerNormalization, whose kernel is
    about four times slower than the two: on kwt1_core (98 x 64, 24 of them) 667 us against 182 us,
    the whole INT8 model 1.00 against 0.73 of float. Sum is outside of its pattern.
    """
    changed = 0
    for node in graph.nodes:
        if node.op != "LayerNormalization":
            continue
        add = graph.producer(node.inputs[0])
        if add is None or add.op != "Add" or any(isinstance(t, Constant) for t in add.inputs):
            continue
        add.op = "Sum"
        changed += 1
    return PassReport(name="sum_before_norm", changed=changed)


def _dequantizer(graph: Graph, node: Node, index: int) -> Node | None:
    producer = graph.producer(node.inputs[index])
    return producer if producer is not None and producer.op == "DequantizeLinear" else None
