"""Small graphs with integer weights, and the explicit Mul and Add that a fold has to equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from qpass.graph import Graph
from qpass.passes.channel_affine import ChannelAffine

Array = np.ndarray[Any, Any]


def graph_of(inputs: str, outputs: str, body: str, **constants: Array) -> Graph:
    """Parse the body of an opset 21 graph."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    graph = Graph.from_text(text, **constants)
    graph.infer_shapes()
    return graph


def run(graph: Graph, feeds: dict[str, Array], *, optimize: bool = False) -> list[Array]:
    """Run in onnxruntime; without optimizations it computes node by node what the file says."""
    options = ort.SessionOptions()
    # Kernels for u8 times s8 saturate on processors without VNNI; these do not.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.to_model().SerializeToString(), options)
    results: list[Array] = session.run(None, feeds)
    return results


def rounded(
    name: str, weight: Array, axis: int | None, *, steps: int = 127, dtype: Any = np.int8
) -> dict[str, Array]:
    """Integers, scales and zero points of a weight rounded to the nearest, along `axis` or one."""
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    top = np.abs(weight).max(axis=others, keepdims=True)
    scale = (top / steps).astype(np.float32)
    middle = 128 if dtype is np.uint8 else 0
    integers = (np.rint(weight.astype(np.float32) / scale) + middle).astype(dtype)
    shape = () if axis is None else (-1,)
    return {
        f"{name}_int": integers,
        f"{name}_scale": scale.reshape(shape),
        f"{name}_zero": np.full(scale.reshape(shape).shape, middle, dtype),
    }


def powers_of_two(name: str, weight: Array, *, steps: int = 127) -> dict[str, Array]:
    """One scale for the whole weight, a power of two that clips nothing."""
    scale = np.float32(np.exp2(np.ceil(np.log2(np.abs(weight).max() / steps))))
    integers = np.rint(weight.astype(np.float32) / scale).astype(np.int8)
    return {
        f"{name}_int": integers,
        f"{name}_scale": np.array(scale),
        f"{name}_zero": np.array(0, np.int8),
    }


def affine_of(channels: int, *, seed: int = 6, dyadic: bool = False) -> ChannelAffine:
    """Gains in [0.5, 2], powers of two on demand (they do not round), and normal offsets."""
    random = np.random.default_rng(seed)
    gain = random.choice([0.5, 1.0, 2.0], channels) if dyadic else random.uniform(0.5, 2, channels)
    offset = random.standard_normal(channels).astype(np.float32).astype(np.float64)
    return ChannelAffine(gain=gain, offset=offset)


def exact_affine(channels: int, *, seed: int = 1) -> ChannelAffine:
    """Gains and offsets of few binary digits, which float32 multiplies and adds exactly."""
    random = np.random.default_rng(seed)
    gain = random.choice([0.5, 0.75, 1.25, 1.5, 2.0], channels)
    return ChannelAffine(gain=gain, offset=random.integers(-64, 65, channels) / 16)


def explicit(graph: Graph, tensor: str, affine: ChannelAffine, axis: int) -> Graph:
    """Return a copy with Mul and Add behind `tensor`, whose channels lie along `axis` (< 0)."""
    graph = graph.copy()
    inner = graph.tensors()[tensor]
    shape = (-1, *([1] * (-axis - 1)))
    parts = [
        graph.constant(name, values.reshape(shape).astype(np.float32))
        for name, values in (("gain", affine.gain), ("offset", affine.offset))
    ]
    readers, is_output = graph.consumers(inner), graph.is_output(inner)
    anchor = graph.producer(inner)
    assert anchor is not None
    source = inner
    if is_output:
        source = graph.variable("inner", inner.dtype, inner.shape)
        graph.set_output(anchor, 0, source)
    scaled = graph.variable("scaled", inner.dtype, inner.shape)
    result = inner if is_output else graph.variable("shifted", inner.dtype, inner.shape)
    mul = graph.make("Mul", [source, parts[0]], [scaled], name="explicit_mul")
    add = graph.make("Add", [scaled, parts[1]], [result], name="explicit_add")
    graph.add(mul, after=anchor)
    graph.add(add, after=mul)
    for reader, index in readers:
        graph.set_input(reader, index, result)
    return graph


def normal(shape: tuple[int, ...], seed: int = 4) -> Array:
    """Seeded standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
