"""What each level of each layer costs in time: layers cut out of the model, run by themselves.

What it does
    The whole model is built with its layers at a level, as the target's dialect wants it, and each
    layer is cut out: from the integers that it reads to the integers that it makes, so that the
    engine fuses Q and DQ as it does in the model. Where the layer alone asks for the Q in front (a
    MatMul on onnxruntime) or makes float numbers, the piece begins and ends with those. An
    activation that the Q behind takes up belongs to the piece. Its inputs have the shapes of one
    sample. All levels of a layer, float among them, are run in turns, in another order each round;
    the median is taken, less that of a session that does nothing. Pieces of the same ops,
    attributes, types and shapes are timed once.
What a table by layer cannot see
    The Q and DQ between a layer in integers and a neighbour in float: a plan that changes often
    between the two is slower than its sum. What the engine does across layers: onnxruntime
    computes float convolutions in a layout of its own, and turns to it and back in each piece, but
    in the model only at the ends of a chain of them; caches are warmer in a piece. Ops that are no
    layers are not in the sum. A Q that several layers read counts for each of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qpass.errors import RecipeError
from qpass.graph import Graph, Node, Tensor
from qpass.plan import Decision, Plan
from qpass.program import Precision, Progress
from qpass.qparams import QParams, quantize
from qpass.submodel import Submodel, cut
from qpass.targets import Target
from qpass.verify.engines import Engine, EngineName, available_engines, open_engine
from qpass.verify.host import shows_speed
from qpass.verify.latency import measure_interleaved

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Level = Precision | None  # None: float

SECONDS: Final = 0.3  # for all levels of a distinct layer
FEWEST: Final = 5  # rounds, however slow the layer is
BYTE: Final = 8  # bits
WARMUP: Final = 3
NOISE: Final = 1.5  # upper over lower quartile of the runs of a piece: beyond, times say little
# Levels closer than this are as fast as each other: medians of the same piece differ by so much.
TIE: Final = 0.03
GRID: Final = 2.0**20  # steps in a millisecond: sums of such numbers are exact, so that ties stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The model with each layer at one of its levels: what layers are cut out of.

    config: session entries of onnxruntime that the file would be run with.
    """

    graph: Graph
    plan: Plan
    qparams: Mapping[str, QParams]
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Milliseconds of each layer at each of its levels, float64, by node name.

    noisy: the layers whose runs differed so much (`NOISE`) that their times say little.
    """

    milliseconds: Mapping[str, Array]
    noisy: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A layer alone, with what it is fed."""

    model: onnx.ModelProto
    feeds: Feeds
    config: Mapping[str, str]


def engine_of(target: Target) -> EngineName:
    """Return the engine that layers for `target` are timed in.

    Raises:
        RecipeError: it is not on this machine, or this machine's CPU is not one for the target.
    """
    if target.engine == "none":
        raise RecipeError(
            f"layers for {target.name} cannot be timed: its engine does not run here",
            fix="use --mixed-cost size",
        )
    name = target.own_engine
    if name not in available_engines():
        raise RecipeError(
            f"layers for {target.name} cannot be timed: {name} is not installed",
            fix=f"pip install qpass[{name}], or use --mixed-cost size",
        )
    if not shows_speed(target):
        raise RecipeError(
            f"layers for {target.name} cannot be timed: this CPU has no VNNI",
            fix=f"use --target {target.name}-avx2 or --mixed-cost size",
        )
    return name


