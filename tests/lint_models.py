"""Quantized models for lint, written op by op or changed by hand, and findings of one rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qpass.lint import Finding, lint

U8, S8, U16, S4 = np.uint8, np.int8, np.uint16, ml_dtypes.int4
ZERO = {U8: 128, S8: 0, U16: 32768, S4: 0}
CHANNELS = 16


class Builder:
    """Writes a QDQ graph op by op; methods return the name of the new tensor."""

    def __init__(self, opset: int = 21) -> None:
        self.random = np.random.default_rng(0)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, shape: list[Any], name: str = "x", element: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element, shape))
        return name

    def constant(self, name: str, values: Any, dtype: Any = None) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{kind.lower()}{len(self.nodes)}"
        outputs = [f"{name}_out"]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, **attributes))
        return outputs[0]

    def numbers(self, name: str, scale: Any, zero: Any, dtype: Any) -> tuple[str, str]:
        scale = np.asarray(scale, np.float32)
        zero = np.broadcast_to(np.asarray(zero), scale.shape) if np.ndim(zero) == 0 else zero
        return (
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", np.asarray(zero).astype(dtype)),
        )

    def pair(
        self, source: str, dtype: Any = U8, *, scale: Any = 0.03125, zero: Any = None, **axis: int
    ) -> str:
        numbers = self.numbers(source, scale, ZERO[dtype] if zero is None else zero, dtype)
        q = self.op("QuantizeLinear", source, *numbers, name=f"{source}_q", **axis)
        return self.op("DequantizeLinear", q, *numbers, name=f"{source}_dq", **axis)

    def stored(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: Any = S8,
        *,
        scale: Any = 0.0625,
        zero: Any = 0,
        **axis: int,
    ) -> str:
        self.constant(name, self.random.integers(0, 7, shape).astype(dtype))
        numbers = self.numbers(name, scale, zero, dtype)
        return self.op("DequantizeLinear", name, *numbers, name=f"{name}_dq", **axis)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            self.inputs,
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets)


PER_CHANNEL = np.full(CHANNELS, 0.0625)


def conv(
    *,
    data: dict[str, Any] | None = None,
    weight: dict[str, Any] | None = None,
    bias: dict[str, Any] | str | None = None,
    follower: str = "Relu",
    output: dict[str, Any] | None = None,
    quantize_output: bool = True,
    op: str = "Conv",
    shape: list[Any] | None = None,
    opset: int = 21,
) -> onnx.ModelProto:
    """X -> Q/DQ -> Conv(DQ(w), DQ(b)) -> Relu -> Q/DQ, clean on ort-x86 unless told otherwise."""
    b = Builder(opset)
    x = b.pair(b.input([1, CHANNELS, 4, 4] if shape is None else shape), **(data or {}))
    axis = 0 if op == "Conv" else 1
    options = {"scale": PER_CHANNEL, "axis": axis} | (weight or {})
    w = b.stored("w", (CHANNELS, CHANNELS, 1, 1), **options)
    if bias == "float":
        terms = (b.constant("b", np.ones(CHANNELS, np.float32)),)
    else:
        numbers = {"scale": PER_CHANNEL * 0.03125, "axis": 0} | (bias or {})
        terms = (b.stored("b", (CHANNELS,), np.int32, **numbers),)
    y = b.op(op, x, w, *terms, name="conv")
    y = b.op(follower, y, name="relu") if follower else y
    if quantize_output:
        y = b.pair(y, **({"zero": 0} | (output or {})))
    return b.model(y)


def matmul(
    *,
    data: dict[str, Any] | None = None,
    weight: dict[str, Any] | None = None,
    bias: np.ndarray | str | None = None,
    shape: list[Any] | None = None,
    quantize_data: bool = True,
    quantize_output: bool = False,
    op: str = "MatMul",
    readers: int = 1,
    opset: int = 21,
    **attributes: Any,
) -> onnx.ModelProto:
    """X -> Q/DQ -> MatMul(DQ(w)) [-> Add], weights per channel along the last axis."""
    b = Builder(opset)
    x = b.input(["N", 4, CHANNELS] if shape is None else shape)
    x = b.pair(x, **(data or {})) if quantize_data else x
    w = b.stored("w", (CHANNELS, CHANNELS), **({"scale": PER_CHANNEL, "axis": 1} | (weight or {})))
    terms = (b.constant("b", np.ones(CHANNELS, np.float32)),) if op == "Gemm" else ()
    ys = [b.op(op, x, w, *terms, name=f"mm{i}", **attributes) for i in range(readers)]
    if isinstance(bias, str):
        term = b.stored("b", (CHANNELS,), np.int32, scale=PER_CHANNEL * 0.03125, axis=0)
        ys = [b.op("Add", ys[0], term, name="add")]
    elif bias is not None:
        ys = [b.op("Add", ys[0], b.constant("b", bias, np.float32), name="add")]
    if quantize_output:
        ys = [b.pair(y) for y in ys]
    return b.model(*ys)


def around(op: str, dtype: Any = U8, *, pairs: bool = True) -> onnx.ModelProto:
    """X -> Q/DQ -> op -> Q/DQ."""
    b = Builder()
    x = b.input([1, 4, 8, 8])
    x = b.pair(x, dtype) if pairs else x
    y = b.op(op, x, name="op", **({"kernel_shape": [2, 2]} if op == "MaxPool" else {}))
    return b.model(b.pair(y, dtype) if pairs else y)


def changed(model: onnx.ModelProto, change: Callable[[onnx.ModelProto], Any]) -> onnx.ModelProto:
    change(model)
    return model


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def set_values(name: str, values: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor(model, name).CopyFrom(numpy_helper.from_array(np.asarray(values), name))

    return change


def drop_axis(model: onnx.ModelProto) -> None:
    del node(model, "w_dq").attribute[:]


def blocks(size: int, rows: int, *, axis: int = 0, dtype: Any = S4) -> dict[str, Any]:
    """Return the options of a weight [CHANNELS, CHANNELS] with blocks along `axis`."""
    shape = [CHANNELS, CHANNELS]
    shape[axis] = rows
    return {"dtype": dtype, "scale": np.full(shape, 0.5), "axis": axis, "block_size": size}


def set_first(name: str, value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        values = numpy_helper.to_array(tensor(model, name)).copy()
        values.flat[0] = value
        set_values(name, values)(model)

    return change


WEIGHT_ONLY = {"quantize_data": False, "shape": [2, CHANNELS]}


def of_rule(model: onnx.ModelProto, rule: str, target: str | None) -> list[Finding]:
    return [finding for finding in lint(model, target) if finding.rule == rule]
