"""Models, samples and small questions for tests of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

import qpass
from qpass.report.model import EngineReport, Report

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "digits_cnn.onnx"
VIT = ROOT / "models" / "digits_vit.onnx"
DIGITS = ROOT / "models" / "digits_calibration.npz"
TINY = {name: ROOT / "tests" / "data" / f"tiny_{name}.onnx" for name in ("legacy", "dynamo")}
LINEAR = {"Conv", "Gemm", "MatMul"}

CONVOLUTIONS = """
<ir_version: 10, opset_import: ["": 21]>
small (float[N,3,8,8] x) => (float[N,4] y) {
  [c0] a = Conv<pads = [1,1,1,1]>(x, w0, b0)
  [r0] b = Relu(a)
  [c1] c = Conv<pads = [1,1,1,1]>(b, w1)
  [r1] d = Relu(c)
  [pool] e = GlobalAveragePool(d)
  [flat] f = Flatten(e)
  [head] y = Gemm<transB = 1>(f, w2, b2)
}
"""
SHAPES = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 3, 3), "w2": (4, 8), "b2": (4,)}


def model_of(text: str, **constants: Any) -> onnx.ModelProto:
    """Parse ONNX text; a constant given by its shape gets seeded normal values."""
    random = np.random.default_rng(3)
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        if isinstance(value, tuple):
            fan_in = max(1, int(np.prod(value[1:] if len(value) > 2 else value[:1])))
            value = (random.standard_normal(value) / np.sqrt(fan_in)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model)
    return model


def small_model() -> onnx.ModelProto:
    """Two convolutions and a head, with a free batch."""
    return model_of(CONVOLUTIONS, **SHAPES)


def saved(model: onnx.ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path


def normal(shape: tuple[int, ...] = (12, 3, 8, 8), name: str = "x") -> dict[str, np.ndarray]:
    """Seeded samples of one input, axis 0 is samples."""
    return {name: np.random.default_rng(11).standard_normal(shape).astype(np.float32)}


def optimize(model: Path, data: Any, **options: Any) -> Report:
    """`qpass.optimize`, verified in onnxruntime alone unless told otherwise."""
    return qpass.optimize(model, data=data, **{"engines": ("ort",), **options})


def engine(report: Report, name: str = "ort") -> EngineReport:
    return next(engine for engine in report.engines if engine.name == name)


def precision_of(report: Report) -> dict[str, str]:
    """Node name -> integer, float or passthrough, as the report maps it."""
    return {node.name: node.precision for node in report.graph_map}


def op_types(path: str | Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def changed(model: onnx.ModelProto, edit: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    """A copy of `model` with one thing changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    edit(copy)
    return copy
