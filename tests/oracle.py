"""Run a model in each engine that the tests compare; every function maps names to arrays.

`reference` is the truth. `ort_plain` (optimizations off) must agree with it to rounding of float32.
`ort` and `openvino` may reorder sums and use faster forms of exp, erf and tanh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort_library
from onnx.reference import ReferenceEvaluator

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Run = Callable[[onnx.ModelProto, Feeds], dict[str, Array]]


def names_of(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.output]


def reference(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Array]:
    """The evaluator of the onnx package: one op after the other, as the standard says."""
    with np.errstate(all="ignore"):  # float ops that overflow do so silently in the engines, too
        results = ReferenceEvaluator(model).run(None, dict(feeds))
    return dict(zip(names_of(model), map(np.asarray, results), strict=True))


def _ort(model: onnx.ModelProto, feeds: Feeds, level: Any) -> dict[str, Array]:
    options = ort_library.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort_library.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(names_of(model), session.run(None, dict(feeds)), strict=True))


def ort_plain(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Array]:
    """onnxruntime, node by node."""
    return _ort(model, feeds, ort_library.GraphOptimizationLevel.ORT_DISABLE_ALL)


def ort(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Array]:
    """Onnxruntime as users run it."""
    return _ort(model, feeds, ort_library.GraphOptimizationLevel.ORT_ENABLE_ALL)


def openvino(model: onnx.ModelProto, feeds: Feeds) -> dict[str, Array]:
    """OpenVINO on the CPU in float32; its default would be bfloat16 where the CPU has it."""
    import openvino as library

    core = library.Core()
    loaded = core.read_model(model.SerializeToString())
    compiled = core.compile_model(loaded, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(dict(feeds)).to_tuple()
    return {name: np.array(value) for name, value in zip(names_of(model), results, strict=True)}


ENGINES: Final[tuple[Run, ...]] = (reference, ort_plain, ort, openvino)


def relative_error(got: Feeds, wanted: Feeds, *, floor: float = 0.0) -> float:
    """Largest difference over all outputs, each relative to the largest value of its output.

    Or relative to `floor` where that is larger: an output that cancels to nothing has the rounding
    of what it was made from. Infinite where a shape or dtype differs, or where only one of the two
    is finite.
    """
    worst = 0.0
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        other = got[name]
        if other.shape != value.shape or other.dtype != value.dtype:
            return float("inf")
        if value.dtype.kind != "f":
            worst = worst if np.array_equal(value, other) else float("inf")
            continue
        finite = np.isfinite(value)
        same = np.array_equal(value[~finite], other[~finite], equal_nan=True)
        if not same or not np.isfinite(other[finite]).all():
            return float("inf")
        size = max(floor, float(np.abs(value[finite]).max(initial=0.0))) or 1.0
        difference = np.abs(value[finite].astype(np.float64) - other[finite].astype(np.float64))
        worst = max(worst, float(difference.max(initial=0.0)) / size)
    return worst
