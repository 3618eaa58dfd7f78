"""Lint on what onnxruntime.quantization makes: findings agree with what the engine then does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from qpass.lint import lint

U8S8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
S8S8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Samples(CalibrationDataReader):
    """Four random inputs."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        shape = (1, 3, 8, 8)
        self.left = [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conv, residual branch, pooling and a linear head."""
    random = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((random.standard_normal(shape) / 5).astype("f4"), name)

    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
            node("Relu", ["c1"], ["r1"], name="relu1"),
            node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", pads=[1] * 4),
            node("Add", ["c2", "r1"], ["a"], name="add"),
            node("MaxPool", ["a"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("Flatten", ["p"], ["f"], name="flatten"),
            node("Gemm", ["f", "w3", "b3"], ["y"], name="head", transB=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 8, 8, 3, 3), weight("b2", 8),
         weight("w3", 10, 128), weight("b3", 10)],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("peer") / "float.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def quantized(float_model: Path, folder: Path, **options: Any) -> Path:
    path = folder / "quantized.onnx"
    quantize_static(float_model, path, Samples(), **options)
    return path


def found(path: Path, target: str | None) -> Counter[str]:
    return Counter(finding.rule for finding in lint(path, target))


def engine_ops(path: Path) -> Counter[str]:
    """Return the ops of onnxruntime's optimized graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(path.with_name("optimized.onnx")).graph.node)


def test_the_recommended_form_is_clean_and_runs_in_integers(
    float_model: Path, tmp_path: Path
) -> None:
    path = quantized(float_model, tmp_path, **U8S8)
    assert found(path, "ort-x86") == {}
    assert engine_ops(path)["QLinearConv"] == 2


def test_signed_activations_with_two_readers(float_model: Path, tmp_path: Path) -> None:
    """Relu's output feeds conv2 and the residual Add."""
    path = quantized(float_model, tmp_path, **S8S8)
    shared = [f.node for f in lint(path, "ort-x86") if f.rule == "QP101"]
    assert shared == ["r1_QuantizeLinear"]
    assert found(path, "ort-x86")["QP102"] == 3
    assert found(path, "ort-arm") == {}


def test_symmetric_relu_keeps_its_pair(float_model: Path, tmp_path: Path) -> None:
    path = quantized(
        float_model, tmp_path, **S8S8, extra_options={"ActivationSymmetric": True}
    )  # zero point 0 does not replace the Relu, so the quantizer keeps it between two pairs
    assert [f.node for f in lint(path, "ort-x86") if f.rule == "QP107"] == ["relu1"]


def test_float_weights_behind_pairs(float_model: Path, tmp_path: Path) -> None:
    """The form for TensorRT: fine there, four times the bytes elsewhere."""
    extra = {
        "AddQDQPairToWeight": True, "DedicatedQDQPair": True, "ActivationSymmetric": True,
        "QuantizeBias": False,
    }  # fmt: skip
    path = quantized(float_model, tmp_path, **S8S8, extra_options=extra)
    assert found(path, None) == {"QP022": 3}
    assert found(path, "tensorrt") == {}


def test_what_tensorrt_refuses(float_model: Path, tmp_path: Path) -> None:
    path = quantized(float_model, tmp_path, **U8S8)
    assert set(found(path, "tensorrt")) == {"QP301", "QP302", "QP303"}


def test_unsigned_weights(float_model: Path, tmp_path: Path) -> None:
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
    path = quantized(float_model, tmp_path, **options)
    assert found(path, "ort-x86") == {"QP103": 3}
    assert found(path, "openvino") == {"QP201": 2}


def test_operator_form_and_dynamic_form(float_model: Path, tmp_path: Path) -> None:
    path = quantized(float_model, tmp_path, **U8S8, quant_format=QuantFormat.QOperator)
    assert found(path, None) == {}
    assert found(path, "tensorrt")["QP304"] > 0
    quantize_dynamic(float_model, path)
    assert found(path, "ort-x86") == {"QP116": 2}  # two ConvInteger
    assert found(path, "openvino")["QP205"] > 0
