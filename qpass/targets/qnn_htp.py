"""Qualcomm's HTP through onnxruntime's QNN provider: everything between Q and DQ."""

from __future__ import annotations

from typing import Final

from qpass.targets.schema import OpRule, Target
from qpass.targets.specs import S8_WEIGHT, U8, U8_WEIGHT_PER_TENSOR

PROVIDER: Final = (
    "https://github.com/onnxruntime/onnxruntime-qnn/blob/"
    "0131740f31800af002800abb7886dfba60d5febe/docs/execution_providers/QNN-ExecutionProvider.md "
    "(2.x: supported operators)"
)
CONFIG: Final = (
    "https://github.com/microsoft/onnxruntime/blob/v1.23.0/onnxruntime/python/tools/quantization/"
    "execution_providers/qnn/quant_config.py"
)
PER_CHANNEL: Final = (
    "https://github.com/microsoft/onnxruntime/pull/20154 (per-channel weights: Conv)"
)
OPERATORS: Final = (
    "https://docs.qualcomm.com/doc/80-63442-10/topic/HtpOpDefSupplement.html (QAIRT SDK 2.4x)"
)

MOVERS: Final = frozenset({
    "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
FOLLOWERS: Final = frozenset({
    "Add", "AveragePool", "Clip", "Concat", "Div", "Elu", "Gelu", "GlobalAveragePool",
    "HardSigmoid", "HardSwish", "LayerNormalization", "LeakyRelu", "Mul", "ReduceMean", "Relu",
    "Sigmoid", "Softmax", "Sqrt", "Sub", "Sum", "Tanh",
})  # fmt: skip

RULES: Final = (
    OpRule(
        ops=frozenset({"Conv", "ConvTranspose"}),
        role="linear",
        activation=U8,
        weight=S8_WEIGHT,
        output="required",
        min_bits=4,
        absorbs=("Relu", "Clip"),
        source=f"{PER_CHANNEL}: symmetric int8 along the output channels; {OPERATORS} (Conv2d)",
    ),
    OpRule(
        ops=frozenset({"Gemm", "MatMul"}),
        role="linear",
        activation=U8,
        weight=U8_WEIGHT_PER_TENSOR,
        output="required",
        min_bits=4,
        constant_weight=False,
        source=f"{PROVIDER}: MatMul takes (uint8, uint8) and 16-bit mixes of it; {CONFIG}: "
        "uint8 weights with one scale",
    ),
    OpRule(
        ops=FOLLOWERS,
        role="follow",
        activation=U8,
        source=f"{PROVIDER}; {OPERATORS}: activations UFIXED_POINT_8",
    ),
    OpRule(
        ops=frozenset({"Resize"}),
        role="passthrough",
        tie=True,
        attributes=(("mode", "nearest"),),
        source=f"{PROVIDER}; {OPERATORS} (ResizeNearestNeighbor)",
    ),
    OpRule(
        ops=MOVERS,
        role="passthrough",
        tie=True,
        source=f"{PROVIDER}; {OPERATORS}: one encoding on both sides",
    ),
)

TARGET: Final = Target(
    name="qnn-htp",
    title="Qualcomm Hexagon HTP, onnxruntime's QNN provider",
    engine="none",
    opset=21,
    rules=RULES,
    bias="int32",
    activation=U8,
    scheme="full",
    per_channel_matmul=False,
    sources=(PROVIDER, CONFIG, PER_CHANNEL, OPERATORS),
    notes=(
        "Taken from documentation and source; the provider was not run.",
        "Shapes must be static, and If and Loop are not supported: fix them before.",
        "Tensors with attention masks stay float: 8 bits cannot hold both mask and scores.",
        "Check on the device with session.disable_cpu_ep_fallback=1.",
    ),
)
