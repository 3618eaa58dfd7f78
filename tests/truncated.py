"""Small graphs whose weights are rounded towards zero, which compensation makes up for."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort

from qpass.graph import Graph

WIDTH = 8


def run(model: onnx.ModelProto | Graph, feeds) -> list[np.ndarray]:
    """Run node by node, as the graph says."""
    return run_each(model, [feeds])[0]


def run_each(model: onnx.ModelProto | Graph, batches) -> list[list[np.ndarray]]:
    """Run all batches in one session: loading a small model takes longer than running it."""
    model = model.to_model() if isinstance(model, Graph) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    return [session.run(None, feeds) for feeds in batches]


def first_outputs(model: onnx.ModelProto | Graph, batches) -> np.ndarray:
    """Return the first output for all batches."""
    return np.concatenate([found[0] for found in run_each(model, batches)])


def quantized_weight(name: str, weight: np.ndarray, axis: int, *, steps: int = 7, per_channel=True):
    """Constants of a DQ weight, rounded towards zero: biased on purpose, as 4-bit rounding is."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    top = np.abs(weight).max(axis=others if per_channel else None, keepdims=True) / steps
    stored = np.trunc(weight / top).astype(np.int8)
    scale = top.ravel() if per_channel else top.reshape(())
    return {f"{name}_int": stored, f"{name}_scale": scale.astype(np.float32)}


def header(inputs: str, outputs: str, body: str) -> str:
    return f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({outputs}) {{ {body} }}'


def mlp(*, quantized: bool, depth: int = 3) -> Graph:
    """Depth times MatMul, Add, Relu; positive inputs make truncation of weights a bias."""
    random = np.random.default_rng(0)
    lines, constants, x = [], {}, "x"
    for i in range(depth):
        weight = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 2
        constants[f"b{i}"] = random.uniform(0, 1, WIDTH).astype(np.float32)
        if quantized:
            constants |= quantized_weight(f"w{i}", weight, 1)
            lines.append(f"w{i} = DequantizeLinear <axis = 1> (w{i}_int, w{i}_scale)")
        else:
            constants[f"w{i}"] = weight
        lines += [
            f"[fc{i}] h{i} = MatMul ({x}, w{i})",
            f"a{i} = Add (h{i}, b{i})",
            f"r{i} = Relu (a{i})",
        ]
        x = f"r{i}"
    text = header(f"float[N, {WIDTH}] x", f"float[N, {WIDTH}] r{depth - 1}", "\n".join(lines))
    graph = Graph.from_text(text, **constants)
    graph.infer_shapes()
    return graph


def batches_of(count: int, rows: int = 8, *, seed: int = 1, mean: float = 1.0):
    random = np.random.default_rng(seed)
    return [
        {"x": (random.standard_normal((rows, WIDTH)) + mean).astype(np.float32)}
        for _ in range(count)
    ]
