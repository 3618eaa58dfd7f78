"""The tensors of a residual stream, and the constants that say in which basis it is written.

A stream are all tensors that hang together by Add, by ops that move whole channels and, for
rotations, by norms without gain. To write it in another basis, x' = x B, everything that makes it
(`writers`: linear ops, embeddings, positional tables) is multiplied by B, and what reads it
(`readers`: linear ops) by the inverse of B. A stream that anything else makes or reads is refused.

Which B a norm allows decides what it is to a stream (`Norms`): "through", B is a rotation that
norms without gain let pass; "end", the stream ends at its norms, and linear ops must not read it;
"none", B is any matrix with an inverse, and a norm refuses the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.affine.absorb import linear_reader
from qpass.passes.affine.movers import data_indices, moved_axis, source_axis
from qpass.passes.norm_gain import NORMS, Norm, read_norm
from qpass.passes.normalize.folding import (
    constant_of,
    given_input,
    rank_of,
    scalar_of,
    write_constant,
)
from qpass.units import is_weighted

Matrix = NDArray[np.float64]
Norms = Literal["through", "end", "none"]
_SUMS: Final = ("Add", "Sub", "Sum")


class _RefusedError(Exception):
    """The stream cannot be written in another basis; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Axis `axis` of the constant input `index` of `node` goes along the stream's channels."""

    node: Node
    index: int
    axis: int


@dataclass(slots=True, kw_only=True)
class Stream:
    """One residual stream: who writes and who reads it; `where` is one node that shows it."""

    channels: int
    where: Node
    writers: list[Slot] = field(default_factory=list)
    readers: list[Slot] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    axes: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    refusal: str = ""


def find_streams(graph: Graph, *, norms: Norms) -> list[Stream]:
    """Return the streams in front of normalizations over the last axis, and of folded ones.

    Args:
        graph: a normalized graph.
        norms: what they are to a stream; with "none" streams are what linear ops write, alone or
            in sums, and what a linear op reads raw.
    """
    streams: list[Stream] = []
    for node in graph.nodes:
        seed = _linear_seed(graph, node) if norms == "none" else _seed(graph, node, norms)
        if seed is None or any(id(seed[0]) in stream.axes for stream in streams):
            continue
        tensor, axis = seed
        stream = Stream(channels=tensor.shape[axis], where=node)
        try:
            _Walk(graph, stream, norms).run(tensor, axis)
        except _RefusedError as reason:
            stream.refusal = str(reason)
        streams.append(stream)
    return streams


def _seed(graph: Graph, node: Node, norms: Norms) -> tuple[Tensor, int] | None:
    """Return the tensor that `node` shows to be a stream, and its last axis; None for most nodes.

    That is what a norm reads, and a sum of two activations that a MatMul or Gemm reads raw: the
    stream of a network whose norms are folded.
    """
    if node.op in NORMS:
        x = node.inputs[0]
        return None if isinstance(read_norm(node), str) else (x, len(x.shape) - 1)
    if node.op != "Add" or norms != "through":
        return None
    out = node.outputs[0]
    if out.shape is None or not out.shape or not isinstance(out.shape[-1], int):
        return None
    sums = not any(isinstance(tensor, Constant) for tensor in node.inputs)
    readers = graph.consumers(out)
    raw = any(n.op in ("Gemm", "MatMul") and i == 0 and is_weighted(n) for n, i in readers)
    return (out, len(out.shape) - 1) if sums and raw else None


def _linear_seed(graph: Graph, node: Node) -> tuple[Tensor, int] | None:
    """Return what a linear op reads right behind a linear op or a sum, and where its channels lie.

    So ReLU, norms and inputs of the model show no stream, and nothing has to be said of them.
    """
    tensor = node.inputs[0] if _mixes(node) else None
    maker = None if tensor is None else graph.producer(tensor)
    if tensor is None or maker is None or not (maker.op in _SUMS or _mixes(maker)):
        return None
    rank = rank_of(tensor) or 0
    axis = 1 if node.op in ("Conv", "ConvTranspose") else rank - 1
    return (tensor, axis) if axis < rank and isinstance(tensor.shape[axis], int) else None


