"""Residual blocks whose branch is linear, samples for them, and their outputs."""

from __future__ import annotations

import numpy as np
import onnx

from qpass.graph import Graph
from tests.small_models import Array, Feeds, from_text, run_each, weights

METHODS = ("qwt", "nbc")

TOKENS = """
<ir_version: 10, opset_import: ["": 21]>
tokens (float[N,5,16] x) => (float[N,5,16] y)
{ f0 = MatMul (x, w)  f = Add (f0, b)  y = Add (x, f) }
"""
ROWS = """
<ir_version: 10, opset_import: ["": 21]>
rows (float[N,16] x) => (float[N,16] y) { f = Gemm (x, w, b)  y = Add (x, f) }
"""
MAPS = """
<ir_version: 10, opset_import: ["": 21]>
maps (float[N,16,8,8] x) => (float[N,32,4,4] y)
{
    s = Conv <strides = [2, 2]> (x, s_w)
    f = Conv <strides = [2, 2]> (x, w, b)
    y = Add (f, s)
}
"""


def linear_block(text: str, *, seed: int) -> Graph:
    """A block whose branch is linear: what a wrong weight does to it is linear in its input."""
    random = np.random.default_rng(seed)
    skip = np.random.default_rng(1)
    shape = (32, 16, 1, 1) if text is MAPS else (16, 16)
    constants = {"w": weights(random, *shape, fan_in=16)}
    constants["b"] = random.standard_normal(shape[0]).astype(np.float32)
    if text is MAPS:
        constants["s_w"] = weights(skip, *shape, fan_in=16)
    return from_text(text, **constants)


def batches_of(graph: Graph, count: int = 8, samples: int = 4, seed: int = 3) -> list[Feeds]:
    random = np.random.default_rng(seed)
    (tensor,) = graph.inputs
    shape = [samples if isinstance(size, str) else size for size in tensor.shape]
    return [{tensor.name: random.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def outputs(graph: Graph | onnx.ModelProto, batches: list[Feeds]) -> Array:
    model = graph.to_model() if isinstance(graph, Graph) else graph
    return np.concatenate([next(iter(found.values())) for found in run_each(model, batches)])
