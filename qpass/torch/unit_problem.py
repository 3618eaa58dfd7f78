"""What a reconstruction by gradients is given, and what it returns: numpy arrays and nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from qpass.graph import Node

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftLayer:
    """A linear op whose rounding is learned.

    weight
        Name of the tensor that it reads as its weight.
    original
        The float model's weight, float64, of the shape that the op reads.
    start
        Float weight to start from, likewise; refitted or not.
    integers
        Those that are there, float64, same shape.
    scale, zero_point
        float64, broadcast over the weight.
    bounds
        Smallest and largest integer.
    output, axis, channels
        Of its output, and how an offset lies along it.
    offset
        Whether it can take an offset.
    rescale
        Whether scales can change: there is one for each output channel.
    shifted
        Name of the tensor that the offset is added to: `output`, or what a bias behind it makes.
        Never the bias itself, which other ops may read.
    """

    name: str
    weight: str
    original: Array
    start: Array
    integers: Array
    scale: Array
    zero_point: Array
    bounds: tuple[int, int]
    output: str
    axis: int
    channels: int
    offset: bool
    rescale: bool
    shifted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftStep:
    """A quantizer of an activation whose step is learned.

    name
        Key of its decision in the plan.
    constant
        Name of the scale that its Q reads; its DQ has the same.
    scale
        The one that is there.
    """

    name: str
    constant: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitProblem:
    """A unit of the quantized graph.

    nodes
        What makes the targets, in order; what makes the layers' weights may be left out.
    layers
        Those to be rounded.
    steps
        Those to be learned.
    targets
        Each is a sum of tensors that should be what a `Batch` wants.
    seen
        What the engine gives for each target and the first batch: torch has to give the same.
    stackable
        The first axis of all that a batch holds is as long as there are samples: batches can be
        joined if torch finds that it counts them.
    """

    nodes: Sequence[Node]
    layers: Sequence[SoftLayer]
    steps: Sequence[SoftStep]
    targets: Sequence[tuple[str, ...]]
    seen: tuple[Array, ...]
    stackable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to search.

    iterations
        Steps of Adam; a quarter of them where samples are too few.
    rows
        Positions (pixels, tokens) that a step should see of the last layer's output, about; a
        third of them where samples are too few.
    drop
        Chance of an element to be the float graph's; None: by how well the unit does on batches
        that it was not fitted to.
    pressure
        Weight of the penalty when all roundings are undecided; 1 is the error that was there.
    seed, device, threads
        `device` None: CUDA where there is one. `threads` None: as many as torch takes.
    """

    iterations: int
    rows: int = 1536
    drop: float | None = None
    pressure: float = 2e4
    seed: int = 0
    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """The outcome: integers and offsets by layer, steps by name, and errors on held-out batches.

    The scales of a layer are to be multiplied by its `shares`, float64 of their shape. `before` and
    `after` are mean squared errors of the targets with the old and the new integers, each in units
    of what the old ones gave on the batches to fit.
    """

    integers: Mapping[str, Array]
    offsets: Mapping[str, Array]
    shares: Mapping[str, Array]
    steps: Mapping[str, float]
    before: float
    after: float
