"""Sweep back over a rounded basic unit, so that the errors of its layers cancel.

For each layer before the last one of the unit whose output reaches the last one element by element:
the residual at the end of the unit is taken back to the layer, other integers are proposed, the
graph is run with them, and outputs are taken over where the unit's error falls (see `sweep`). Rows
that are held out judge the whole; where they see no gain, the old integers come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Graph
from qpass.passes.rounding.hessian import InputSums
from qpass.passes.rounding.layer import Layer
from qpass.passes.rounding.probe import Probe
from qpass.passes.rounding.sweep import accept, is_elementwise_between, propose
from qpass.passes.row_weights import Weights
from qpass.stream import Stream
from qpass.submodel import Submodel

Array = NDArray[Any]
# Elements of the unfolded input of the last layer that a sweep looks at, in float64.
ELEMENTS: Final = 1 << 23
# Step of the difference quotient, as a share of the largest output.
STEP: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """One batch: inputs and output of the layer, input of the last one, and what that one lacks.

    `rest` is wanted minus got, [groups, rows, outputs], `weights` says how much its rows count.
    """

    source: Array
    output: Array
    last_input: Array
    rest: Array
    weights: Array

    def weighted(self, rows: Array) -> Array:
        """Return rows whose squares are to be added up."""
        weighted: Array = rows * np.sqrt(self.weights)[:, None]
        return weighted


def sweep_back(
    stream: Stream, layers: Sequence[Layer], first_held: int
) -> Iterator[tuple[str, str]]:
    """Improve the layers before the last one, from back to front; yield (name, reason) of refusals.

    Args:
        stream: stands in the unit, which has been rounded.
        layers: those of the unit that were rounded, in execution order.
        first_held: number of the first batch that is held out.
    """
    for layer in reversed(layers[:-1]):
        if layer.together or layers[-1].together or layer.spare is not None:
            continue  # sums of errors of channels are what counts there
        if is_elementwise_between(stream.reference, layer.original, layers[-1].original):
            reason = _sweep(stream, layer, layers[-1], first_held)
            if reason:
                yield layer.name, f"sweep: {reason}"
        else:
            yield layer.name, f"sweep: {layers[-1].name} does not read its elements each by itself"


def _sweep(stream: Stream, layer: Layer, last: Layer, first_held: int) -> str:
    """Sweep one layer; return why nothing was changed, or nothing."""
    graph, centered = stream.quantized, last.site.offset
    fit = _look(stream, layer, last, range(first_held))
    held = _look(stream, layer, last, range(first_held, len(stream.batches)))
    if not fit or not held:
        return "one sample has too many positions"
    if fit[0].output.shape != fit[0].last_input.shape:
        return "a constant broadcasts its output on the way to the last layer"
    weight, grid = last.grid().values(last.integers()), layer.grid()
    mean = _mean(fit, [seen.rest for seen in fit]) if centered else 0.0
    rest = [seen.rest - mean for seen in fit]
    sums, energy = _slopes(stream, layer, last, fit, rest, weight)
    old = layer.integers()
    new = propose(grid.values(old), old, sums.xx, sums.xt, energy, grid)
    if (new == old).all():
        return ""
    layer.write(graph, new)
    change = _changes(stream, last, fit, 0)
    held_change = _changes(stream, last, held, first_held)
    mean_change = _mean(fit, change) if centered else 0.0
    accepted, _ = accept(
        np.concatenate([s.weighted(r) for s, r in zip(fit, rest, strict=True)], axis=1),
        np.concatenate(
            [s.weighted(c - mean_change) for s, c in zip(fit, change, strict=True)], axis=1
        ),
        weight,
        last.layout,
    )
    kept = np.repeat(accepted, last.layout.columns_per_channel).reshape(last.layout.groups, 1, -1)
    shift = (mean_change * kept) @ weight  # goes into the offset of the last layer
    before = after = 0.0
    for seen, moved in zip(held, held_change, strict=True):
        missing = seen.rest - mean
        left = missing - (moved * kept) @ weight + shift
        before += float(np.square(seen.weighted(missing)).sum())
        after += float(np.square(seen.weighted(left)).sum())
    if not after < before:
        layer.write(graph, old)
        return "no gain at the end of the unit on held-out rows"
    by_output = accepted.reshape(layer.layout.groups, 1, layer.layout.outputs)
    layer.write(graph, np.where(by_output, new, old))
    if centered:
        last.write_offset(graph, -shift)
    return ""


def _look(stream: Stream, layer: Layer, last: Layer, numbers: range) -> list[_Seen]:
    """Run the first of some batches, as many as `ELEMENTS` allow; maybe not even one sample."""
    skip = last.skip
    wanted_names = [last.output, *([skip.float_name] if skip else [])]
    source, tap, target, got = (
        layer.node.inputs[0].name,
        layer.site.tap,
        last.node.inputs[0].name,
        last.site.tap,
    )
    names = [source, tap, target, got, *([skip.quantized_name] if skip else [])]
    floating = Probe(stream, "float", stream.aim, wanted_names)
    quantized = Probe(stream, "quantized", stream.quantized, names)
    found: list[_Seen] = []
    weighted = None if skip is None or last.normed_sum is None else Weights(last.normed_sum)
    room = ELEMENTS
    for number in numbers:
        wanted, values = floating.run(number), quantized.run(number)
        aim = wanted[wanted_names[0]]
        normed: Array | None = None
        if skip is not None:
            if weighted is not None:
                normed = weighted.of(aim, wanted[skip.float_name])
            aim = aim + (wanted[skip.float_name] - values[skip.quantized_name])
        samples = len(aim)
        each = last.layout.positions(aim) // samples * last.layout.groups * last.layout.inputs
        taken = min(samples, room // each)
        if not taken:
            break
        room -= taken * each
        weights = last.guided(number, normed)
        missing = (aim - values[got])[:taken]
        rows = np.arange(last.layout.positions(missing))
        found.append(
            _Seen(
                source=values[source][:taken],
                output=values[tap][:taken],
                last_input=values[target][:taken],
                rest=last.layout.output_rows(missing, rows),
                weights=np.ones(rows.size) if weights is None else weights[:taken].ravel(),
            )
        )
    return found


def _slopes(
    stream: Stream,
    layer: Layer,
    last: Layer,
    fit: Sequence[_Seen],
    rest: Sequence[Array],
    weight: Array,
) -> tuple[InputSums, Array]:
    """Return the sums ``x^T x`` and ``x^T g`` of the layer, and the curvature of its outputs."""
    sums = InputSums(layout=layer.layout, centered=False)
    axis = layer.site.axis
    energy, count = np.zeros(layer.site.channels), 0.0
    between = _Between(stream.reference, layer, last)
    for seen, missing in zip(fit, rest, strict=True):
        slope = between.derivative(seen.output)
        back = last.layout.scatter(missing @ weight.swapaxes(1, 2), seen.last_input.shape)
        rows = np.arange(layer.layout.positions(seen.output))
        # The rows of a convolution are not those of a layer with another window, or channels last.
        weighted = last.normed_sum is not None or last.guide is not None
        alike = weighted and "Conv" not in (layer.layout.op, last.layout.op)
        weights = seen.weights if alike else np.ones(rows.size)
        sums.update(seen.source, back * slope, rows, weights)
        by_channel = np.moveaxis(slope, axis, 0).reshape(len(energy), -1)
        energy += np.square(by_channel, dtype=np.float64) @ weights
        count += float(weights.sum())
    columns = np.square(weight).sum(axis=2).reshape(len(energy), -1).sum(axis=1)
    curvature = energy / count * columns
    return sums, curvature.reshape(layer.layout.groups, layer.layout.outputs)


def _changes(stream: Stream, last: Layer, seen: Sequence[_Seen], first: int) -> list[Array]:
    """Return by how much the input rows of the last layer differ from those that were seen."""
    name = last.node.inputs[0].name
    side = Probe(stream, "quantized", stream.quantized, [name])
    found = []
    for number, one in enumerate(seen, start=first):
        values = side.run(number)[name][: len(one.last_input)]
        rows = np.arange(one.rest.shape[1])
        found.append(
            last.layout.input_rows(values, rows) - last.layout.input_rows(one.last_input, rows)
        )
    return found


def _mean(seen: Sequence[_Seen], parts: Sequence[Array]) -> Array:
    """Return the mean row of some [groups, rows, n] by the weights of the rows: [groups, 1, n]."""
    total = sum(
        np.einsum("n,gni->gi", one.weights, part) for one, part in zip(seen, parts, strict=True)
    )
    mean: Array = (total / sum(one.weights.sum() for one in seen))[:, None]
    return mean


class _Between:
    """What lies between a layer and the last one in the float graph; works on elements.

    Quantizers that are aimed at are not in it: the slope of a staircase is zero or a jump.
    """

    def __init__(self, graph: Graph, layer: Layer, last: Layer) -> None:
        self._graph = graph
        self._source, self._target = layer.original.outputs[0].name, last.original.inputs[0].name
        self._session: Submodel | None = None

    def derivative(self, output: Array) -> Array:
        """Return the derivative at each element, by a difference quotient."""
        if self._source == self._target:
            return np.ones_like(output)
        if self._session is None:
            self._session = Submodel(self._graph, {self._source: output}, [self._target])
        step = np.float32(STEP * float(np.abs(output).max(initial=1e-6)))
        high, low = (
            self._session.run({self._source: output + sign * step})[self._target]
            for sign in (np.float32(1), np.float32(-1))
        )
        slope: Array = (high - low) / (2 * step)
        return slope
