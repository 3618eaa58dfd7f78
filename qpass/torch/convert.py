"""Swap the LayerNorms of a trained module for Unified Normalization.

What it does
    Each chosen `nn.LayerNorm` becomes a `UnifiedNorm` with the same weight, bias, eps, dtype and
    device. The function changes (no mean is taken off, and statistics are of channels instead of
    tokens), so the module has to be trained or fine-tuned afterwards; see `finetune_unified`.
Preconditions
    Channels are on the last axis and are all that is normalized over. An optimizer is made
    afterwards: the parameters are new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qpass.errors import RecipeError
from qpass.torch.unified_norm import UnifiedNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `convert_layernorm` did.

    Attributes:
        swapped: names of the modules that are `UnifiedNorm` now.
        excluded: names of LayerNorms that the patterns left alone.
        refused: names of chosen modules that cannot be swapped, each with its reason.
    """

    swapped: tuple[str, ...]
    excluded: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


def convert_layernorm(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    classes: Sequence[type[nn.Module]] = (),
    window: int | tuple[int, int] = 4,
    warmup: int = 4000,
    filtration: bool = False,
    momentum: float = 0.9,
) -> Conversion:
    """Swap LayerNorms in place.

    Args:
        model: changed in place; a module that is used at several places stays one module.
        include: names to swap, as in `model.named_modules()`; patterns with ``*``, ``?``, ``[ ]``.
        exclude: names to leave alone, likewise.
        classes: subclasses of `nn.LayerNorm` that compute the same over the last axis. Other
            subclasses are refused, since some normalize another axis.
        window: as for `UnifiedNorm`; so are the arguments that follow.
        warmup: iterations with plain statistics.
        filtration: leave batches with outliers out.
        momentum: share of the running statistics that stays.

    Returns:
        What was swapped and what was not.

    Raises:
        RecipeError: a pattern matches no LayerNorm, the model is itself one, or nothing could be
            swapped.
    """
    if isinstance(model, nn.LayerNorm):
        raise RecipeError(
            "the model is a LayerNorm, which cannot be swapped in place",
            where="convert_layernorm",
            fix="build a UnifiedNorm and load the weights into it",
        )
    places = list(_layernorms(model))
    names = [name for name, _, _ in places]
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f"{pattern!r} matches no LayerNorm",
                where="convert_layernorm",
                fix="the model has " + (", ".join(names[:8]) or "none"),
            )
    made: dict[nn.Module, UnifiedNorm] = {}
    swapped, excluded, refused = [], [], []
    for name, parent, layer in places:
        if not _chosen(name, include, exclude):
            excluded.append(name)
            continue
        if reason := _reason_against(layer, tuple(classes)):
            refused.append((name, reason))
            continue
        if layer not in made:
            options: dict[str, Any] = {"window": window, "warmup": warmup, "momentum": momentum}
            made[layer] = _unified_from(layer, filtration=filtration, **options)
            like = _first_float(layer, parent, model)
            if like is not None:
                made[layer].to(device=like.device, dtype=like.dtype)
        setattr(parent, name.rpartition(".")[2], made[layer])
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused path at inference reads weight, bias and eps of its norms and computes
            # LayerNorm whatever class they are of; this is how it is told not to.
            parent.activation_relu_or_gelu = 0
        swapped.append(name)
    if not swapped:
        raise RecipeError(
            "no LayerNorm could be swapped",
            where="convert_layernorm",
            fix="; ".join(f"{name}: {reason}" for name, reason in refused)
            or "the patterns exclude all of them",
        )
    return Conversion(swapped=tuple(swapped), excluded=tuple(excluded), refused=tuple(refused))


def _layernorms(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.LayerNorm]]:
    """Yield every place of a LayerNorm: its name, the module that holds it, and itself."""
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, nn.LayerNorm):
            yield name, model.get_submodule(name.rpartition(".")[0]), part


def _chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    wanted = any(fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude)


def _reason_against(layer: nn.LayerNorm, classes: tuple[type[nn.Module], ...]) -> str:
    if type(layer) is not nn.LayerNorm and type(layer) not in classes:
        return f"{type(layer).__name__} may compute something else; name it in `classes`"
    if len(layer.normalized_shape) != 1:
        return f"it normalizes over {len(layer.normalized_shape)} axes"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks, which would be lost"
    return ""


def _unified_from(layer: nn.LayerNorm, **options: Any) -> UnifiedNorm:
    norm = UnifiedNorm(layer.normalized_shape[0], eps=layer.eps, **options)
    with torch.no_grad():
        for name in ("weight", "bias"):
            ours, theirs = getattr(norm, name), getattr(layer, name)
            if theirs is None:
                ours.requires_grad_(False)  # stays at 1 or 0, as in the LayerNorm without it
                continue
            ours.copy_(theirs)
            ours.requires_grad_(theirs.requires_grad)
    norm.train(layer.training)
    return norm


def _first_float(*modules: nn.Module) -> torch.Tensor | None:
    """Return a floating-point parameter or buffer of the first module that has any.

    A LayerNorm without weight and bias has none: it computes where its input is, and as it is.
    """
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
    return None
