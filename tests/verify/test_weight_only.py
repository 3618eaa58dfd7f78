"""Files with integer weights alone: their size, their session setting, and what did not fuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qpass
from qpass.modelfile import read_metadata, save_model
from qpass.verify.census_ort import read_back_ort
from qpass.verify.diagnose import Diagnosis
from qpass.verify.host import config_of
from qpass.verify.session import ACCURACY_LEVEL, SESSION_KEY, recorded_entries
from tests.jobs import optimize
from tests.small_models import from_text
from tests.test_weight_only import EXACT, HEAD, matrix


def weighty(folder: Path) -> Path:
    """A model that is nearly all weights."""
    body = " ".join(f"t{i + 1} = MatMul (t{i}, w{i}) r{i} = Tanh (t{i + 1})" for i in range(6))
    graph = from_text(
        f"{HEAD} g (float[1,4,256] t0) => (float[1,4,256] y) {{ {body} y = Identity (r5) }}",
        **{f"w{i}": matrix(256, 256, i) / 16 for i in range(6)},
    )
    path = folder / "float.onnx"
    save_model(graph, path)
    return path


def test_files_are_small_and_every_product_is_verified(tmp_path: Path) -> None:
    source = weighty(tmp_path)
    data = {"t0": np.random.default_rng(0).standard_normal((4, 4, 256)).astype(np.float32)}
    report = qpass.optimize(
        source, data=data, precision="w4", output=tmp_path / "q.onnx", engines=("ort",),
        low_bit_edges=True, accuracy_level=0,
    )  # fmt: skip
    assert report.ok
    assert report.sizes.ratio < 0.16
    (engine,) = report.engines
    assert (engine.integer_ops, engine.planned_integer_ops) == (6, 6)
    assert engine.op_counts["MatMulNBits"] == 6
    assert recorded_entries(read_metadata(report.output)) == EXACT
    # `verify` runs the file with the setting that it asks for.
    (checked,) = qpass.verify(report.output, reference=source, data=data, engines=("ort",))
    assert checked.optimizer_diff_db > 80.0  # float32 on both sides; 8-bit activations give 45


def test_the_accuracy_level_decides(tmp_path: Path) -> None:
    source = weighty(tmp_path)
    data = {"t0": np.random.default_rng(0).standard_normal((4, 4, 256)).astype(np.float32)}
    options = {"data": data, "precision": "w4", "engines": ("ort",)}
    report = qpass.optimize(source, output=tmp_path / "q.onnx", **options)
    assert json.loads(read_metadata(report.output)[SESSION_KEY]) == {ACCURACY_LEVEL: "4"}
    assert 30.0 < report.engines[0].optimizer_diff_db < 60.0


def test_where_another_engine_is_meant_the_stand_in_computes_in_float32(tmp_path: Path) -> None:
    source = weighty(tmp_path)
    data = {"t0": np.random.default_rng(0).standard_normal((4, 4, 256)).astype(np.float32)}
    report = qpass.optimize(
        source, data=data, precision="w4", target="tensorrt", output=tmp_path / "q.onnx",
        engines=("ort",),
    )  # fmt: skip
    assert recorded_entries(read_metadata(report.output)) == EXACT
    assert report.engines[0].optimizer_diff_db > 80.0
    assert not any("session entries" in note for note in report.notes)


def test_files_of_others_ask_for_nothing() -> None:
    assert recorded_entries({}) == {}
    assert recorded_entries({SESSION_KEY: "no json"}) == {}
    assert recorded_entries({SESSION_KEY: "[]"}) == {}


def pattern(
    tmp_path: Path,
    *,
    block: int = 32,
    axis: int = 0,
    shared: bool = False,
    behind: bool = False,
    op: str = "MatMul",
    attributes: str = "",
) -> onnx.ModelProto:
    """DQ(int4) -> op, and one thing about it changed."""
    shape = [48, 64] if "transB" in attributes else [64, 48]
    scales = list(shape)
    scales[axis] = -(-scales[axis] // block)
    body = f"d = DequantizeLinear <axis = {axis}, block_size = {block}> (w, s)"
    body += f" y = {op} {attributes} (x, d)"
    body += " z = MatMul (x, d)" if shared else ""
    body += " r = Relu (y) z = Neg (r)" if behind else ""
    outputs = "float[4,48] z" if behind else "float[4,48] y"
    outputs += ", float[4,48] z" if shared else ""
    graph = from_text(f"{HEAD} g (float[4,64] x) => ({outputs}) {{ {body} }}")
    model = graph.to_model()
    integers = np.random.default_rng(0).integers(-7, 8, shape)
    model.graph.initializer.extend([
        onnx.helper.make_tensor("w", onnx.TensorProto.INT4, shape, integers.ravel()),
        numpy_helper.from_array(np.full(scales, 0.01, np.float32), "s"),
    ])  # fmt: skip
    onnx.save(model, tmp_path / "p.onnx")
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block": 8}, "no blocks of 8"),
        ({"block": 16, "axis": 1}, "scales run along axis 1"),
        ({"shared": True}, "has another reader"),
        ({"behind": True}, "Relu behind it hides it"),
        ({"op": "Gemm", "attributes": "<transB = 1>", "axis": 1}, "no transposed weight"),
        ({"op": "Gemm", "attributes": "<alpha = 2.0>"}, "alpha or transA"),
    ],
)
def test_a_product_that_did_not_fuse_is_named_with_the_rule(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    model = pattern(tmp_path, **change)
    census = read_back_ort(tmp_path / "p.onnx", tmp_path, {})
    assert not census.weight_only_compute  # the engine agrees: it is not fused
    rule, reason = Diagnosis(model).explain("ort", "node_y")
    assert rule.startswith("ort/")
    assert words in reason


def test_the_same_pattern_unchanged_fuses(tmp_path: Path) -> None:
    pattern(tmp_path)
    assert read_back_ort(tmp_path / "p.onnx", tmp_path, {}).weight_only_compute


def test_a_kernel_that_stands_in_for_another_engines_computes_in_float32(tmp_path: Path) -> None:
    """What `optimize` verifies with is what `verify` takes, whichever engine looks."""
    report = optimize(
        weighty(tmp_path), None, precision="w4", target="openvino", output=tmp_path / "q.onnx"
    )
    assert config_of(Path(report.output), "ort")[ACCURACY_LEVEL] == "0"
    own = optimize(weighty(tmp_path), None, precision="w4", output=tmp_path / "o.onnx")
    assert config_of(Path(own.output), "ort")[ACCURACY_LEVEL] == "4"
