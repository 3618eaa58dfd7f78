"""Every rule has one model that breaks it and one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import ModelError, RecipeError
from qpass.lint import RULES, TARGET_NAMES, Finding, lint, rules_for

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


def product(left: dict[str, Any], right: dict[str, Any]) -> onnx.ModelProto:
    """Return the product of two activations."""
    b = Builder()
    first = b.pair(b.input([2, 4, 4], "x"), **left)
    second = b.pair(b.input([2, 4, 4], "y"), **right)
    return b.model(b.op("MatMul", first, second, name="mm"))


def around(op: str, dtype: Any = U8, *, pairs: bool = True) -> onnx.ModelProto:
    """X -> Q/DQ -> op -> Q/DQ."""
    b = Builder()
    x = b.input([1, 4, 8, 8])
    x = b.pair(x, dtype) if pairs else x
    y = b.op(op, x, name="op", **({"kernel_shape": [2, 2]} if op == "MaxPool" else {}))
    return b.model(b.pair(y, dtype) if pairs else y)


def shared(dtype: Any) -> onnx.ModelProto:
    """Return a residual branch: one activation with two readers."""
    b = Builder()
    x = b.pair(b.input([1, 4, CHANNELS]), dtype)
    w = b.stored("w", (CHANNELS, CHANNELS), scale=PER_CHANNEL, axis=1)
    return b.model(b.op("MatMul", x, w), b.op("Neg", x))


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


def integers_as_output(model: onnx.ModelProto) -> None:
    """Let the float op read the Q itself."""
    node(model, "conv").input[0] = "x_q_out"


def drop_axis(model: onnx.ModelProto) -> None:
    del node(model, "w_dq").attribute[:]


def float_weight_quantized(model: onnx.ModelProto) -> None:
    """Store the weight in float, with a Q before the DQ."""
    scale, zero = node(model, "w_dq").input[1:]
    set_values("w", np.ones((CHANNELS, CHANNELS, 1, 1), np.float32))(model)
    quantize = helper.make_node("QuantizeLinear", ["w", scale, zero], ["w_q"], name="w_q", axis=0)
    model.graph.node.insert(0, quantize)
    node(model, "w_dq").input[0] = "w_q"


def float_twin(model: onnx.ModelProto) -> None:
    """Let another node read a float weight of which "w..." is the quantized copy."""
    model.graph.initializer.append(
        numpy_helper.from_array(np.ones((CHANNELS, CHANNELS), np.float32), "w")
    )
    model.graph.node.append(helper.make_node("Gather", ["w", "i"], ["row"], name="gather"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "i"))
    tensor(model, "w").name = "w_quantized"
    node(model, "w_dq").input[0] = "w_quantized"


def second_pair(scale: float) -> onnx.ModelProto:
    b = Builder()
    return b.model(b.pair(b.pair(b.input([4])), scale=scale))


def moved_pair() -> onnx.ModelProto:
    b = Builder()
    return b.model(b.pair(b.op("Relu", b.pair(b.input([4])))))


def made_by(op: str) -> onnx.ModelProto:
    """DQ of a tensor that `op` made of an integer input."""
    b = Builder()
    y = b.op(op, b.input([1, 4, 4], element=TensorProto.UINT8), name="maker")
    return b.model(b.op("DequantizeLinear", y, *b.numbers("y", 0.5, 0, U8), name="dq"))


def two_scales(second: float) -> onnx.ModelProto:
    b = Builder()
    first = b.stored("w", (4, 4), scale=0.5)
    numbers = b.numbers("again", second, 0, S8)
    return b.model(first, b.op("DequantizeLinear", "w", *numbers, name="again"))


def conv_relu_conv(*, between: bool) -> onnx.ModelProto:
    """Conv, then Relu with or without a pair in between."""
    b = Builder()
    x = b.pair(b.input([1, CHANNELS, 4, 4]))
    w = b.stored("w", (CHANNELS, CHANNELS, 1, 1), scale=PER_CHANNEL, axis=0)
    y = b.op("Conv", x, w, name="conv")
    y = b.pair(y) if between else y
    return b.model(b.pair(b.op("Relu", y, name="relu"), zero=0))


def weight_only_conv(*, float_data: bool) -> onnx.ModelProto:
    b = Builder()
    x = b.input([1, CHANNELS, 4, 4])
    x = x if float_data else b.pair(x)
    w = b.stored("w", (CHANNELS, CHANNELS, 1, 1), scale=PER_CHANNEL, axis=0)
    return b.model(b.pair(b.op("Conv", x, w, name="conv")))


def integer_op(kind: str) -> onnx.ModelProto:
    b = Builder()
    x = b.input([1, 4, 4, 4], element=TensorProto.UINT8)
    w = b.constant("w", np.ones((4, 4, 1, 1) if kind == "ConvInteger" else (4, 4), np.int8))
    return b.model(b.op(kind, x, w, name="integer"))


def computed_scale(*, computed: bool) -> onnx.ModelProto:
    b = Builder()
    x = b.input([4])
    scale, zero = b.numbers("x", 0.5, 0, S8)
    scale = b.op("Abs", scale) if computed else scale
    q = b.op("QuantizeLinear", x, scale, zero, name="q")
    return b.model(b.op("DequantizeLinear", q, scale, zero, name="dq"))


def control_flow(*, used: bool) -> onnx.ModelProto:
    if not used:
        return conv()
    return onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (bool c, float[4] x) => (float[4] y) {
          [branch] y = If(c) <
            then_branch = t () => (float[4] a) { a = Relu(x) },
            else_branch = e () => (float[4] b) { b = Neg(x) }
          >
        }""")


