"""Where a per-channel affine correction of a linear op goes, and putting it there.

What it does
    ``gain * y + offset`` behind a linear op becomes a change of its constants: the weight scale (or
    the float weight) takes the gain, the bias takes both.
Why it is free at run time
    A quantized linear op computes ``y = s_w * (q_w @ x) + b`` with one ``s_w`` per channel, hence
    ``gain * y + offset == (gain * s_w) * (q_w @ x) + (gain * b + offset)``. Integers, ops and edges
    stay the same.
Preconditions
    `insert_qdq` has run and biases are still float (`lower_biases` makes them int32 afterwards,
    with the scale that they then must have).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qpass.graph import Constant, Graph, Node, array_of
from qpass.matching import weight_axis
from qpass.passes.channel_affine import Array, ChannelAffine, GainKind

# Ops through which a MatMul's bias may lie behind it.
_PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Input `index` of the node `node`, a constant."""

    node: Node
    index: int

    @property
    def constant(self) -> Constant:
        """The constant that is there now."""
        return self.node.inputs[self.index]

    def write(self, graph: Graph, values: Array) -> None:
        """Put new values there; other readers of the old constant keep it."""
        old, new = self.constant, graph.constant(self.constant.name, values)
        graph.set_input(self.node, self.index, new)
        if not old.outputs and old.name not in graph.captured:
            new.name = old.name  # nobody else has it: names of constants stay as they were


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One place of correction: the output of a linear op in the quantized graph.

    gain, gain_slot, gain_axis
        How the gain is expressed: per channel along `gain_axis` of the constant, or as one number.
    offset
        False: there is nothing that could take an offset.
    bias_slot, bias_inside
        The bias constant; None: one is made in the bias input of Conv or Gemm. `bias_inside` says
        that `tap` includes the bias, so that the gain applies to it as well.
    reasons
        Why the site takes less than a gain and an offset per channel.
    """

    linear: str
    op: str
    node: Node
    tap: str
    axis: int
    channels: int
    gain: GainKind
    gain_slot: Slot
    gain_axis: int | None
    offset: bool
    bias_slot: Slot | None
    bias_inside: bool
    reasons: tuple[str, ...] = ()


def find_site(graph: Graph, nodes: Mapping[str, Node], reference: Node) -> Site | str:
    """Return where the output of the float node `reference` can be corrected, or why nowhere.

    Args:
        graph: the quantized graph.
        nodes: its nodes by name.
        reference: linear op of the float graph.
    """
    node = nodes.get(reference.name)
    if node is None or node.op != reference.op:
        return "the quantized graph computes it in another way"
    gain_slot, gain, gain_axis, reasons = _gain_place(graph, node, reference)
    if gain_slot is None:
        return reasons[0]
    rank = len(reference.inputs[1].shape)
    channels = int(reference.inputs[1].shape[weight_axis(reference, rank)])
    if reference.op == "ConvTranspose":
        channels *= int(reference.attrs.get("group", 1))
    bias_inside = node.op != "MatMul"
    bias_slot, offset, reason = _bias_place(graph, node, inside=bias_inside)
    return Site(
        linear=reference.name,
        op=reference.op,
        node=node,
        tap=node.outputs[0].name,
        axis=1 if reference.op in ("Conv", "ConvTranspose") else -1,
        channels=channels,
        gain=gain,
        gain_slot=gain_slot,
        gain_axis=gain_axis,
        offset=offset,
        bias_slot=bias_slot,
        bias_inside=bias_inside,
        reasons=(*reasons, *([reason] if reason else [])),
    )


def fold(graph: Graph, site: Site, affine: ChannelAffine) -> None:
    """Absorb `affine` into the constants of `site`; what cannot be absorbed must be 1 or 0."""
    if (affine.gain != 1.0).any():
        values = array_of(site.gain_slot.constant)
        gain = affine.gain
        if site.gain_axis is None:
            gain = gain[0]
        else:
            gain = gain.reshape([-1 if i == site.gain_axis else 1 for i in range(values.ndim)])
        site.gain_slot.write(graph, (values.astype(np.float64) * gain).astype(values.dtype))
    if not site.offset or not ((affine.gain != 1.0).any() or affine.offset.any()):
        return
    if site.bias_slot is None:
        bias = graph.constant(f"{site.linear}_bias", affine.offset.astype(np.float32))
        if len(site.node.inputs) == 3:
            graph.set_input(site.node, 2, bias)
        elif affine.offset.any():
            graph.set_input(site.node, len(site.node.inputs), bias)
        return
    values = array_of(site.bias_slot.constant)
    wide = values.astype(np.float64)
    wide = wide * affine.gain + affine.offset if site.bias_inside else wide + affine.offset
    site.bias_slot.write(graph, wide.astype(values.dtype))


def _gain_place(
    graph: Graph, node: Node, reference: Node
) -> tuple[Slot | None, GainKind, int | None, tuple[str, ...]]:
    weight = node.inputs[1]
    rank = len(reference.inputs[1].shape)
    axis = weight_axis(node, rank) % rank
    grouped = node.op == "ConvTranspose" and int(node.attrs.get("group", 1)) > 1
    if isinstance(weight, Constant):
        if grouped:
            return Slot(node=node, index=1), "tensor", None, (_GROUPED,)
        return Slot(node=node, index=1), "channel", axis, ()
    dq = graph.producer(weight)
    if dq is None or dq.op != "DequantizeLinear" or not isinstance(dq.inputs[1], Constant):
        return None, "none", None, ("its weight is neither a constant nor dequantized",)
    if len(graph.consumers(weight)) > 1:
        return None, "none", None, ("several nodes read its dequantized weight",)
    slot = Slot(node=dq, index=1)
    scale = array_of(dq.inputs[1])
    if (np.frexp(scale)[0] == 0.5).all():
        return slot, "none", None, ("its scales are powers of two: a gain would leave that grid",)
    if scale.size == 1:
        return slot, "tensor", None, ("one scale for the whole weight: one gain",)
    blocked = bool(dq.attrs.get("block_size", 0))
    stored_axis = int(dq.attrs.get("axis", 1)) % rank
    if grouped:
        return slot, "tensor", None, (_GROUPED,)
    if blocked and stored_axis != axis:
        return slot, "channel", axis, ()
    if not blocked and stored_axis == axis:
        return slot, "channel", 0, ()
    return slot, "tensor", None, ("its scales do not lie along the output channels: one gain",)


_GROUPED = "the scales of a grouped ConvTranspose are shared by its groups: one gain"


def _bias_place(graph: Graph, node: Node, *, inside: bool) -> tuple[Slot | None, bool, str]:
    """Return the slot of the bias, whether an offset can be taken, and why not."""
    if inside:
        if node.op == "Gemm" and float(node.attrs.get("beta", 1.0)) != 1.0:
            return None, False, "Gemm with beta"
        if len(node.inputs) < 3 or not node.inputs[2].name:
            return None, True, ""
        bias = node.inputs[2]
        if not isinstance(bias, Constant):
            return None, False, "its bias is computed at run time"
        if bias.shape and len(bias.shape) > 1 and any(size != 1 for size in bias.shape[:-1]):
            return None, False, "its bias differs from row to row"
        return Slot(node=node, index=2), True, ""
    out = node.outputs[0]
    while True:
        readers = graph.consumers(out)
        if len(readers) != 1 or graph.is_output(out):
            return None, False, "there is no bias behind it (--allow-runtime-ops would add one)"
        reader, index = readers[0]
        if reader.op not in _PAIR or index != 0:
            break
        out = reader.outputs[0]
    if reader.op == "Add" and isinstance(reader.inputs[1 - index], Constant):
        return Slot(node=reader, index=1 - index), True, ""
    if reader.op == "Add":
        maker = graph.producer(reader.inputs[1 - index])
        stored = maker.inputs[0] if maker and maker.op == "DequantizeLinear" else None
        if isinstance(stored, Constant):
            return None, False, "the bias behind it is stored in integers"
    return None, False, "there is no bias behind it (--allow-runtime-ops would add one)"
