"""Layers of two models side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import qpass
from qpass.compare import common_layers, compare_layers
from tests.jobs import CNN, changed, model_of, normal, optimize, saved, small_model


def scale_of(model: onnx.ModelProto, name: str, factor: float) -> None:
    proto = next(p for p in model.graph.initializer if p.name == name)
    proto.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(proto) * factor, name))


def test_the_layer_that_differs_is_found() -> None:
    a = small_model()
    b = changed(a, lambda m: scale_of(m, "w1", np.float32(1.125)))
    rows = compare_layers(a, b, [{"x": normal()["x"][:2]}])
    assert [(row.name, row.op) for row in rows] == [
        ("c0", "Conv"),
        ("c1", "Conv"),
        ("head", "Gemm"),
    ]
    first, second, _ = rows
    assert (first.max_abs, first.max_lsb) == (0.0, None)
    assert second.sqnr_db == pytest.approx(-20 * np.log10(0.125), abs=1e-3)
    assert second.cosine == pytest.approx(1.0, abs=1e-9)


def test_error_in_steps_of_the_reader(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    quantized = onnx.load(optimize(path, normal(), repair=False).output)
    rows = compare_layers(small_model(), quantized, [{"x": normal()["x"][:2]}])
    lsb = {row.name: row.max_lsb for row in rows}
    assert lsb["head"] is None  # float: nothing quantizes the output
    stored = {p.name: onnx.numpy_helper.to_array(p) for p in quantized.graph.initializer}
    for row, tensor in zip(rows[:2], ("b", "d"), strict=True):  # Q stands behind the Relu
        assert row.max_lsb == pytest.approx(row.max_abs / float(stored[f"{tensor}_scale"]))


def test_layers_pair_by_name_and_op() -> None:
    a = small_model()
    b = changed(a, lambda m: setattr(m.graph.node[2], "name", "other"))
    assert [name for name, _, _ in common_layers(a, b)] == ["c0", "head"]
    unlike = model_of(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x) => (float[N,4] y) { [c0] y = Relu(x) }"""
    )
    assert compare_layers(a, unlike, []) == []


def test_layers_with_scaled_channels_are_left_out(tmp_path: Path) -> None:
    source, plain, other = (tmp_path / f"{name}.onnx" for name in ("float", "a", "b"))
    onnx.save(onnx.load(CNN), source)
    scaled = next(n.name for n in onnx.load(CNN).graph.node if n.op_type == "Conv")
    for path, key in ((plain, "one"), (other, "two")):
        model = onnx.load(CNN)
        text = json.dumps({"key": key, "layers": [scaled]})
        model.metadata_props.add(key="qpass.scaled", value=text)
        onnx.save(model, path)
    data = {"image": np.zeros((2, 1, 8, 8), np.float32)}
    names = {row.name for row in qpass.compare(plain, plain, data=data)}
    assert scaled in names
    for pair in ((source, plain), (plain, source), (plain, other)):
        assert {row.name for row in qpass.compare(*pair, data=data)} == names - {scaled}
