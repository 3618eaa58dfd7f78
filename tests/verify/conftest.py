"""Small QDQ models, one for each way an engine treats a linear op."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ELEMENT = {"u8": np.uint8, "s8": np.int8}


class Builder:
    """Writes an ONNX graph node by node; every method returns the name of the new tensor."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: list[Any], element: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element, shape))
        return name

    def output(self, name: str, shape: list[Any] | None = None) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def op(self, kind: str, *inputs: str, name: str = "", out: str = "", **attributes: Any) -> str:
        out = out or f"{name or kind}_{len(self.nodes)}_out"
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=name, **attributes))
        return out

    def qdq(self, x: str, kind: str = "u8", zero: int = 128, scale: float = 0.05) -> str:
        """Q and DQ behind `x`, with scale and zero point named after it."""
        point = [
            self.constant(f"{x}_scale_{len(self.nodes)}", np.float32(scale)),
            self.constant(f"{x}_zero_{len(self.nodes)}", ELEMENT[kind](zero)),
        ]
        stored = self.op("QuantizeLinear", x, *point, name=f"{x}/q", out=f"{x}_q")
        return self.op("DequantizeLinear", stored, *point, name=f"{x}/dq", out=f"{x}_dq")

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        """Signed 8-bit weights behind a DQ with one scale per index of `axis`."""
        integers = self.random.integers(-127, 128, shape, dtype=np.int8)
        scale = self.random.uniform(0.002, 0.004, shape[axis]).astype(np.float32)
        parts = [
            self.constant(f"{name}_q", integers),
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", np.zeros(shape[axis], np.int8)),
        ]
        return self.op("DequantizeLinear", *parts, name=f"{name}/dq", out=f"{name}_dq", axis=axis)

    def bias(self, name: str, weight: str, scale: float = 0.05) -> str:
        """Bias in int32 whose scale is the activation's times the weight's, as engines want it."""
        weight_scale = next(
            numpy_helper.to_array(c) for c in self.constants if c.name == f"{weight}_scale"
        )
        parts = [
            self.constant(
                f"{name}_q", self.random.integers(-900, 900, weight_scale.shape, dtype=np.int32)
            ),
            self.constant(f"{name}_scale", (weight_scale * np.float32(scale)).astype(np.float32)),
            self.constant(f"{name}_zero", np.zeros(weight_scale.shape, np.int32)),
        ]
        return self.op("DequantizeLinear", *parts, name=f"{name}/dq", out=f"{name}_dq", axis=0)

    def floats(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.normal(0, 0.3, shape).astype(np.float32))

    def build(self, opset: int = 21) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
        )
        onnx.checker.check_model(model)
        return model


def conv_chain() -> onnx.ModelProto:
    """Two convolutions with absorbed Relu, in the dialect that onnxruntime fuses."""
    b = Builder()
    x = b.qdq(b.input("x", [1, 8, 8, 8]))
    for layer in ("conv0", "conv1"):
        w = b.weight(f"{layer}.w", (8, 8, 3, 3), 0)
        bias = b.bias(f"{layer}.b", f"{layer}.w")
        y = b.op("Conv", x, w, bias, name=layer, pads=[1, 1, 1, 1])
        x = b.qdq(b.op("Relu", y, name=f"{layer}/relu", out=f"{layer}_relu"), zero=0)
    b.op("ReduceMean", x, name="mean", out="y", keepdims=1)
    b.output("y", [1, 1, 1, 1])
    return b.build()


def conv_without_output_q() -> onnx.ModelProto:
    """A convolution whose output is float: onnxruntime keeps it in float."""
    b = Builder()
    x = b.qdq(b.input("x", [1, 8, 8, 8]))
    y = b.op("Conv", x, b.weight("w", (8, 8, 1, 1), 0), name="conv")
    b.op("Sigmoid", y, name="sigmoid", out="y")
    b.output("y", [1, 8, 8, 8])
    return b.build()


