"""Bring a converted module back to the accuracy of the module that it was converted from.

What it does
    Feature mimicking: the student learns to give the features and the outputs of its teacher, on
    samples without labels. Features are what enters each norm, which in a pre-norm transformer is
    the residual stream in front of every branch.
Why no labels are needed
    The teacher's features say more about a sample than its label, so few epochs and few samples
    are enough: Wang et al., "Distilling Knowledge by Mimicking Features", TPAMI 2021.
Preconditions
    Teacher and student compute on the same device and their norms have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn

from qpass.errors import RecipeError, SampleError
from qpass.torch.unified_norm import UnifiedNorm

Loss = Literal["features+outputs", "outputs"]
_LOSSES: Final = ("features+outputs", "outputs")
_WARMUP_SHARE: Final = 10  # of the run: the norms' own warm-up is not longer than one part of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuning:
    """What `finetune_unified` measured.

    Attributes:
        losses: mean loss of each epoch; 1 is as far off as a constant.
        iterations: steps of the optimizer.
    """

    losses: tuple[float, ...]
    iterations: int


def finetune_unified(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 10,
    lr: float = 2e-3,
    loss: Loss = "features+outputs",
) -> Finetuning:
    """Train `model` to do what `teacher` does; both end in evaluation mode.

    AdamW without weight decay on a one-cycle schedule trains every parameter of `model` that
    requires a gradient. Only the `UnifiedNorm`s are in training mode: dropout is off and other
    norms keep their statistics. Their statistics start from those of the teacher's features, and
    their warm-up is at most a tenth of the run.

    Args:
        model: as `convert_layernorm` left it; changed in place.
        teacher: a copy of the module from before the conversion; not changed.
        loader: can be iterated anew for every epoch; gives the argument of the modules, or a
            tuple or list that starts with it (labels are not looked at), or a dict of keyword
            arguments.
        epochs: passes over `loader`.
        lr: the largest learning rate.
        loss: mean squared errors of the outputs, relative to the variance of the teacher's, and
            with features the mean of theirs in addition.

    Raises:
        RecipeError: an argument is out of range, or a norm has no counterpart in the teacher.
        SampleError: the loader gives nothing or, as a generator does, not the same number of
            batches each time; or the loss is not finite.
    """
    norms = {name: part for name, part in model.named_modules() if isinstance(part, UnifiedNorm)}
    _check_arguments(norms, teacher, epochs=epochs, lr=lr, loss=loss)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(1 for _ in loader)
    if count == 0:
        raise SampleError("the loader gives no batch", where="finetune_unified", fix="check it")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * count)
    losses: list[float] = []
    with ExitStack() as stack:
        ours = stack.enter_context(_inputs_of(model, norms))
        theirs = stack.enter_context(_inputs_of(teacher, norms))
        teacher.eval()
        _start_statistics(norms, teacher, _counted(loader, count), theirs)
        stack.enter_context(_training(model, norms, warmup=epochs * count // _WARMUP_SHARE))
        for _ in range(epochs):
            total = 0.0
            for batch in _counted(loader, count):
                with torch.no_grad():
                    wanted = _outputs(teacher, batch)
                found = _outputs(model, batch)
                value = _mean_error(found, wanted)
                if loss == "features+outputs":
                    value = value + _mean_error(
                        [ours[name] for name in norms], [theirs[name] for name in norms]
                    )
                if not torch.isfinite(value):
                    raise SampleError(
                        "the loss is not finite",
                        where="finetune_unified",
                        fix="look for NaN in the samples, or lower lr",
                    )
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                total += value.item()
            losses.append(total / count)
    return Finetuning(losses=tuple(losses), iterations=epochs * count)


def _counted(loader: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield the batches of a loader; raise a SampleError when there are not `count` of them."""
    seen = 0
    for batch in loader:
        seen += 1
        if seen > count:
            break
        yield batch
    if seen != count:
        found = "more" if seen > count else str(seen)
        raise SampleError(
            f"the loader gave {count} batches at first, then {found}",
            where="finetune_unified",
            fix="give a list or a DataLoader, which can be iterated anew for every epoch",
        )


def _check_arguments(
    norms: Mapping[str, UnifiedNorm], teacher: nn.Module, *, epochs: int, lr: float, loss: str
) -> None:
    where = "finetune_unified"
    if epochs < 1 or lr <= 0:
        raise RecipeError(f"epochs={epochs}, lr={lr}", where=where, fix="make both positive")
    if loss not in _LOSSES:
        raise RecipeError(f"loss={loss!r} is not known", where=where, fix=", ".join(_LOSSES))
    if not norms:
        raise RecipeError(
            "the model has no UnifiedNorm", where=where, fix="convert it with convert_layernorm"
        )
    known = dict(teacher.named_modules())
    for name, norm in norms.items():
        if name not in known or known[name] is norm:
            raise RecipeError(
                f"the teacher has no module {name!r} of its own",
                where=where,
                fix="give a deep copy of the module from before the conversion",
            )


def _start_statistics(
    norms: Mapping[str, UnifiedNorm],
    teacher: nn.Module,
    batches: Iterable[Any],
    features: Mapping[str, torch.Tensor],
) -> None:
    """Give every norm the second moments of the teacher's features, the first of which it meets."""
    moments = {name: torch.zeros_like(norm.running_var) for name, norm in norms.items()}
    count = 0
    with torch.no_grad():
        for batch in batches:
            _outputs(teacher, batch)
            count += 1
            for name, moment in moments.items():
                feature = features[name].to(moment.dtype).reshape(-1, len(moment))
                moment += feature.square().mean(0)
        for name, norm in norms.items():
            norm.reset()
            norm.running_var.copy_(moments[name] / count)


@contextmanager
def _inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Record what enters the named modules at each forward."""
    inputs: dict[str, torch.Tensor] = {}
    parts = dict(model.named_modules())

    def record(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = arguments[0]

        return hook

    handles = [parts[name].register_forward_pre_hook(record(name)) for name in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _training(model: nn.Module, norms: Mapping[str, UnifiedNorm], *, warmup: int) -> Iterator[None]:
    model.eval()
    before = {name: norm.warmup for name, norm in norms.items()}
    for norm in norms.values():
        norm.train()
        norm.warmup = min(norm.warmup, warmup)
    try:
        yield
    finally:
        model.eval()
        for name, norm in norms.items():
            norm.warmup = before[name]


def _outputs(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, Mapping):
        outputs = model(**batch)
    else:
        outputs = model(batch[0] if isinstance(batch, tuple | list) else batch)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if torch.is_tensor(leaf)]


def _mean_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
    errors = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().var().clamp_min(1e-12)
        for ours, theirs in zip(found, wanted, strict=True)
    ]
    return torch.stack(errors).mean()
