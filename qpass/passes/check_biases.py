"""Assert that every int32 bias has the scale that its accumulator has: an internal check.

An integer Conv or Gemm adds its bias to ``sum q_x q_w``, whose unit is x_scale * w_scale. A bias in
another unit is not an error to every engine: onnxruntime runs such a Conv in float, but a Gemm in
integers, with wrong numbers and without a word (20 % of the outputs off in a test with a gain that
was folded into the weight scale alone). So no graph leaves qpass without this check.
"""

from __future__ import annotations

import numpy as np

from qpass.errors import InternalError
from qpass.graph import Constant, Graph, Node, array_of

TOLERANCE: float = 1e-6  # relative; rounding the product to float32 costs 6e-8


def check_bias_scales(graph: Graph) -> int:
    """Compare the scale of each int32 bias with that of data times weight; return their number.

    Raises:
        InternalError: a scale is off by more than `TOLERANCE`, or there are too many or too few.
    """
    checked = 0
    for node in graph.nodes:
        if node.op not in ("Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 3:
            continue
        bias = _dequantizer(graph, node, 2)
        if bias is None or not isinstance(bias.inputs[0], Constant):
            continue
        if bias.inputs[0].dtype != np.int32:
            continue
        x, w = _dequantizer(graph, node, 0), _dequantizer(graph, node, 1)
        if x is None or w is None:
            raise InternalError(f"{node.name} has an int32 bias but no integer operands")
        x_scale, w_scale, scale = (_scale(dq) for dq in (x, w, bias))
        wanted = x_scale * w_scale
        count = int(np.prod(bias.inputs[0].shape))
        if scale.size not in (1, count) or wanted.size not in (1, count):
            raise InternalError(
                f"{node.name}: {scale.size} bias scales and {wanted.size} of its product "
                f"for {count} channels"
            )
        off = float(np.abs(scale / wanted - 1.0).max())
        if not off <= TOLERANCE:
            raise InternalError(
                f"{node.name}: the scale of its int32 bias is off x_scale * w_scale by {off:.2g} "
                "of it; engines would add it in the wrong unit"
            )
        checked += 1
    return checked


def _dequantizer(graph: Graph, node: Node, index: int) -> Node | None:
    producer = graph.producer(node.inputs[index])
    return producer if producer is not None and producer.op == "DequantizeLinear" else None


def _scale(dequantizer: Node) -> np.ndarray:
    values: np.ndarray = array_of(dequantizer.inputs[1]).astype(np.float64).ravel()
    return values
