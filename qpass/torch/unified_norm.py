# mypy: disallow-subclassing-any=False
# (torch is untyped to mypy here, see pyproject.toml, so nn.Module counts as Any.)
"""Unified Normalization: trains like LayerNorm, is a per-channel affine map at inference.

What it does
    While training, every channel is divided by the root of its second moment; no mean is taken
    off. Two measures make frozen statistics trainable: the moments of the last M batches are
    smoothed (geometric mean forward, arithmetic mean of the gradient statistic backward), and a
    batch whose moments are outliers is neither smoothed nor remembered.
Why it is free at inference
    ``y = weight * x / sqrt(running_var + eps) + bias`` has constants only, one pair per channel, so
    ``qpass optimize`` folds it into the linear layers that read it.
Preconditions
    Channels are on the last axis. Statistics of one batch are of one device: nothing is
    synchronised. DistributedDataParallel broadcasts the buffers of rank 0 before each forward;
    give it ``broadcast_buffers=False`` to let every device keep its own. A forward that is run
    again, as by gradient checkpointing, counts twice, as in BatchNorm.

Source: Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers", ACM MM
2022, and its published code. Ours differ where state would be lost: a batch with an infinite or
NaN statistic, or without a token that counts, leaves the statistics alone; outliers are looked
for once the window is full, even when `warmup` is shorter than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from qpass.errors import RecipeError
from qpass.torch.kept_function import as_node

_RATIO_FROM: Final = 1000  # the first iterations have no ratio of new to running statistics
_RATIO_LIMIT: Final = 5.0
_STATISTICS: Final = ("running_var", "moments", "gradient_mean", "gradients")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What one forward in training leaves for its backward; tensors of no or C elements."""

    iteration: torch.Tensor  # counts from 1
    skip: torch.Tensor  # bool: plain statistics of this batch
    inverse: torch.Tensor  # 1 / sqrt(variance + eps), per channel
    ratio: torch.Tensor  # of this batch's deviation to the running one, per channel


