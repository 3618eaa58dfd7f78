"""The rules of onnxruntime's CPU provider, each with its source."""

from __future__ import annotations

from typing import Final

from qpass.lint import onnxruntime as ort
from qpass.lint.engines import wide
from qpass.lint.model import Rule

SELECTORS: Final = (
    "https://github.com/microsoft/onnxruntime/blob/v1.23.0/onnxruntime/core/optimizer/"
    "qdq_transformer/selectors_actions/qdq_selectors.cc"
)
S8_TO_U8: Final = (
    "https://github.com/microsoft/onnxruntime/blob/v1.23.0/onnxruntime/core/optimizer/"
    "qdq_transformer/qdq_s8_to_u8.cc"
)
GUIDE: Final = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
MEASURED: Final = "measured on onnxruntime 1.31.1, AVX512-VNNI"
BOTH: Final = ("ort-x86", "ort-arm")
X86: Final = ("ort-x86",)

RULES: Final = (
    Rule(
        id="QP101",
        severity="warning",
        title="int8 activations have one reader",
        repair="use uint8 for every activation that several nodes read",
        source=f"{S8_TO_U8}: only a Q with exactly one DQ is rewritten to uint8",
        check=ort.signed_shared,
        targets=X86,
    ),
    Rule(
        id="QP102",
        severity="warning",
        title="activations are uint8 where weights are int8",
        repair="quantize activations as uint8: only u8 x s8 has fast instructions on x86",
        source=f"{GUIDE}; {MEASURED}: s8 x s8 kernels reach 45 Gop/s, u8 x s8 900, float 250",
        check=ort.signed_both,
        targets=X86,
    ),
    Rule(
        id="QP103",
        severity="warning",
        title="weights are int8",
        repair="quantize weights as symmetric int8",
        source=f"{MEASURED}: u8 x u8 kernels reach 400 Gop/s, u8 x s8 900",
        check=ort.unsigned_both,
        targets=X86,
    ),
    Rule(
        id="QP104",
        severity="warning",
        title="the output of a quantized Conv is quantized",
        repair="put Q/DQ behind the Conv, or behind its Relu; it must be its only reader",
        source=f"{SELECTORS} (ConvNodeGroupSelector)",
        check=ort.conv_without_quantizer,
        targets=BOTH,
    ),
    Rule(
        id="QP105",
        severity="warning",
        title="the bias of a MatMul keeps it a MatMul",
        repair="write the bias with shape [1, 1, N], or as DQ(int32, x_scale * w_scale)",
        source=f"MatMulAddFusion makes a float Gemm of it; {MEASURED}: 23 ms for 6.3 ms",
        check=ort.matmul_bias_trap,
        targets=BOTH,
    ),
    Rule(
        id="QP106",
        severity="warning",
        title="pairs serve ops that run in integers",
        repair="remove the Q and DQ in front of the op",
        source=f"{MEASURED}: Softmax 7 times, MaxPool alone 30, Relu 2.3, GELU 1.4 of float time",
        check=ort.pure_cost,
        targets=BOTH,
    ),
    Rule(
        id="QP107",
        severity="warning",
        title="no pair between a linear op and its Relu",
        repair="quantize behind the Relu only",
        source=f"{MEASURED}: QLinearConv and a float Relu instead of one op",
        check=ort.relu_between_pairs,
        targets=BOTH,
    ),
    Rule(
        id="QP108",
        severity="warning",
        title="the range behind a Relu starts at zero",
        repair="use the lowest integer as zero point: 0 for uint8, -128 for int8",
        source=f"{SELECTORS} (IsClipMadeRedundantByQ); {MEASURED}: float FusedConv",
        check=ort.relu_not_redundant,
        targets=BOTH,
    ),
    Rule(
        id="QP109",
        severity="warning",
        title="data and output of a linear op have one dtype",
        repair="quantize input and output activations in one dtype",
        source=f"{SELECTORS}: the dtypes of DQ and Q must agree",
        check=ort.dtypes_differ,
        targets=BOTH,
    ),
    Rule(
        id="QP110",
        severity="warning",
        title="integers have 8 bit where 16 are not supported",
        repair="use 8 bit, or leave the op in float",
        source=f"{SELECTORS} (allow_16bit is false); OpenVINO and TensorRT have no such kernels",
        check=wide,
        targets=(*BOTH, "openvino", "tensorrt", "vitis-xint8"),
    ),
    Rule(
        id="QP111",
        severity="warning",
        title="4-bit weights become MatMulNBits",
        repair="constant matrix of MatMul, float activation, blocks along axis 0 of a power of two "
        "from 16 on (or per tensor, or per channel along axis 1), a DQ for each reader",
        source=f"{SELECTORS} (DQMatMulNodeGroupSelector)",
        check=ort.narrow_not_fused,
        targets=BOTH,
    ),
    Rule(
        id="QP112",
        severity="error",
        title="no 8-bit floats",
        repair="use int8, or a GPU engine",
        source=f"{MEASURED}: INVALID_GRAPH on the CPU provider",
        check=ort.float_8,
        targets=BOTH,
    ),
    Rule(
        id="QP113",
        severity="warning",
        title="Softmax is not quantized to int8",
        repair="use uint8 behind Softmax, or leave it in float",
        source="https://github.com/microsoft/onnxruntime/issues/29727",
        check=ort.signed_softmax,
        targets=BOTH,
    ),
    Rule(
        id="QP114",
        severity="error",
        title="an int8 MatMul has no int32 bias",
        repair="use uint8 activations, or a float bias of shape [1, 1, N]",
        source=f"{MEASURED}: the session is not created at opset 21",
        check=ort.signed_matmul_bias,
        targets=X86,
    ),
    Rule(
        id="QP115",
        severity="warning",
        title="beta of a quantized Gemm is 1",
        repair="multiply the bias by beta and set beta to 1",
        source=f"{SELECTORS} (GemmNodeGroupSelector)",
        check=ort.gemm_beta,
        targets=BOTH,
    ),
    Rule(
        id="QP116",
        severity="warning",
        title="quantized ops have a fast integer kernel",
        repair="leave ConvTranspose, LSTM and GRU in float; use Q/DQ around Conv, not ConvInteger",
        source=f"{SELECTORS}; {MEASURED}",
        check=ort.slow_operators,
        targets=BOTH,
    ),
    Rule(
        id="QP150",
        severity="warning",
        title="activations are int8 on ARM",
        repair="quantize activations as int8, as the weights",
        source=f"{GUIDE} (ARM64: S8S8)",
        check=ort.unsigned_on_arm,
        targets=("ort-arm",),
    ),
)
