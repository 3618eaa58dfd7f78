"""TensorRT 10 with explicit quantization: symmetric S8 on the inputs of weighted ops, float out."""

from __future__ import annotations

from typing import Final

from qpass.targets.schema import OpRule, Target, WeightRule
from qpass.targets.specs import S8_SYMMETRIC, S8_WEIGHT

EXPLICIT: Final = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
    "quantized-types-explicit-quantization.html (TensorRT 10)"
)
RESIDUAL: Final = (
    "https://docs.nvidia.com/deeplearning/tensorrt/tensorflow-quantization-toolkit/docs/docs/"
    "add_custom_qdq_cases.html; https://github.com/NVIDIA/TensorRT/issues/1992"
)
IMPORTER: Final = (
    "https://github.com/onnx/onnx-tensorrt/blob/dd0a3a9f8794ae4f0316ed07ea68cda9b944bb3c/"
    "onnxOpImporters.cpp "
    "(QuantDequantLinearHelper: zero points are zero, scales constant and positive)"
)
DEQUANTIZE: Final = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/Dequantize.html"
)
MODEL_OPTIMIZER: Final = (
    "https://github.com/NVIDIA/Model-Optimizer/blob/34139ec444af80b831ae31f7ad976cf66f9103db/"
    "modelopt/onnx/quantization/graph_utils.py"
)
MIN_CHANNELS: Final = 16

RULES: Final = (
    OpRule(
        ops=frozenset({"Conv", "ConvTranspose"}),
        role="linear",
        activation=S8_SYMMETRIC,
        weight=S8_WEIGHT,
        output="float",
        min_channels=MIN_CHANNELS,
        min_bits=8,
        source=f"{EXPLICIT}: Q/DQ on the inputs of weighted ops, none behind them; "
        f"{MODEL_OPTIMIZER} (find_nodes_from_convs_to_exclude): no gain below 16 channels",
        note="ReLU behind it is fused by the builder and needs no Q/DQ.",
    ),
    OpRule(
        ops=frozenset({"Gemm", "MatMul"}),
        role="linear",
        activation=S8_SYMMETRIC,
        weight=S8_WEIGHT,
        output="float",
        min_channels=MIN_CHANNELS,
        min_bits=8,
        source=f"{EXPLICIT}; {MODEL_OPTIMIZER} (find_nodes_from_matmul_to_exclude): K and N of at "
        "least 16",
        note="Attention products (no constant operand) stay float: partial Q/DQ breaks the fused "
        "attention kernel.",
    ),
    OpRule(
        ops=frozenset({"Add"}),
        role="follow",
        activation=S8_SYMMETRIC,
        output="float",
        skip_input_only=True,
        source=f"{RESIDUAL}: Q/DQ on the skip input of a residual Add, none on the input that a "
        "convolution computes, so that the two fuse",
    ),
)

WEIGHT_RULES: Final = (
    WeightRule(
        ops=frozenset({"Gemm", "MatMul"}),
        kernel="GEMM of INT4 weights",
        blocks=(16, 32, 64, 128),
        narrow_in_blocks=True,
        half_scales=False,
        zero_points=False,
        source=f"{EXPLICIT}: INT4 is block quantization of the weights of matrix products alone; "
        f"{DEQUANTIZE}: scales of the rank of the weight, build-time constants, zero points 0; "
        f"{IMPORTER}: blocks along one axis that divide it, an even last dimension",
    ),
    WeightRule(
        ops=frozenset({"Conv", "ConvTranspose"}),
        narrow_in_blocks=True,
        zero_points=False,
        source=f"{EXPLICIT}: INT4 is for matrix products",
    ),
)

TARGET: Final = Target(
    name="tensorrt",
    title="NVIDIA TensorRT 10, explicit quantization",
    engine="none",
    opset=21,
    rules=RULES,
    bias="float",
    activation=S8_SYMMETRIC,
    weight_rules=WEIGHT_RULES,
    # For onnxruntime, in which files for other engines are checked: version 1.31 fails to load
    # S8 MatMul and Add of a vector where shapes are static. Broadcasting is the same with rank 3.
    matmul_bias_rank=3,
    sources=(EXPLICIT, RESIDUAL, IMPORTER, DEQUANTIZE, MODEL_OPTIMIZER),
    notes=(
        "Taken from documentation, importer source and issues; TensorRT was not run.",
        f"Zero points are 0, scales positive: {IMPORTER}.",
        "Biases stay float: the importer refuses DequantizeLinear of int32.",
        "Pooling, Transpose and Reshape need no Q/DQ: the builder moves Q and DQ through them.",
        "Weights are stored as int8 with DequantizeLinear only.",
        "INT4 is for weights of Gemm and MatMul behind float activations, in blocks; integer "
        "products have 8 bits, and so have weights that take no blocks.",
    ),
)
