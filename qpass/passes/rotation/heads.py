"""Rotate the channels of attention heads: query with key, value with the projection behind.

What it does
    With one orthogonal R for all heads of an attention, q' = q R and k' = k R, v' = v R. The scores
    are the same, and the projection that reads the heads takes R' W. All of it goes into constants.
Why it is correct
    (q R)(k R)' = q k'. Attention mixes tokens and not channels, so softmax(s) (v R) = (softmax(s)
    v) R, and (c R)(R' W) = c W.
Why it helps
    One scale serves a whole tensor: an outlier channel of q, k, v or of what the projection reads
    takes integers from all others. R spreads it over the channels of its head.
Preconditions
    The graph is normalized. Everything between a linear op with constant weights and the product
    moves values or scales by one number; channels that are turned by position (RoPE), normalized or
    scaled one by one are refused, and so are channels that something else reads.
Source
    Ashkboos et al., QuaRot, 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from qpass.graph import Graph, Node, Tensor, array_of
from qpass.matching import weight_axis
from qpass.passes.affine.absorb import linear_reader
from qpass.passes.normalize.folding import FoldResult, constant_of, given_input, write_constant
from qpass.passes.rotation.hadamard import Matrix, solve_rotation
from qpass.passes.rotation.trace import Arrival, Ids, arrivals
from qpass.report.model import PassReport
from qpass.units import is_weighted

QUERY_KEY: Final = "rotate query and key"
VALUE: Final = "rotate value and projection"
_ON_SCORES: Final = ("Add", "Div", "Mul", "Sub", "Where")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """Channels of `linear` that arrive at a product in groups: `groups` is [heads, size]."""

    linear: Node
    groups: Ids
    biases: tuple[tuple[Node, int], ...]


class _Traced(NamedTuple):
    """A linear op, and where its output channels arrive."""

    linear: Node
    ends: list[Arrival]


def rotate_heads(graph: Graph, seed: int) -> PassReport:
    """Rotate the heads of every attention that allows it; `changed` counts pairs."""
    result = FoldResult()
    attentions = [node for node in graph.nodes if node.op == "Softmax"]
    linears = graph.nodes if attentions else []
    traced = [_Traced(node, ends) for node in linears if (ends := _ends(graph, node))]
    for softmax in attentions:
        scores = _scores(graph, softmax)
        if scores is not None:
            _note(result, QUERY_KEY, scores, _rotate_query_key(graph, scores, traced, seed))
        for node, index in graph.consumers(softmax.outputs[0]):
            if node.op == "MatMul" and index == 0:
                _note(result, VALUE, node, _rotate_value(graph, node, traced, seed))
    return PassReport(name="rotate-heads", changed=result.changed, refusals=tuple(result.refusals))


def _note(result: FoldResult, rule: str, node: Node, reason: str) -> None:
    if reason:
        result.refuse(rule, node, reason)
    else:
        result.changed += 1


def _ends(graph: Graph, node: Node) -> list[Arrival]:
    """Return where the output channels of a linear op with constant weights arrive."""
    if not is_weighted(node) or len(node.inputs[1].shape) < 2:
        return []
    out = node.outputs[0]
    axis = 1 if node.op in ("Conv", "ConvTranspose") else len(out.shape or (0,)) - 1
    ends = arrivals(graph, out, axis)
    return [] if isinstance(ends, str) else ends


def _scores(graph: Graph, softmax: Node) -> Node | None:
    """Return the product in front of a Softmax, behind masks and scales."""
    waiting: list[Tensor] = [softmax.inputs[0]]
    seen: set[int] = set()
    while waiting:
        maker = graph.producer(waiting.pop())
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        if maker.op == "MatMul":
            return maker
        if maker.op in _ON_SCORES:
            waiting += maker.inputs
    return None


def _rotate_query_key(graph: Graph, node: Node, traced: list[_Traced], seed: int) -> str:
    """Rotate both operands of a product; return why not, "" when done."""
    query, key = _made(node, 0, traced), _made(node, 1, traced, transposed=True)
    if isinstance(query, str):
        return query
    if isinstance(key, str):
        return key
    if query.linear is key.linear and np.intersect1d(query.groups, key.groups).size:
        return "query and key are the same channels"
    rotation = solve_rotation(query.groups.shape[1], seed)
    _turn(graph, query, rotation)
    _turn(graph, key, rotation)
    return ""


def _rotate_value(graph: Graph, node: Node, traced: list[_Traced], seed: int) -> str:
    """Rotate what a product mixes and the ops that read it; return why not, "" when done."""
    value = _made(node, 1, traced)
    if isinstance(value, str):
        return value
    size = value.groups.shape[1]
    readers = _projections(graph, node, size)
    if isinstance(readers, str):
        return readers
    rotation = solve_rotation(size, seed)
    _turn(graph, value, rotation)
    for reader, axis in readers:
        rows = np.arange(reader.inputs[1].shape[axis]).reshape(-1, size)
        _turn_constant(graph, reader, 1, axis, rows, rotation)
    return ""


def _made(
    node: Node, index: int, traced: list[_Traced], *, transposed: bool = False
) -> _Made | str:
    """Return whose channels lie along the last (or last but one) axis of an input of a product."""
    for linear, ends in traced:
        here = next((end for end in ends if end.node is node and end.index == index), None)
        if here is None:
            continue
        ids = np.swapaxes(here.ids, -1, -2) if transposed else here.ids
        name = linear.name
        if ids.ndim < 2 or (ids != ids[..., :1, :]).any():
            return f"the channels of {name} do not lie along the head"
        groups = np.unique(ids[..., 0, :].reshape(-1, ids.shape[-1]), axis=0)
        if np.unique(groups).size != groups.size:
            return f"heads share channels of {name} in part"
        for end in ends:
            if end is not here and np.isin(end.ids, groups).any():
                other = "the model's output" if end.node is None else end.node.name
                return f"{other} reads the same channels of {name}"
        obstacle = _unturnable(linear)
        return obstacle or _Made(linear=linear, groups=groups, biases=here.biases)
    return f"operand {index} does not come straight from a linear op with constant weights"


def _unturnable(linear: Node) -> str:
    """Return why the output channels of a linear op cannot be mixed."""
    if int(linear.attrs.get("group", 1)) != 1:
        return f"{linear.name} is grouped: its outputs cannot be mixed"
    bias = given_input(linear, 2)
    constants = [linear.inputs[1], *([] if bias is None else [bias])]
    if any(constant_of(tensor) is None for tensor in constants):
        return f"weight or bias of {linear.name} is not a constant of floats"
    return ""


def _projections(graph: Graph, node: Node, size: int) -> list[tuple[Node, int]] | str:
    """Return the linear ops that read the heads, each with the axis of its weight's rows."""
    out = node.outputs[0]
    if out.shape is None or out.shape[-1] != size:
        return "the shape of the product is not known"
    ends = arrivals(graph, out, len(out.shape) - 1)
    if isinstance(ends, str):
        return ends
    found = []
    for end in ends:
        if end.node is None:
            return "the heads are an output of the model"
        if end.biases:
            return f"{end.biases[0][0].name} adds to the heads"
        axis = _contracted(end)
        channels = end.ids.shape[axis]
        reader = linear_reader(end.node, end.index, axis, channels)
        if isinstance(reader, str):
            return f"{end.node.name} reads the heads: {reader}"
        if int(end.node.attrs.get("group", 1)) != 1:
            return f"{end.node.name} is grouped: its inputs cannot be mixed"
        rows = np.moveaxis(end.ids, axis, -1)
        if channels % size or (rows != np.tile(np.arange(size), channels // size)).any():
            return f"{end.node.name} does not read the channels of a head side by side"
        found.append((end.node, reader.axis))
    return found


def _contracted(end: Arrival) -> int:
    assert end.node is not None
    if end.node.op in ("Conv", "ConvTranspose"):
        return 1
    last = end.ids.ndim - 1
    return 0 if end.node.op == "Gemm" and end.node.attrs.get("transA", 0) else last


def _turn(graph: Graph, made: _Made, rotation: Matrix) -> None:
    """Rotate the output channels of a linear op and all of its biases, group by group."""
    node, groups = made.linear, made.groups
    weight = node.inputs[1]
    channels = weight.shape[weight_axis(node, len(weight.shape))]
    _turn_constant(graph, node, 1, weight_axis(node, len(weight.shape)), groups, rotation)
    if given_input(node, 2) is not None:
        _turn_bias(graph, node, 2, channels, -1, groups, rotation)
    from_end = -(len(node.outputs[0].shape) - 1) if node.op == "Conv" else -1
    for add, index in made.biases:
        _turn_bias(graph, add, index, channels, from_end, groups, rotation)


def _turn_bias(
    graph: Graph, node: Node, index: int, channels: int, axis: int, groups: Ids, rotation: Matrix
) -> None:
    """Rotate an added constant; one that is a single number is written out for all channels."""
    values = array_of(node.inputs[index])
    if values.size == 1:
        shape = [channels] + [1] * (-axis - 1)
        write_constant(graph, node, index, np.full(shape, values.ravel()[0], values.dtype))
    _turn_constant(graph, node, index, axis, groups, rotation)


def _turn_constant(
    graph: Graph, node: Node, index: int, axis: int, groups: Ids, rotation: Matrix
) -> None:
    """Multiply groups of a constant along `axis` by `rotation`, in float64, rounded once."""
    values = array_of(node.inputs[index])
    wide = np.moveaxis(values.astype(np.float64), axis, -1).copy()
    wide[..., groups] = wide[..., groups] @ rotation
    write_constant(graph, node, index, np.moveaxis(wide, -1, axis).astype(values.dtype))
