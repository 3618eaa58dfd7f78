"""Reconstruct a basic unit by gradients, in torch: what it is given and what becomes of the result.

The unit is what the quantized graph computes from the live tensors up to the outputs of the unit's
last layers; with the quantized skip where a residual sum follows, so that the float sum is the aim.
The layers have been rounded in closed form before. The new integers are written only when they give
a smaller error at the unit's outputs on batches that are held out.

Steps of activations with few levels are learned along, where nobody outside of the unit reads their
integers: a unit that has been walked through has seen the old step, and one that comes later would
have no say.

torch is imported when the first unit is reconstructed: everything else here is numpy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.errors import RecipeError
from qpass.graph import Graph, Node, array_of
from qpass.passes.insert_qdq import quantizer_name
from qpass.passes.rounding.layer import Layer
from qpass.passes.rounding.probe import Probe
from qpass.qparams import expand
from qpass.stream import Pair, Stream
from qpass.submodel import slice_nodes

if TYPE_CHECKING:
    from qpass.torch.batch import Batch
    from qpass.torch.reconstruct import SoftLayer, SoftStep

Array = NDArray[Any]
# With more levels than these the error of rounding is below that of the activations.
LEVELS: Final = 64
OTHERS_READ: Final = "another unit, or an output, reads its integers: the step stays"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What became of a unit.

    layers
        Those that have new integers.
    steps
        New steps of activations, float32, by key of their decision.
    refused
        (name, reason) of layers and steps that stay.
    """

    layers: tuple[Layer, ...] = ()
    steps: Mapping[str, float] = field(default_factory=dict)
    refused: tuple[tuple[str, str], ...] = ()


def check_torch(option: str) -> None:
    """Raise a RecipeError when torch, which `option` needs, is not there."""
    if importlib.util.find_spec("torch") is None:
        raise RecipeError(f"{option} needs torch", fix="pip install 'qpass[torch]'")


def reconstruct_unit(
    stream: Stream,
    layers: Sequence[Layer],
    *,
    first_held: int,
    settings: Mapping[str, Any],
    rescaled: Collection[str] = (),
    free_steps: Collection[str] = (),
) -> Learned:
    """Learn the roundings of a unit that has been rounded in closed form.

    Args:
        stream: stands in the unit.
        layers: the linear ops of the unit in execution order.
        first_held: number of the first batch that is held out.
        settings: of `qpass.torch.reconstruct.Settings`.
        rescaled: names of layers whose scales may change.
        free_steps: keys of activations whose step may change.
    """
    from qpass.torch import reconstruct as gradient

    soft = _soft(layers)
    refused = [
        (layer.name, f"more than {LEVELS} levels: the integers of unit stay")
        for layer in layers
        if layer not in soft
    ]
    if not soft:
        return Learned(refused=tuple(refused))
    ends = _ends(stream, layers)
    nodes, inputs = _learned_part(stream, soft, ends, gradient)
    quantized = Probe(stream, "quantized", stream.quantized, inputs, as_written=True)
    floating = Probe(stream, "float", stream.aim, inputs)
    steps, held_steps = _soft_steps(stream.quantized, nodes, ends, free_steps, gradient)
    refused += held_steps
    batches = [
        gradient.Batch(
            quantized=quantized.run(number),
            floating=floating.run(number),
            wanted=aims,
            counts=tuple(end.counts(number, aim) for end, aim in zip(ends, aims, strict=True)),
        )
        for number, aims in enumerate(_wanted(stream, ends))
    ]
    problem = gradient.UnitProblem(
        nodes=nodes,
        layers=[_soft_layer(layer, gradient, rescale=layer.name in rescaled) for layer in soft],
        steps=steps,
        targets=[end.quantized for end in ends],
        seen=_seen(stream, ends),
        stackable=_stackable(stream.reference, batches),
    )
    try:
        found = gradient.reconstruct(
            problem, batches[:first_held], batches[first_held:], gradient.Settings(**settings)
        )
    except gradient.UnsupportedOpError as error:
        reason = f"{error.what} ({error.where}): the integers of unit stay"
        return Learned(refused=(*refused, *((layer.name, reason) for layer in soft)))
    if not found.after < found.before:
        reason = (
            f"error {found.after:.3g} at the end of the unit on held-out batches, "
            f"{found.before:.3g} with the integers of unit: those stay"
        )
        return Learned(refused=(*refused, *((layer.name, reason) for layer in soft)))
    for layer in soft:
        layer.write(stream.quantized, layer.layout.matrix(found.integers[layer.name]))
        if layer.name in found.shares:
            layer.rescale(stream.quantized, found.shares[layer.name])
        if layer.site.offset:
            layer.write_offset(stream.quantized, found.offsets[layer.name])
    write_steps(stream.quantized, found.steps)
    return Learned(layers=tuple(soft), steps=found.steps, refused=tuple(refused))


