"""The ops of `Executor`: for each a small function of its attributes and operands.

Semantics are those of opset 13 and newer: axes, splits and shapes are operands, some also
attributes in older versions. Ops with more than one output return a tuple. `Executor` adds what a
node alone does not say: Cast has a ``device``, where floats are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.nn import functional

from qpass.torch import executor_windows as windows
from qpass.torch.executor_errors import UnsupportedOpError
from qpass.torch.executor_quantize import dequantize, quantize

Attrs = Mapping[str, Any]
Operator = Callable[..., Any]
CASTS: Final = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 11: torch.float64}


def _elementwise(function: Operator) -> Operator:
    return lambda _, *operands: function(*operands)


def _gemm(
    attrs: Attrs, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None
) -> torch.Tensor:
    a = a.mT if attrs.get("transA", 0) else a
    product = attrs.get("alpha", 1.0) * (a @ (b.mT if attrs.get("transB", 0) else b))
    return product if c is None else product + attrs.get("beta", 1.0) * c


def _clip(
    attrs: Attrs,
    x: torch.Tensor,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
) -> torch.Tensor:
    least = attrs.get("min") if low is None else low.item()
    most = attrs.get("max") if high is None else high.item()
    return x if least is None and most is None else x.clamp(least, most)


def _div(_: Attrs, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _gelu(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate=str(attrs.get("approximate", "none")))


def _softmax(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return x.softmax(dim=int(attrs.get("axis", -1)))


def _log_softmax(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return x.log_softmax(dim=int(attrs.get("axis", -1)))


def _hard_sigmoid(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return (attrs.get("alpha", 0.2) * x + attrs.get("beta", 0.5)).clamp(0.0, 1.0)


def _swish(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(attrs.get("alpha", 1.0) * x)


def _layer_norm(
    attrs: Attrs, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    axis = int(attrs.get("axis", -1)) % x.ndim
    shape = x.shape[axis:]
    flat = functional.layer_norm(x, shape, eps=float(attrs.get("epsilon", 1e-5))) * scale
    return flat if bias is None else flat + bias


def _rms_norm(attrs: Attrs, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    axes = tuple(range(int(attrs.get("axis", -1)) % x.ndim, x.ndim))
    mean = x.square().mean(dim=axes, keepdim=True)
    return x * torch.rsqrt(mean + float(attrs.get("epsilon", 1e-5))) * scale


def _instance_norm(
    attrs: Attrs, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    # torch's own function refuses a single position, which leaves the bias alone.
    shape = x.shape[2:]
    flat = functional.layer_norm(x, shape, eps=float(attrs.get("epsilon", 1e-5)))
    channels = [-1, *[1] * len(shape)]
    return flat * scale.reshape(channels) + bias.reshape(channels)


def _batch_norm(
    attrs: Attrs,
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor:
    if attrs.get("training_mode", 0):
        raise UnsupportedOpError("BatchNormalization in training mode")
    return functional.batch_norm(
        x, mean, variance, scale, bias, eps=float(attrs.get("epsilon", 1e-5))
    )


def _transpose(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    return x.permute(list(attrs.get("perm", range(x.ndim - 1, -1, -1))))


def _reshape(attrs: Attrs, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    sizes = shape.tolist()
    if not attrs.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    axis = int(attrs.get("axis", 1))
    rows = x.shape[: axis + x.ndim if axis < 0 else axis].numel()
    return x.reshape(rows, -1)


def _axes(attrs: Attrs, axes: torch.Tensor | None) -> list[int] | None:
    found = attrs.get("axes") if axes is None else axes.tolist()
    return None if found is None else [int(axis) for axis in found]


def _squeeze(attrs: Attrs, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    named = _axes(attrs, axes)
    return x.squeeze() if named is None else x.squeeze(tuple(named))


def _unsqueeze(attrs: Attrs, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    named = _axes(attrs, axes) or []
    rank = x.ndim + len(named)
    for axis in sorted(axis % rank for axis in named):
        x = x.unsqueeze(axis)
    return x


def _split(attrs: Attrs, x: torch.Tensor, sizes: torch.Tensor | None = None) -> Any:
    axis = int(attrs.get("axis", 0))
    if sizes is not None:
        return x.split(sizes.tolist(), dim=axis)
    count = int(attrs.get("num_outputs", 0))
    if not count:
        raise UnsupportedOpError("Split without sizes and without num_outputs")
    return x.split(-(-x.shape[axis] // count), dim=axis)


def _slice(
    _: Attrs,
    x: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    axes: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    begins, limits = starts.tolist(), ends.tolist()
    named = list(range(len(begins))) if axes is None else axes.tolist()
    strides = [1] * len(begins) if steps is None else steps.tolist()
    if min(strides) < 1:
        raise UnsupportedOpError("Slice with a negative step")
    cut: list[slice] = [slice(None)] * x.ndim
    for axis, begin, limit, stride in zip(named, begins, limits, strides, strict=True):
        cut[axis] = slice(begin, limit, stride)
    return x[tuple(cut)]


def _gather(attrs: Attrs, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = int(attrs.get("axis", 0)) % x.ndim
    flat = indices.reshape(-1).to(x.device, torch.int64)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    picked = x.index_select(axis, flat)
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _expand(_: Attrs, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _shape(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    sizes = list(x.shape)[int(attrs.get("start", 0)) : attrs.get("end")]
    return torch.tensor(sizes, dtype=torch.int64)


def _cast(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    to = int(attrs["to"])
    if to not in CASTS:
        raise UnsupportedOpError(f"Cast to type {to}")
    dtype = CASTS[to]
    return x.to(attrs["device"], dtype) if dtype.is_floating_point else x.to(dtype)


def _concat(attrs: Attrs, *parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=int(attrs["axis"]))


def _reduced(function: Operator) -> Operator:
    def run(attrs: Attrs, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
        named = _axes(attrs, axes)
        if not named:
            if attrs.get("noop_with_empty_axes", 0):
                return x
            named = list(range(x.ndim))
        result: torch.Tensor = function(x, dim=named, keepdim=bool(attrs.get("keepdims", 1)))
        return result

    return run


def _where(_: Attrs, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition.to(a.device), a, b)


def _many(function: Operator) -> Operator:
    def run(_: Attrs, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        for other in others:
            first = function(first, other)
        return first

    return run


OPS: Final[Mapping[str, Operator]] = {
    "Abs": _elementwise(torch.abs),
    "Add": _elementwise(torch.add),
    "AveragePool": windows.average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": windows.conv,
    "ConvTranspose": windows.conv_transpose,
    "Cos": _elementwise(torch.cos),
    "DequantizeLinear": dequantize,
    "Div": _div,
    "Elu": lambda attrs, x: functional.elu(x, alpha=attrs.get("alpha", 1.0)),
    "Equal": _elementwise(torch.eq),
    "Erf": _elementwise(torch.erf),
    "Exp": _elementwise(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": windows.global_average_pool,
    "GlobalMaxPool": windows.global_max_pool,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _elementwise(functional.hardswish),
    "Identity": _elementwise(torch.clone),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda attrs, x: functional.leaky_relu(x, attrs.get("alpha", 0.01)),
    "Log": _elementwise(torch.log),
    "LogSoftmax": _log_softmax,
    "MatMul": _elementwise(torch.matmul),
    "Max": _many(torch.maximum),
    "MaxPool": windows.max_pool,
    "Min": _many(torch.minimum),
    "Mish": _elementwise(functional.mish),
    "Mul": _elementwise(torch.mul),
    "Neg": _elementwise(torch.neg),
    "PRelu": lambda _, x, slope: torch.where(x >= 0, x, x * slope),
    "Pad": windows.pad,
    "Pow": _elementwise(torch.pow),
    "QuantizeLinear": quantize,
    "RMSNormalization": _rms_norm,
    "Reciprocal": _elementwise(torch.reciprocal),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Relu": _elementwise(torch.relu),
    "Reshape": _reshape,
    "Selu": lambda attrs, x: (
        attrs.get("gamma", 1.0507009873554805)
        * functional.elu(x, alpha=attrs.get("alpha", 1.6732632423543772))
    ),
    "Shape": _shape,
    "Sigmoid": _elementwise(torch.sigmoid),
    "Sin": _elementwise(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _elementwise(functional.softplus),
    "Softsign": _elementwise(functional.softsign),
    "Split": _split,
    "Sqrt": _elementwise(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(torch.sub),
    "Swish": _swish,
    "Tanh": _elementwise(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