def float_weight_between_quantized() -> onnx.ModelProto:
    """Quantized input and output around a convolution whose weight was left in float."""
    b = Builder()
    x = b.qdq(b.input("x", [1, 8, 8, 8]))
    x = b.qdq(b.op("Conv", x, b.floats("w", 8, 8, 1, 1), name="conv"))
    b.op("Sigmoid", x, name="sigmoid", out="y")
    b.output("y", [1, 8, 8, 8])
    return b.build()


def residual() -> onnx.ModelProto:
    """Two convolutions and a skip connection, everything u8."""
    b = Builder()
    x = b.qdq(b.input("x", [1, 8, 8, 8]))
    y = x
    for layer in ("conv0", "conv1"):
        w = b.weight(f"{layer}.w", (8, 8, 3, 3), 0)
        y = b.qdq(b.op("Conv", y, w, name=layer, out=f"{layer}_out", pads=[1, 1, 1, 1]))
    y = b.qdq(b.op("Add", y, x, name="add", out="sum"))
    b.op("GlobalAveragePool", y, name="pool", out="y")
    b.output("y", [1, 8, 1, 1])
    return b.build()


def residual_signed_symmetric() -> onnx.ModelProto:
    """s8 with zero point 0 and Relu: not absorbed, so the convolution stays in float."""
    b = Builder()
    x = b.qdq(b.input("x", [1, 8, 8, 8]), "s8", 0)
    y = b.op("Conv", x, b.weight("w", (8, 8, 3, 3), 0), name="conv", pads=[1, 1, 1, 1])
    y = b.qdq(b.op("Relu", y, name="relu", out="r"), "s8", 0)
    y = b.qdq(b.op("Add", y, x, name="add", out="sum"), "s8", 0)
    b.op("GlobalAveragePool", y, name="pool", out="y")
    b.output("y", [1, 8, 1, 1])
    return b.build()


def signed_asymmetric() -> onnx.ModelProto:
    """s8 with zero point -128 behind Relu: as good as u8 with zero point 0."""
    b = Builder()
    x = b.qdq(b.input("x", [1, 8, 8, 8]), "s8", -3)
    y = b.op("Conv", x, b.weight("w", (8, 8, 3, 3), 0), name="conv", pads=[1, 1, 1, 1])
    y = b.qdq(b.op("Relu", y, name="relu", out="r"), "s8", -128)
    b.op("GlobalAveragePool", y, name="pool", out="y")
    b.output("y", [1, 8, 1, 1])
    return b.build()


def matmul_float_output() -> onnx.ModelProto:
    """Linear layers with quantized inputs, float outputs and rank-3 biases."""
    b = Builder()
    x = b.input("x", [1, 4, 16])
    for layer in ("fc0", "fc1"):
        y = b.op("MatMul", b.qdq(x), b.weight(f"{layer}.w", (16, 16), 1), name=layer)
        y = b.op("Add", y, b.floats(f"{layer}.b", 1, 1, 16), name=f"{layer}/add")
        x = b.op("Tanh", y, name=f"{layer}/act", out=f"{layer}_act")
    b.op("Identity", x, name="last", out="y")
    b.output("y", [1, 4, 16])
    return b.build()


def matmul_bias_trap(batch: Any = 1) -> onnx.ModelProto:
    """MatMul + Add(bias [N]) with static shape: MatMulAddFusion makes a float Gemm of it."""
    b = Builder()
    x = b.input("x", [batch, 4, 16])
    y = b.op("MatMul", b.qdq(x), b.weight("w", (16, 16), 1), name="fc")
    y = b.op("Add", y, b.floats("b", 16), name="fc/add")
    b.op("Tanh", y, name="act", out="y")
    b.output("y", [batch, 4, 16])
    return b.build()


def attention() -> onnx.ModelProto:
    """Activation x activation: scores, Softmax, context."""
    b = Builder()
    q, k, v = (b.input(n, [1, 2, 4, 16]) for n in "qkv")
    k = b.op("Transpose", k, name="kt", out="k_t", perm=[0, 1, 3, 2])
    s = b.op("MatMul", b.qdq(q, "s8", 0), b.qdq(k, "s8", 0), name="scores")
    s = b.op("Mul", s, b.constant("root", np.float32(0.25)), name="divide", out="scaled")
    p = b.op("Softmax", s, name="softmax", out="p", axis=-1)
    p = b.qdq(p, "u8", 0, 1 / 255)
    c = b.op("MatMul", p, b.qdq(v, "s8", 0), name="context")
    c = b.op("Transpose", c, name="ct", out="ct", perm=[0, 2, 1, 3])
    b.op("Reshape", c, b.constant("shape", np.array([1, 4, 32])), name="merge", out="y")
    b.output("y", [1, 4, 32])
    return b.build()