def _mixes(node: Node) -> bool:
    """Return whether a node is a linear op with constant weights that mixes all channels."""
    return is_weighted(node) and int(node.attrs.get("group", 1)) == 1


def change_basis(graph: Graph, slots: list[Slot], matrix: Matrix, channels: int) -> None:
    """Replace each constant c by c @ matrix along its axis, in float64, rounded once.

    A constant with one element for all `channels` is repeated first.
    """
    for slot in slots:
        tensor = slot.node.inputs[slot.index]
        values = array_of(tensor)
        wide = values.astype(np.float64)
        if wide.ndim == 0:
            wide = wide.reshape(1)
        if wide.shape[slot.axis] == 1:
            wide = np.repeat(wide, channels, axis=slot.axis)
        turned = np.moveaxis(np.moveaxis(wide, slot.axis, -1) @ matrix, -1, slot.axis)
        write_constant(graph, slot.node, slot.index, turned.astype(values.dtype))


class _Walk:
    """Follow a stream through the graph in both directions."""

    def __init__(self, graph: Graph, stream: Stream, norms: Norms) -> None:
        self._graph, self._stream, self._norms = graph, stream, norms
        self._waiting: list[Tensor] = []
        self._slots: set[tuple[int, int, int]] = set()

    def run(self, tensor: Tensor, axis: int) -> None:
        self._reach(tensor, axis)
        while self._waiting:
            current = self._waiting.pop()
            where = self._stream.axes[id(current)][1]
            self._behind(current, where)
            self._in_front(current, where)

    def _reach(self, tensor: Tensor, axis: int) -> None:
        known = self._stream.axes.get(id(tensor))
        if known is not None:
            if known[1] != axis:
                raise _RefusedError(f"{tensor.name} has its channels on two axes")
            return
        self._stream.axes[id(tensor)] = (tensor, axis)
        shape = tensor.shape
        if shape is None or shape[axis] != self._stream.channels:
            raise _RefusedError(f"{tensor.name} has another number of channels")
        if self._graph.is_output(tensor):
            raise _RefusedError(f"{tensor.name} is an output of the model")
        if tensor.name in self._graph.captured:
            raise _RefusedError(f"control flow reads {tensor.name}")
        self._waiting.append(tensor)

    # ------------------------------------------------------------------ makers

    def _behind(self, tensor: Tensor, axis: int) -> None:
        node = self._graph.producer(tensor)
        if node is None:
            raise _RefusedError(f"{tensor.name} is an input of the model")
        if node.op in _SUMS:
            self._operands(node, axis)
        elif self._scale_index(node) is not None:
            self._reach(node.inputs[self._scale_index(node) or 0], axis)
        elif node.op in NORMS:
            if self._norms != "through":
                raise _RefusedError(f"{node.name} ({node.op}) writes it")
            self._norm(node, axis)
        elif node.op in ("Conv", "Gemm", "MatMul"):
            self._written(node, axis)
        elif node.op in ("Gather", "Expand") and isinstance(node.inputs[0], Constant):
            self._table(node, axis)
        else:
            self._moved(node, axis)

    def _operands(self, node: Node, axis: int) -> None:
        rank = rank_of(node.outputs[0])
        for index, operand in enumerate(node.inputs):
            if not isinstance(operand, Constant):
                if rank_of(operand) != rank:
                    raise _RefusedError(f"{node.name} stretches {operand.name}")
                self._reach(operand, axis)
                continue
            place = axis - (rank or 0) + len(operand.shape)
            if operand.shape and place < 0:
                raise _RefusedError(f"{node.name} adds a constant across the channels")
            self._write(node, index, max(place, 0))

    def _written(self, node: Node, axis: int) -> None:
        weight = node.inputs[1]
        rank = rank_of(node.outputs[0]) or 0
        wanted = 1 if node.op == "Conv" else rank - 1
        if not isinstance(weight, Constant) or len(weight.shape) < 2 or axis != wanted:
            raise _RefusedError(f"{node.name} ({node.op}) writes it, without constant weights")
        if int(node.attrs.get("group", 1)) != 1:
            raise _RefusedError(f"{node.name} is grouped: its outputs cannot be mixed")
        rows = node.op == "Conv" or (node.op == "Gemm" and bool(node.attrs.get("transB", 0)))
        self._write(node, 1, 0 if rows else len(weight.shape) - 1)
        bias = given_input(node, 2)
        if bias is None:
            return
        if constant_of(bias) is None or float(node.attrs.get("beta", 1.0)) != 1.0:
            raise _RefusedError(f"the bias of {node.name} is not constant")
        self._write(node, 2, max(0, len(bias.shape) - 1))

    def _table(self, node: Node, axis: int) -> None:
        """Embeddings and tokens: rows of a constant."""
        source = source_axis(node, 0, axis)
        if source is None:
            raise _RefusedError(f"{node.name} ({node.op}) takes its table apart")
        self._write(node, 0, source)

    def _moved(self, node: Node, axis: int) -> None:
        indices = data_indices(node)
        axes = [source_axis(node, index, axis) for index in indices]
        if any(found is None for found in axes):
            raise _RefusedError(f"{node.name} ({node.op}) writes it")
        for index, found in zip(indices, axes, strict=True):
            assert found is not None
            if isinstance(node.inputs[index], Constant):
                self._write(node, index, found)
            else:
                self._reach(node.inputs[index], found)

    def _write(self, node: Node, index: int, axis: int) -> None:
        if constant_of(node.inputs[index]) is None:
            raise _RefusedError(f"{node.inputs[index].name} is not a constant of floats")
        if (id(node), index, axis) not in self._slots:
            self._slots.add((id(node), index, axis))
            self._stream.writers.append(Slot(node=node, index=index, axis=axis))

    # ------------------------------------------------------------------ readers

    def _in_front(self, tensor: Tensor, axis: int) -> None:
        for node, index in self._graph.consumers(tensor):
            if node.op in _SUMS or self._scale_index(node) == index:
                self._reach(node.outputs[0], axis)
            elif node.op in NORMS and index == 0:
                self._norm(node, axis)
            elif node.op != "Shape":
                self._read(node, index, axis)

    def _read(self, node: Node, index: int, axis: int) -> None:
        moved = moved_axis(node, index, axis)
        if moved is not None:
            for out in node.outputs:
                if out.name:
                    self._reach(out, moved)
            return
        reader = linear_reader(node, index, axis, self._stream.channels)
        if isinstance(reader, str):
            raise _RefusedError(f"{node.name} reads it: {reader}")
        if self._norms == "end":
            raise _RefusedError(f"{node.name} reads it without a norm")
        if int(node.attrs.get("group", 1)) != 1:
            raise _RefusedError(f"{node.name} is grouped: its inputs cannot be mixed")
        if (id(node), 1, reader.axis) not in self._slots:
            self._slots.add((id(node), 1, reader.axis))
            self._stream.readers.append(Slot(node=node, index=1, axis=reader.axis))

    def _norm(self, node: Node, axis: int) -> None:
        if self._norms == "none":
            raise _RefusedError(f"{node.name} ({node.op}) reads it")
        norm = read_norm(node)
        if isinstance(norm, str):
            raise _RefusedError(f"{node.name}: {norm}")
        if axis != len(node.inputs[0].shape) - 1:
            raise _RefusedError(f"{node.name} does not go over the channels")
        if self._norms == "through" and not norm.plain:
            raise _RefusedError(f"{node.name} has a gain or bias that does not fold")
        if all(norm.node is not node for norm in self._stream.norms):
            self._stream.norms.append(norm)
        self._reach(node.inputs[0], axis)
        if self._norms == "through":
            self._reach(node.outputs[0], axis)

    @staticmethod
    def _scale_index(node: Node) -> int | None:
        """Return which input of a Mul or Div by one number is scaled."""
        if node.op not in ("Mul", "Div"):
            return None
        scalars = [scalar_of(tensor) is not None for tensor in node.inputs]
        if node.op == "Div":
            return 0 if scalars == [False, True] else None
        return {(False, True): 0, (True, False): 1}.get((scalars[0], scalars[1]))
