"""Relu and Clip between a product of integers and an op that stays float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.jobs import engine, model_of, normal, op_types, optimize, saved

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,16] x) => (float[N,8] y) {
  [first] a = FIRST
  [act] b = ACTIVATION
  [last] y = Gemm(b, v)
}
"""
LIMITS = {
    "six": np.float32(6.0), "zero": np.float32(0.0), "low": np.float32(-1.0), "one": np.float32(1.0)
}  # fmt: skip


@pytest.mark.parametrize("first", ["Gemm<transB = 1>(x, w, bias)", "Gemm(x, w)", "MatMul(x, w)"])
@pytest.mark.parametrize(
    ("activation", "ops"),
    [("Relu(a)", "Max"), ("Clip(a, zero, six)", "Max Min"), ("Clip(a, low, one)", "Max Min")],
)
def test_product_in_front_of_a_float_op_is_an_integer_one(
    tmp_path: Path, first: str, activation: str, ops: str
) -> None:
    text = TEXT.replace("FIRST", first).replace("ACTIVATION", activation)
    constants = {name: value for name, value in LIMITS.items() if name in activation}
    if "bias" in first:
        constants["bias"] = np.linspace(-1, 1, 16, dtype=np.float32)
    path = saved(model_of(text, w=(16, 16), v=(16, 8), **constants), tmp_path)
    report = optimize(path, normal((32, 16)), keep=("last",), compensate="none")
    assert report.ok
    assert not report.rounds
    assert (engine(report).integer_ops, engine(report).planned_integer_ops) == (1, 1)
    assert [op for op in op_types(report.output) if op in ("Relu", "Clip", "Max", "Min")] == (
        ops.split()
    )
    assert engine(report).sqnr_db > 30.0


def test_q_does_the_work_of_relu(tmp_path: Path) -> None:
    text = TEXT.replace("FIRST", "Gemm(x, w)").replace("ACTIVATION", "Relu(a)")
    path = saved(model_of(text, w=(16, 16), v=(16, 8)), tmp_path)
    report = optimize(path, normal((32, 16)), compensate="none")
    assert "Max" not in op_types(report.output)
    assert engine(report).integer_ops == 2
