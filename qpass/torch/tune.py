"""Learn gains and offsets of all linear ops together, by gradients of the model's output error.

What it does
    The whole quantized graph runs in torch. Each linear op that can take them gets a gain and an
    offset for each output channel; Adam lowers the squared error of the model's outputs against the
    float model's. Integers stay, and so do the ranges of activations.
Why it helps where a closed form has been
    Corrections of single ops minimize errors where they stand; what an error does to the output
    depends on everything behind it, and with few bits that is no longer small.
Why two numbers a channel, and views
    They are few against what a hundred samples say. Weights, or roundings, learn a hundred samples
    by heart; so do gains in the end. Where the inputs allow it, each step sees other views of the
    samples, and the float model says what they should give (`views`).

Close to the second phase of EfficientQAT (Chen et al., 2024), which trains scales end to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from qpass.graph import Node
from qpass.torch.executor import Executor, UnsupportedOpError
from qpass.torch.threads import limited_threads
from qpass.torch.views import Views, shuffled

__all__ = ["TunedLayer", "UnsupportedOpError", "tune_channels"]

Array = NDArray[Any]
Feeds = Mapping[str, Array]
RATE: Final = 1e-3  # of log gains, and of offsets in units of the channel's root mean square
TINY: Final = float(np.finfo(np.float32).tiny)
PART: Final = 2  # samples of a view that run at once: what a gradient needs is kept of so many


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedLayer:
    """A linear op whose output gets a gain and an offset for each channel.

    weight
        Name of the tensor that it reads as its weight.
    output, axis, channels
        Of its output.
    gain, offset
        What it can take.
    shifted
        Name of the tensor that the offset is added to: `output`, or what a bias behind it makes.
        Never the bias itself, which other ops may read.
    """

    name: str
    weight: str
    output: str
    axis: int
    channels: int
    gain: bool
    offset: bool
    shifted: str


class _Channels:
    """The gain and the offset of one op while they are learned."""

    def __init__(self, layer: TunedLayer, weight: torch.Tensor, output: torch.Tensor) -> None:
        self.layer, self._weight = layer, weight
        by_channel = output.movedim(layer.axis, 0).reshape(layer.channels, -1)
        self._unit = (
            by_channel.square().mean(dim=1).sqrt().clamp_min(torch.finfo(output.dtype).tiny)
        )
        self._along = [1] * output.ndim
        self._along[layer.axis] = -1
        self.log_gain = torch.zeros_like(self._unit, requires_grad=layer.gain)
        self.shift = torch.zeros_like(self._unit, requires_grad=layer.offset)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What is to be learned."""
        return [tensor for tensor in (self.log_gain, self.shift) if tensor.requires_grad]

    def edit(self, edits: _Edits) -> None:
        """Put the gain and the offset into what the executor is given.

        The output takes the gain, though the weight's scale does in the end: so weights, which are
        many, need no gradient, and are dequantized once.
        """
        layer = self.layer
        edits.given[layer.weight] = self._weight
        if layer.gain:
            edits.scaled[layer.output] = self.log_gain.exp().reshape(self._along)
        if layer.offset:
            edits.added[layer.shifted] = (self.shift * self._unit).reshape(self._along)

    def result(self) -> tuple[Array, Array]:
        """Return gain and offset, float64 [channels]."""
        found = (self.log_gain.exp(), self.shift * self._unit)
        gain, offset = (t.detach().cpu().numpy().astype(np.float64) for t in found)
        return gain, offset


@dataclass(frozen=True, slots=True)
class _Edits:
    """What the executor is told besides its constants."""

    given: dict[str, torch.Tensor]
    scaled: dict[str, torch.Tensor] = field(default_factory=dict)
    added: dict[str, torch.Tensor] = field(default_factory=dict)


