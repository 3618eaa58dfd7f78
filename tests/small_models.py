"""Small float models with seeded weights, and min/max quantization of them without the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from qpass.choose import QTable, weight_range
from qpass.graph import Graph, array_of
from qpass.plan import Decision, Plan
from qpass.planner import plan as make_plan
from qpass.program import Policy, Precision
from qpass.qparams import QParams, choose_qparams
from qpass.quantize import build_quantized
from qpass.targets.schema import Target

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

RESIDUAL_CNN = """
<ir_version: 10, opset_import: ["": 21]>
cnn (float[2,3,12,12] image) => (float[2,10] logits)
{
    stem = Conv <pads = [1, 1, 1, 1]> (image, stem_w, stem_b)
    x0 = Relu (stem)
    a = Conv <pads = [1, 1, 1, 1]> (x0, a_w, a_b)
    ra = Relu (a)
    b = Conv <pads = [1, 1, 1, 1]> (ra, b_w, b_b)
    sum = Add (b, x0)
    x1 = Relu (sum)
    pooled = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x1)
    c = Conv (pooled, c_w, c_b)
    six = Clip (c, zero, top)
    mean = GlobalAveragePool (six)
    flat = Flatten (mean)
    logits = Gemm <transB = 1> (flat, head_w, head_b)
}
"""

TRANSFORMER = """
<ir_version: 10, opset_import: ["": 21]>
transformer (float[2,6,32] x) => (float[2,6,32] y)
{
    n1 = LayerNormalization (x, g1, be1)
    qkv0 = MatMul (n1, qkv_w)
    qkv = Add (qkv0, qkv_b)
    q0, k0, v0 = Split <axis = -1, num_outputs = 3> (qkv)
    q1 = Reshape (q0, heads)
    k1 = Reshape (k0, heads)
    v1 = Reshape (v0, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
    scores = MatMul (q, k)
    scaled = Mul (scores, root)
    p = Softmax <axis = -1> (scaled)
    context = MatMul (p, v)
    turned = Transpose <perm = [0, 2, 1, 3]> (context)
    merged = Reshape (turned, whole)
    proj0 = MatMul (merged, proj_w)
    proj = Add (proj0, proj_b)
    x1 = Add (x, proj)
    n2 = LayerNormalization (x1, g2, be2)
    up0 = MatMul (n2, up_w)
    up = Add (up0, up_b)
    act = Gelu (up)
    down0 = MatMul (act, down_w)
    down = Add (down0, down_b)
    y = Add (x1, down)
}
"""


def weights(random: np.random.Generator, *shape: int, fan_in: int) -> Array:
    """Normal weights that keep the size of a signal."""
    return (random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def named(graph: Graph) -> Graph:
    """Name each node after its first output, so that tests can speak of it."""
    for node in graph.nodes:
        node.name = f"node_{node.outputs[0].name}"
    graph.infer_shapes()
    return graph


def from_text(text: str, **constants: Array) -> Graph:
    return named(Graph.from_text(text, **constants))


def residual_cnn() -> Graph:
    """Stem, one residual block, pooling, a convolution with Clip, and a head."""
    random = np.random.default_rng(5)
    constants = {
        "stem_w": weights(random, 16, 3, 3, 3, fan_in=27),
        "a_w": weights(random, 16, 16, 3, 3, fan_in=144),
        "b_w": weights(random, 16, 16, 3, 3, fan_in=144),
        "c_w": weights(random, 24, 16, 1, 1, fan_in=16),
        "head_w": weights(random, 10, 24, fan_in=24),
        "zero": np.float32(0),
        "top": np.float32(6),
    }
    for name, size in (("stem", 16), ("a", 16), ("b", 16), ("c", 24), ("head", 10)):
        constants[f"{name}_b"] = random.normal(0, 0.2, size).astype(np.float32)
    return from_text(RESIDUAL_CNN, **constants)


def transformer() -> Graph:
    """One pre-norm block with two heads of 16 channels."""
    random = np.random.default_rng(6)
    constants: dict[str, Array] = {
        "heads": np.array([2, 6, 2, 16]),
        "whole": np.array([2, 6, 32]),
        "root": np.float32(0.25),
    }
    for name, rows, columns in (
        ("qkv", 32, 96),
        ("proj", 32, 32),
        ("up", 32, 64),
        ("down", 64, 32),
    ):
        constants[f"{name}_w"] = weights(random, rows, columns, fan_in=rows)
        constants[f"{name}_b"] = random.normal(0, 0.1, columns).astype(np.float32)
    for number in "12":
        constants[f"g{number}"] = random.uniform(0.8, 1.2, 32).astype(np.float32)
        constants[f"be{number}"] = random.normal(0, 0.1, 32).astype(np.float32)
    return from_text(TRANSFORMER, **constants)


def mlp(*, shared: bool = False, width: int = 264) -> Graph:
    """Two linear layers that have a bias of zeros each, or the same one.

    It holds more than 1,024 bytes: what is smaller is not shared in a graph.
    """
    random = np.random.default_rng(7)
    constants = {
        "up_w": weights(random, 8, width, fan_in=8),
        "down_w": weights(random, width, width, fan_in=width),
        "bias": np.zeros(width, np.float32),
        "other": np.zeros(width, np.float32),
    }
    second = "bias" if shared else "other"
    text = f"""
    <ir_version: 10, opset_import: ["": 21]>
    mlp (float[2,6,8] x) => (float[2,6,{width}] y)
    {{
        up0 = MatMul (x, up_w)
        up = Add (up0, bias)
        act = Relu (up)
        down0 = MatMul (act, down_w)
        y = Add (down0, {second})
    }}
    """
    return from_text(text, **{k: v for k, v in constants.items() if k != "other" or not shared})


def feeds_of(graph: Graph, count: int = 4, seed: int = 11) -> list[dict[str, Array]]:
    """Seeded standard normal samples for the float inputs of `graph`."""
    random = np.random.default_rng(seed)
    return [
        {
            t.name: random.standard_normal(
                [d if isinstance(d, int) else 2 for d in t.shape]
            ).astype(np.float32)
            for t in graph.inputs
        }
        for _ in range(count)
    ]


def run(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Array]:
    """Run `model` in onnxruntime with every optimization off: what the file says."""
    return run_each(model, [feeds])[0]


def run_each(model: onnx.ModelProto, batches: Sequence[Feeds]) -> list[dict[str, Array]]:
    """Run all batches in one session: loading a small model takes longer than running it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(feeds)), strict=True)) for feeds in batches]


