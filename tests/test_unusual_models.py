"""Whole runs of unusual models: a body, half precision, a data file, two inputs, dynamic ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qpass.errors import ModelError, SampleError
from tests.jobs import (
    engine,
    model_of,
    normal,
    op_types,
    optimize,
    precision_of,
    saved,
    small_model,
)


def rows(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """One dict per entry of axis 0, which stays as a batch of one."""
    count = len(next(iter(arrays.values())))
    return [{name: a[i : i + 1] for name, a in arrays.items()} for i in range(count)]


def test_body_of_if_is_kept(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,3,8,8] x, bool[1] c) => (float[N,8,8,8] y) {
      [conv] a = Conv<pads = [1,1,1,1]>(x, w)
      [if] b = If(c) <
        then_branch = t () => (float[N,8,8,8] p) { p = Relu(a) },
        else_branch = e () => (float[N,8,8,8] q) { q = Neg(a) }
      >
      [last] y = Conv<pads = [1,1,1,1]>(b, v)
    }
    """
    path = saved(model_of(text, w=(8, 3, 3, 3), v=(8, 8, 3, 3)), tmp_path)
    samples = [{**row, "c": np.array([True])} for row in rows(normal((8, 3, 8, 8)))]
    report = optimize(path, samples, calibrate="minmax", repair=False)
    assert "If" in op_types(report.output)
    assert precision_of(report)["last"] == "integer"
    assert engine(report).sqnr_db > 25.0  # measured: 37


def test_half_precision_model(tmp_path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(small_model())
    report = optimize(saved(half, tmp_path), {"x": normal()["x"].astype(np.float16)})
    graph = onnx.load(report.output).graph
    half_type = onnx.TensorProto.FLOAT16
    assert [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)] == [half_type] * 2
    assert engine(report).integer_ops == 3
    assert engine(report).sqnr_db > 25.0


@pytest.mark.parametrize(
    "options", [{}, {"precision": "w4a8"}, {"precision": "w4", "round": "gptq"}], ids=str
)
def test_a_weight_that_is_an_output_as_well(tmp_path: Path, options: dict[str, Any]) -> None:
    model = small_model()
    model.graph.output.append(onnx.helper.make_tensor_value_info("w1", 1, (8, 8, 3, 3)))
    report = optimize(saved(model, tmp_path), normal(), **options)
    assert report.ok
    kept = {t.name: t for t in onnx.load(report.output).graph.initializer}["w1"]
    weight = next(t for t in model.graph.initializer if t.name == "w1")
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(kept), onnx.numpy_helper.to_array(weight)
    )


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    onnx.save(
        small_model(), path, save_as_external_data=True, size_threshold=64, location="big.data"
    )
    report = optimize(path, normal())
    assert report.ok
    assert engine(report).sqnr_db > 25.0
    assert report.sizes.float_bytes == path.stat().st_size + (tmp_path / "big.data").stat().st_size


