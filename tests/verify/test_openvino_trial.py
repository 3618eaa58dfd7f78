"""A file that kills OpenVINO is an error with words; nothing else is tried in another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpass.verify import EngineError, available_engines, open_engine, openvino_trial
from qpass.verify import engines as engines_module
from tests.folds import graph_of

TYPES = {8: np.dtype(np.uint8), 4: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(21))}
needs_openvino = pytest.mark.skipif("openvino" not in available_engines(), reason="needs openvino")


def model_of(folder: Path, bits: int) -> Path:
    """A Conv behind a quantized Concat of float tensors."""
    random = np.random.default_rng(0)
    graph = graph_of(
        "float[N,16,8,8] a, float[N,16,8,8] b",
        "float[N,8,8,8] y",
        """x = Concat <axis = 1> (a, b) q = QuantizeLinear (x, step, middle)
        d = DequantizeLinear (q, step, middle) y = Conv (d, w)""",
        step=np.float32(0.5),
        middle=np.array(2 ** (bits - 1), TYPES[bits]),
        w=random.standard_normal((8, 32, 1, 1)).astype(np.float32),
    )
    path = folder / "m.onnx"
    onnx.save(graph.to_model(), path)
    return path


@needs_openvino
def test_a_crash_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_trial, "_COMPILE", "import os; os.abort()")
    with pytest.raises(EngineError, match=r"failed to load m\.onnx: .* killed by signal 6"):
        open_engine("openvino", model_of(tmp_path, 4))


@needs_openvino
def test_8_bits_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_trial, "_COMPILE", "import os; os.abort()")
    random = np.random.default_rng(1)
    feeds = {name: random.standard_normal((2, 16, 8, 8)).astype(np.float32) for name in "ab"}
    path = model_of(tmp_path, 8)
    (got,) = open_engine("openvino", path).run(feeds)
    (expected,) = open_engine("reference", path).run(feeds)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)  # float32 sums of 32 products


@pytest.mark.parametrize(("code", "dies"), [("import os; os.abort()", True), ("1 / 0", False)])
def test_only_a_process_that_is_killed_counts(
    code: str, *, dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is an exception, and the caller gets it in words."""
    monkeypatch.setattr(openvino_trial, "_COMPILE", code)
    assert (openvino_trial.crash_of(model_of(tmp_path, 4), {}) is not None) == dies


def test_no_process_for_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_trial, "_COMPILE", "import os; os.abort()")
    (tmp_path / "text.onnx").write_text("not a model")
    for name in ("gone.onnx", "text.onnx"):
        assert openvino_trial.crash_of(tmp_path / name, {}) is None


@needs_openvino
def test_the_other_process_compiles_with_the_same_properties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        openvino_trial.subprocess, "run", lambda command, **_: asked.append(command) or Done()
    )
    path = model_of(tmp_path, 4)
    # Not compiled here: it might kill this process.
    monkeypatch.setattr(engines_module, "compile_openvino", lambda *_: Done())
    open_engine("openvino", path, threads=1)
    ((_, _, code, name, config),) = asked
    assert "compile_model" in code
    assert name == str(path)
    assert '"INFERENCE_PRECISION_HINT": "f32"' in config


class Done:
    """A process that ended well, and a compiled model without inputs."""

    returncode = 0
    inputs = ()

    def create_infer_request(self) -> None:
        """Nothing is run."""