def minmax(graph: Graph, plan: Plan, feeds: Sequence[Feeds]) -> QTable:
    """Choose min/max numbers for every decision; tied tensors get one range."""
    wanted = [d.tensor for d in plan.activations()]
    model = graph.to_model(taps=wanted)
    ranges: dict[str, list[tuple[float, float]]] = {}
    for feed, found in zip(feeds, run_each(model, feeds), strict=True):
        values = {**feed, **found}
        for decision in plan.activations():
            seen = values[decision.tensor]
            if decision.mask_below is not None:
                seen = seen[seen > decision.mask_below]
            group = decision.group or f"alone: {decision.tensor}"
            ranges.setdefault(group, []).append((float(seen.min()), float(seen.max())))
    tensors = graph.tensors()

    def numbers(decision: Decision) -> QParams:
        if decision.kind != "activation":
            low, high = weight_range(array_of(tensors[decision.tensor]), decision.spec)
            return choose_qparams(decision.spec, low, high)
        ends = ranges[decision.group or f"alone: {decision.tensor}"]
        return choose_qparams(decision.spec, min(r[0] for r in ends), max(r[1] for r in ends))

    return QTable(qparams={d.key: numbers(d) for d in plan.decisions}, ranges={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What `quantize` made: the integer graph with the plan and numbers behind it."""

    graph: Graph
    plan: Plan
    table: QTable


def policy_of(precision: str = "w8a8", **options: Any) -> Policy:
    return Policy(precision=Precision.parse(precision), **options)


def quantize(
    graph: Graph, target: Target, feeds: Sequence[Feeds], precision: str = "w8a8", **options: Any
) -> Quantized:
    """Plan, choose min/max numbers, insert and lower."""
    policy = policy_of(precision, **options)
    plan = make_plan(graph, target, policy)
    table = minmax(graph, plan, feeds)
    quantized, _ = build_quantized(graph, plan, table, target, policy)
    return Quantized(graph=quantized, plan=plan, table=table)