def time_layers(
    graph: Graph,
    levels: Mapping[str, Sequence[Level]],
    variants: Sequence[Variant],
    sample: Feeds,
    engine: EngineName,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> LayerTimes:
    """Time every layer of `levels` at each of its levels.

    Args:
        graph: the float graph; not changed.
        levels: by node name, lowest precision first, float last.
        variants: the quantized model by number of the level; layers with fewer levels are at their
            last one.
        sample: one sample of the model's inputs, which gives the shapes.
        engine: where to time.
        threads: of the engine.
        progress: told after each layer.

    Raises:
        EngineError: the engine refused a layer.
    """
    inputs = list(dict.fromkeys(graph.node(name).inputs[0].name for name in levels))
    made = [name for name in inputs if name not in sample]
    known = {**sample, **(Submodel(graph, sample, made).run(sample) if made else {})}
    table: dict[tuple[bytes, ...], tuple[Array, float]] = {}
    times: dict[str, Array] = {}
    noisy: list[str] = []
    for done, (name, own) in enumerate(levels.items()):
        node = graph.node(name)
        end = _end(graph, node, variants[0].plan)
        pieces = [
            _float_piece(graph, node, end, known)
            if level is None
            else _piece(variants[number], node, end, known)
            for number, level in enumerate(own)
        ]
        key = tuple(signature(piece.model) for piece in pieces)
        if key not in table:
            medians, spread = _time(pieces, engine, threads)
            table[key] = level_off(medians), spread
        times[name], spread = table[key]
        if spread > NOISE:
            noisy.append(name)
        if progress is not None:
            progress("layer latency", done + 1, len(levels))
    return LayerTimes(milliseconds=times, noisy=tuple(noisy))


def time_models(
    engine: EngineName,
    models: Sequence[Path],
    configs: Sequence[Mapping[str, str]],
    sample: Feeds,
    *,
    threads: int = 1,
) -> list[float]:
    """Return the median milliseconds of whole models that take turns.

    Args:
        engine: where to time.
        models: files.
        configs: for each of them its session entries of onnxruntime.
        sample: inputs.
        threads: of the engine.

    Raises:
        EngineError: the engine refused a model.
    """
    if not models:
        return []
    loaded = [
        open_engine(engine, path, threads=threads, session_config=own if engine == "ort" else {})
        for path, own in zip(models, configs, strict=True)
    ]
    found = measure_interleaved(
        loaded, sample, seconds=SECONDS * len(loaded), min_runs=FEWEST, warmup=WARMUP
    )
    return [result.median_ms for result in found]


def level_off(milliseconds: Sequence[float]) -> Array:
    """Return times of levels with those that differ by noise alone made equal, float64.

    Each level, from the most accurate (the last) down, takes the time of the first more accurate
    one that is within `TIE` of it. Times lie on a grid of `GRID` steps, so that sums of equal times
    are equal: then a knapsack gives a layer that gains no time by fewer bits the smaller error.
    """
    found: list[float] = []
    for time in reversed(milliseconds):
        near = (other for other in found if abs(time - other) <= TIE * other)
        found.append(next(near, time))
    return np.maximum(np.rint(np.array(found[::-1]) * GRID), 1.0) / GRID


def signature(model: onnx.ModelProto) -> bytes:
    """Return what the time of a piece depends on: ops, attributes, wiring, types and shapes."""
    graph = model.graph
    numbers: dict[str, int] = {"": -1}
    facts: list[object] = [
        (t.data_type, tuple(t.dims), numbers.setdefault(t.name, len(numbers)))
        for node in graph.node
        for t in graph.initializer
        if t.name in node.input
    ]
    for value in graph.input:
        numbers.setdefault(value.name, len(numbers))
        facts.append(value.type.SerializeToString(deterministic=True))
    for node in graph.node:
        wires = [numbers.setdefault(name, len(numbers)) for name in (*node.input, *node.output)]
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        facts.append((node.domain, node.op_type, tuple(wires), tuple(attributes)))
    return repr(facts).encode()


def _resident(plan: Plan) -> dict[str, Decision]:
    return {d.tensor: d for d in plan.activations() if d.edges is None}


def _end(graph: Graph, node: Node, plan: Plan) -> str:
    """Return the tensor that a layer ends in: behind an activation that its Q takes up."""
    out, resident = node.outputs[0], _resident(plan)
    moved = {n.name for n in plan.nodes if n.precision == "passthrough"}
    readers = graph.consumers(out)
    if out.name not in resident and len(readers) == 1 and readers[0][0].name in moved:
        behind: str = readers[0][0].outputs[0].name
        if behind in resident:
            return behind
    name: str = out.name
    return name


def _float_piece(graph: Graph, node: Node, end: str, known: Feeds) -> _Piece:
    feeds = {node.inputs[0].name: known[node.inputs[0].name]}
    return _Piece(model=cut(graph, feeds, [end], static=True), feeds=feeds, config={})


def _piece(variant: Variant, node: Node, end: str, known: Feeds) -> _Piece:
    """Cut a layer out of the quantized model, between integers where neighbours hand them on.

    Integers below 8 bits cannot be fed; no kernel has them either, so the piece has a Q of its own.
    """
    graph, resident = variant.graph, _resident(variant.plan)
    twin, source = graph.node(node.name), node.inputs[0].name
    own = any(
        edge.node == node.name and edge.index == 0
        for decision in variant.plan.activations()
        for edge in decision.edges or ()
    )
    feeds = {source: known[source]}
    before, behind = resident.get(source), resident.get(end)
    if before is not None and not own and _can_be_fed(before):
        dequantize = graph.producer(twin.inputs[0])
        assert dequantize is not None
        numbers = variant.qparams[before.key]
        feeds = {dequantize.inputs[0].name: quantize(known[source], numbers)}
    if behind is not None and _can_be_fed(behind):
        end = _stored_behind(graph, twin.outputs[0])
    model = cut(graph, feeds, [end], static=True)
    return _Piece(model=model, feeds=feeds, config=variant.config)


def _can_be_fed(decision: Decision) -> bool:
    return decision.spec.storage.bits >= BYTE


def _stored_behind(graph: Graph, tensor: Tensor) -> str:
    """Return what the Q behind a tensor makes; activations and a Clip stand between at the most."""
    while True:
        ((reader, _),) = graph.consumers(tensor)
        tensor = reader.outputs[0]
        if reader.op == "QuantizeLinear":
            name: str = tensor.name
            return name


class _Fed:
    """An engine with a piece in it, and what the piece is fed."""

    def __init__(self, name: str, engine: Engine, feeds: Feeds) -> None:
        self.name, self._engine, self._feeds = name, engine, feeds
        self.version, self.output_names = engine.version, engine.output_names

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        return self._engine.run({**self._feeds, **feeds})


def _idle() -> _Piece:
    """Return a piece that does nothing: what it takes is the call."""
    info = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["x"], ["y"])], "idle", [info],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
        ),
        opset_imports=[helper.make_opsetid("", 21)], ir_version=10,
    )  # fmt: skip
    return _Piece(model=model, feeds={"x": np.zeros(1, np.float32)}, config={})


def _time(pieces: Sequence[_Piece], engine: EngineName, threads: int) -> tuple[list[float], float]:
    """Let pieces take turns; return their medians in milliseconds and the largest spread.

    The time of a call is taken off. The spread is the upper quartile over the lower one.
    """
    with tempfile.TemporaryDirectory(prefix="qpass-layer-") as folder:
        loaded = []
        for number, piece in enumerate((_idle(), *pieces)):
            path = Path(folder, f"level{number}.onnx")
            onnx.save(piece.model, path)
            config = piece.config if engine == "ort" else {}
            runner = open_engine(engine, path, threads=threads, session_config=config)
            loaded.append(_Fed(path.stem, runner, piece.feeds))
        found = measure_interleaved(loaded, {}, seconds=SECONDS, min_runs=FEWEST, warmup=WARMUP)
    idle, *times = (result.median_ms for result in found)
    spread = max(result.quartiles_ms[1] / result.quartiles_ms[0] for result in found)
    return [time - idle for time in times], spread