def attention_unsigned() -> onnx.ModelProto:
    """Activation x activation in u8 with zero point 128: onnxruntime only."""
    b = Builder()
    q, k = (b.qdq(b.input(name, [1, 2, 8, 8])) for name in "qk")
    s = b.op("MatMul", q, k, name="scores")
    b.op("Softmax", s, name="softmax", out="y", axis=-1)
    b.output("y", [1, 2, 8, 8])
    return b.build()


def mixed(kept: int = 0) -> onnx.ModelProto:
    """Four equal convolutions in a row; number `kept` has a float weight and a float output."""
    b = Builder()
    x = b.input("x", [1, 8, 8, 8])
    for number in range(4):
        name = f"conv{number}"
        if number == kept:
            x = b.op("Conv", x, b.floats(f"{name}.w", 8, 8, 1, 1), name=name)
            x = b.op("Tanh", x, name=f"{name}/act")
        else:
            w = b.weight(f"{name}.w", (8, 8, 1, 1), 0)
            x = b.qdq(b.op("Conv", b.qdq(x), w, name=name))
    b.op("GlobalAveragePool", x, name="pool", out="y")
    b.output("y", [1, 8, 1, 1])
    return b.build()


def float_blocks() -> onnx.ModelProto:
    """Float only, with everything that engines fuse: BatchNormalization, skip, scale, Transpose."""
    b = Builder()
    x = b.input("x", [1, 32, 8, 8])
    pads = [1, 1, 1, 1]
    y = b.op("Conv", x, b.floats("c0.w", 32, 32, 3, 3), b.floats("c0.b", 32), name="c0", pads=pads)
    y = b.op("Relu", y, name="r0")
    z = b.op("Conv", y, b.floats("c1.w", 32, 32, 3, 3), name="c1", pads=pads)
    statistics = [b.floats(f"bn.{part}", 32) for part in ("gain", "bias", "mean")]
    statistics.append(b.constant("bn.variance", np.ones(32, np.float32)))
    z = b.op("BatchNormalization", z, *statistics, name="bn")
    z = b.op("Relu", b.op("Add", z, y, name="add"), name="r1")
    z = b.op("Conv", z, b.floats("c2.w", 32, 1, 3, 3), name="c2", pads=pads, group=32)
    z = b.op("Mul", z, b.floats("scale", 32, 1, 1), name="affine")
    z = b.op("Flatten", b.op("GlobalAveragePool", z, name="pool"), name="flat")
    z = b.op("Gemm", z, b.floats("g.w", 32, 8), b.floats("g.b", 8), name="g")
    z = b.op("Mul", b.op("Relu", z, name="r2"), b.constant("k0", np.float32(0.2)), name="scale0")
    z = b.op("MatMul", z, b.floats("m0.w", 8, 8), name="m0")
    z = b.op("MatMul", z, b.op("Transpose", z, name="turn", perm=[1, 0]), name="m1")
    b.op("Mul", z, b.constant("k1", np.float32(0.3)), name="scale1", out="y")
    b.output("y", [1, 1])
    return b.build()


def gemm() -> onnx.ModelProto:
    """A head: Gemm (transB) with int32 bias, float output, and one with a quantized output."""
    b = Builder()
    x = b.input("x", [2, 16])
    w = b.weight("fc0.w", (16, 16), 0)
    x = b.op("Gemm", b.qdq(x), w, b.bias("fc0.b", "fc0.w"), name="fc0", out="h", transB=1)
    x = b.qdq(b.op("Relu", x, name="relu", out="r"), zero=0)
    w = b.weight("fc1.w", (4, 16), 0)
    b.op("Gemm", x, w, b.bias("fc1.b", "fc1.w"), name="fc1", out="y", transB=1)
    b.output("y", [2, 4])
    return b.build()


