"""QuantizeLinear and DequantizeLinear with gradients.

Integers that a gradient has to pass are floats here. Rounding passes it straight through; where the
integer saturates it is zero. So a scale that wants a gradient gets that of LSQ (Esser et al.,
"Learned step size quantization", ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Attrs = Mapping[str, Any]


def quantize(
    attrs: Attrs, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the integers as floats; `attrs` holds their bounds as ``qmin`` and ``qmax``."""
    scaled = x / along(scale, attrs, x)
    rounded = scaled + (scaled.round() - scaled).detach()
    if zero_point is not None:
        rounded = rounded + along(zero_point.to(x.device, x.dtype), attrs, x)
    return rounded.clamp(attrs["qmin"], attrs["qmax"])


def dequantize(
    attrs: Attrs, q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what integers stand for."""
    values = q.to(scale.device, scale.dtype)
    if zero_point is not None:
        values = values - along(zero_point.to(scale.device, scale.dtype), attrs, q)
    return values * along(scale, attrs, q)


def fake_quantize(
    attrs: Attrs, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `dequantize` of `quantize`."""
    if scale.numel() == 1 and not scale.requires_grad:
        step = scale.reshape(())
        if zero_point is None:
            shift = torch.zeros_like(step)
        else:
            shift = zero_point.to(x.device, x.dtype).reshape(())
        result: torch.Tensor = _FixedStep.apply(x, step, shift, attrs["qmin"], attrs["qmax"])
        return result
    return dequantize(attrs, quantize(attrs, x, scale, zero_point), scale, zero_point)


class _FixedStep(torch.autograd.Function):  # type: ignore[misc]
    """One step and zero point for all of a tensor, neither with a gradient.

    It keeps a truth value for each element instead of four tensors. torch's own kernel works on
    single elements on a CPU, where it took as long as the convolutions.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, step: torch.Tensor, shift: torch.Tensor, qmin: int, qmax: int
    ) -> torch.Tensor:
        free = (x / step).round_().add_(shift)
        integers = free.clamp(qmin, qmax)
        ctx.save_for_backward(integers == free)
        return integers.sub_(shift).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def along(values: torch.Tensor, attrs: Attrs, x: torch.Tensor) -> torch.Tensor:
    """Give scales, or zero points, of an axis or of blocks the shape that broadcasts over `x`."""
    if values.numel() == 1:
        return values.reshape(())
    axis = int(attrs.get("axis", 1)) % x.ndim
    block = int(attrs.get("block_size", 0))
    if block:
        return values.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
