"""Dynamic activations: MatMuls whose input is quantized at run time, with the range it has then.

What it does
    A MatMul with quantized constant weights and float input becomes DynamicQuantizeLinear ->
    MatMulInteger -> Cast -> Mul, which onnxruntime fuses into one DynamicQuantizeMatMul with float
    in and out. No calibration, and outliers of one sample do not cost the others.
Why it is correct
    ``y = (q_x - z_x) @ q_w * (s_x * s_w)``: the definition of the QDQ form with run-time s_x, z_x.
Preconditions
    `insert_qdq` has run with a plan that gives these MatMuls weights but no activation pair.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import TensorProto

from qpass.graph import Constant, Graph, Node, array_of
from qpass.report.model import PassReport, Refusal


def make_dynamic(graph: Graph, nodes: Collection[str]) -> PassReport:
    """Rewrite the MatMuls among `nodes` whose weights alone are quantized.

    Args:
        graph: is changed.
        nodes: names of what is to compute in integers; other weights stay behind DequantizeLinear.
    """
    changed, refusals = 0, []
    shared: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node.op != "MatMul" or node.name not in nodes:
            continue
        dq = graph.producer(node.inputs[1])
        left = graph.producer(node.inputs[0])
        if dq is None or dq.op != "DequantizeLinear" or not isinstance(dq.inputs[0], Constant):
            continue
        if left is not None and left.op == "DequantizeLinear":
            continue
        weight, scale, zero_point = dq.inputs
        if dq.attrs.get("block_size") or len(weight.shape) != 2:
            refusals.append(
                Refusal(rule="dynamic", where=node.name, reason="the weight is not a matrix")
            )
            continue
        _rewrite(graph, node, weight, scale, zero_point, shared)
        changed += 1
    graph.remove_unused()
    return PassReport(name="make_dynamic", changed=changed, refusals=tuple(refusals))


def _rewrite(
    graph: Graph,
    node: Node,
    weight: Constant,
    scale: Constant,
    zero_point: Constant,
    shared: dict[str, Node],
) -> None:
    x, out, name = node.inputs[0], node.outputs[0], node.name
    if x.name not in shared:
        outputs = [
            graph.variable(f"{x.name}_dynamic", np.dtype(np.uint8), x.shape),
            graph.variable(f"{x.name}_dynamic_scale", np.dtype(np.float32), ()),
            graph.variable(f"{x.name}_dynamic_zero_point", np.dtype(np.uint8), ()),
        ]
        quantizer = graph.make(
            "DynamicQuantizeLinear", [x], outputs, name=f"{x.name}_DynamicQuantizeLinear"
        )
        graph.add(quantizer, before=node)
        shared[x.name] = quantizer
    stored, x_scale, x_zero_point = shared[x.name].outputs
    product = graph.variable(f"{name}_int32", np.dtype(np.int32), out.shape)
    cast = graph.variable(f"{name}_cast", np.dtype(np.float32), out.shape)
    scales = graph.variable(f"{name}_scales", np.dtype(np.float32), None)
    # A zero point per column would keep the fusion away; symmetric weights need only one.
    zero = graph.constant(f"{name}_zero_point", array_of(zero_point).ravel()[:1].reshape(()))
    weight_scale = graph.constant(f"{name}_weight_scale", array_of(scale))
    graph.remove(node)
    # The product keeps the name of the MatMul: it is the op that the plan speaks of.
    product_node = graph.make(
        "MatMulInteger", [stored, weight, x_zero_point, zero], [product], name=f"{name}_integer"
    )
    product_node.name = name
    cast_node = graph.make(
        "Cast", [product], [cast], name=f"{name}_cast", attrs={"to": TensorProto.FLOAT}
    )
    scale_node = graph.make("Mul", [x_scale, weight_scale], [scales], name=f"{name}_scales")
    final = graph.make("Mul", [cast, scales], [out], name=f"{name}_scaled")
    for new in (product_node, cast_node, scale_node, final):
        graph.add(new, before=node)
