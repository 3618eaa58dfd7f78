"""The rules of OpenVINO, TensorRT, QNN and Vitis AI, each with its source."""

from __future__ import annotations

from typing import Final

from qpass.lint import engines
from qpass.lint.model import Rule
from qpass.lint.numbers import TENSORRT, negative_scale

OPENVINO: Final = (
    "https://docs.openvino.ai/2025/documentation/openvino-extensibility/"
    "openvino-plugin-library/advanced-guides/low-precision-transformations.html; "
    "measured on 2026.4.1"
)
ONNX_TENSORRT: Final = (
    "https://github.com/onnx/onnx-tensorrt/blob/dd0a3a9f8794ae4f0316ed07ea68cda9b944bb3c/"
    "onnxOpImporters.cpp"
)
QNN: Final = (
    "https://github.com/onnxruntime/onnxruntime-qnn/blob/"
    "0131740f31800af002800abb7886dfba60d5febe/docs/execution_providers/QNN-ExecutionProvider.md"
)
QNN_PER_CHANNEL: Final = "https://github.com/microsoft/onnxruntime/pull/20154"
VITIS: Final = (
    "https://quark.docs.amd.com/release-0.12/supported_accelerators/ryzenai/"
    "int8_int16_quantization.html"
)

RULES: Final = (
    Rule(
        id="QP201",
        severity="warning",
        title="convolution weights are symmetric int8",
        repair="quantize the weights as int8 with zero point 0",
        source=f"{OPENVINO}: others run in bf16",
        check=engines.openvino_weight,
        targets=("openvino",),
    ),
    Rule(
        id="QP202",
        severity="warning",
        title="products of activations are symmetric",
        repair="left operand with zero point 0, right operand int8 with zero point 0",
        source=f"{OPENVINO}: others run in f32",
        check=engines.openvino_product,
        targets=("openvino",),
    ),
    Rule(
        id="QP203",
        severity="warning",
        title="transposed convolutions read symmetric int8",
        repair="quantize the input as int8 with zero point 0",
        source=OPENVINO,
        check=engines.openvino_transposed,
        targets=("openvino",),
    ),
    Rule(
        id="QP204",
        severity="warning",
        title="4-bit weights belong to a MatMul of float activations",
        repair="remove the pair on the activation; use 8 bit for convolutions",
        source=OPENVINO,
        check=engines.openvino_narrow,
        targets=("openvino",),
    ),
    Rule(
        id="QP205",
        severity="warning",
        title="activations are quantized statically",
        repair="quantize with Q/DQ and calibrated scales",
        source=f"{OPENVINO}: a dynamic model takes 26 ms, float 16 ms",
        check=engines.dynamic_operators,
        targets=("openvino",),
    ),
    Rule(
        id="QP301",
        severity="error",
        title="zero points are 0",
        repair="quantize symmetrically",
        source=f"{ONNX_TENSORRT} (shiftIsAllZeros); {TENSORRT}",
        check=engines.nonzero_zero_point,
        targets=("tensorrt",),
    ),
    Rule(
        id="QP302",
        severity="error",
        title="no uint8",
        repair="quantize as int8",
        source=TENSORRT,
        check=engines.unsigned,
        targets=("tensorrt",),
    ),
    Rule(
        id="QP303",
        severity="error",
        title="biases are float",
        repair="store the bias in float32, without DQ",
        source=ONNX_TENSORRT,
        check=engines.int32_bias,
        targets=("tensorrt",),
    ),
    Rule(
        id="QP304",
        severity="error",
        title="integers are expressed with Q and DQ",
        repair="export in QDQ form",
        source=ONNX_TENSORRT,
        check=engines.integer_operators,
        targets=("tensorrt",),
    ),
    Rule(
        id="QP305",
        severity="error",
        title="scales are positive",
        repair="make the scale positive and negate the integers",
        source=TENSORRT,
        check=negative_scale,
        targets=("tensorrt",),
    ),
    Rule(
        id="QP306",
        severity="error",
        title="scales and zero points are constants",
        repair="quantize statically",
        source=TENSORRT,
        check=engines.computed_scale,
        targets=("tensorrt",),
    ),
    Rule(
        id="QP307",
        severity="error",
        title="4-bit weights have blocks along one axis",
        repair="give the weight blocks that divide the axis, and an even last dimension",
        source=TENSORRT,
        check=engines.tensorrt_blocks,
        targets=("tensorrt",),
    ),
    Rule(
        id="QP401",
        severity="warning",
        title="weights of MatMul and Gemm have one scale",
        repair="quantize these weights per tensor",
        source=QNN_PER_CHANNEL,
        check=engines.per_channel_product,
        targets=("qnn-htp",),
    ),
    Rule(
        id="QP402",
        severity="warning",
        title="every op is quantized, inputs and outputs included",
        repair="put Q/DQ on every float tensor: float nodes fall back to the CPU",
        source=QNN,
        check=engines.float_operand,
        targets=("qnn-htp",),
    ),
    Rule(
        id="QP403",
        severity="error",
        title="shapes are static",
        repair="fix the dimensions of the inputs (onnxruntime.tools.make_dynamic_shape_fixed)",
        source=QNN,
        check=engines.dynamic_shape,
        targets=("qnn-htp",),
    ),
    Rule(
        id="QP404",
        severity="error",
        title="no control flow",
        repair="unroll the loop, or export the branch that is taken",
        source=QNN,
        check=engines.control_flow,
        targets=("qnn-htp",),
    ),
    Rule(
        id="QP405",
        severity="warning",
        title="biases are int32",
        repair="store the bias as DQ(int32, x_scale * w_scale)",
        source=QNN,
        check=engines.float_bias,
        targets=("qnn-htp",),
    ),
    Rule(
        id="QP406",
        severity="warning",
        title="activations are uint8 or uint16",
        repair="quantize activations as uint8, or uint16",
        source=QNN,
        check=engines.signed_activation,
        targets=("qnn-htp",),
    ),
    Rule(
        id="QP501",
        severity="error",
        title="scales are powers of two",
        repair="round the scales to powers of two and quantize again",
        source=f"{VITIS} (XINT8)",
        check=engines.not_power_of_two,
        targets=("vitis-xint8",),
    ),
    Rule(
        id="QP502",
        severity="error",
        title="weights have one scale",
        repair="quantize per tensor",
        source=f"{VITIS} (XINT8)",
        check=engines.per_channel_weight,
        targets=("vitis-xint8",),
    ),
    Rule(
        id="QP503",
        severity="error",
        title="everything is symmetric int8",
        repair="quantize activations and weights as int8 with zero point 0",
        source=f"{VITIS} (XINT8)",
        check=engines.not_symmetric_int8,
        targets=("vitis-xint8",),
    ),
)