def unquantized_op(*, present: bool) -> onnx.ModelProto:
    b = Builder()
    x = b.input([4])
    x = x if present else b.pair(x)
    return b.model(b.pair(b.op("Relu", x, name="relu")))


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
VITIS = {
    "data": {"dtype": S8},
    "weight": {"scale": 0.0625},
    "bias": {"scale": 0.0625 / 32},
    "output": {"dtype": S8, "zero": 0},
}
for options in (VITIS["weight"], VITIS["bias"]):
    options["axis"] = 0
S8_CONV = {"data": {"dtype": S8}, "output": {"dtype": S8, "zero": 0}, "bias": "float"}

# rule: (target, a model that breaks it, one that does not)
CASES: dict[str, tuple[str | None, onnx.ModelProto, onnx.ModelProto]] = {
    "QP001": (None, changed(conv(), set_first("w_scale", 0.0)), conv()),
    "QP002": (None, changed(conv(), set_first("w_scale", -0.0625)), conv()),
    "QP003": (None, changed(conv(), set_values("w_zero", np.zeros(3, np.int8))), conv()),
    "QP004": (None, changed(conv(), set_values("w_zero", np.zeros(CHANNELS, np.uint8))), conv()),
    "QP005": (None, conv(bias={"zero": 1}), conv()),
    "QP006": (None, conv(weight={"scale": np.full(3, 0.0625)}), conv()),
    "QP007": (None, conv(data={"scale": 1e36}), conv(data={"scale": 1e3})),
    "QP008": (None, matmul(weight=blocks(8, 3), **WEIGHT_ONLY), matmul(weight=blocks(8, 2))),
    "QP009": (None, conv(opset=12), conv(opset=13)),
    "QP020": (None, changed(conv(), integers_as_output), conv()),
    "QP021": (None, made_by("Relu"), made_by("Transpose")),
    "QP022": (None, changed(conv(), float_weight_quantized), conv()),
    "QP023": (
        None,
        changed(conv(), lambda m: m.graph.initializer.add(name="old", data_type=1, dims=[0])),
        conv(),
    ),
    "QP024": (None, changed(matmul(), float_twin), matmul()),
    "QP025": (None, second_pair(0.5), moved_pair()),
    "QP026": (None, two_scales(0.25), two_scales(0.5)),
    "QP030": (None, changed(conv(), drop_axis), matmul(weight={"axis": -1})),
    "QP031": (None, conv(bias={"scale": PER_CHANNEL * 0.03126}), conv()),
    "QP032": (None, conv(data={"scale": PER_CHANNEL, "axis": 1}), conv()),
    "QP033": ("openvino", conv(data={"scale": PER_CHANNEL, "axis": 1}), conv()),
    "QP034": (None, weight_only_conv(float_data=True), weight_only_conv(float_data=False)),
    "QP101": ("ort-x86", shared(S8), shared(U8)),
    "QP102": ("ort-x86", conv(data={"dtype": S8}), conv()),
    "QP103": ("ort-x86", conv(weight={"dtype": U8}), conv()),
    "QP104": ("ort-x86", conv(quantize_output=False), conv()),
    "QP105": (
        "ort-x86",
        matmul(bias=np.ones(CHANNELS), shape=[1, 4, CHANNELS]),
        matmul(bias=np.ones((1, 1, CHANNELS)), shape=[1, 4, CHANNELS]),
    ),
    "QP106": ("ort-x86", around("Softmax"), around("Softmax", pairs=False)),
    "QP107": ("ort-x86", conv_relu_conv(between=True), conv_relu_conv(between=False)),
    "QP108": ("ort-x86", conv(output={"zero": 3}), conv(output={"zero": 0})),
    "QP109": ("ort-x86", conv(output={"dtype": S8, "zero": -128}), conv()),
    "QP110": ("ort-x86", conv(data={"dtype": U16}), conv()),
    "QP111": (
        "ort-x86",
        matmul(weight=blocks(8, 2), **WEIGHT_ONLY),
        matmul(weight=blocks(16, 1), **WEIGHT_ONLY),
    ),
    "QP112": (
        "ort-x86",
        changed(matmul(), set_values("w_zero", np.zeros(CHANNELS, ml_dtypes.float8_e4m3fn))),
        matmul(),
    ),
    "QP113": ("ort-x86", around("Softmax", S8), around("Softmax", U8)),
    "QP114": (
        "ort-x86",
        matmul(data={"dtype": S8}, bias="int32"),
        matmul(data={"dtype": S8}, bias="int32", opset=20),
    ),
    "QP115": ("ort-x86", matmul(op="Gemm", beta=0.5), matmul(op="Gemm", beta=1.0)),
    "QP116": ("ort-x86", integer_op("ConvInteger"), integer_op("MatMulInteger")),
    "QP150": ("ort-arm", conv(), conv(data={"dtype": S8})),
    "QP201": ("openvino", conv(weight={"zero": 1}), conv()),
    "QP202": (
        "openvino",
        product({"dtype": U8, "zero": 128}, {"dtype": S8}),
        product({"dtype": U8, "zero": 0}, {"dtype": S8}),
    ),
    "QP203": (
        "openvino",
        conv(op="ConvTranspose", data={"dtype": U8}),
        conv(op="ConvTranspose", data={"dtype": S8}),
    ),
    "QP204": (
        "openvino",
        matmul(weight=blocks(16, 1)),
        matmul(weight=blocks(16, 1), **WEIGHT_ONLY),
    ),
    "QP205": ("openvino", integer_op("MatMulInteger"), conv()),
    "QP301": ("tensorrt", conv(), conv(**S8_CONV)),
    "QP302": ("tensorrt", conv(data={"zero": 0}), conv(**S8_CONV)),
    "QP303": ("tensorrt", conv(), conv(bias="float")),
    "QP304": ("tensorrt", integer_op("MatMulInteger"), conv()),
    "QP305": ("tensorrt", changed(conv(), set_first("w_scale", -0.0625)), conv()),
    "QP306": ("tensorrt", computed_scale(computed=True), computed_scale(computed=False)),
    "QP307": ("tensorrt", matmul(weight={"dtype": S4}), matmul(weight=blocks(8, 2))),
    "QP401": ("qnn-htp", matmul(), matmul(weight={"scale": 0.5})),
    "QP402": ("qnn-htp", unquantized_op(present=True), unquantized_op(present=False)),
    "QP403": ("qnn-htp", conv(shape=["N", CHANNELS, 4, 4]), conv()),
    "QP404": ("qnn-htp", control_flow(used=True), control_flow(used=False)),
    "QP405": ("qnn-htp", conv(bias="float"), conv()),
    "QP406": ("qnn-htp", conv(**S8_CONV), conv()),
    "QP501": ("vitis-xint8", conv(data={"scale": 0.03}), conv(**VITIS)),
    "QP502": ("vitis-xint8", conv(), conv(**VITIS)),
    "QP503": ("vitis-xint8", conv(), conv(**VITIS)),
}


