"""Find the channels of linear ops that are nothing but keys of an attention.

What it does
    Follows the output of each linear op through biases and ops that only move values, and notes
    which of its channels end as the right operand of the product in front of a Softmax.
Why it matters
    ``softmax(q (k + b)^T) == softmax(q k^T)`` for a ``b`` that is the same at all positions: it
    adds one number to all scores of a query. An offset for a key can be fitted, but corrects
    nothing, and takes room in the range of the key's Q.
How it finds them
    By names it could not: exporters write one projection for q, k and v and take it apart with
    Split, with Slice, with Reshape, Transpose and Gather, or write three. So the number of its
    channel takes the place of each value, the moving ops are run on that, and what arrives at the
    product is read off. Shapes that are computed at run time come from one batch of samples.
Preconditions
    None; the graph is only read. A key that is scaled by channel or turned by position (RoPE), or
    scores that something other than masks and scales changes, are not taken for keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.masks import MASK_VALUE
from qpass.matching import weight_axis
from qpass.passes.channel_affine import PairMoments
from qpass.submodel import Feeds, Submodel
from qpass.units import is_weighted

Array = NDArray[Any]

MOVERS: Final = frozenset({
    "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip
# Ops that add a constant, or multiply by one number: a channel stays what it is.
_ADDS: Final = frozenset({"Add", "Sub"})
_SCALES: Final = frozenset({"Mul", "Div"})


def key_channels(graph: Graph, shapes: Shapes) -> dict[str, Array]:
    """Return, by the name of each linear op that makes keys, which of its channels are only keys.

    Args:
        graph: the float graph.
        shapes: of its tensors.

    Returns:
        Boolean arrays, one entry per output channel; ops without such channels are left out.
    """
    products = {id(node) for node in graph.nodes if feeds_softmax(graph, node)}
    if not products:
        return {}
    found: dict[str, Array] = {}
    for node in sources(graph, products, shapes, operands=(1,)):
        reached = _Reached()
        ids = channel_numbers(node, shapes)
        if ids is None:
            continue
        _follow(graph, node.outputs[0], ids, products, shapes, reached)
        keys = sorted(reached.keys - reached.others)
        if keys:
            mask = np.zeros(_channels(node), bool)
            mask[keys] = True
            found[node.name] = mask
    return found


@dataclass(slots=True, kw_only=True)
class _Reached:
    """Numbers of the channels that arrive at keys, and anywhere else."""

    keys: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class Shapes:
    """Values of small tensors (shapes, indices) and shapes of large ones, from one sample."""

    graph: Graph
    sample: Feeds
    known: dict[str, Array] = field(default_factory=dict)

    def value(self, tensor: Tensor) -> Array:
        """Return the value that `tensor` has for the sample."""
        if isinstance(tensor, Constant):
            return array_of(tensor)
        self.compute([tensor])
        return self.known[tensor.name]

    def compute(self, tensors: Iterable[Tensor]) -> None:
        """Find the values of several tensors in one run: a session for each takes far longer."""
        names = [t.name for t in tensors if not isinstance(t, Constant)]
        missing = [name for name in dict.fromkeys(names) if name not in self.known]
        if missing:
            alive = {**self.sample, **self.known}
            self.known |= Submodel(self.graph, alive, missing).run(alive)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape that `tensor` has for the sample."""
        return tuple(tensor.shape) if self.is_known(tensor) else self.value(tensor).shape

    @staticmethod
    def is_known(tensor: Tensor) -> bool:
        """True for a tensor whose shape the graph says."""
        return tensor.shape is not None and all(isinstance(size, int) for size in tensor.shape)


def feeds_softmax(graph: Graph, node: Node) -> bool:
    """True for a product of two activations whose only way on is to Softmax over the last axis."""
    if node.op != "MatMul" or any(isinstance(t, Constant) for t in node.inputs):
        return False
    out = node.outputs[0]
    while True:
        readers = graph.consumers(out)
        if len(readers) != 1 or graph.is_output(out):
            return False
        reader, index = readers[0]
        if reader.op == "Softmax":
            rank = None if out.shape is None else len(out.shape)
            return int(reader.attrs.get("axis", -1)) in (-1, rank - 1 if rank else -1)
        if not _keeps_score(reader, index):
            return False
        out = reader.outputs[0]


def _keeps_score(node: Node, index: int) -> bool:
    """True when adding one number to a row of scores still does so behind `node`."""
    others = [tensor for i, tensor in enumerate(node.inputs) if i != index]
    if node.op in ("Add", "Identity"):
        return True
    if node.op == "Sub":
        return index == 0
    if node.op in _SCALES:
        return (node.op == "Mul" or index == 0) and all(_is_number(t) for t in others)
    if node.op == "Where":  # what is masked stays masked
        other = node.inputs[3 - index] if index else None
        return isinstance(other, Constant) and bool((array_of(other) <= MASK_VALUE).all())
    return False


def _is_number(tensor: Tensor) -> bool:
    return isinstance(tensor, Constant) and array_of(tensor).size == 1


