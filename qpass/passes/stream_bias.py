"""Move the bias of what writes to a residual stream into the biases of what reads the stream.

What it does
    ``x + (f W + b)`` is two Adds for each branch. Where everything that reads the stream from there
    on is linear and has a bias, the stream may run without ``b``: each reader ``V`` adds ``b V`` to
    its own bias, and the Add of ``b`` goes. A network whose norms are folded (Unified
    Normalization) has such a stream; LayerNormalization does not allow it.
Why it is correct
    ``(x + b) V + c = x V + (c + b V)``, and an offset by channel passes sums and ops that move,
    select or average whole channels. It has to arrive once at each reader: what would carry it
    twice, or something that is not linear, or an output of the model, refuses the move.
What it costs
    Nothing: a Conv or Gemm keeps its bias, which is free there; only a MatMul loses an Add.
Preconditions
    The graph is normalized; affine maps of channels are folded (`fold_channel_affines`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from qpass.graph import Constant, Graph, Node, Tensor
from qpass.passes.affine.absorb import LinearReader, absorb, linear_reader, overflow
from qpass.passes.affine.movers import data_indices, moved_axis
from qpass.passes.equalize.linear import has_bias
from qpass.passes.norm_gain import NORMS
from qpass.passes.normalize.folding import (
    Array,
    FoldResult,
    constant_of,
    rank_of,
    sole_reader,
)
from qpass.passes.normalize.linear_folding import Affine
from qpass.report.model import PassReport
from qpass.units import is_weighted

RULE: Final = "move stream bias"


@dataclass(slots=True, kw_only=True)
class _Flow:
    """How far an offset runs.

    axes: tensor -> the axis of its channels, for all that carry it. sums: residual sums on the way.
    normed: a norm reads it; such streams are not what this is about, and nothing is said of them.
    """

    axes: dict[int, int]
    readers: list[LinearReader] = field(default_factory=list)
    sums: int = 0
    normed: bool = False
    reason: str = ""


def move_stream_biases(graph: Graph) -> PassReport:
    """Remove every bias of a MatMul that the readers of a residual stream can take."""
    result = FoldResult()
    for add in list(graph.nodes):
        found = _bias_of(graph, add)
        if found is None:
            continue
        product, bias = found
        flow = _follow(graph, add, bias.size)
        if not flow.sums or flow.normed:
            continue
        affine = Affine(gain=np.ones(bias.size), offset=bias)
        reasons = (overflow(reader, affine) for reader in flow.readers)
        reason = flow.reason or next(filter(None, reasons), "")
        if reason:
            result.refuse(RULE, product, reason)
            continue
        for reader in flow.readers:
            absorb(graph, reader, affine)
        out = add.outputs[0]
        graph.remove(add)
        graph.set_output(product, 0, out)
        result.changed += 1
    if result.changed:
        graph.remove_unused()
        graph.infer_shapes()
    return PassReport(name="stream-bias", changed=result.changed, refusals=tuple(result.refusals))


def _bias_of(graph: Graph, add: Node) -> tuple[Node, Array] | None:
    """Return the MatMul in front of an Add and the bias by channel, float64, that it gets."""
    if add.op != "Add" or len(add.inputs) != 2:
        return None
    constants = [i for i, tensor in enumerate(add.inputs) if isinstance(tensor, Constant)]
    if len(constants) != 1:
        return None
    values = constant_of(add.inputs[constants[0]])
    data, out = add.inputs[1 - constants[0]], add.outputs[0]
    product = graph.producer(data)
    if product is None or product.op != "MatMul" or not is_weighted(product):
        return None
    if values is None or sole_reader(graph, data) is None or out.shape is None:
        return None
    channels = out.shape[-1]
    if not isinstance(channels, int) or data.shape != out.shape:
        return None
    if values.size != channels or (values.shape or (1,))[-1] != channels:
        return None
    return product, values.astype(np.float64).ravel()


def _follow(graph: Graph, add: Node, channels: int) -> _Flow:
    """Follow the offset from the output of `add` to everything that reads it."""
    out = add.outputs[0]
    rank = rank_of(out)
    assert rank is not None
    flow = _Flow(axes={id(out): rank - 1}, reason=_leaves(graph, out))
    for node in graph.nodes:
        hits = [i for i, tensor in enumerate(node.inputs) if id(tensor) in flow.axes]
        if not hits or node.op == "Shape":
            continue
        if node.op in NORMS:
            flow.normed = True
        if flow.reason or flow.normed:
            break
        axis = flow.axes[id(node.inputs[hits[0]])]
        moved = _moved(flow, node, hits, axis)
        if moved is None:
            reader = linear_reader(node, hits[0], axis, channels)
            flow.reason = _obstacle(graph, node, reader)
            if isinstance(reader, LinearReader):
                flow.readers.append(reader)
            continue
        for made in node.outputs:
            flow.axes[id(made)] = moved
            flow.reason = flow.reason or _leaves(graph, made)
    if not flow.readers:
        flow.reason = flow.reason or "nothing reads it"
    return flow


def _moved(flow: _Flow, node: Node, hits: list[int], axis: int) -> int | None:
    """Return the axis of the channels behind an op that passes the offset on, else None."""
    if node.op in ("Add", "Sub"):
        flow.sums += not isinstance(node.inputs[1 - hits[0]], Constant)
        alike = node.inputs[hits[0]].shape == node.outputs[0].shape
        once = len(hits) == 1 and alike and not (node.op == "Sub" and hits[0] == 1)
        return axis if once else None
    if len(hits) != len(data_indices(node)):
        return None  # of a Concat, say, only a part carries it
    return moved_axis(node, hits[0], axis)


def _obstacle(graph: Graph, node: Node, reader: LinearReader | str) -> str:
    """Return why `node` cannot take the offset, "" when it can."""
    if isinstance(reader, str):
        if node.op in ("Add", "Sub"):
            return f"{node.name} adds it up otherwise"
        return f"{node.name}: {reader}"
    if reader.obstacle:
        return f"{node.name}: {reader.obstacle}"
    return "" if has_bias(graph, reader) else f"{node.name} has no bias"


def _leaves(graph: Graph, tensor: Tensor) -> str:
    if graph.is_output(tensor):
        return f"{tensor.name} is an output of the model"
    return "control flow reads it" if tensor.name in graph.captured else ""
