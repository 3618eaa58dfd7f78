"""Where a rule begins and ends, what it says, and what lint does with targets and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qpass.errors import ModelError, RecipeError
from qpass.lint import RULES, TARGET_NAMES, Finding, lint, rules_for
from qpass.targets import TARGETS
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
)


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


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_has_rules(target: str) -> None:
    assert rules_for(target) == rules_for(target.removesuffix("-avx2"))
    assert len(rules_for(target)) > len(rules_for(None)) // 2


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