def tune_channels(
    nodes: Sequence[Node],
    layers: Sequence[TunedLayer],
    batches: Sequence[Feeds],
    wanted: Sequence[Feeds],
    *,
    steps: int,
    teacher: Sequence[Node] = (),
    divisible: bool = False,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
) -> dict[str, tuple[Array, Array]]:
    """Return gain and offset, float64 [channels], of each layer by name.

    Args:
        nodes: all nodes of the quantized graph, in order.
        layers: the linear ops.
        batches: inputs of the graph by name.
        wanted: the float model's outputs for each batch; only float tensors count.
        steps: of Adam, one batch each.
        teacher: all nodes of the float graph, in order, which says what views of the batches
            should give, for batches that have any (`has_views`); without it they stay as they are.
        divisible: the nodes take any number of samples, so that views can be run in parts.
        seed: of the order of the batches, and of the views.
        device: None: CUDA where there is one.
        threads: of torch, None for its choice.

    Raises:
        UnsupportedOpError: an op has no function in torch here; it is named.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with limited_threads(threads), torch.backends.cudnn.flags(deterministic=True):
        lessons = _Lessons(batches, wanted, teacher, device, seed, PART if divisible else None)
        return _tune(Executor(nodes, device=device), layers, lessons, steps)


class _Lessons:
    """What the steps learn from: inputs, and what the float model gives for them."""

    def __init__(
        self,
        batches: Sequence[Feeds],
        wanted: Sequence[Feeds],
        teacher: Sequence[Node],
        device: str,
        seed: int,
        part: int | None,
    ) -> None:
        self.batches, self._wanted, self._part = batches, wanted, part
        random = torch.Generator().manual_seed(seed)
        self._order, self._views = shuffled(len(batches), random), Views(batches, random)
        self._teacher = Executor(teacher, device=device) if teacher else None
        floats = [name for name, array in wanted[0].items() if array.dtype.kind == "f"]
        # Mean square of each output over the batches: the unit of its error.
        self.sizes = {
            name: max(float(np.mean([np.square(w[name]).mean() for w in wanted])), TINY)
            for name in floats
        }

    def draw(self) -> Iterator[tuple[float, Feeds, Mapping[str, Array | torch.Tensor]]]:
        """Yield the next batch in parts: its share of the batch, inputs, and wanted outputs."""
        if self._teacher is None:
            number = next(self._order)
            yield 1.0, self.batches[number], self._wanted[number]
            return
        batch, executor = self._views.draw(), self._teacher
        samples = len(next(iter(batch.values())))
        size = self._part or samples
        for begin in range(0, samples, size):
            part = {name: array[begin : begin + size] for name, array in batch.items()}
            with torch.no_grad():
                feeds = {name: executor.tensor(array) for name, array in part.items()}
                outputs = executor.run(feeds, list(self.sizes))
            share = min(size, samples - begin) / samples
            yield share, part, dict(zip(self.sizes, outputs, strict=True))


def _tune(
    executor: Executor, layers: Sequence[TunedLayer], lessons: _Lessons, steps: int
) -> dict[str, tuple[Array, Array]]:
    taps = [name for layer in layers for name in (layer.weight, layer.output)]
    with torch.no_grad():
        first = {name: executor.tensor(array) for name, array in lessons.batches[0].items()}
        found = iter(executor.run(first, taps))
    channels = [_Channels(layer, next(found), next(found)) for layer in layers]
    optimizer = torch.optim.Adam([p for one in channels for p in one.parameters], lr=RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        for share, batch, wanted in lessons.draw():
            edits = _Edits({name: executor.tensor(array) for name, array in batch.items()})
            for one in channels:
                one.edit(edits)
            outputs = executor.run(
                edits.given, list(lessons.sizes), scaled=edits.scaled, added=edits.added
            )
            errors = [
                (got - _tensor(executor, wanted[name])).square().mean() / size
                for (name, size), got in zip(lessons.sizes.items(), outputs, strict=True)
            ]
            (share * torch.stack(errors).mean()).backward()
        optimizer.step()
    return {one.layer.name: one.result() for one in channels}


def _tensor(executor: Executor, value: Array | torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else executor.tensor(value)
