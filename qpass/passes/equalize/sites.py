"""Find where scales of channels can migrate, exactly in float.

What it does
    A site begins at a tensor that a linear op reads in integers. Its channels are to be divided by
    s; from there the scale is followed through the ops that commute with it, forward and backward,
    until something takes it up: the weights of linear ops behind (times s), the constants in front
    (divided by s): gain and bias of a norm, output channels and bias of a linear op, constants of
    Mul, Add and Concat. A product of two activations passes the scale of its right operand's
    columns on (softmax(A) V), or wants the inverse at its other operand (Q K^T). A sum of two
    activations wants the same scale at both, which makes one site of a residual stream.
Why it is exact
    Every op that is passed obeys f(s * x) == s * f(x) for positive s by channel, so the function of
    the model does not change. Where that does not hold for a channel, its scale is fixed to 1; when
    all are, the site is refused with the reason.
Preconditions
    The graph is normalized and has inferred shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qpass.graph import Graph, Node, Tensor
from qpass.matching import channel_axis
from qpass.passes.affine.absorb import linear_reader
from qpass.passes.equalize.labels import along
from qpass.passes.equalize.linear import channels_of
from qpass.passes.equalize.site import Reader, Refused, Site
from qpass.passes.equalize.spread import Spread
from qpass.units import is_weighted

__all__ = ["Site", "find_sites"]


def find_sites(graph: Graph, quantized: Sequence[str]) -> tuple[list[Site], list[Refused]]:
    """Return the sites of a graph in topological order, and the tensors that have none.

    Args:
        graph: is not changed; the sites refer to its nodes.
        quantized: names of the linear ops that read integers.
    """
    wanted, seen = set(quantized), set[str]()
    sites: list[Site] = []
    refused: list[Refused] = []
    for node in graph.nodes:
        tensor = node.inputs[0] if node.inputs else None
        if node.name not in wanted or tensor is None or tensor.name in seen:
            continue
        seen.add(tensor.name)
        found = _site(graph, node, tensor)
        if isinstance(found, Site):
            sites.append(found)
            if found.kind == "stream":  # its other readers would find the same site
                seen |= found.tensors
        elif is_weighted(node):
            readers = direct_readers(graph, tensor, wanted)
            refused.append(Refused(tensor=tensor.name, reason=found, readers=readers))
    return sites, refused


def direct_readers(graph: Graph, tensor: Tensor, wanted: set[str]) -> tuple[Reader, ...]:
    """Return the linear ops that read `tensor` itself, with one label for each channel.

    All along one axis, that of the first: what a Conv scales by channel a MatMul cannot take back.
    """
    found: list[Reader] = []
    taken: tuple[int, int] | None = None
    for node, index in graph.consumers(tensor):
        channels = channels_of(node)
        if node.name not in wanted or channels is None:
            continue
        axis = channel_axis(node) % len(tensor.shape or node.inputs[1].shape)
        if taken not in (None, (axis, channels)):
            continue
        reader = linear_reader(node, index, axis, channels)
        if not isinstance(reader, str):
            taken = axis, channels
            labels = np.arange(1, channels + 1)
            found.append(Reader(linear=reader, labels=labels, power=-1))
    return tuple(found)


def _site(graph: Graph, node: Node, tensor: Tensor) -> Site | str:
    if tensor.shape is None:
        return "its shape is not known"
    rank = len(tensor.shape)
    weighted = is_weighted(node)
    axis = channel_axis(node) % rank
    channels = channels_of(node) if weighted else tensor.shape[axis]
    if not isinstance(channels, int):
        return "the number of its channels is not known"
    if not weighted and node.op != "MatMul":
        return f"{node.op} of two activations"
    spread = Spread(graph)
    labels = along(axis, rank, np.arange(1, channels + 1))
    if not weighted:  # Q K^T: heads have scales of their own
        heads = tensor.shape[1] if rank == 4 else 1
        if not isinstance(heads, int):
            return "the number of its heads is not known"
        shape = [1] * rank
        shape[axis], shape[1 if rank == 4 else 0] = channels, heads
        labels = np.arange(1, channels * heads + 1).reshape(shape)
    spread.start(tensor, labels)
    return spread.result(tensor)