def leads_to(
    graph: Graph, tensor: Tensor, products: Collection[int], *, operands: Collection[int]
) -> bool:
    """True when a walk through moving ops from `tensor` meets an operand of one of `products`."""
    waiting, seen = [tensor], set()
    while waiting:
        for reader, index in graph.consumers(waiting.pop()):
            if id(reader) in products and index in operands:
                return True
            if id(reader) not in seen and passes(reader, index):
                seen.add(id(reader))
                waiting.extend(reader.outputs)
    return False


def sources(
    graph: Graph, products: Collection[int], shapes: Shapes, *, operands: Collection[int]
) -> list[Node]:
    """Return the linear ops that lead to operands of `products`; `shapes` then knows their ways."""
    found = [
        node
        for node in graph.nodes
        if is_weighted(node) and leads_to(graph, node.outputs[0], products, operands=operands)
    ]
    waiting, asked = [node.outputs[0] for node in found], {}
    while waiting:
        tensor = waiting.pop()
        if not shapes.is_known(tensor):
            asked[id(tensor)] = tensor
        for reader, index in graph.consumers(tensor):
            if reader.op in MOVERS and passes(reader, index):
                asked |= {id(t): t for t in reader.inputs[1:] if t.name}
                waiting.extend(reader.outputs)
    # What only moves is worked out by numbers: its values are not needed.
    starts = {id(node.outputs[0]) for node in found}
    shapes.compute(t for t in asked.values() if id(t) in starts or t.dtype != np.float32)
    return found


def passes(node: Node, index: int) -> bool:
    """True when `node` only moves its input `index`, shifts it, or multiplies it by one number."""
    if node.op in MOVERS:
        return index == 0
    others = [tensor for i, tensor in enumerate(node.inputs) if i != index]
    if node.op in _ADDS:
        return all(isinstance(t, Constant) for t in others)
    return node.op in _SCALES and index == 0 and all(_is_number(t) for t in others)


def _channels(node: Node) -> int:
    weight = node.inputs[1]
    count = int(weight.shape[weight_axis(node, len(weight.shape))])
    return count * int(node.attrs.get("group", 1)) if node.op == "ConvTranspose" else count


def channel_numbers(node: Node, shapes: Shapes) -> Array | None:
    """Return the output of a linear op with the number of its channel for each value."""
    shape, count = shapes.shape(node.outputs[0]), _channels(node)
    axis = 1 if node.op in ("Conv", "ConvTranspose") else len(shape) - 1
    if len(shape) <= axis or shape[axis] != count:
        return None
    numbers = np.arange(count, dtype=np.int64)
    line = numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.broadcast_to(line, shape)


def _follow(
    graph: Graph, tensor: Tensor, ids: Array, products: set[int], shapes: Shapes, reached: _Reached
) -> None:
    """Note where the channels in `tensor` go to."""
    if graph.is_output(tensor) or tensor.name in graph.captured:
        reached.others.update(np.unique(ids).tolist())
    for reader, index in graph.consumers(tensor):
        if id(reader) in products and index == 1:
            # Keys lie along the last axis; a channel that differs between keys does not cancel.
            same = (ids == ids[..., :1]).all()
            (reached.keys if same else reached.others).update(np.unique(ids).tolist())
        elif passes(reader, index):
            for out, there in moved(reader, ids, shapes):
                _follow(graph, out, there, products, shapes, reached)
        else:
            reached.others.update(np.unique(ids).tolist())


def moved(node: Node, ids: Array, shapes: Shapes) -> Iterator[tuple[Tensor, Array]]:
    """Yield the outputs of one passing op, with the numbers of the channels in them."""
    if node.op not in MOVERS:
        shape = shapes.shape(node.outputs[0])
        yield node.outputs[0], np.broadcast_to(ids, shape)
        return
    constants = {t.name: shapes.value(t) for t in node.inputs[1:] if t.name}
    outputs = [t for t in node.outputs if t.name]
    arrays = run_alone(node, ids, constants, [t.name for t in outputs], shapes.graph.opset)
    yield from zip(outputs, arrays, strict=True)


def run_alone(
    node: Node, ids: Array, constants: Mapping[str, Array], outputs: list[str], opset: int
) -> list[Array]:
    """Run one moving op by the definition of ONNX."""
    proto = Graph.proto_of(node)
    feeds = {node.inputs[0].name: np.ascontiguousarray(ids), **constants}
    graph = helper.make_graph(
        [proto],
        "mover",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    results: Any = ReferenceEvaluator(model).run(None, feeds)
    return list(results)


def without_means(moments: PairMoments, channels: Array) -> PairMoments:
    """Return `moments` as if both means of `channels` were 0.

    For keys: what differs from the mean of a group of samples counts, the mean itself cancels in
    the softmax. A fit gives them a gain and the offset 0.
    """
    return replace(
        moments,
        mean_a=np.where(channels, 0.0, moments.mean_a),
        mean_t=np.where(channels, 0.0, moments.mean_t),
    )
