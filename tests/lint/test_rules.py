"""Every rule has one model that breaks it and one that does not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.lint import RULES, lint
from tests.lint_models import (
    CHANNELS,
    PER_CHANNEL,
    S4,
    S8,
    U8,
    U16,
    WEIGHT_ONLY,
    Builder,
    around,
    blocks,
    changed,
    conv,
    drop_axis,
    matmul,
    node,
    of_rule,
    set_first,
    set_values,
    tensor,
)


def product(left: dict[str, Any], right: dict[str, Any]) -> onnx.ModelProto:
    """Return the product of two activations."""
    b = Builder()
    first = b.pair(b.input([2, 4, 4], "x"), **left)
    second = b.pair(b.input([2, 4, 4], "y"), **right)
    return b.model(b.op("MatMul", first, second, name="mm"))


def shared(dtype: Any) -> onnx.ModelProto:
    """Return a residual branch: one activation with two readers."""
    b = Builder()
    x = b.pair(b.input([1, 4, CHANNELS]), dtype)
    w = b.stored("w", (CHANNELS, CHANNELS), scale=PER_CHANNEL, axis=1)
    return b.model(b.op("MatMul", x, w), b.op("Neg", x))


def integers_as_output(model: onnx.ModelProto) -> None:
    """Let the float op read the Q itself."""
    node(model, "conv").input[0] = "x_q_out"


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
    "QP026": (None, two_scales(0.0625), two_scales(0.25)),
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
