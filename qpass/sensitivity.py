"""How much each layer's precision costs at the outputs of the model, from one pass over samples.

What it does
    The graph is walked segment by segment (see `qpass.segments`) with two sets of live activations:
    those of the float model, and those of a model with the weights of every layer at its lowest
    level. In each segment, every layer is rounded by itself, weight and input, on the float
    activations, and the rest of the segment is run: that is the error it adds at the end of the
    segment. Then the float segment is run on the activations of the rounded model: how much an
    error that comes in grows or shrinks on the way is the gain of the segment. The error of a layer
    at the outputs is the error it adds times the gains of all segments behind its own.
Why it is right
    Errors are small beside the activations, so that they pass linearly, and independent from layer
    to layer, so that their powers add. Both hold well above about 10 dB and badly below; the plan
    that is chosen is therefore measured, and corrected where the sum was wrong.
Cost
    One float and one rounded forward, one more for the gains, and the rest of a segment for each of
    its layers: a handful of forwards for a model of any depth, not one for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.embeddings import weight_place
from qpass.graph import Constant, Graph, Node
from qpass.program import Precision, Progress
from qpass.segments import Segment, segments
from qpass.submodel import Feeds, Submodel

Array = NDArray[Any]
TINY: Final = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """What a layer becomes at a level.

    `weight` is None of a product of two activations. `inputs` gives, by place, the functions that
    round what it reads.
    """

    weight: Array | None
    inputs: Mapping[int, Callable[[Array], Array]] = field(default_factory=dict)


Rounder = Callable[[Node, Precision], Rounded]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Errors of one layer at its levels, as shares of the power of the model's outputs."""

    name: str
    levels: tuple[Precision | None, ...]  # lowest first; None: float
    errors: tuple[float, ...]