def of_rule(model: onnx.ModelProto, rule: str, target: str | None) -> list[Finding]:
    return [finding for finding in lint(model, target) if finding.rule == rule]


def test_every_rule_has_a_case() -> None:
    assert sorted(CASES) == sorted(rule.id for rule in RULES)


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_finds_its_breach_and_nothing_else(rule: str) -> None:
    target, bad, good = CASES[rule]
    row = next(row for row in RULES if row.id == rule)
    found = of_rule(bad, rule, target)
    assert found
    assert {(f.severity, f.repair, f.source) for f in found} == {
        (row.severity, row.repair, row.source)
    }
    names = {node.name for node in bad.graph.node} | {""}
    assert all(f.message and f.node in names for f in found)
    assert of_rule(good, rule, target) == []


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (conv(), "ort-x86"),
        (matmul(), "ort-x86"),
        (conv(), "openvino"),
        (conv(**S8_CONV), "tensorrt"),
        (conv(), "qnn-htp"),
        (conv(**VITIS), "vitis-xint8"),
        (conv(data={"dtype": S8}, output={"dtype": S8, "zero": -128}), "ort-arm"),
    ],
    ids=["ort-x86 conv", "ort-x86 matmul", "openvino", "tensorrt", "qnn-htp", "vitis", "ort-arm"],
)
def test_a_model_in_the_dialect_of_the_target_is_clean(model: onnx.ModelProto, target: str) -> None:
    assert lint(model, target) == ()
    assert lint(model) == ()


