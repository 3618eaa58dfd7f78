"""Rules about scales, zero points and dtypes: what the ONNX standard asks of every model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from onnx import TensorProto

from qpass.lint.model import Hit, Rule, hit
from qpass.lint.view import BITS_2, BITS_4, BITS_16, FLOAT_8, Slot, View, type_name
from qpass.wellformed import ONNX_DOMAINS

OPERATORS: Final = "https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html"
QUANTIZE_OPERATOR: Final = "https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html"
TENSORRT: Final = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
    "quantized-types-explicit-quantization.html"
)
ABSURD: Final = 1e30  # a range that holds -inf or the lowest float gives scales above 1e36
PER_AXIS_OPSET: Final = 13
BLOCK_OPSET: Final = 21
FIRST_OPSET: Final = (  # of QuantizeLinear with that dtype
    (BITS_2, 25),
    (BITS_4 | BITS_16, 21),
    (FLOAT_8, 19),
)


def unusable_scale(view: View) -> Iterator[Hit]:
    """Find scales that are zero, infinite or not a number."""
    for slot in view.slots:
        scale = view.scale(slot)
        if scale is not None and not (np.isfinite(scale) & (scale != 0)).all():
            bad = scale[~(np.isfinite(scale) & (scale != 0))].flat[0]
            yield hit(slot.node, slot.scale_name, f"a scale is {bad}")


def negative_scale(view: View) -> Iterator[Hit]:
    """Find negative scales."""
    for slot in view.slots:
        scale = view.scale(slot)
        if scale is not None and (scale < 0).any():
            yield hit(slot.node, slot.scale_name, f"a scale is {scale.min()}")


def absurd_scale(view: View) -> Iterator[Hit]:
    """Find scales that only a range with an attention mask or an overflow can have given."""
    for slot in view.slots:
        scale = view.scale(slot)
        if scale is None or slot.constant:
            continue
        finite = np.abs(scale[np.isfinite(scale) & (scale != 0)])
        if finite.size and (finite.max() > ABSURD or finite.min() < 1 / ABSURD):
            extreme = finite.max() if finite.max() > ABSURD else finite.min()
            yield hit(slot.node, slot.scale_name, f"the scale of an activation is {extreme:.3g}")


def shape_mismatch(view: View) -> Iterator[Hit]:
    """Find zero points of another shape than their scale."""
    for slot in view.slots:
        scale, zero_point = view.constants.get(slot.scale_name), slot.zero_point_name
        if scale is None or zero_point not in view.constants:
            continue
        first, second = list(scale.dims), list(view.constants[zero_point].dims)
        one_value = np.prod(first) == 1 and np.prod(second) == 1
        if first != second and not one_value:
            message = f"the scale has shape {first}, the zero point {second}"
            yield hit(slot.node, zero_point, message)


def dtype_mismatch(view: View) -> Iterator[Hit]:
    """Find zero points of another dtype than the integers they belong to."""
    for slot in view.pairs:
        if slot.zero_point_name not in view.constants:
            continue
        other = _integers_of(view, slot)
        if other not in (None, slot.data_type):
            message = (
                f"the zero point is {type_name(slot.data_type)}, "
                f"the integers are {type_name(int(other or 0))}"
            )
            yield hit(slot.node, slot.zero_point_name, message)


def _integers_of(view: View, slot: Slot) -> int | None:
    """Return the dtype that the integers of a Q or DQ have apart from its zero point."""
    if slot.node.op_type == "QuantizeLinear":
        return next((a.i for a in slot.node.attribute if a.name == "output_dtype" and a.i), None)
    if slot.source in view.constants:
        return int(view.constants[slot.source].data_type)
    maker = view.by_result.get(slot.source)
    return maker.data_type if maker is not None else None


def int32_zero_point(view: View) -> Iterator[Hit]:
    """Find int32 constants (biases) with a zero point that is not 0."""
    for slot in view.dequantizers:
        if slot.data_type == TensorProto.INT32:
            zero_point = view.zero_point(slot)
            if zero_point is not None and zero_point.any():
                message = f"int32 is dequantized with zero point {zero_point.flat[0]}"
                yield hit(slot.node, slot.zero_point_name, message)


def per_axis_length(view: View) -> Iterator[Hit]:
    """Find per-axis scales whose length is not that of the axis."""
    for slot in view.pairs:
        scale, shape = view.constants.get(slot.scale_name), view.shape(slot.source)
        if scale is None or shape is None or slot.block_size or np.prod(scale.dims) <= 1:
            continue
        missing = "" if slot.axis_given else " (the attribute is missing: 1)"
        count = int(np.prod(scale.dims))
        if not -len(shape) <= slot.axis < len(shape):
            message = f"axis {slot.axis}{missing} is outside of shape {list(shape)}"
            yield hit(slot.node, slot.scale_name, message)
        elif shape[slot.axis] not in (None, count):
            message = f"{count} scales for axis {slot.axis}{missing} of shape {list(shape)}"
            yield hit(slot.node, slot.scale_name, message)


def block_shape(view: View) -> Iterator[Hit]:
    """Find blocked scales whose shape does not cover the tensor."""
    for slot in view.pairs:
        scale, shape = view.constants.get(slot.scale_name), view.shape(slot.source)
        if scale is None or shape is None or not slot.block_size or None in shape:
            continue
        wanted = [int(dim or 0) for dim in shape]
        if -len(wanted) <= slot.axis < len(wanted):
            wanted[slot.axis] = -(-wanted[slot.axis] // slot.block_size)
        if list(scale.dims) != wanted:
            message = (
                f"blocks of {slot.block_size} along axis {slot.axis} of {list(shape)} need scales "
                f"of shape {wanted}, not {list(scale.dims)}"
            )
            yield hit(slot.node, slot.scale_name, message)


def opset_too_old(view: View) -> Iterator[Hit]:
    """Find Q and DQ that use what the model's opset does not have yet."""
    for slot in view.pairs:
        if slot.node.domain not in ONNX_DOMAINS:
            continue
        scale = view.constants.get(slot.scale_name)
        if scale is not None and np.prod(scale.dims) > 1 and view.opset < PER_AXIS_OPSET:
            yield _too_old(view, slot, "per-axis scales", PER_AXIS_OPSET)
        if slot.block_size and view.opset < BLOCK_OPSET:
            yield _too_old(view, slot, "block_size", BLOCK_OPSET)
        for data_types, opset in FIRST_OPSET:
            if slot.data_type in data_types and view.opset < opset:
                yield _too_old(view, slot, type_name(slot.data_type), opset)


