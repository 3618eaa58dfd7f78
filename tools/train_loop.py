"""The training loop that all models of this project share: AdamW on a one-cycle schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is the same for all networks that are compared."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.05
    label_smoothing: float = 0.05


def fit(
    build: Callable[[], nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
    *,
    seed: int,
    augment: Augment | None = None,
) -> tuple[nn.Module, float]:
    """Build and train a network; return it in evaluation mode, and its mean loss in the last epoch.

    Args:
        build: makes the network; its random weights come from `seed`.
        images: (n, ...), float32; n divisible by the batch, or the last batches are smaller.
        labels: (n,), int64.
        recipe: how to train.
        seed: of the weights, of the order of the samples and of `augment`.
        augment: changes a batch of images.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = build()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * -(-len(images) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps
    )
    losses: list[float] = []
    for _ in range(recipe.epochs):
        losses.clear()
        for chosen in torch.randperm(len(images), generator=generator).split(recipe.batch):
            batch = images[chosen] if augment is None else augment(images[chosen], generator)
            loss = nn.functional.cross_entropy(
                module(batch), labels[chosen], label_smoothing=recipe.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return module.eval(), sum(losses) / len(losses)
