"""Chains of ops that are one gain and one offset per channel.

The ops are Mul, Div, Add, Sub and BatchNormalization; their operands are constant and vary along
one axis at most. A chain is read from its head as long as each link has one reader, and put
together in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Graph, Node, Tensor
from qpass.passes.normalize.folding import Array, constant_of, rank_of, sole_reader
from qpass.passes.normalize.linear_folding import Affine

STEPS: Final = ("Add", "BatchNormalization", "Div", "Mul", "Sub")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """`nodes` compute gain * source + offset; `axis` is None when the same for all channels."""

    source: Tensor
    nodes: tuple[Node, ...]
    axis: int | None
    affine: Affine

    @property
    def output(self) -> Tensor:
        """What the chain makes."""
        out: Tensor = self.nodes[-1].outputs[0]
        return out

    def along(self, axis: int, channels: int) -> Affine | None:
        """Return the affine for channels along `axis`, None when it does not go along it."""
        if self.axis is not None:
            return self.affine if self.axis == axis else None
        gain, offset = (
            np.broadcast_to(v, (channels,)) for v in (self.affine.gain, self.affine.offset)
        )
        return Affine(gain=gain, offset=offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    index: int  # of the input that is transformed
    axis: int | None
    affine: Affine


def chains(graph: Graph) -> list[Chain]:
    """Return the longest chains of `graph`, in execution order.

    The bias behind a MatMul is a part of that MatMul, and no chain.
    """
    found, inside = [], set()
    for node in graph.nodes:
        if node.op not in STEPS or id(node) in inside:
            continue
        step = _step(node)
        if step is None or _is_bias(graph, node, step):
            continue
        chain = _extend(graph, node, step)
        inside |= {id(link) for link in chain.nodes}
        found.append(chain)
    return found


def _is_bias(graph: Graph, node: Node, step: _Step) -> bool:
    maker = graph.producer(node.inputs[step.index])
    return node.op == "Add" and maker is not None and maker.op == "MatMul"


def _extend(graph: Graph, head: Node, step: _Step) -> Chain:
    nodes, axis, affine = [head], step.axis, step.affine
    while (reader := sole_reader(graph, nodes[-1].outputs[0])) is not None:
        following = _step(reader) if reader.op in STEPS else None
        if following is None or reader.inputs[following.index] is not nodes[-1].outputs[0]:
            break
        if axis is not None and following.axis not in (None, axis):
            break
        axis = following.axis if axis is None else axis
        affine = affine.then(following.affine.gain, following.affine.offset)
        nodes.append(reader)
    source = head.inputs[step.index]
    size = 1 if axis is None else source.shape[axis]
    wide = Affine(
        gain=np.array(np.broadcast_to(affine.gain, (size,))),
        offset=np.array(np.broadcast_to(affine.offset, (size,))),
    )
    return Chain(source=source, nodes=tuple(nodes), axis=axis, affine=wide)


def _step(node: Node) -> _Step | None:
    """Read one node; None when it is no affine of channels with finite constants."""
    if node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op == "BatchNormalization":
        return _batch_norm(node)
    values = [constant_of(tensor) for tensor in node.inputs]
    index = 0 if values[0] is None else 1
    constant, source = values[1 - index], node.inputs[index]
    if constant is None or values[index] is not None or not _is_float(source):
        return None
    found = _vector(constant, source)
    if found is None:
        return None
    axis, vector = found
    ones, zeros = np.ones_like(vector), np.zeros_like(vector)
    if node.op == "Mul":
        gain, offset = vector, zeros
    elif node.op == "Div":
        if index == 1 or not (vector != 0).all():
            return None
        gain, offset = 1.0 / vector, zeros
    elif node.op == "Add":
        gain, offset = ones, vector
    else:
        gain, offset = (ones, -vector) if index == 0 else (-ones, vector)
    return _finite(_Step(index=index, axis=axis, affine=Affine(gain=gain, offset=offset)))


def _batch_norm(node: Node) -> _Step | None:
    values = [constant_of(tensor) for tensor in node.inputs[1:5]]
    source = node.inputs[0]
    if node.attrs.get("training_mode", 0) or any(value is None for value in values):
        return None
    if (rank_of(source) or 0) < 2 or not _is_float(source):
        return None
    scale, bias, mean, variance = (np.asarray(value) for value in values)
    if source.shape[1] != scale.size:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        gain = scale / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        offset = bias - gain * mean
    return _finite(_Step(index=0, axis=1, affine=Affine(gain=gain, offset=offset)))


def _finite(step: _Step) -> _Step | None:
    numbers = (step.affine.gain, step.affine.offset)
    return step if all(np.isfinite(v).all() for v in numbers) else None


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype in (np.float32, np.float64)


def _vector(constant: Array, source: Tensor) -> tuple[int | None, Array] | None:
    """Return (axis, values) of a constant that varies along one axis of `source` and repeats.

    The result has the shape of `source`: nothing is stretched to the constant's.
    """
    rank = rank_of(source)
    if rank is None or constant.ndim > rank:
        return None
    if constant.size == 1:
        return None, constant.reshape(1)
    long = [i for i, size in enumerate(constant.shape) if size != 1]
    if len(long) != 1:
        return None
    axis = long[0] + rank - constant.ndim
    if source.shape[axis] != constant.size:
        return None
    return axis, constant.ravel()