def dynamic() -> onnx.ModelProto:
    """Ranges at run time: DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul."""
    b = Builder()
    x = b.input("x", [1, 4, 16])
    parts = ["xq", "xs", "xz"]
    b.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], parts, name="fc/dql"))
    w = b.constant("w", b.random.integers(-127, 128, (16, 16), dtype=np.int8))
    zero = b.constant("wz", np.int8(0))
    y = b.op("MatMulInteger", "xq", w, "xz", zero, name="fc")
    y = b.op("Cast", y, name="fc/cast", to=TensorProto.FLOAT)
    s = b.op("Mul", "xs", b.constant("ws", np.float32(0.003)), name="fc/scale")
    y = b.op("Mul", y, s, name="fc/mul")
    b.op("Tanh", y, name="act", out="y")
    b.output("y", [1, 4, 16])
    return b.build()


def weight_only() -> onnx.ModelProto:
    """int4 weights in blocks of 16 along axis 0, float activations."""
    b = Builder()
    x = b.input("x", [1, 4, 32])
    packed = helper.make_tensor("w_q", TensorProto.INT4, [32, 16], b.random.integers(-7, 8, 512))
    b.constants.append(packed)
    scale = b.constant("w_s", b.random.uniform(0.01, 0.02, (2, 16)).astype(np.float32))
    w = b.op("DequantizeLinear", "w_q", scale, name="w/dq", out="w_dq", axis=0, block_size=16)
    y = b.op("MatMul", x, w, name="fc")
    b.op("Tanh", y, name="act", out="y")
    b.output("y", [1, 4, 16])
    return b.build()


def branches() -> onnx.ModelProto:
    """An If whose branches hold one quantized MatMul each."""
    b = Builder()
    b.input("x", [1, 4, 16])
    b.input("flag", [], TensorProto.BOOL)
    graphs = []
    for arm in ("then", "else"):
        inner = Builder(seed=len(arm))
        dq = inner.qdq(inner.op("Identity", "x", name=f"{arm}/in", out=f"{arm}_x"))
        inner.op("MatMul", dq, inner.weight(f"{arm}.w", (16, 16), 1), name=arm, out=f"{arm}_y")
        inner.output(f"{arm}_y", [1, 4, 16])
        graph = helper.make_graph(inner.nodes, arm, [], inner.outputs, inner.constants)
        graphs.append(graph)
    b.op("If", "flag", name="if", out="y", then_branch=graphs[0], else_branch=graphs[1])
    b.output("y", [1, 4, 16])
    return b.build()


CASES = {
    case.__name__: case
    for case in (
        conv_chain,
        conv_without_output_q,
        float_weight_between_quantized,
        residual,
        residual_signed_symmetric,
        signed_asymmetric,
        matmul_float_output,
        matmul_bias_trap,
        attention,
        attention_unsigned,
        mixed,
        float_blocks,
        gemm,
        dynamic,
        weight_only,
        branches,
    )
}


@pytest.fixture
def saved(tmp_path: Path):
    """Return a function that builds a case by name, saves it, and gives model and path."""

    def save(case: str, **options: Any) -> tuple[onnx.ModelProto, Path]:
        model = CASES[case](**options)
        path = tmp_path / f"{case}.onnx"
        onnx.save(model, path)
        return model, path

    return save


@pytest.fixture
def feeds():
    """Return a function that makes seeded standard normal feeds for the inputs of a model."""

    def make(model: onnx.ModelProto, seed: int = 7) -> dict[str, Any]:
        random = np.random.default_rng(seed)
        values = {}
        for value in model.graph.input:
            tensor = value.type.tensor_type
            shape = [max(dim.dim_value, 1) for dim in tensor.shape.dim]
            if tensor.elem_type == TensorProto.BOOL:
                values[value.name] = np.ones(shape, bool)
            else:
                values[value.name] = random.standard_normal(shape).astype(np.float32)
        return values

    return make
