"""What a rounding of weights has found, and how it is written into another copy of the graph."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from qpass.graph import Graph
from qpass.passes.rounding.gradient import write_steps
from qpass.passes.rounding.layer import find_layers
from qpass.qparams import QParams
from qpass.report.model import PassReport

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedLayer:
    """New constants of one op.

    integers, scale
        As the graph stores them; `scale` None: those of the numbers.
    offsets
        What the bias got, one after the other.
    """

    integers: Array
    scale: Array | None
    offsets: tuple[Array, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Result of `round_weights`: what changed, by name of the linear op.

    `steps` holds new steps of activations, float32, by key of their decision; `learned` counts the
    layers that gradients gave new integers.
    """

    report: PassReport
    layers: Mapping[str, RoundedLayer]
    steps: Mapping[str, float] = field(default_factory=dict)
    learned: int = 0


def replay(
    rounding: Rounding,
    reference: Graph,
    quantized: Graph,
    numbers: Mapping[str, QParams],
    *,
    offsets: bool = True,
) -> PassReport:
    """Write what `round_weights` found into another copy of the graph that it worked on.

    Args:
        rounding: its result.
        reference: the float graph.
        quantized: changed in place.
        numbers: as for `round_weights`.
        offsets: False where a compensation follows that finds them better.

    Returns:
        The report of `round_weights`, with the time of both.
    """
    begin = time.perf_counter()
    layers, _ = find_layers(reference, quantized, numbers)
    for name, rounded in rounding.layers.items():
        layers[name].stored.write(quantized, rounded.integers)
        if rounded.scale is not None:
            layers[name].write_scale(quantized, rounded.scale)
    write_steps(quantized, rounding.steps)
    if offsets:
        write_offsets(rounding, reference, quantized, numbers)
    seconds = rounding.report.seconds + time.perf_counter() - begin
    return replace(rounding.report, seconds=seconds)


def write_offsets(
    rounding: Rounding, reference: Graph, quantized: Graph, numbers: Mapping[str, QParams]
) -> None:
    """Add the offsets that `replay` has left out."""
    layers, _ = find_layers(reference, quantized, numbers)
    for name, rounded in rounding.layers.items():
        for offset in rounded.offsets:  # one by one: the bias is rounded to float32 each time
            layers[name].write_offset(quantized, offset)
