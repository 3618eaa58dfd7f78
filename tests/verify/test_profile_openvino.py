from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.verify import EngineError, EngineOp, read_back
from qpass.verify.profile_openvino import _microseconds, profile_openvino, time_of

openvino = pytest.importorskip("openvino")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of OpenVINO's profile, as far as it is read."""

    node_name: str
    real_time: timedelta


@pytest.mark.parametrize("case", ["conv_chain", "matmul_float_output", "attention", "float_blocks"])
def test_every_linear_op_of_the_census_has_a_time(case, saved, feeds, tmp_path):
    model, path = saved(case)
    profile = profile_openvino(path, feeds(model), runs=3, warmup=1)
    linear = [op for op in read_back("openvino", path, tmp_path).ops if op.kind == "linear"]
    assert linear
    assert [op.name for op in linear if time_of(op, profile) is None] == []
    assert all(time >= 0 for time in profile.values())


def test_the_larger_product_takes_longer(tmp_path, feeds):

    random = np.random.default_rng(5)
    weights = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("a", (256, 2048)), ("b", (2048, 16)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="large"),
        helper.make_node("Tanh", ["h"], ["t"], name="act"),
        helper.make_node("MatMul", ["t", "b"], ["s"], name="small"),
        helper.make_node("Softmax", ["s"], ["y"], name="last"),
    ]
    value = helper.make_tensor_value_info
    x, y = (value(n, TensorProto.FLOAT, s) for n, s in (("x", [64, 256]), ("y", [64, 16])))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "two.onnx"
    onnx.save(model, path)
    profile = profile_openvino(path, feeds(model), runs=25)
    # 16 times the multiplications: no noise of a machine turns that round in the median.
    assert profile["large"] > profile["small"]


def test_rows_of_one_node_are_summed_in_microseconds():
    rows = [
        Row(node_name="body", real_time=timedelta(microseconds=3)),
        Row(node_name="other", real_time=timedelta(milliseconds=2)),
        Row(node_name="body", real_time=timedelta(microseconds=4)),
    ]
    assert _microseconds(rows) == pytest.approx({"body": 7.0, "other": 2000.0}, abs=1e-6)


def test_the_time_of_an_op_is_found_by_what_it_covers():
    op = EngineOp(
        name="Multiply_17",
        op="Convolution",
        precision="integer",
        kind="linear",
        covers=("Multiply_17", "conv", "affine"),
    )
    assert time_of(op, {"Multiply_18": 3.0, "conv": 0.0, "affine": 7.0}) == 7.0
    assert time_of(op, {"Multiply_18": 3.0}) is None


def test_refusals(saved, feeds):
    model, path = saved("gemm")
    with pytest.raises(ValueError, match="at least one run"):
        profile_openvino(path, feeds(model), runs=0)
    with pytest.raises(EngineError, match=r"profile gemm\.onnx.*unknown inputs \['z'\]"):
        profile_openvino(path, {"z": np.ones((2, 16), np.float32)})
    with pytest.raises(EngineError, match=r"profile gemm\.onnx"):
        profile_openvino(path, {"x": np.ones((1, 2, 3, 4), np.float32)})