class UnifiedNorm(nn.Module):
    """Drop-in for `nn.LayerNorm` over the last axis, with frozen statistics at inference.

    Statistics are in float32 (float64 in a float64 module) whatever the dtype of the input, also
    after ``half()``. The gradient statistic has the scale of the loss: after a change of the loss
    scale it needs about ``1 / (1 - momentum)`` iterations to follow.

    Attributes:
        weight, bias: parameters, (channels,), named and shaped as in `nn.LayerNorm`.
        running_var: second moments for inference, (channels,).
        iterations: batches seen in training since `reset`.
        skipped: how many of them were outliers.
    """

    def __init__(
        self,
        channels: int,
        *,
        window: int | tuple[int, int] = 4,
        warmup: int = 4000,
        filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
    ) -> None:
        """Build the module with weight 1, bias 0 and running statistics 1.

        Args:
            channels: size of the last axis.
            window: batches that are smoothed over, or a pair (forward, backward). 1 forward means
                plain statistics of each batch in both directions.
            warmup: iterations with plain statistics of each batch.
            filtration: leave batches with outliers out of the window. The paper has it on for
                vision and off for text.
            eps: added to the second moment.
            momentum: share of the running statistics that stays at each iteration (BatchNorm's
                argument of that name is the other share).

        Raises:
            RecipeError: an argument is out of its range.
        """
        super().__init__()
        forward, backward = window if isinstance(window, tuple) else (window, window)
        _check(channels >= 1, f"channels={channels}", "at least 1")
        _check(min(forward, backward) >= 1, f"window={window}", "at least 1")
        _check(warmup >= 0, f"warmup={warmup}", "0 or more")
        _check(eps > 0, f"eps={eps}", "positive")
        _check(0 <= momentum < 1, f"momentum={momentum}", "in [0, 1)")
        _check(forward > 1 or not filtration, "filtration=True", "False where window is 1")
        self.channels, self.warmup, self.filtration = channels, warmup, filtration
        self.eps, self.momentum = eps, momentum
        self.as_function = False  # set by `qpass.torch.export_onnx` while it exports
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("moments", torch.zeros(forward, channels))
        self.register_buffer("gradient_mean", torch.zeros(channels))
        self.register_buffer("gradients", torch.zeros(backward, channels))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize `x`, and learn its statistics while training.

        Args:
            x: (..., channels), floating point.
            padding_mask: bool, shape of `x` without its last axis, True where a token is padding:
                it is normalized like every token, but its values do not enter the second moments.

        Returns:
            The same shape and dtype as `x`.
        """
        if self.training:
            step = self._observe(x.detach(), padding_mask)
            return _Normalize.apply(x, self.weight, self.bias, self, step)
        if self.as_function:
            return as_node(x, self.weight, self.bias, self.running_var, self.eps)
        gain, bias = self.weight / torch.sqrt(self.running_var + self.eps), self.bias
        if gain.dtype != x.dtype:  # asked for, since exporters write even a cast to the same dtype
            gain = gain.to(x.dtype)
        if bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return x * gain + bias

    def reset(self) -> None:
        """Start the warm-up anew, for fine-tuning: running_var, weight and bias stay."""
        for buffer in (self.iterations, self.skipped, self.gradient_mean):
            buffer.zero_()
        self.moments.zero_()
        self.gradients.zero_()

    def extra_repr(self) -> str:
        """Return the arguments that the module was built with."""
        return (
            f"{self.channels}, window={(len(self.moments), len(self.gradients))}, "
            f"warmup={self.warmup}, filtration={self.filtration}, eps={self.eps}, "
            f"momentum={self.momentum}"
        )

    def _observe(self, x: torch.Tensor, padding_mask: torch.Tensor | None) -> _Step:
        """Take the second moments of a batch into the statistics.

        Conditions are tensors and both branches are computed (on C numbers), so that no device
        has to be waited for.
        """
        with torch.no_grad():
            self.iterations += 1
            iteration, size = self.iterations.clone(), len(self.moments)
            slot = (iteration % size).reshape(1)
            moment, usable = self._second_moment(x, padding_mask)
            spread = self.moments.sqrt().var() if self.filtration else None  # before this batch
            self.moments.index_copy_(0, slot, moment[None])
            settled = (iteration > size) & (iteration >= self.warmup)
            skip = ~usable | (size == 1)
            if spread is not None:
                # For numbers a: mean(a) - geometric mean(a) <= M * Var(sqrt(a)). A batch that
                # breaks this bound with the variance of those before it is not of their kind.
                excess = self.moments.mean(0) - geometric_mean(self.moments)
                outlier = settled & (excess > size * spread).any()
                kept = torch.where(outlier, self.running_var, moment)
                self.moments.index_copy_(0, slot, kept[None])
                self.skipped += outlier
                skip = skip | outlier
            variance = torch.where(settled & ~skip, geometric_mean(self.moments), moment)
            deviation = torch.sqrt(variance + self.eps)
            ratio = deviation / torch.sqrt(self.running_var + self.eps)
            ratio = ratio.clamp(1 / _RATIO_LIMIT, _RATIO_LIMIT)
            early = iteration <= max(_RATIO_FROM, self.warmup)
            ratio = torch.where(early | skip, torch.ones_like(ratio), ratio)
            self.running_var.mul_(self.momentum).add_(variance, alpha=1 - self.momentum)
        return _Step(iteration=iteration, skip=skip, inverse=1 / deviation, ratio=ratio)

    def _second_moment(
        self, x: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of x^2 per channel, and whether it can be used; else the running one."""
        squares = x.to(self.running_var.dtype).square().reshape(-1, self.channels)
        if padding_mask is None:
            moment = squares.mean(0)
        else:
            counts = (~padding_mask).reshape(-1, 1)
            moment = torch.where(counts, squares, 0).sum(0) / counts.sum()
        usable = torch.isfinite(moment).all()
        return torch.where(usable, moment, self.running_var), usable

    def _smooth_gradient(self, statistic: torch.Tensor, step: _Step) -> torch.Tensor:
        """Take mean(g * z) of a batch into the statistics; return what stands in for it."""
        size = len(self.gradients)
        usable = torch.isfinite(statistic).all()
        statistic = torch.where(usable, statistic, self.gradient_mean)
        skip = step.skip | ~usable
        slot = (step.iteration % size).reshape(1)
        self.gradients.index_copy_(0, slot, torch.where(skip, self.gradient_mean, statistic)[None])
        settled = (step.iteration > size) & (step.iteration >= self.warmup)
        mean = torch.where(settled & ~skip, self.gradients.mean(0), statistic)
        self.gradient_mean.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        return torch.where(skip, mean, self.gradient_mean)

    def _apply(self, fn: Any, recurse: bool = True) -> UnifiedNorm:
        """Move or cast like every module, but never to a half-precision statistic."""
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.element_size() < old.element_size() and new.element_size() < 4:
                setattr(self, name, old.to(new.device))
        return self


class _Normalize(torch.autograd.Function):
    """``y = weight * z + bias`` with ``z = x * inverse``, and the gradient of the paper.

    With ``g = dy * weight * ratio`` and ``s`` the smoothed mean of ``g * z`` over all tokens::

        dx = (g - z * s) * inverse;  dweight = sum(dy * ratio * z);  dbias = sum(dy)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        norm: UnifiedNorm,
        step: _Step,
    ) -> torch.Tensor:
        """Compute in the dtype of the statistics, return the dtype of `x`."""
        ctx.save_for_backward(x, weight)
        ctx.norm, ctx.step = norm, step
        y = torch.addcmul(bias, x.to(step.inverse.dtype), step.inverse * weight)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias; update the gradient statistics."""
        x, weight = ctx.saved_tensors
        step: _Step = ctx.step
        wide = x.to(step.inverse.dtype).reshape(-1, x.shape[-1])
        dy = dy.to(step.inverse.dtype).reshape(wide.shape)
        # What is per channel is multiplied first: two passes over the tokens for each result.
        gain = step.ratio * step.inverse
        dweight = gain * (dy * wide).sum(0)
        smooth = ctx.norm._smooth_gradient(weight * dweight / len(wide), step)
        dx = torch.addcmul(dy * (gain * weight), wide, step.inverse**2 * smooth, value=-1)
        return (
            dx.reshape(x.shape).to(x.dtype),
            dweight.to(weight.dtype),
            dy.sum(0).to(weight.dtype),
            None,
            None,
        )


def geometric_mean(moments: torch.Tensor) -> torch.Tensor:
    """Return the geometric mean over axis 0; 0 where one number is 0."""
    return torch.exp(torch.log(moments).mean(0))


def _check(holds: bool, what: str, wanted: str) -> None:
    if not holds:
        raise RecipeError(f"{what} cannot be used", where="UnifiedNorm", fix=f"make it {wanted}")
