"""Hypothesis strategies: tensors, specs and small valid graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qpass.dtypes import STORAGE_TYPES, storage_for
from qpass.graph import Graph
from qpass.qparams import TensorSpec

Array = np.ndarray[Any, Any]

# Scales beyond these do not come out of calibration, and x / scale would overflow float32.
MAGNITUDES = st.floats(1e-3, 1e4)


@st.composite
def tensors(
    draw: st.DrawFn, *, ranks: tuple[int, ...] = (0, 1, 2, 3, 4), sides: tuple[int, int] = (1, 5)
) -> Array:
    """A float32 array: normal values of some magnitude, with zeros and exact halves in it."""
    shape = [draw(st.integers(*sides)) for _ in range(draw(st.sampled_from(ranks)))]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = random.standard_normal(shape) * draw(MAGNITUDES)
    kind = random.integers(0, 4, shape)
    values = np.where(kind == 0, 0.0, np.where(kind == 1, np.round(values * 2) / 2, values))
    return values.astype(np.float32)


@st.composite
def specs(draw: st.DrawFn, *, rank: int | None = None, blocks: bool = False) -> TensorSpec:
    """A spec that ONNX can store; per channel or per block where `rank` gives an axis to choose."""
    bits, signed = draw(st.integers(2, 16)), draw(st.booleans())
    symmetric = draw(st.booleans())
    kinds = ["per_tensor"] + ["per_channel"] * bool(rank) + ["per_block"] * bool(rank and blocks)
    granularity: Any = draw(st.sampled_from(kinds))
    return TensorSpec(
        storage=storage_for(bits, signed=signed),
        symmetric=symmetric,
        bits=bits,
        granularity=granularity,
        axis=None if granularity == "per_tensor" else draw(st.integers(0, (rank or 1) - 1)),
        block_size=draw(st.integers(1, 4)) if granularity == "per_block" else None,
        narrow_range=symmetric and signed and draw(st.booleans()),
        power_of_two=draw(st.booleans()),
    )


def storages() -> st.SearchStrategy[Any]:
    """One of the integer types that ONNX stores."""
    return st.sampled_from(STORAGE_TYPES)


CHANNELS = 16


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A small valid graph of convolutions and what surrounds them; every shape is [1, 16, 4, 4].

    Any tensor may be read again, so there are skips, shared readers, unused and several outputs.
    """
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes, constants, values = [], [], ["x"]
    for number in range(draw(st.integers(2, 8))):
        kind = draw(
            st.sampled_from(["Conv", "Conv", "Relu", "Clip", "Add", "AddConstant", "MaxPool", "Mul",
                             "Concat", "Transpose", "Sigmoid", "Softmax", "MatMul"])
        )  # fmt: skip
        source, out = draw(st.sampled_from(values)), f"t{number}"
        other, name = draw(st.sampled_from(values)), f"n{number}"
        made = _nodes_of(kind, name, source, other, out, constants, random)
        nodes += made
        values.append(out)
    count = draw(st.integers(1, min(3, len(values) - 1)))
    chosen = draw(st.permutations(values[1:]))[:count]
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, CHANNELS, 4, 4])],
        [helper.make_tensor_value_info(v, TensorProto.FLOAT, [1, CHANNELS, 4, 4]) for v in chosen],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made_graph = Graph(model)
    made_graph.infer_shapes()
    return made_graph


def _nodes_of(
    kind: str,
    name: str,
    source: str,
    other: str,
    out: str,
    constants: list[TensorProto],
    random: np.random.Generator,
) -> list[Any]:
    def constant(tail: str, values: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values), f"{name}_{tail}"))
        return f"{name}_{tail}"

    def floats(tail: str, *shape: int) -> str:
        return constant(tail, random.normal(0, 0.2, shape).astype(np.float32))

    if kind == "Conv":
        inputs = [source, floats("w", CHANNELS, CHANNELS, 3, 3), floats("b", CHANNELS)]
        return [helper.make_node("Conv", inputs, [out], name=name, pads=[1, 1, 1, 1])]
    if kind == "Clip":
        inputs = [source, "", constant("high", np.float32(3))]
        return [helper.make_node("Clip", inputs, [out], name=name)]
    if kind == "AddConstant":
        return [helper.make_node("Add", [source, floats("c", CHANNELS, 1, 1)], [out], name=name)]
    if kind in ("Add", "Mul"):
        return [helper.make_node(kind, [source, other], [out], name=name)]
    if kind == "MatMul":  # a constant or a second activation
        right = floats("w", 4, 4) if source == other else other
        return [helper.make_node("MatMul", [source, right], [out], name=name)]
    if kind == "MaxPool":
        attrs: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        return [helper.make_node("MaxPool", [source], [out], name=name, **attrs)]
    if kind == "Transpose":
        return [helper.make_node("Transpose", [source], [out], name=name, perm=[0, 1, 3, 2])]
    if kind == "Concat":  # two halves of channels
        sizes = constant("sizes", np.array([CHANNELS // 2] * 2))
        halves = [[f"{name}_{side}{i}" for i in range(2)] for side in "lr"]
        return [
            helper.make_node("Split", [source, sizes], halves[0], name=f"{name}_left", axis=1),
            helper.make_node("Split", [other, sizes], halves[1], name=f"{name}_right", axis=1),
            helper.make_node("Concat", [halves[0][0], halves[1][1]], [out], name=name, axis=1),
        ]
    return [helper.make_node(kind, [source], [out], name=name)]