# ---------------------------------------------------------------------------- details


def axis_case(op: str, axis: int, **attributes: Any) -> list[Finding]:
    if op in ("Conv", "ConvTranspose"):
        return of_rule(conv(op=op, weight={"axis": axis}), "QP030", None)
    return of_rule(matmul(op=op, weight={"axis": axis}, **attributes), "QP030", None)


@pytest.mark.parametrize(
    ("op", "right", "attributes"),
    [("Conv", 0, {}), ("ConvTranspose", 1, {}), ("MatMul", 1, {}), ("Gemm", 1, {}),
     ("Gemm", 0, {"transB": 1})],
)  # fmt: skip
def test_weight_axis_of_each_op(op: str, right: int, attributes: dict[str, Any]) -> None:
    assert axis_case(op, right, **attributes) == []
    assert len(axis_case(op, 1 - right, **attributes)) == 1


def test_weight_axis_behind_a_transpose() -> None:
    for axis, count in ((0, 0), (1, 1)):
        model = matmul(weight={"axis": axis})
        transpose = helper.make_node("Transpose", ["w_dq_out"], ["wt"], name="t", perm=[1, 0])
        model.graph.node.insert(3, transpose)
        node(model, "mm0").input[1] = "wt"
        assert len(of_rule(model, "QP030", None)) == count


def test_missing_axis_is_said() -> None:
    (found,) = of_rule(changed(conv(), drop_axis), "QP030", None)
    assert (found.node, found.tensor) == ("conv", "w")
    assert "axis 1 (the attribute is missing), output channels are axis 0" in found.message


def test_bias_scale_within_float32_is_accepted() -> None:
    scale = np.random.default_rng(1).uniform(0.01, 0.1, CHANNELS).astype(np.float32)
    x_scale = np.float32(0.0237)
    model = conv(data={"scale": x_scale}, weight={"scale": scale}, bias={"scale": x_scale * scale})
    assert of_rule(model, "QP031", None) == []
    model = conv(
        data={"scale": x_scale},
        weight={"scale": scale},
        bias={"scale": x_scale * scale * np.float32(1 + 4e-6)},
    )
    assert len(of_rule(model, "QP031", None)) == 1


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (blocks(16, 1, axis=1), "blocks along axis 1, not 0"),
        (blocks(12, 2), "a power of two from 16 on"),
        ({"dtype": S4, "axis": 0}, "scales along axis 0, not 1"),
    ],
)
def test_reasons_for_4_bit_weights(weight: dict[str, Any], reason: str) -> None:
    (found,) = of_rule(matmul(weight=weight, **WEIGHT_ONLY), "QP111", "ort-x86")
    assert reason in found.message


