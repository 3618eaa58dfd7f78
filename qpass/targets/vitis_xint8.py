"""AMD's NPU through the VitisAI provider, XINT8: symmetric, one power-of-two scale per tensor."""

from __future__ import annotations

from typing import Final

from qpass.targets.schema import OpRule, Target
from qpass.targets.specs import S8_POWER_OF_TWO, S8_WEIGHT_POWER_OF_TWO

XINT8: Final = (
    "https://quark.docs.amd.com/release-0.12/supported_accelerators/ryzenai/"
    "int8_int16_quantization.html (Quark 0.12: XINT8)"
)
OPERATORS: Final = (
    "https://github.com/amd/quark-documentation/blob/85fabaae3c90f46ade33ca795ed9cb6af120fccc/"
    "docs/onnx/user_guide_supported_optype_datatype.rst (Quark: supported op types)"
)
ADJUST: Final = (
    "https://github.com/amd/Quark/blob/1d27b5582e4ecbb466fa1658e0bc91d01a5fbdd1/docs/source/"
    "quark_shapeshifter_onnx_passes.rst (Quark 0.12: onnx_xint8_adjust)"
)
COMPATIBILITY: Final = (
    "https://ryzenai.docs.amd.com/en/latest/modelcompat.html (Ryzen AI: opset 17 recommended)"
)

MOVERS: Final = frozenset({
    "DepthToSpace", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
FOLLOWERS: Final = frozenset({
    "Clip", "HardSigmoid", "LayerNormalization", "LeakyRelu", "Mul", "ReduceMean", "Relu",
    "Sigmoid", "Softmax", "Sub", "Tanh",
})  # fmt: skip

RULES: Final = (
    OpRule(
        ops=frozenset({"Conv", "ConvTranspose"}),
        role="linear",
        activation=S8_POWER_OF_TWO,
        weight=S8_WEIGHT_POWER_OF_TWO,
        min_bits=8,
        output="required",
        absorbs=("Relu", "Clip", "LeakyRelu"),
        source=f"{XINT8}; {ADJUST} (onnx_remove_qdq_between_op_types: none between Conv and Relu)",
    ),
    OpRule(
        ops=frozenset({"Gemm", "MatMul"}),
        role="linear",
        activation=S8_POWER_OF_TWO,
        weight=S8_WEIGHT_POWER_OF_TWO,
        min_bits=8,
        output="required",
        absorbs=("Relu",),
        constant_weight=False,
        source=f"{XINT8}; {OPERATORS}",
    ),
    OpRule(
        ops=frozenset({"Add"}),
        role="follow",
        activation=S8_POWER_OF_TWO,
        absorbs=("Relu",),
        source=f"{XINT8}; {OPERATORS}; {ADJUST}",
    ),
    OpRule(
        ops=frozenset({"Concat", "AveragePool", "GlobalAveragePool"}),
        role="follow",
        activation=S8_POWER_OF_TWO,
        tie=True,
        source=f"{ADJUST}: positions of the inputs and outputs of Concat and pooling are aligned",
    ),
    OpRule(
        ops=FOLLOWERS,
        role="follow",
        activation=S8_POWER_OF_TWO,
        source=f"{XINT8}; {OPERATORS}",
    ),
    OpRule(
        ops=MOVERS,
        role="passthrough",
        tie=True,
        source=f"{ADJUST}: positions of both sides of pooling, Pad and Slice are aligned; "
        f"{OPERATORS}, where Flatten is a Reshape",
    ),
    OpRule(
        ops=frozenset({"Resize"}),
        role="passthrough",
        tie=True,
        attributes=(("mode", "nearest"),),
        source=f"{OPERATORS}",
    ),
)

TARGET: Final = Target(
    name="vitis-xint8",
    title="AMD NPU, VitisAI provider, XINT8",
    engine="none",
    opset=17,
    rules=RULES,
    bias="int32",
    activation=S8_POWER_OF_TWO,
    scheme="full",
    per_channel_matmul=False,
    sources=(XINT8, OPERATORS, ADJUST, COMPATIBILITY),
    notes=(
        "Taken from documentation; the NPU was not used. onnxruntime's CPU provider runs it in "
        "float, slower than the float model.",
        "Meant for CNNs: AMD recommends BF16 for transformers.",
        "Bounds on the differences of positions (shift_cut, shift_bias) are not checked here; "
        "Quark's onnx_xint8_adjust does.",
    ),
)
