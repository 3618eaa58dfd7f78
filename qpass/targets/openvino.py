"""OpenVINO's CPU plugin: low precision transformations on an imported QDQ graph."""

from __future__ import annotations

from typing import Final

from qpass.targets.schema import OpRule, Target, WeightRule
from qpass.targets.specs import S8_SYMMETRIC, S8_WEIGHT, U8

LPT: Final = (
    "https://docs.openvino.ai/2025/documentation/openvino-extensibility/"
    "openvino-plugin-library/advanced-guides/low-precision-transformations.html"
)
MEASURED: Final = "runtime model of OpenVINO 2026.4.1 read back (AVX512-VNNI)"

RULES: Final = (
    OpRule(
        ops=frozenset({"Conv"}),
        role="linear",
        activation=U8,
        weight=S8_WEIGHT,
        output="follow",
        absorbs=("Relu", "Clip"),
        source=f"{LPT} (ConvolutionTransformation); {MEASURED}: symmetric int8 weights only, "
        "no Q needed behind it. A Q that only float ops read is miscomputed with a dynamic batch "
        "and a Concat with an expanded token: all channels get the bias of channel 0",
    ),
    OpRule(
        ops=frozenset({"MatMul"}),
        role="linear",
        activation=U8,
        lhs=S8_SYMMETRIC,
        lhs_nonnegative=U8,
        rhs=S8_SYMMETRIC,
        weight=S8_WEIGHT,
        output="float",
        constant_weight=False,
        source=f"{LPT} (MatMulTransformation); {MEASURED}: activation x activation needs zero "
        "point 0 on the left and S8 with zero point 0 on the right, else f32",
    ),
    OpRule(
        ops=frozenset({"Gemm"}),
        role="linear",
        activation=U8,
        weight=S8_WEIGHT,
        output="float",
        absorbs=("Relu", "Clip"),
        source=f"{LPT} (MatMulTransformation); {MEASURED}",
    ),
    OpRule(
        ops=frozenset({"Add"}),
        role="follow",
        activation=U8,
        absorbs=("Relu", "Clip"),
        source=f"{LPT} (AddTransformation); {MEASURED}: fused into the convolution before it",
    ),
    OpRule(
        ops=frozenset({"Concat"}),
        role="follow",
        activation=U8,
        source=f"{LPT} (ConcatTransformation)",
    ),
    OpRule(
        ops=frozenset({"AveragePool", "GlobalAveragePool"}),
        role="follow",
        activation=U8,
        source=f"{LPT} (AvgPoolTransformation)",
    ),
    OpRule(
        ops=frozenset(
            {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice"}
        ),
        role="passthrough",
        tie=True,
        source=f"{LPT} (MaxPoolTransformation, TransposeTransformation, ...)",
    ),
)

WEIGHT_RULES: Final = (
    WeightRule(
        ops=frozenset({"Gemm", "MatMul"}),
        kernel="FullyConnected",
        blocks=(16, 32, 64, 128),
        source=f"{MEASURED}: i4, u4, i8 and u8 weights behind f32 activations; the importer "
        "refuses a shorter last block",
    ),
    WeightRule(
        ops=frozenset({"Conv"}),
        blocks=(16, 32, 64, 128),
        source=f"{MEASURED}: i4 weights of Conv are made f32 when the model is compiled",
    ),
    WeightRule(
        ops=frozenset({"Gather"}),
        source=f"{MEASURED}: i8 rows stay i8 with one scale a row; i4 tables are made f32 when the "
        "model is compiled",
    ),
)

TARGET: Final = Target(
    name="openvino",
    title="OpenVINO CPU, x86-64 with VNNI",
    engine="openvino",
    opset=21,
    rules=RULES,
    bias="int32",
    activation=U8,
    weight_rules=WEIGHT_RULES,
    needs_vnni=True,
    sources=(LPT,),
    notes=(
        "Attention operands are S8 with zero point 0 (the Softmax output U8, its low end is 0).",
        "An int32 bias is as fast here as a float one (resnet18 0.303 against 0.307 of float), and "
        "lets onnxruntime run the same file in integers.",
    ),
)
