"""Ops that slide a window over an image: convolution, pooling and padding, for any rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final

import torch
from torch.nn import functional

from qpass.torch.executor_errors import UnsupportedOpError

Attrs = Mapping[str, Any]
CONVOLUTIONS: Final = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED: Final = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
MAX_POOLS: Final = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
AVERAGE_POOLS: Final = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
PAD_MODES: Final = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}


def conv(
    attrs: Attrs, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Conv."""
    kernel = list(weight.shape[2:])
    strides, dilations = (
        _sizes(attrs, "strides", len(kernel)),
        _sizes(attrs, "dilations", len(kernel)),
    )
    begin, end = _pads(attrs, x, kernel, strides, dilations)
    if begin != end:
        x, begin = functional.pad(x, _torch_order(begin, end)), [0] * len(kernel)
    result: torch.Tensor = CONVOLUTIONS[len(kernel) - 1](
        x, weight, bias, strides, begin, dilations, int(attrs.get("group", 1))
    )
    return result


def conv_transpose(
    attrs: Attrs, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """ConvTranspose with equal pads on both sides."""
    rank = x.ndim - 2
    pads = list(attrs.get("pads", [0] * (2 * rank)))
    if attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in attrs:
        raise UnsupportedOpError("ConvTranspose with auto_pad or output_shape")
    if pads[:rank] != pads[rank:]:
        raise UnsupportedOpError("ConvTranspose with different pads on the two sides")
    result: torch.Tensor = TRANSPOSED[rank - 1](
        x,
        weight,
        bias,
        _sizes(attrs, "strides", rank),
        pads[:rank],
        _sizes(attrs, "output_padding", rank, 0),
        int(attrs.get("group", 1)),
        _sizes(attrs, "dilations", rank),
    )
    return result


def max_pool(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    """MaxPool, its first output."""
    kernel = [int(size) for size in attrs["kernel_shape"]]
    strides, dilations = (
        _sizes(attrs, "strides", len(kernel)),
        _sizes(attrs, "dilations", len(kernel)),
    )
    begin, end = _pads(attrs, x, kernel, strides, dilations)
    extra = _ceil_extra(attrs, x, kernel, strides, dilations, begin, end)
    if any(chain(begin, end, extra)):
        end = [a + b for a, b in zip(end, extra, strict=True)]
        x = functional.pad(x, _torch_order(begin, end), value=-torch.inf)
    result: torch.Tensor = MAX_POOLS[len(kernel) - 1](x, kernel, strides, 0, dilations)
    return result


def average_pool(attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    """AveragePool: a sum of what is there, divided by how much of it counts."""
    kernel = [int(size) for size in attrs["kernel_shape"]]
    strides, dilations = (
        _sizes(attrs, "strides", len(kernel)),
        _sizes(attrs, "dilations", len(kernel)),
    )
    if any(size != 1 for size in dilations):
        raise UnsupportedOpError("AveragePool with dilations")
    begin, end = _pads(attrs, x, kernel, strides, dilations)
    extra = _ceil_extra(attrs, x, kernel, strides, dilations, begin, end)
    pool = AVERAGE_POOLS[len(kernel) - 1]
    if not any(chain(begin, end, extra)):
        plain: torch.Tensor = pool(x, kernel, strides)
        return plain
    counted = 1.0 if attrs.get("count_include_pad", 0) else 0.0
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    ones = functional.pad(ones, _torch_order(begin, end), value=counted)
    behind = _torch_order([0] * len(kernel), extra)
    padded = functional.pad(functional.pad(x, _torch_order(begin, end)), behind)
    # The size of the kernel in both divisors cancels.
    result: torch.Tensor = pool(padded, kernel, strides) / pool(
        functional.pad(ones, behind), kernel, strides
    )
    return result


def global_average_pool(_: Attrs, x: torch.Tensor) -> torch.Tensor:
    """GlobalAveragePool."""
    return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)


def global_max_pool(_: Attrs, x: torch.Tensor) -> torch.Tensor:
    """GlobalMaxPool."""
    return x.amax(dim=tuple(range(2, x.ndim)), keepdim=True)


def pad(
    attrs: Attrs,
    x: torch.Tensor,
    pads: torch.Tensor,
    value: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pad."""
    mode = str(attrs.get("mode", "constant"))
    if mode not in PAD_MODES:
        raise UnsupportedOpError(f"Pad with mode {mode}")
    named = list(range(x.ndim)) if axes is None else [int(a) % x.ndim for a in axes.tolist()]
    sizes = pads.tolist()
    begin, end = [0] * x.ndim, [0] * x.ndim
    for place, axis in enumerate(named):
        begin[axis], end[axis] = sizes[place], sizes[len(named) + place]
    if mode == "constant":
        filling = 0.0 if value is None else float(value)
        return functional.pad(x, _torch_order(begin, end), value=filling)
    if any(begin[:2]) or any(end[:2]):
        raise UnsupportedOpError(f"Pad with mode {mode} of samples or channels")
    return functional.pad(x, _torch_order(begin[2:], end[2:]), mode=PAD_MODES[mode])


def _sizes(attrs: Attrs, name: str, rank: int, default: int = 1) -> list[int]:
    return [int(size) for size in attrs.get(name, [default] * rank)]


def _torch_order(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Return pads as `functional.pad` wants them: the last axis first."""
    return list(chain.from_iterable(zip(reversed(begin), reversed(end), strict=True)))


def _pads(
    attrs: Attrs,
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    rank, mode = len(kernel), str(attrs.get("auto_pad", "NOTSET"))
    if mode in ("NOTSET", ""):
        pads = [int(size) for size in attrs.get("pads", [0] * (2 * rank))]
        return pads[:rank], pads[rank:]
    if mode == "VALID":
        return [0] * rank, [0] * rank
    needed = [
        max(0, (-(-size // step) - 1) * step + (k - 1) * d + 1 - size)
        for size, k, step, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    small, large = [n // 2 for n in needed], [n - n // 2 for n in needed]
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def _ceil_extra(
    attrs: Attrs,
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    begin: Sequence[int],
    end: Sequence[int],
) -> list[int]:
    """Return what `ceil_mode` needs behind the pads: a last window, if it begins inside."""
    extra = []
    for size, k, step, d, a, b in zip(
        x.shape[2:], kernel, strides, dilations, begin, end, strict=True
    ):
        span = (k - 1) * d + 1
        left = (size + a + b - span) % step
        windows = (size + a + b - span) // step + 1
        more = bool(attrs.get("ceil_mode", 0)) and left > 0 and windows * step < size + a
        extra.append(step - left if more else 0)
    return extra