def measure(
    graph: Graph,
    levels: Mapping[str, Sequence[Precision | None]],
    rounder: Rounder,
    batches: Sequence[Feeds],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[LayerError]:
    """Return the error of every layer of `levels` at each of its levels, in execution order.

    Args:
        graph: the float graph; not changed.
        levels: by node name, lowest precision first; layers that are not named stay float.
        rounder: rounds a layer.
        batches: samples; a dozen is enough, for powers are sums over all elements.
        threads: of each session.
        progress: told after each segment.
    """
    walk = _Walk(graph, levels, rounder, batches, threads)
    parts = segments(graph)
    errors: list[dict[str, list[float]]] = []
    gains: list[float] = []
    for number, segment in enumerate(parts):
        found, gain = walk.step(segment)
        errors.append(found)
        gains.append(gain)
        walk.forget(parts[number + 1 :])
        if progress is not None:
            progress("sensitivity", number + 1, len(parts))
    result: list[LayerError] = []
    total = 1.0
    for found, gain in zip(reversed(errors), reversed(gains), strict=True):
        for name, own in reversed(found.items()):
            at_outputs = tuple(error * total for error in own)
            result.append(LayerError(name=name, levels=tuple(levels[name]), errors=at_outputs))
        total *= gain
    return result[::-1]


class _Walk:
    """Two sets of live activations, and three graphs: float, one layer rounded, all rounded."""

    def __init__(
        self,
        graph: Graph,
        levels: Mapping[str, Sequence[Precision | None]],
        rounder: Rounder,
        batches: Sequence[Feeds],
        threads: int | None,
    ) -> None:
        self._graph, self._levels, self._rounder, self._threads = graph, levels, rounder, threads
        self._single, self._lowest = graph.copy(), graph.copy()
        self._twins = {node.name: node for node in self._single.nodes}
        self._low_twins = {node.name: node for node in self._lowest.nodes}
        self._float: list[dict[str, Array]] = [dict(feeds) for feeds in batches]
        self._rounded: list[dict[str, Array]] = [dict(feeds) for feeds in batches]

    def step(self, segment: Segment) -> tuple[dict[str, list[float]], float]:
        """Walk through one segment; return the errors of its layers at its end, and its gain."""
        layers = [node for node in segment.nodes if node.name in self._levels]
        outputs = list(segment.outputs)
        wanted = [name for n in layers for name in (*_sources(n).values(), n.outputs[0].name)]
        session = self._runner(self._graph, self._float[0], _distinct(*wanted, *outputs))
        known = [{**feeds, **session.run(feeds)} for feeds in self._float]
        # A share of the output that it is in: outputs of all sizes are worth the same.
        # Masks and positions are no share of anything: they carry no error, or are no numbers.
        carriers = [name for name in segment.carriers if known[0][name].dtype.kind == "f"]
        power = {name: sum(_power(k[name]) for k in known) + TINY for name in carriers}
        errors = {n.name: self._layer(n, segment, known, power) for n in layers}
        gain = self._gain(segment, known, power)
        for node in layers:
            level = self._levels[node.name][0]
            if level is not None:
                weight = self._rounder(node, level).weight
                if weight is None:
                    continue
                constant = self._lowest.constant("rounded", weight)
                self._lowest.set_input(self._low_twins[node.name], weight_place(node), constant)
        session = self._runner(self._lowest, self._rounded[0], outputs)
        for floating, rounded, k in zip(self._float, self._rounded, known, strict=True):
            rounded.update(session.run(rounded))
            floating.update({name: k[name] for name in outputs})
        return errors, gain

    def _layer(
        self,
        node: Node,
        segment: Segment,
        known: list[dict[str, Array]],
        power: Mapping[str, float],
    ) -> list[float]:
        """Return the share of the error at the end of the segment for each level of one layer.

        The lowest level is run to the end; the others are scaled by their error at the layer.
        """
        tap = node.outputs[0].name
        own: list[float] = []
        lowest: list[Array] = []
        for level in self._levels[node.name]:
            if level is None:
                own.append(0.0)
                continue
            outputs = self._run_rounded(node, level, known)
            own.append(sum(_error(y, k[tap]) for y, k in zip(outputs, known, strict=True)))
            lowest = lowest or outputs
        if not lowest or own[0] <= 0.0:
            return [0.0] * len(own)
        behind = _dependents(segment, tap)
        names = [name for name in power if name in behind]
        available = {name: k for name, k in known[0].items() if name == tap or name not in behind}
        tail = self._runner(self._graph, available, names)
        total = 0.0
        for output, k in zip(lowest, known, strict=True):
            reached = tail.run({**k, tap: output})
            total += sum(_error(reached[name], k[name]) / power[name] for name in names)
        share = total / max(len(power), 1) / own[0]
        return [error * share for error in own]

    def _run_rounded(
        self, node: Node, level: Precision, known: list[dict[str, Array]]
    ) -> list[Array]:
        tap, sources = node.outputs[0].name, _sources(node)
        rounded, twin = self._rounder(node, level), self._twins[node.name]

        def feeds(values: Mapping[str, Array]) -> dict[str, Array]:
            given = {}
            for place, name in sources.items():
                value = values[name]
                given[name] = rounded.inputs[place](value) if place in rounded.inputs else value
            return given

        place = weight_place(node)
        before = twin.inputs[place]
        if rounded.weight is not None:
            self._single.set_input(twin, place, self._single.constant("rounded", rounded.weight))
        session = self._runner(self._single, feeds(known[0]), [tap])
        self._single.set_input(twin, place, before)
        return [session.run(feeds(values))[tap] for values in known]

    def _gain(
        self, segment: Segment, known: list[dict[str, Array]], power: Mapping[str, float]
    ) -> float:
        """Return how much of an error that comes in is left at the end, both as shares of power."""
        inside = {tensor.name for node in segment.nodes for tensor in node.outputs}
        read = {t.name for node in segment.nodes for t in (*node.inputs, *node.captured)}
        shares = []
        for name in sorted((read | set(segment.outputs)) - inside):
            if name not in self._rounded[0]:
                continue
            pairs = [(f[name], r[name]) for f, r in zip(self._float, self._rounded, strict=True)]
            error = sum(_error(r, f) for f, r in pairs)
            if error > 0.0:
                shares.append(error / (sum(_power(f) for f, _ in pairs) + TINY))
        if not shares:
            return 1.0
        session = self._runner(self._graph, self._rounded[0], list(segment.outputs))
        left = 0.0
        for feeds, k in zip(self._rounded, known, strict=True):
            got = session.run(feeds)
            left += sum(_error(got[name], k[name]) / power[name] for name in power)
        return left / max(len(power), 1) / (sum(shares) / len(shares))

    def forget(self, rest: Sequence[Segment]) -> None:
        """Drop what no later segment reads."""
        needed = {tensor.name for tensor in self._graph.outputs}
        for segment in rest:
            for node in segment.nodes:
                needed.update(t.name for t in (*node.inputs, *node.captured))
        for side in (*self._float, *self._rounded):
            for name in [name for name in side if name not in needed]:
                del side[name]

    def _runner(self, graph: Graph, available: Feeds, outputs: Sequence[str]) -> _Runner:
        return _Runner(graph, available, outputs, self._threads)


class _Runner:
    """A submodel that hands through what is available already."""

    def __init__(
        self, graph: Graph, available: Feeds, outputs: Sequence[str], threads: int | None
    ) -> None:
        self._given = [name for name in outputs if name in available]
        made = [name for name in outputs if name not in available]
        self._session = Submodel(graph, available, made, threads=threads) if made else None

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Compute the outputs for one batch."""
        made = {} if self._session is None else self._session.run(feeds)
        return {**made, **{name: feeds[name] for name in self._given}}


def _dependents(segment: Segment, tap: str) -> set[str]:
    """Return the tensors of a segment that depend on `tap`, itself included."""
    behind = {tap}
    for node in segment.nodes:
        if any(t.name in behind for t in (*node.inputs, *node.captured)):
            behind.update(tensor.name for tensor in node.outputs)
    return behind


def _sources(layer: Node) -> dict[int, str]:
    """Return what a layer reads that is computed, by place: two of a product of activations."""
    found = {place: layer.inputs[place] for place in (0, 1)}
    return {place: t.name for place, t in found.items() if not isinstance(t, Constant)}


def _distinct(*names: str) -> list[str]:
    return list(dict.fromkeys(names))


def _error(got: Array, wanted: Array) -> float:
    """Return the power of the difference; masks of -inf or of truth values have none."""
    if not np.issubdtype(wanted.dtype, np.floating):
        return 0.0
    with np.errstate(invalid="ignore"):  # of -inf - -inf, which is not finite, and not counted
        return _power(got - wanted)


def _power(array: Array) -> float:
    if not np.issubdtype(array.dtype, np.floating):
        return 0.0
    values = array.astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    return float(values @ values)
