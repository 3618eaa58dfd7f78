"""Checks for onnxruntime's CPU provider: what keeps an op from running in integers or slows it.

The selectors were read in the source; what is called measured was seen in the optimized graph of
onnxruntime 1.31.1 on AVX512-VNNI.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from onnx import NodeProto, TensorProto

from qpass.lint.model import Hit, hit
from qpass.lint.view import (
    BITS_4,
    DEQUANTIZE,
    FLOAT_8,
    FLOATS,
    SIGNED_8,
    UNSIGNED_8,
    Linear,
    Slot,
    View,
    attribute,
    type_name,
)

# Ops without an integer kernel: a pair in front of them is pure cost. MaxPool and Softmax have one
# that is 30 and 7 times slower than float.
FLOAT_OPS: Final = frozenset(
    {"Softmax", "LayerNormalization", "Gelu", "Relu", "HardSwish", "HardSigmoid", "Tanh", "Erf",
     "Elu", "Exp", "Sqrt", "Neg", "GlobalMaxPool", "ReduceMean", "Div", "Sub", "Pow", "Mish",
     "MaxPool"}
)  # fmt: skip
NEVER_INTEGER: Final = frozenset({"ConvTranspose", "LSTM", "GRU"})
MIN_BLOCK: Final = 16
LOWEST: Final[dict[int, int]] = {UNSIGNED_8: 0, SIGNED_8: -128}


def signed_shared(view: View) -> Iterator[Hit]:
    """Find S8 activations with several readers.

    Readers behind one shared DQ count: the engine gives each its own DQ before it looks.
    """
    for slot in view.quantizers:
        count = sum(
            len(view.readers(reader.output[0])) if reader.op_type == DEQUANTIZE else 1
            for reader in view.readers(slot.result)
        )
        if slot.data_type == SIGNED_8 and count > 1 and not slot.constant:
            message = f"an int8 activation has {count} readers: linear ops that read it stay float"
            yield hit(slot.node, slot.result, message)


def _with_dtypes(view: View, data: int, weight: int, message: str) -> Iterator[Hit]:
    for linear in view.linears():
        if (linear.data.data_type, linear.weight.data_type) == (data, weight):
            yield hit(linear.node, linear.weight.source, message)


def signed_both(view: View) -> Iterator[Hit]:
    """Find S8 activations with S8 weights."""
    return _with_dtypes(view, SIGNED_8, SIGNED_8, "int8 activation with int8 weight")


def unsigned_both(view: View) -> Iterator[Hit]:
    """Find U8 activations with U8 weights."""
    for linear in view.linears():
        if linear.weight.constant and (
            linear.data.data_type == linear.weight.data_type == UNSIGNED_8
        ):
            yield hit(linear.node, linear.weight.source, "uint8 activation with uint8 weight")


def unsigned_on_arm(view: View) -> Iterator[Hit]:
    """Find U8 activations with S8 weights."""
    return _with_dtypes(view, UNSIGNED_8, SIGNED_8, "uint8 activation with int8 weight")


def conv_without_quantizer(view: View) -> Iterator[Hit]:
    """Find quantized convolutions whose output is not quantized."""
    for linear in view.linears():
        if linear.node.op_type == "Conv" and view.output_of(linear.node)[1] is None:
            message = "the output has no Q of its own: the engine runs a float Conv"
            yield hit(linear.node, linear.output, message)


def matmul_bias_trap(view: View) -> Iterator[Hit]:
    """Find MatMul + Add(float vector) with static shapes, which become a float Gemm."""
    for linear in view.linears():
        readers = view.readers(linear.output)
        if linear.node.op_type != "MatMul" or len(readers) != 1 or readers[0].op_type != "Add":
            continue
        other = next((name for name in readers[0].input if name != linear.output), "")
        bias, shape = view.constants.get(other), view.shape(linear.node.input[0])
        if bias is None or bias.data_type not in FLOATS or len(bias.dims) != 1 or shape is None:
            continue
        if len(shape) == 2 or None not in shape:
            message = f"MatMul + Add of a vector on shape {list(shape)} becomes a float Gemm"
            yield hit(readers[0], other, message)


def pure_cost(view: View) -> Iterator[Hit]:
    """Find pairs that serve nothing but an op without a (fast) integer kernel."""
    for node in view.nodes:
        data = view.dequantizer(node.input[0]) if node.op_type in FLOAT_OPS else None
        before = view.producers.get(data.source) if data is not None else None
        if data is None or before is None or before.op_type != "QuantizeLinear":
            continue
        alone = len(view.readers(data.source)) == 1 and len(view.readers(data.result)) == 1
        if alone and not _made_in_integers(view, before.input[0]):
            message = f"Q and DQ in front of {node.op_type} serve only a float op"
            yield hit(node, data.source, message)
        elif node.op_type == "Softmax" and view.quantizer_behind(node.output[0]) is not None:
            yield hit(node, data.source, "Softmax between DQ and Q runs as QLinearSoftmax")


def _made_in_integers(view: View, name: str) -> bool:
    """True when the Q behind `name` lets its producer run in integers."""
    maker = view.producers.get(name)
    if maker is not None and maker.op_type in ("Relu", "Clip"):
        before = view.producers.get(maker.input[0])
        if before is not None and before.op_type in ("Conv", "Gemm"):
            maker = before
    if maker is None or maker.op_type in FLOAT_OPS:
        return False
    return any(view.dequantizer(operand) is not None for operand in maker.input)


def relu_between_pairs(view: View) -> Iterator[Hit]:
    """Find Conv -> Q -> DQ -> Relu."""
    for linear in view.linears():
        slot = view.quantizer_behind(linear.output)
        if slot is None:
            continue
        for dequantize in view.readers(slot.result):
            for reader in view.readers(dequantize.output[0]):
                if reader.op_type in ("Relu", "Clip"):
                    yield hit(reader, slot.source, f"a pair lies between a linear op and its "
                              f"{reader.op_type}")  # fmt: skip


def relu_not_redundant(view: View) -> Iterator[Hit]:
    """Find Conv -> Relu -> Q where the range of Q reaches below zero."""
    for linear in view.linears():
        follower, slot = view.output_of(linear.node)
        if follower is None or follower.op_type != "Relu" or slot is None:
            continue
        zero_point = view.zero_point(slot)
        lowest = LOWEST.get(slot.data_type)
        if lowest is not None and zero_point is not None and (zero_point != lowest).any():
            message = f"zero point {int(zero_point.flat[0])} behind a Relu: {lowest} is needed"
            yield hit(linear.node, slot.zero_point_name, message)


def dtypes_differ(view: View) -> Iterator[Hit]:
    """Find linear ops whose Q makes another dtype than their data has."""
    for linear in view.linears():
        _, slot = view.output_of(linear.node)
        if slot is not None and slot.data_type != linear.data.data_type:
            message = (
                f"{type_name(linear.data.data_type)} goes in, {type_name(slot.data_type)} comes out"
            )
            yield hit(linear.node, slot.result, message)


def narrow_not_fused(view: View) -> Iterator[Hit]:
    """Find 4-bit weights that do not become MatMulNBits."""
    for node in view.nodes:
        if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose") or len(node.input) < 2:
            continue
        weight = view.dequantizer(node.input[1])
        if weight is not None and weight.data_type in BITS_4:
            reasons = list(_reasons_not_fused(view, node, weight))
            if reasons:
                yield hit(node, weight.source, "4-bit weight: " + "; ".join(reasons))


def _reasons_not_fused(view: View, node: NodeProto, weight: Slot) -> Iterator[str]:
    shape, scale = view.shape(weight.source), view.constants.get(weight.scale_name)
    if node.op_type not in ("MatMul", "Gemm"):
        yield f"{node.op_type} has no 4-bit kernel"
        return
    if view.dequantizer(node.input[0]) is not None:
        yield "the activation is quantized too"
    if not weight.constant or shape is None or len(shape) != 2:
        yield "it is not a constant matrix"
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        yield "Gemm with transB=1"
    if len(view.readers(weight.result)) != 1:
        yield "its DQ has several readers"
    if scale is not None and scale.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        yield f"scales are {type_name(scale.data_type)}"
    rank = len(shape) if shape is not None else 2
    if weight.block_size:
        if weight.axis % rank != 0:
            yield f"blocks along axis {weight.axis}, not 0"
        if weight.block_size < MIN_BLOCK or weight.block_size & (weight.block_size - 1):
            yield f"blocks of {weight.block_size}: a power of two from {MIN_BLOCK} on is needed"
    elif scale is not None and np.prod(scale.dims) > 1 and weight.axis % rank != 1:
        yield f"scales along axis {weight.axis}, not 1"


def float_8(view: View) -> Iterator[Hit]:
    """Find 8-bit floats."""
    for slot in view.pairs:
        if slot.data_type in FLOAT_8:
            yield hit(slot.node, slot.source, f"{type_name(slot.data_type)} on the CPU provider")


def signed_softmax(view: View) -> Iterator[Hit]:
    """Find Softmax between DQ and an S8 Q."""
    for node in view.nodes:
        if node.op_type == "Softmax" and view.dequantizer(node.input[0]) is not None:
            slot = view.quantizer_behind(node.output[0])
            if slot is not None and slot.data_type == SIGNED_8:
                yield hit(node, slot.result, "QLinearSoftmax in int8 wraps 127 to -128")


def signed_matmul_bias(view: View) -> Iterator[Hit]:
    """Find S8 x S8 MatMul + Add(DQ(int32)) without Q at opset 21."""
    for linear in view.linears():
        if linear.node.op_type == "MatMul" and view.opset >= 21 and _signed(linear):
            for reader in view.readers(linear.output):
                slots = [view.dequantizer(name) for name in reader.input]
                if reader.op_type == "Add" and any(
                    s is not None and s.data_type == TensorProto.INT32 for s in slots
                ):
                    yield hit(reader, linear.output, "int8 MatMul + Add of an int32 bias")


def _signed(linear: Linear) -> bool:
    return linear.data.data_type == linear.weight.data_type == SIGNED_8


def gemm_beta(view: View) -> Iterator[Hit]:
    """Find quantized Gemm with beta other than 1."""
    for linear in view.linears():
        beta = attribute(linear.node, "beta", 1.0)
        if linear.node.op_type == "Gemm" and len(linear.node.input) > 2 and beta != 1.0:
            yield hit(linear.node, "", f"beta is {beta}")


def slow_operators(view: View) -> Iterator[Hit]:
    """Find ConvInteger, and quantized ops that have no integer kernel at all."""
    for node in view.nodes:
        if node.op_type == "ConvInteger":
            yield hit(node, node.output[0], "ConvInteger is 6.6 times slower than a float Conv")
        elif node.op_type in NEVER_INTEGER and view.weight_of(node)[0] is not None:
            yield hit(node, node.input[1], f"{node.op_type} has no integer kernel")
