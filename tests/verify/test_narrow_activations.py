"""Activations of 4 bits: no CPU kernel has them, and the file says how it can be run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import qpass
from qpass.modelfile import read_metadata
from qpass.verify import available_engines
from qpass.verify.session import NARROW_IN_FLOAT, NARROW_IN_OPENVINO, SESSION_KEY, recorded_entries
from tests.folds import graph_of
from tests.jobs import CNN, DIGITS

needs_openvino = pytest.mark.skipif("openvino" not in available_engines(), reason="needs openvino")


@pytest.mark.parametrize("precision", ["w8a4", "w4a4"])
def test_results_load_with_the_entries_that_they_record(precision: str, tmp_path: Path) -> None:
    report = qpass.optimize(
        CNN, data=DIGITS, precision=precision, calibrate="minmax", equalize=False, samples=16,
        compensate="none", round="rtn", engines=("ort",), output=tmp_path / "m.onnx",
    )  # fmt: skip
    assert report.ok
    assert report.engines[0].sqnr_db is not None
    assert recorded_entries(read_metadata(Path(report.output))) == NARROW_IN_FLOAT
    (how,) = [note for note in report.notes if SESSION_KEY in note]
    assert all(f"{key}={value}" in how for key, value in NARROW_IN_FLOAT.items())
    planned = [op.reason for op in report.engines[0].float_ops if op.planned]
    assert planned  # stem and head have 8 bits
    assert all("session.disable_quant_qdq=1" in reason for reason in planned)


@needs_openvino
def test_a_concat_of_float_tensors_runs_in_openvino(tmp_path: Path) -> None:
    """Its integer transformations corrupt memory behind such a Concat: they are off."""
    random = np.random.default_rng(0)
    model = graph_of(
        "float[N,64,32,32] x",
        "float[N,64,32,32] y",
        """s = Conv (x, w) a = Relu (s) b = Sigmoid (s) c = Concat <axis = 1> (a, b)
        d = Conv (c, v) e = Tanh (d) y = Conv (e, u)""",
        v=random.standard_normal((64, 128, 1, 1)).astype(np.float32) / 11,
        w=random.standard_normal((64, 64, 1, 1)).astype(np.float32) / 8,
        u=random.standard_normal((64, 64, 1, 1)).astype(np.float32) / 8,
    ).to_model()
    onnx.save(model, tmp_path / "float.onnx")
    samples = [{"x": random.standard_normal((1, 64, 32, 32)).astype(np.float32)} for _ in range(16)]
    report = qpass.optimize(
        tmp_path / "float.onnx", data=samples, precision="w4a4", target="openvino",
        calibrate="minmax", equalize=False, compensate="none", round="rtn", engines=("openvino",),
        output=tmp_path / "m.onnx",
    )  # fmt: skip
    assert report.ok
    assert report.engines[0].sqnr_db is not None
    assert recorded_entries(read_metadata(tmp_path / "m.onnx"), "openvino") == NARROW_IN_OPENVINO
    assert recorded_entries(read_metadata(tmp_path / "m.onnx"), "ort") == {}
    (other,) = [note for note in report.notes if note.startswith("onnxruntime loads it")]
    assert all(f"{key}={value}" in other for key, value in NARROW_IN_FLOAT.items())
    reasons = [op.reason for op in report.engines[0].float_ops if op.planned]
    assert any("LP_TRANSFORMS_MODE=NO" in note for note in report.notes)
    assert len(reasons) == 2  # stem and head have 8 bits
    assert all("LP_TRANSFORMS_MODE=NO" in reason for reason in reasons)


@pytest.mark.parametrize("target", ["ort-x86", pytest.param("openvino", marks=needs_openvino)])
def test_files_are_verified_in_the_engine_that_they_are_not_for_too(
    target: str, tmp_path: Path
) -> None:
    """digits_cnn has a Clip, of which onnxruntime refuses Q with 4 bits by default."""
    report = qpass.optimize(
        CNN, data=DIGITS, precision="w4a4", calibrate="minmax", equalize=False, samples=16,
        compensate="none", round="rtn", target=target, output=tmp_path / "m.onnx",
    )  # fmt: skip
    assert report.ok
    found = qpass.verify(report.output, data=DIGITS, samples=4)
    alone = qpass.verify(report.output, data=DIGITS, samples=4, reference=CNN)
    assert [engine.name for engine in found] == [engine.name for engine in alone]
    assert len(found) == len(report.engines)
    for engine in alone:
        assert engine.sqnr_db is not None
        assert engine.sqnr_db > 15.0
