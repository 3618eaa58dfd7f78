"""How strongly an error in a row of some tensor shows at the outputs of a model.

What it does
    The float graph runs in torch. A vector of random signs `v`, as long as the outputs, is drawn
    back through it: the squares of the gradient ``J^T v`` have the diagonal of ``J^T J`` as their
    mean (Hutchinson's estimator), and their sum over the channels of a row is what noise in that
    row adds to the squared error of the outputs. Nothing but that sum is kept.
Cost
    Two forward passes of the float model, one of them for the shapes, and `PROBES` backward passes,
    batch by batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from qpass.graph import Node
from qpass.torch.executor import Executor, UnsupportedOpError
from qpass.torch.threads import limited_threads

__all__ = ["UnsupportedOpError", "row_sensitivity"]

Array = NDArray[Any]
PROBES: Final = 2  # vectors of signs for each batch


def row_sensitivity(
    nodes: Sequence[Node],
    outputs: Sequence[str],
    taps: Mapping[str, int],
    batches: Sequence[Mapping[str, Array]],
    *,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
) -> dict[str, list[Array]]:
    """Return the sensitivity of each row of some tensors, for each batch.

    Args:
        nodes: all nodes of the float graph, in order.
        outputs: names of its outputs; each counts in units of its root mean square in the batch.
        taps: the axis of the channels by name of a tensor.
        batches: inputs of the graph by name.
        seed: of the signs.
        device: None: CUDA where there is one.
        threads: of torch, None for its choice.

    Returns:
        float64, of the shape of the tensor without the axis of the channels.

    Raises:
        UnsupportedOpError: an op has no function in torch here; it is named. No output has a
            gradient: all are integers, or depend on none of the tensors.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator().manual_seed(seed)
    found: dict[str, list[Array]] = {name: [] for name in taps}
    with limited_threads(threads), torch.backends.cudnn.flags(deterministic=True):
        executor = Executor(nodes, device=device)
        for batch in batches:
            feeds = {name: executor.tensor(array) for name, array in batch.items()}
            with torch.no_grad():
                seen = executor.run(feeds, list(taps))
            # What is added to a tensor has the gradient of the tensor.
            added = {
                name: torch.zeros_like(value, requires_grad=True)
                for name, value in zip(taps, seen, strict=True)
            }
            ends = [
                end
                for end in executor.run(feeds, outputs, added=added)
                if end.requires_grad  # not one that is made of shapes, or of integers
            ]
            if not ends:
                raise UnsupportedOpError("no output has a gradient", where=", ".join(outputs))
            for name, squares in _squares(ends, added, random).items():
                rows = squares.sum(dim=taps[name]).cpu().numpy()
                found[name].append(rows.astype(np.float64))
    return found


def _squares(
    ends: Sequence[torch.Tensor], added: Mapping[str, torch.Tensor], random: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the mean squared gradient of each tensor in `added`."""
    total = {name: torch.zeros_like(value) for name, value in added.items()}
    tiny = torch.finfo(torch.float32).tiny
    for probe in range(PROBES):
        signs = []
        for end in ends:
            sign = 2.0 * torch.randint(0, 2, end.shape, generator=random) - 1.0
            size = end.detach().square().mean().sqrt().clamp_min(tiny)
            signs.append(sign.to(end.device, end.dtype) / size)
        gradients = torch.autograd.grad(
            ends,
            list(added.values()),
            signs,
            retain_graph=probe < PROBES - 1,
            allow_unused=True,  # a tensor that no output depends on
        )
        for name, gradient in zip(added, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square() / PROBES
    return total