def test_two_inputs_one_of_them_integer(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (int64[N,5] ids, float[N,5,16] x) => (float[N,5,16] y) {
      [embed] a = Gather(table, ids)
      [add] b = Add(a, x)
      [fc] c = MatMul(b, w)
      [act] y = Tanh(c)
    }
    """
    path = saved(model_of(text, table=(7, 16), w=(16, 16)), tmp_path)
    ids = np.random.default_rng(0).integers(0, 7, (12, 5))
    report = optimize(path, {"ids": ids, **normal((12, 5, 16))}, repair=False)
    assert precision_of(report)["fc"] == "integer"
    assert engine(report).sqnr_db > 25.0
    assert [v.name for v in onnx.load(report.output).graph.input] == ["ids", "x"]


def test_dynamic_activations(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,5,16] x) => (float[N,5,16] y) {
      [fc] a = MatMul(x, w)
      [act] b = Tanh(a)
      [out] y = MatMul(b, v)
    }
    """
    path = saved(model_of(text, w=(16, 16), v=(16, 16)), tmp_path)
    report = optimize(path, normal((12, 5, 16)), activations="dynamic", repair=False)
    counts = engine(report).op_counts
    assert counts["DynamicQuantizeMatMul"] == 2
    assert engine(report).sqnr_db > 30.0
    session = ort.InferenceSession(report.output, providers=["CPUExecutionProvider"])
    for batch in (1, 3):  # the batch stays free
        assert session.run(None, normal((batch, 5, 16)))[0].shape == (batch, 5, 16)


MLP = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,5,16] x) => (float[N,5,8] y) {
  [gate] a = Sigmoid(x)
  [first] b = MatMul(a, w0)
  [act] c = Relu(b)
  [middle] d = MatMul(c, w1)
  [curve] e = Gelu(d)
  [last] y = MatMul(e, w2)
}
"""


@pytest.mark.parametrize("options", [{"precision": "w4a8"}, {"bits": ("middle=w4a8",)}])
def test_dynamic_ranges_are_for_products_of_8_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    """The narrow one between two wide ones stays static, in the plan and in every trial."""
    path = saved(model_of(MLP, w0=(16, 16), w1=(16, 16), w2=(16, 8)), tmp_path)
    report = optimize(path, normal((40, 5, 16)), activations="dynamic", **options)
    ops = op_types(report.output)
    assert (ops.count("MatMulInteger"), ops.count("MatMul")) == (2, 1)
    stored = {i.data_type for i in onnx.load(report.output).graph.initializer if len(i.dims) == 2}
    assert stored & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    assert engine(report).sqnr_db > 20.0  # measured: 28 to 30


def test_weights_without_an_element_stay(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,16] x) => (float[N,8] y) {
      [full] a = MatMul(x, w0)
      [empty] b = MatMul(x, w1)
      [join] c = Concat<axis = 1>(a, b)
      [act] d = Relu(c)
      [last] y = MatMul(d, w2)
    }
    """
    model = model_of(text, w0=(16, 16), w1=np.zeros((16, 0), np.float32), w2=(16, 8))
    path = saved(model, tmp_path)
    for precision, least_db in (("w8a8", 25.0), ("w4", 12.0)):  # measured: 39 and 15 to 17
        report = optimize(path, normal((200, 16)), precision=precision)
        assert report.ok
        assert precision_of(report)["empty"] == "float"
        assert engine(report).sqnr_db > least_db


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    broken = np.random.default_rng(3).standard_normal((16, 16)).astype(np.float32)
    broken[0, 0] = np.nan
    model = model_of(MLP, w0=(16, 16), w1=broken, w2=(16, 8))
    path = saved(model, tmp_path)
    with pytest.raises(ModelError, match="the weight of middle holds NaN or infinity"):
        optimize(path, normal((24, 5, 16)))
    with pytest.raises(SampleError, match="NaN"):  # of the samples themselves: no weight's doing
        optimize(path, {"x": np.full((24, 5, 16), np.nan, np.float32)})
    with pytest.raises(SampleError, match="no sample"):
        optimize(path, [])
    report = optimize(path, None, precision="w8")
    assert any(note.startswith("THE WEIGHT OF middle HOLDS NaN") for note in report.notes)


@pytest.mark.parametrize("count", [9, 16, 17, 24])  # 7, 12, 13 and 18 of them calibrate
def test_a_last_batch_of_one_sample_judges_with_the_one_before(tmp_path: Path, count: int) -> None:
    """One sample has no standard error, and would refuse every rounding and compensation."""
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[N,8,32] x) => (float[N,8,16] y) {
      [first] a = MatMul(x, w0)
      [act] b = Relu(a)
      [second] c = MatMul(b, w1)
      [act2] d = Relu(c)
      [last] y = MatMul(d, w2)
    }"""
    path = saved(model_of(text, w0=(32, 32), w1=(32, 32), w2=(32, 16)), tmp_path)
    report = optimize(path, normal((count, 8, 32)), precision="w4a8")
    (rounding,) = (part for part in report.passes if part.name == "round_weights")
    assert rounding.changed > 0 or count == 9
    assert not [refusal for refusal in rounding.refusals if "inf dB" in refusal.reason]
    assert not any(note.startswith("TOO FEW") for note in report.notes)


def test_too_few_samples_to_fit_anything_are_said(tmp_path: Path) -> None:
    path = saved(model_of(MLP, w0=(16, 16), w1=(16, 16), w2=(16, 8)), tmp_path)
    report = optimize(path, normal((3, 5, 16)), precision="w4a8")
    assert any(note.startswith("TOO FEW SAMPLES: 2") for note in report.notes)