def why_not(stream: Stream, layers: Sequence[Layer]) -> str:
    """Return why no gradient reaches the roundings of a unit that has some to learn, or nothing.

    Args:
        stream: stands in the unit.
        layers: as for `reconstruct_unit`.
    """
    from qpass.torch import reconstruct as gradient

    soft = _soft(layers)
    if not soft:
        return ""
    nodes, _ = _learned_part(stream, soft, _ends(stream, layers), gradient)
    for node in nodes:
        if not gradient.has_function(node):
            return f"{node.op} has no gradient here ({node.name})"
    return ""


def _soft(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers whose roundings are worth learning."""
    return [layer for layer in layers if layer.numbers.qmax - layer.numbers.qmin < LEVELS]


def _learned_part(
    stream: Stream, soft: Sequence[Layer], ends: Sequence[_End], gradient: ModuleType
) -> tuple[list[Node], list[str]]:
    """Return the nodes that torch runs, and what they read besides the weights that are learned.

    What torch has no function for and lies in front of these weights (recurrent cells) is left to
    the engine, and its outputs are inputs of the part.
    """
    graph, weights = stream.quantized, {layer.node.inputs[1].name for layer in soft}
    alive = dict.fromkeys([*stream.feeds("quantized", 0), *weights])
    targets = [name for end in ends for name in end.quantized]
    nodes, inputs = slice_nodes(graph, alive, targets)
    made = [
        tensor.name
        for node in nodes
        if not gradient.has_function(node)
        for tensor in node.outputs
        if tensor.name
    ]
    if made and weights.isdisjoint(slice_nodes(graph, alive, made)[1]):
        nodes, inputs = slice_nodes(graph, {**alive, **dict.fromkeys(made)}, targets)
    return nodes, [name for name in inputs if name not in weights]


def write_steps(graph: Graph, steps: Mapping[str, float]) -> None:
    """Give quantizers of activations new steps.

    Args:
        graph: after `insert_qdq`; changed in place.
        steps: by key of the decision, float32.
    """
    nodes = {node.name: node for node in graph.nodes}
    for key, step in steps.items():
        quantizer = nodes[quantizer_name(key)]
        old = quantizer.inputs[1]
        scale = graph.constant(old.name, np.array(step, np.float32))
        for node in (quantizer, *(one for one, _ in graph.consumers(quantizer.outputs[0]))):
            graph.set_input(node, 1, scale)
        if not graph.consumers(old):
            scale.name = old.name


def _soft_steps(
    graph: Graph,
    nodes: Sequence[Node],
    ends: Sequence[_End],
    free: Collection[str],
    gradient: ModuleType,
) -> tuple[list[SoftStep], list[tuple[str, str]]]:
    """Return the quantizers of the unit whose step can be learned, and why others cannot be."""
    inside, tensors = {id(node) for node in nodes}, graph.tensors()
    for end in ends:
        # The sum itself stands behind the unit, and reads it no other way than the target does.
        readers = [{id(n) for n, _ in graph.consumers(tensors[t])} for t in end.quantized]
        if len(readers) > 1:
            inside |= set.intersection(*readers)
    names = {quantizer_name(key): key for key in free}
    steps, refused = [], []
    for node in nodes:
        if node.op != "QuantizeLinear" or node.name not in names:
            continue
        key, scale = names[node.name], array_of(node.inputs[1])
        restored = [one for one, _ in graph.consumers(node.outputs[0])]
        readers_of = [reader for dq in restored for reader, _ in graph.consumers(dq.outputs[0])]
        shown = any(graph.is_output(dq.outputs[0]) for dq in restored)
        if not shown and all(id(one) in inside for one in (*restored, *readers_of)):
            steps.append(
                gradient.SoftStep(name=key, constant=node.inputs[1].name, scale=float(scale))
            )
        else:
            refused.append((key, OTHERS_READ))
    return steps, refused


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """A sum of tensors behind the last `layer` of a unit, under the names of both graphs."""

    quantized: tuple[str, ...]
    floating: tuple[str, ...]
    layer: Layer

    def counts(self, batch: int, total: Array) -> Array:
        """Return how much the errors of the sum count, float32, to be broadcast over it."""
        normed_sum = self.layer.normed_sum
        normed = None if normed_sum is None else normed_sum.of_total(total)
        weights = self.layer.guided(batch, normed)
        if weights is None:
            return np.ones((*total.shape[:1], *[1] * (total.ndim - 1)), np.float32)
        return weights.astype(np.float32)


def _ends(stream: Stream, layers: Sequence[Layer]) -> list[_End]:
    """Return the outputs of the layers that feed no other end."""
    alive = dict.fromkeys(stream.feeds("quantized", 0))
    covered: set[int] = set()
    ends = []
    for layer in reversed(layers):
        if id(layer.node) in covered:
            continue
        pairs = [_output(stream, layer), *([layer.skip] if layer.skip else [])]
        end = _End(
            quantized=tuple(pair.quantized_name for pair in pairs),
            floating=tuple(pair.float_name for pair in pairs),
            layer=layer,
        )
        nodes, _ = slice_nodes(stream.quantized, alive, end.quantized)
        covered |= {id(node) for node in nodes}
        ends.append(end)
    return ends


def _output(stream: Stream, layer: Layer) -> Pair:
    """Return the output of a layer, its bias included."""
    site = layer.site
    if site.bias_slot is None or site.bias_inside:
        return Pair(float_name=layer.output, quantized_name=site.tap)
    add = stream.aims[site.bias_slot.node.name]
    return Pair(float_name=add.outputs[0].name, quantized_name=site.shifted)


def _wanted(stream: Stream, ends: Sequence[_End]) -> list[tuple[Array, ...]]:
    """Return for each batch what the ends should be."""
    parts = [end.floating for end in ends]
    probe = Probe(stream, "float", stream.aim, [name for part in parts for name in part])
    return [_sums(probe.run(batch), parts) for batch in range(len(stream.batches))]


def _seen(stream: Stream, ends: Sequence[_End]) -> tuple[Array, ...]:
    """Return what the ends are in the first batch, as the quantized graph says.

    Where an integer op may come of it, the engine rounds float biases to steps of its accumulator
    at load. With weights of few bits those are no longer small: what the next Q gets moves across
    its steps, and what torch gives looks wrong (kws_dscnn W4A8: by 2 to 5 % of the error).
    """
    parts = [end.quantized for end in ends]
    names = [name for part in parts for name in part]
    probe = Probe(stream, "quantized", stream.quantized, names, as_written=True)
    return _sums(probe.run(0), parts)


def _sums(tensors: Mapping[str, Array], parts: Sequence[tuple[str, ...]]) -> tuple[Array, ...]:
    """Add up the tensors of each part."""
    return tuple(reduce(np.add, [tensors[name] for name in part]) for part in parts)


def _soft_layer(layer: Layer, gradient: ModuleType, *, rescale: bool) -> SoftLayer:
    shape = layer.layout.shape
    scale, zero_point = (
        expand(values.astype(np.float64), layer.numbers, shape)
        for values in (layer.numbers.scale, layer.numbers.zero_point)
    )
    site = layer.site
    original = layer.weight()
    start = original if layer.wanted is None else layer.wanted
    soft: SoftLayer = gradient.SoftLayer(
        name=layer.name,
        weight=layer.node.inputs[1].name,
        original=layer.layout.restore(original),
        start=layer.layout.restore(start),
        integers=layer.layout.restore(layer.integers()),
        scale=scale,
        zero_point=zero_point,
        bounds=(layer.numbers.qmin, layer.numbers.qmax),
        output=site.tap,
        axis=site.axis,
        channels=site.channels,
        offset=site.offset,
        rescale=rescale,
        shifted=site.shifted,
    )
    return soft


def _stackable(graph: Graph, batches: Sequence[Batch]) -> bool:
    """True when the first axis of everything is as long as there are samples."""
    if any(not tensor.shape or isinstance(tensor.shape[0], int) for tensor in graph.inputs):
        return False
    return all(
        array.ndim and len(array) == len(batch.wanted[0])
        for batch in batches
        for array in (*batch.quantized.values(), *batch.floating.values(), *batch.wanted)
    )