def _too_old(view: View, slot: Slot, what: str, opset: int) -> Hit:
    return hit(slot.node, slot.source, f"{what} needs opset {opset}, the model has {view.opset}")


RULES: Final = (
    Rule(
        id="QP001",
        severity="error",
        title="scales are finite and not zero",
        repair="give channels that are all zero a scale of 1 and integers of 0; calibrate again "
        "without NaN and infinity",
        source=QUANTIZE_OPERATOR,
        check=unusable_scale,
    ),
    Rule(
        id="QP002",
        severity="warning",
        title="scales are positive",
        repair="make the scale positive and negate the integers",
        source=f"onnxruntime and OpenVINO compute them correctly, TensorRT refuses: {TENSORRT}",
        check=negative_scale,
        except_for=("tensorrt",),
    ),
    Rule(
        id="QP003",
        severity="error",
        title="scale and zero point have one shape",
        repair="write one zero point per scale",
        source=OPERATORS,
        check=shape_mismatch,
    ),
    Rule(
        id="QP004",
        severity="error",
        title="the zero point has the dtype of the integers",
        repair="write the zero point, output_dtype and the integers in one dtype",
        source=QUANTIZE_OPERATOR,
        check=dtype_mismatch,
    ),
    Rule(
        id="QP005",
        severity="error",
        title="int32 is dequantized with zero point 0",
        repair="leave the zero point of the bias away, or set it to 0",
        source=OPERATORS,
        check=int32_zero_point,
    ),
    Rule(
        id="QP006",
        severity="error",
        title="there is one scale for each index of the axis",
        repair="write the axis of the channels explicitly; its default is 1",
        source=OPERATORS,
        check=per_axis_length,
    ),
    Rule(
        id="QP007",
        severity="warning",
        title="the range of an activation is plausible",
        repair="keep masks (-inf, -1e4 and lower) out of the calibrated range: leave the Add of "
        "the mask in float",
        source="an 8-bit step of this size leaves ordinary activations no integer but one",
        check=absurd_scale,
    ),
    Rule(
        id="QP008",
        severity="error",
        title="blocked scales cover the tensor",
        repair="give the scale the shape of the tensor, with ceil(dim / block_size) on the axis",
        source=OPERATORS,
        check=block_shape,
    ),
    Rule(
        id="QP009",
        severity="error",
        title="the opset knows what Q and DQ use",
        repair="convert the model to the opset (qpass does), or quantize per tensor in 8 bit",
        source="https://github.com/onnx/onnx/blob/main/docs/Changelog.md",
        check=opset_too_old,
    ),
)
