"""Rules about the shape of a QDQ graph: pairs, weights, biases and what is left over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from qpass.lint.model import Hit, Rule, hit
from qpass.lint.numbers import OPERATORS, QUANTIZE_OPERATOR
from qpass.lint.view import DEQUANTIZE, FLOATS, MOVERS, QUANTIZE, View
from qpass.wellformed import is_quantized_op

BIAS_TOLERANCE: Final = 1e-6  # relative; the float32 product of two float32 scales is within 6e-8
LOOKS_AT_INTEGERS: Final = MOVERS | {"Cast", "Shape"}
PER_CHANNEL_ACTIVATION: Final = (
    "onnxruntime has a slow kernel for it (measured: 55 ms for 8.6 ms); OpenVINO 2026.4: "
    "'doesn't support non per-tensor quant'; TensorRT wants per-tensor activations"
)


def quantize_alone(view: View) -> Iterator[Hit]:
    """Find Q whose integers nobody dequantizes."""
    for slot in view.quantizers:
        readers = view.readers(slot.result)
        if not readers and slot.result not in view.outputs | view.captured:
            yield hit(slot.node, slot.result, "nobody reads the quantized tensor")
        for reader in readers:
            if not (is_quantized_op(reader) or reader.op_type in LOOKS_AT_INTEGERS):
                yield hit(slot.node, slot.result, f"{reader.op_type} computes on raw integers")


def dequantize_alone(view: View) -> Iterator[Hit]:
    """Find DQ on an activation that no Q made."""
    for slot in view.dequantizers:
        maker = view.producers.get(slot.source)
        if slot.constant or maker is None:
            continue
        if not (is_quantized_op(maker) or maker.op_type in LOOKS_AT_INTEGERS):
            yield hit(slot.node, slot.source, f"{maker.op_type} makes what DQ reads, no Q")


def float_constant_quantized(view: View) -> Iterator[Hit]:
    """Find Q on float constants."""
    for slot in view.quantizers:
        if slot.source in view.constants:
            yield hit(slot.node, slot.source, "a float constant is quantized at run time")


def unused_constant(view: View) -> Iterator[Hit]:
    """Find initializers that nobody reads."""
    for tensor in view.model.graph.initializer:
        name = tensor.name
        if name not in view.consumers and name not in view.captured | view.outputs:
            yield Hit("", name, f"nobody reads this constant of shape {list(tensor.dims)}")


def float_twin(view: View) -> Iterator[Hit]:
    """Find float weights in use whose quantized copy is in the model too."""
    integers: dict[tuple[int, ...], list[str]] = {}
    for slot in view.dequantizers:
        if slot.source in view.constants and len(view.constants[slot.source].dims) > 1:
            integers.setdefault(tuple(view.constants[slot.source].dims), []).append(slot.source)
    for tensor in view.model.graph.initializer:
        if tensor.data_type not in FLOATS or tensor.name not in view.consumers:
            continue
        for twin in integers.get(tuple(tensor.dims), ()):
            if twin.startswith(tensor.name):
                yield Hit("", tensor.name, f"float beside its quantized copy {twin}")


def quantized_twice(view: View) -> Iterator[Hit]:
    """Find DQ -> Q: integers that are turned into other integers."""
    for slot in view.quantizers:
        before = view.dequantizer(slot.source)
        if before is None:
            continue
        same = _numbers(view, before.scale_name) == _numbers(view, slot.scale_name) and _numbers(
            view, before.zero_point_name
        ) == _numbers(view, slot.zero_point_name)
        how = "with the same scale" if same else "with another scale, which rounds twice"
        yield hit(slot.node, slot.source, f"dequantized and quantized again {how}")


def _numbers(view: View, name: str) -> object:
    values = view.values(name)
    return name if values is None else values.ravel().tolist()


def one_weight_two_scales(view: View) -> Iterator[Hit]:
    """Find integer constants that several DQs read with scales that are far apart."""
    first: dict[str, str] = {}
    for slot in view.dequantizers:
        if slot.source not in view.constants:
            continue
        other = first.setdefault(slot.source, slot.scale_name)
        if not _alike(view, other, slot.scale_name):
            yield hit(slot.node, slot.source, f"dequantized with the scales {other} and its own")


def _alike(view: View, left: str, right: str) -> bool:
    """True where gains of the ops that read the integers, from 1/2 to 2, explain the scales."""
    a, b = view.values(left), view.values(right)
    if left == right or a is None or b is None or a.shape != b.shape:
        return left == right
    ratios = a.astype(np.float64).ravel() / b.astype(np.float64).ravel()
    return bool((np.abs(np.log2(ratios)) <= 2.0).all())


def weight_axis(view: View) -> Iterator[Hit]:
    """Find per-channel weights whose scales lie along another axis than the output channels."""
    for linear in view.linears():
        weight, shape = linear.weight, view.shape(linear.weight.source)
        scale = view.constants.get(weight.scale_name)
        if not weight.constant or scale is None or shape is None or weight.block_size:
            continue
        if np.prod(scale.dims) <= 1 or not -len(shape) <= weight.axis < len(shape):
            continue
        axis = weight.axis % len(shape)
        if linear.order is not None:
            axis = linear.order.index(axis)
        wanted = linear.channel_axis(len(shape))
        if axis != wanted:
            missing = "" if weight.axis_given else " (the attribute is missing)"
            message = f"scales along axis {axis}{missing}, output channels are axis {wanted}"
            yield hit(linear.node, weight.source, message)


def bias_scale(view: View) -> Iterator[Hit]:
    """Find quantized biases whose scale is not the product of the scales of data and weight."""
    for linear in view.linears():
        bias = view.dequantizer(linear.node.input[2]) if len(linear.node.input) > 2 else None
        if bias is None:
            continue
        x, w, b = (view.scale(slot) for slot in (linear.data, linear.weight, bias))
        if x is None or w is None or b is None or x.size != 1 or linear.weight.block_size:
            continue
        wanted = x.ravel() * w.ravel()
        if b.size not in (1, wanted.size):
            message = f"{b.size} bias scales for {wanted.size} channels"
            yield hit(linear.node, bias.scale_name, message)
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.abs(b.ravel() / wanted - 1.0).max()
        if not error <= BIAS_TOLERANCE:
            message = f"the bias scale is off x_scale * w_scale by {error:.2g} of it"
            yield hit(linear.node, bias.scale_name, message)


def per_channel_activation(view: View) -> Iterator[Hit]:
    """Find activations with more than one scale."""
    for slot in view.quantizers:
        scale = view.constants.get(slot.scale_name)
        if not slot.constant and scale is not None and np.prod(scale.dims) > 1:
            message = f"an activation has {int(np.prod(scale.dims))} scales"
            yield hit(slot.node, slot.source, message)


def half_quantized(view: View) -> Iterator[Hit]:
    """Find convolutions that have an integer weight and a float input."""
    for node in view.nodes:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) > 1:
            weight, _ = view.weight_of(node)
            if weight is not None and view.dequantizer(node.input[0]) is None:
                message = "the weight is quantized, the input is float: computed in float"
                yield hit(node, node.input[0], message)


RULES: Final = (
    Rule(
        id="QP020",
        severity="warning",
        title=f"{QUANTIZE} is followed by {DEQUANTIZE}",
        repair="put a DQ with the same scale and zero point behind the Q, or remove the Q",
        source=QUANTIZE_OPERATOR,
        check=quantize_alone,
    ),
    Rule(
        id="QP021",
        severity="warning",
        title=f"{DEQUANTIZE} of an activation follows {QUANTIZE}",
        repair="put the Q of the pair before the DQ, or remove the DQ",
        source=OPERATORS,
        check=dequantize_alone,
    ),
    Rule(
        id="QP022",
        severity="warning",
        title="weights are stored as integers",
        repair="store the integers and keep only the DQ: the file gets 4 times smaller",
        source="engines read DQ(integers) as well as Q/DQ(float); TensorRT's exporters use the "
        "latter",
        check=float_constant_quantized,
        except_for=("tensorrt",),
    ),
    Rule(
        id="QP023",
        severity="warning",
        title="every constant is read",
        repair="remove the initializer: quantizers leave the float weights behind",
        source="dead bytes in the file",
        check=unused_constant,
    ),
    Rule(
        id="QP024",
        severity="warning",
        title="a weight is stored once",
        repair="let every reader of the float weight read the DQ of the quantized one",
        source="the float copy takes 4 times the bytes of the quantized one",
        check=float_twin,
    ),
    Rule(
        id="QP025",
        severity="warning",
        title="nothing is quantized twice",
        repair="keep one pair: remove the DQ and Q in the middle and share one scale",
        source="each pair rounds and clips",
        check=quantized_twice,
    ),
    Rule(
        id="QP026",
        severity="error",
        title="a weight has one scale",
        repair="give every DQ of the weight the same scale, or every scale its own integers",
        source="integers were rounded for one scale; compensation gives each op that reads them a "
        "gain of its own, from 1/2 to 2",
        check=one_weight_two_scales,
    ),
    Rule(
        id="QP030",
        severity="error",
        title="scales of a weight lie along its output channels",
        repair="set axis: Conv 0, ConvTranspose 1, Gemm 0 with transB and 1 without, MatMul last",
        source="onnxruntime 1.31 fuses a wrong axis with K == N silently to wrong numbers (7 dB), "
        "others fail at run time; measured",
        check=weight_axis,
    ),
    Rule(
        id="QP031",
        severity="error",
        title="the scale of an int32 bias is x_scale * w_scale",
        repair="quantize the float bias again with the product of the scales",
        source="https://github.com/microsoft/onnxruntime/issues/24711: the accumulator is added to "
        "the bias as it is",
        check=bias_scale,
    ),
    Rule(
        id="QP032",
        severity="warning",
        title="activations have one scale",
        repair="use one scale; move the range of channels into the weights instead",
        source=PER_CHANNEL_ACTIVATION,
        check=per_channel_activation,
        except_for=("openvino", "tensorrt", "vitis-xint8"),
    ),
    Rule(
        id="QP033",
        severity="error",
        title="activations have one scale",
        repair="use one scale; move the range of channels into the weights instead",
        source=PER_CHANNEL_ACTIVATION,
        check=per_channel_activation,
        targets=("openvino", "tensorrt", "vitis-xint8"),
    ),
    Rule(
        id="QP034",
        severity="warning",
        title="both operands of a convolution are integers",
        repair="put a Q/DQ pair on the input, or leave the weight in float",
        source="no engine of the table has a weight-only convolution kernel",
        check=half_quantized,
    ),
)