def test_4_bit_weight_with_several_readers_or_quantized_data() -> None:
    several = matmul(weight=blocks(16, 1), readers=2, **WEIGHT_ONLY)
    assert "several readers" in of_rule(several, "QP111", "ort-x86")[0].message
    quantized = matmul(weight=blocks(16, 1))
    assert "quantized too" in of_rule(quantized, "QP111", "ort-x86")[0].message


def test_int4_and_16_bit_need_opset_21() -> None:
    assert of_rule(conv(data={"dtype": U16}, opset=20), "QP009", None)
    assert of_rule(matmul(weight={"dtype": S4}, opset=20, **WEIGHT_ONLY), "QP009", None)
    assert not of_rule(conv(data={"dtype": U16}, opset=21), "QP009", None)


def test_maxpool_in_an_integer_region_is_no_cost() -> None:
    b = Builder()
    x = b.pair(b.input([1, CHANNELS, 8, 8]))
    w = b.stored("w", (CHANNELS, CHANNELS, 1, 1), scale=PER_CHANNEL, axis=0)
    y = b.pair(b.op("Relu", b.op("Conv", x, w, name="conv"), name="relu"), zero=0)
    inside = b.model(b.pair(b.op("MaxPool", y, name="pool", kernel_shape=[2, 2]), zero=0))
    assert of_rule(inside, "QP106", "ort-x86") == []
    assert [f.node for f in of_rule(around("MaxPool"), "QP106", "ort-x86")] == ["op"]


def test_dynamic_batch_is_out_of_the_matmul_trap() -> None:
    assert of_rule(matmul(bias=np.ones(CHANNELS)), "QP105", "ort-x86") == []
    flat = matmul(bias=np.ones(CHANNELS), shape=["N", CHANNELS])
    assert len(of_rule(flat, "QP105", "ort-x86")) == 1


def test_errors_come_first() -> None:
    model = changed(conv(bias={"scale": PER_CHANNEL}), set_first("w_scale", -0.0625))
    assert [f.severity for f in lint(model)] == ["error", "warning"]


def test_targets_are_checked() -> None:
    with pytest.raises(RecipeError, match="no target called 'ort'"):
        lint(conv(), "ort")
    ids = [rule.id for rule in RULES]
    assert ids == sorted(set(ids))
    assert {t for rule in RULES for t in (*rule.targets, *rule.except_for)} <= set(TARGET_NAMES)
    generic = rules_for(None)
    assert all(set(generic) - set(rules_for(t)) <= {r for r in generic if t in r.except_for}
               for t in TARGET_NAMES)  # fmt: skip


def test_files_with_external_data_give_the_same_findings(tmp_path: Path) -> None:
    model = changed(conv(bias={"scale": PER_CHANNEL}), set_first("w_scale", -0.0625))
    expected = lint(model, "ort-x86")
    onnx.save(model, tmp_path / "inline.onnx")
    onnx.save(
        model, tmp_path / "external.onnx", save_as_external_data=True, size_threshold=0,
        location="external.data",
    )  # fmt: skip
    assert lint(tmp_path / "inline.onnx", "ort-x86") == expected
    assert lint(tmp_path / "external.onnx", "ort-x86") == expected
    (tmp_path / "external.data").unlink()
    with pytest.raises(ModelError, match="is missing"):
        lint(tmp_path / "external.onnx")


def test_operator_form_is_judged_too() -> None:
    b = Builder()
    x = b.input([4, CHANNELS], element=TensorProto.UINT8)
    w = b.constant("w", np.ones((CHANNELS, CHANNELS), np.int8))
    numbers = [
        *b.numbers("x", 0.5, 0, U8), *b.numbers("w", 0.0, 0, S8), *b.numbers("y", 0.5, 7, U8),
    ]  # fmt: skip
    y = b.op("QLinearMatMul", x, *numbers[:2], w, *numbers[2:], name="qmm")
    model = b.model(y)
    assert [f.tensor for f in of_rule(model, "QP001", None)] == ["w_scale"]
    assert [f.tensor for f in of_rule(model, "QP301", "tensorrt")] == ["y_zero"]
