"""Checks for OpenVINO, TensorRT, QNN (Snapdragon HTP) and Vitis AI (AMD NPU).

OpenVINO's were measured on 2026.4.1; the others come from documentation and source and were never
run on the hardware.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from onnx import TensorProto

from qpass.lint.model import Hit, hit
from qpass.lint.view import (
    ABSORBED,
    BITS_4,
    BITS_16,
    FLOATS,
    LINEAR,
    MOVERS,
    SIGNED_8,
    UNSIGNED_8,
    Slot,
    View,
    type_name,
)
from qpass.wellformed import is_quantized_op

CONTROL_FLOW: Final = frozenset({"If", "Loop", "Scan"})
# Ops whose results are shapes or constants, or which only move data.
NO_COMPUTE: Final = MOVERS | {"Constant", "ConstantOfShape", "Shape", "Cast", "Range"}


def _is_symmetric(view: View, slot: Slot, data_types: tuple[int, ...] = (SIGNED_8,)) -> bool:
    zero_point = view.zero_point(slot)
    return slot.data_type in data_types and (zero_point is None or not zero_point.any())


def _describe(view: View, slot: Slot) -> str:
    zero_point = view.zero_point(slot)
    text = "computed" if zero_point is None else str(zero_point.ravel()[:1].tolist()[0])
    return f"{type_name(slot.data_type)} with zero point {text}"


def openvino_weight(view: View) -> Iterator[Hit]:
    """Find convolution weights that are not symmetric int8."""
    for linear in view.linears():
        if linear.node.op_type in ("Conv", "ConvTranspose"):
            weight = linear.weight
            if not _is_symmetric(view, weight):
                yield hit(linear.node, weight.source, f"weights are {_describe(view, weight)}")


def openvino_transposed(view: View) -> Iterator[Hit]:
    """Find transposed convolutions of activations that are not symmetric int8."""
    for linear in view.linears():
        data = linear.data
        if linear.node.op_type == "ConvTranspose" and not _is_symmetric(view, data):
            yield hit(linear.node, data.source, f"the input is {_describe(view, data)}")


def openvino_product(view: View) -> Iterator[Hit]:
    """Find products of two activations in forms that run in float."""
    for linear in view.linears():
        if linear.node.op_type != "MatMul" or linear.weight.constant:
            continue
        left, right = linear.data, linear.weight
        if not _is_symmetric(view, left, (SIGNED_8, UNSIGNED_8)):
            yield hit(linear.node, left.source, f"the left operand is {_describe(view, left)}")
        if not _is_symmetric(view, right):
            yield hit(linear.node, right.source, f"the right operand is {_describe(view, right)}")


def openvino_narrow(view: View) -> Iterator[Hit]:
    """Find 4-bit weights of convolutions, and 4-bit weights with quantized activations."""
    for node in view.nodes:
        weight = view.weight_of(node)[0] if node.op_type in LINEAR else None
        if weight is None or weight.data_type not in BITS_4:
            continue
        if node.op_type in ("Conv", "ConvTranspose"):
            yield hit(node, weight.source, f"{node.op_type} with 4-bit weights is not supported")
        elif view.dequantizer(node.input[0]) is not None:
            yield hit(node, weight.source, "4-bit weights with quantized activations run in float")


def dynamic_operators(view: View) -> Iterator[Hit]:
    """Find ops that quantize at run time or compute on integers by themselves."""
    for node in view.nodes:
        op = node.op_type
        if op.startswith("DynamicQuantize") or op in ("MatMulInteger", "ConvInteger"):
            yield hit(node, node.output[0], f"{op} runs in float")


def wide(view: View) -> Iterator[Hit]:
    """Find linear ops on 16-bit integers."""
    for linear in view.linears():
        for slot in (linear.data, linear.weight):
            if slot.data_type in BITS_16:
                yield hit(linear.node, slot.source, f"{type_name(slot.data_type)} runs in float")


def nonzero_zero_point(view: View) -> Iterator[Hit]:
    """Find zero points that are not 0."""
    for slot in view.slots:
        zero_point = view.zero_point(slot)
        if zero_point is not None and zero_point.any():
            yield hit(slot.node, slot.zero_point_name, f"the tensor is {_describe(view, slot)}")


def unsigned(view: View) -> Iterator[Hit]:
    """Find uint8 tensors."""
    for slot in view.pairs:
        if slot.data_type == UNSIGNED_8:
            yield hit(slot.node, slot.source, "the tensor is uint8")


def int32_bias(view: View) -> Iterator[Hit]:
    """Find biases that are stored as int32."""
    for slot in view.dequantizers:
        if slot.data_type == TensorProto.INT32:
            yield hit(slot.node, slot.source, "a DQ reads int32")


def integer_operators(view: View) -> Iterator[Hit]:
    """Find ops that compute on integers by themselves."""
    for node in view.nodes:
        if is_quantized_op(node) and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            yield hit(node, node.output[0], f"{node.op_type} is not imported")


def computed_scale(view: View) -> Iterator[Hit]:
    """Find scales and zero points that are no constants."""
    for slot in view.pairs:
        for name in filter(None, (slot.scale_name, slot.zero_point_name)):
            if name not in view.constants:
                yield hit(slot.node, name, "a scale or zero point is computed at run time")


def tensorrt_blocks(view: View) -> Iterator[Hit]:
    """Find 4-bit weights that are not blocked along exactly one axis."""
    for slot in view.dequantizers:
        shape = view.shape(slot.source)
        if slot.data_type not in BITS_4 or shape is None or not shape:
            continue
        axis = slot.axis if -len(shape) <= slot.axis < len(shape) else 0
        dim, last = shape[axis], shape[-1]
        if not slot.block_size:
            yield hit(slot.node, slot.source, "4-bit weights without blocks")
        elif dim is not None and dim % slot.block_size:
            yield hit(slot.node, slot.source, f"blocks of {slot.block_size} do not divide {dim}")
        if last is not None and last % 2:
            yield hit(slot.node, slot.source, f"the last dimension is odd: {last}")


def per_channel_product(view: View) -> Iterator[Hit]:
    """Find per-channel weights of MatMul and Gemm."""
    for linear in view.linears():
        scale = view.constants.get(linear.weight.scale_name)
        if linear.node.op_type in ("MatMul", "Gemm") and scale is not None:
            count = int(np.prod(scale.dims))
            if count > 1:
                yield hit(linear.node, linear.weight.scale_name, f"{count} scales for one weight")


def float_operand(view: View) -> Iterator[Hit]:
    """Find ops that compute on float tensors which no DQ made."""
    floating = {
        value.name for value in view.model.graph.input if value.type.tensor_type.elem_type in FLOATS
    } | {name for name, tensor in view.constants.items() if tensor.data_type in FLOATS}
    for node in view.nodes:
        if is_quantized_op(node) or node.op_type in NO_COMPUTE:
            continue
        for name in node.input[:2]:
            maker = view.producers.get(name)
            if node.op_type in ABSORBED and maker is not None and maker.op_type in LINEAR:
                break  # one unit with the linear op before it
            computed = maker is not None and not is_quantized_op(maker)
            moved = maker is not None and maker.op_type in NO_COMPUTE
            if name in floating or (computed and not moved):
                yield hit(node, name, f"{node.op_type} reads a float tensor")
                break


def dynamic_shape(view: View) -> Iterator[Hit]:
    """Find inputs with dimensions that are not numbers."""
    for value in view.model.graph.input:
        shape = view.shape(value.name)
        if shape is None or None in shape:
            shown = "unknown" if shape is None else [d if d is not None else "?" for d in shape]
            yield Hit("", value.name, f"the shape of an input is {shown}")


def control_flow(view: View) -> Iterator[Hit]:
    """Find If, Loop and Scan."""
    for node in view.nodes:
        if node.op_type in CONTROL_FLOW:
            yield hit(node, node.output[0], f"{node.op_type} is not supported")


def float_bias(view: View) -> Iterator[Hit]:
    """Find quantized Conv and Gemm with a float bias."""
    for linear in view.linears():
        if len(linear.node.input) > 2 and linear.node.input[2]:
            bias = view.constants.get(linear.node.input[2])
            if bias is not None and bias.data_type in FLOATS:
                yield hit(linear.node, bias.name, "the bias is float")


def signed_activation(view: View) -> Iterator[Hit]:
    """Find activations in int8."""
    for slot in view.quantizers:
        if slot.data_type == SIGNED_8 and not slot.constant:
            yield hit(slot.node, slot.source, "the activation is int8")


def not_power_of_two(view: View) -> Iterator[Hit]:
    """Find scales that are no powers of two."""
    for slot in view.pairs:
        scale = view.scale(slot)
        if scale is not None and (np.frexp(np.abs(scale))[0] != 0.5).any():
            bad = scale[np.frexp(np.abs(scale))[0] != 0.5].flat[0]
            yield hit(slot.node, slot.scale_name, f"the scale {bad:.6g} is no power of two")


def per_channel_weight(view: View) -> Iterator[Hit]:
    """Find weights with more than one scale."""
    for slot in view.dequantizers:
        scale = view.constants.get(slot.scale_name)
        is_bias = slot.data_type == TensorProto.INT32
        if slot.constant and scale is not None and np.prod(scale.dims) > 1 and not is_bias:
            yield hit(slot.node, slot.scale_name, f"{int(np.prod(scale.dims))} scales")


def not_symmetric_int8(view: View) -> Iterator[Hit]:
    """Find tensors other than symmetric int8, biases aside."""
    for slot in view.pairs:
        if slot.data_type != TensorProto.INT32 and not _is_symmetric(view, slot):
            yield hit(slot.node, slot.source, f"the tensor is {_describe(view, slot)}")
