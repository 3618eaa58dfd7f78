"""onnxruntime's CPU provider on x86-64 with VNNI: U8 activations, S8 per-channel weights."""

from __future__ import annotations

from typing import Final

from qpass.targets.schema import OpRule, Target, WeightRule
from qpass.targets.specs import S8_WEIGHT, U8

SELECTORS: Final = (
    "https://github.com/microsoft/onnxruntime/blob/v1.23.0/onnxruntime/core/optimizer/"
    "qdq_transformer/selectors_actions/qdq_selectors.cc"
)
CONTRIB: Final = "https://github.com/microsoft/onnxruntime/blob/v1.23.0/docs/ContribOperators.md"
MEASURED: Final = "optimized graph of onnxruntime 1.31.1 read back (AVX512-VNNI)"

# Ops that only move data: the selectors drop the pairs around them when both sides have one scale.
MOVERS: Final = frozenset({
    "Expand", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
})  # fmt: skip

RULES: Final = (
    OpRule(
        ops=frozenset({"Conv"}),
        role="linear",
        activation=U8,
        weight=S8_WEIGHT,
        output="required",
        absorbs=("Relu", "Clip"),
        source=f"{SELECTORS} (ConvNodeGroupSelector); {MEASURED}: no Q on the output, float Conv",
    ),
    OpRule(
        ops=frozenset({"MatMul"}),
        role="linear",
        activation=U8,
        lhs=U8,
        rhs=U8,
        weight=S8_WEIGHT,
        output="float",
        constant_weight=False,
        source=f"{SELECTORS} (MatMulNodeGroupSelector); {MEASURED}: DQ, DQ -> MatMul without Q is "
        "MatMulIntegerToFloat, the fastest form for transformers",
    ),
    OpRule(
        ops=frozenset({"Gemm"}),
        role="linear",
        activation=U8,
        weight=S8_WEIGHT,
        output="float",
        absorbs=("Relu", "Clip"),
        source=f"{SELECTORS} (GemmNodeGroupSelector): float output allowed, bias int32, beta 1",
    ),
    OpRule(
        ops=frozenset({"Add"}),
        role="follow",
        activation=U8,
        absorbs=("Relu", "Clip"),
        source=f"{SELECTORS} (BinaryNodeGroupSelector); {MEASURED}: QLinearAdd, 0.94x of float",
    ),
    OpRule(
        ops=frozenset({"Concat"}),
        role="follow",
        activation=U8,
        source=f"{SELECTORS} (VariadicNodeGroupSelector); {MEASURED}: QLinearConcat, 0.66x",
    ),
    OpRule(
        ops=frozenset({"GlobalAveragePool"}),
        role="follow",
        activation=U8,
        shrinks=True,
        source=f"{SELECTORS} (UnaryNodeGroupSelector); {MEASURED}: cheaper than to dequantize its "
        "input",
    ),
    OpRule(
        ops=frozenset({"Sigmoid", "Mul"}),
        role="follow",
        activation=U8,
        source=f"{SELECTORS} (UnaryNodeGroupSelector, BinaryNodeGroupSelector); {MEASURED}: SiLU "
        "between convolutions, yolox_nano 1.34 of float without the rule, 1.10 with it",
    ),
    OpRule(
        ops=frozenset({"AveragePool", "LeakyRelu"}),
        role="follow",
        activation=U8,
        source=f"{SELECTORS} (UnaryNodeGroupSelector)",
    ),
    OpRule(
        ops=frozenset({"Resize"}),
        role="passthrough",
        tie=True,
        attributes=(("mode", "nearest"),),
        source=f"{SELECTORS} (DropQDQNodeGroupSelector): nearest only",
    ),
    OpRule(
        ops=MOVERS | {"MaxPool"},
        role="passthrough",
        tie=True,
        source=f"{SELECTORS} (DropQDQNodeGroupSelector): equal scale and zero point on both sides",
    ),
)

WEIGHT_RULES: Final = (
    WeightRule(
        ops=frozenset({"Gemm", "MatMul"}),
        kernel="MatMulNBits",
        blocks=(16, 32, 64, 128),
        ragged=True,
        transposed=False,
        activations_apart=True,
        source=f"{SELECTORS} (DQMatMulNodeGroupSelector); {MEASURED}: DQ of a constant matrix, "
        "blocks along axis 0 (a power of two, at least 16) or one scale a column; weight, scale "
        "and zero point must have no other reader; Gemm with transB 0 and alpha 1; no Relu or "
        "Clip with one reader behind it",
    ),
    WeightRule(
        ops=frozenset({"Conv"}),
        blocks=(16, 32, 64, 128),
        ragged=True,
        source=f"{MEASURED}: DQ of the weight stays in front of a float Conv",
    ),
    WeightRule(
        ops=frozenset({"Gather"}),
        kernel="GatherBlockQuantized",
        blocks=(16, 32, 64, 128),
        ragged=True,
        source=f"{CONTRIB} (com.microsoft.GatherBlockQuantized); {MEASURED}: DQ in front of Gather "
        "unpacks the whole table at every run, and no fusion makes the one of the other",
    ),
)

TARGET: Final = Target(
    name="ort-x86",
    title="onnxruntime CPU, x86-64 with VNNI",
    engine="onnxruntime",
    opset=21,
    rules=RULES,
    bias="int32",
    activation=U8,
    weight_rules=WEIGHT_RULES,
    matmul_bias_rank=3,
    zero_points_below=5,
    sum_before_norm=True,
    needs_vnni=True,
    sources=(SELECTORS,),
    notes=(
        "S8 activations run in float or 4 to 20 times slower on x86: U8 everywhere.",
        "Softmax, LayerNormalization, GELU, HardSwish and MaxPool alone get slower between Q and "
        "DQ: they stay float.",
        "MatMul biases get rank 3: with static shapes MatMulAddFusion would turn the integer "
        "MatMul into a float Gemm.",
    ),
)
