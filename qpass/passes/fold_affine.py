"""Where a per-channel affine correction of a linear op goes, and putting it there.

What it does
    ``gain * y + offset`` behind a linear op becomes a change of its constants: the weight scale (or
    the float weight) takes the gain, the bias takes both.
Why it is free at run time
    A quantized linear op computes ``y = s_w * (q_w @ x) + b`` with one ``s_w`` per channel, hence
    ``gain * y + offset == (gain * s_w) * (q_w @ x) + (gain * b + offset)``. Integers, ops and edges
    stay the same.
Where the scales cannot take it
    One scale for the whole weight, or one for all groups of a ConvTranspose, holds no gain per
    channel. The float weight does, and is rounded again on the same kind of grid (`requantize`):
    other integers, so whoever folds has to look at the output again (`Site.rounding` says so).
    A weight that several ops share gets a DequantizeLinear of its own for the corrected one.
Preconditions
    `insert_qdq` has run and biases are still float (`lower_biases` makes them int32 afterwards,
    with the scale that they then must have).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qpass.errors import InternalError
from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.matching import weight_axis
from qpass.passes.channel_affine import Array, ChannelAffine, GainKind
from qpass.passes.requantize import Rounding, find_rounding, requantize, scaled_weight
from qpass.qparams import as_half

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
    shared
        Other nodes read the dequantized weight too: `fold` makes one for this node first.
    groups
        Of a ConvTranspose, whose output channels lie along two axes of its weight.
    rounding
        Given: a gain per channel means new integers, and the output has to be looked at again.
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
    shared: bool = False
    groups: int = 1
    rounding: Rounding | None = None

    @property
    def predictable(self) -> bool:
        """True where `at_tap` tells what the op gives after a fold, to the last bits of float32."""
        return self.rounding is None and self.gain_slot.constant.dtype == np.float32

    @property
    def shifted(self) -> str:
        """Name of the tensor that has the offset: `tap`, or what a bias behind it makes."""
        if self.bias_inside or self.bias_slot is None:
            return self.tap
        return str(self.bias_slot.node.outputs[0].name)

    def at_tap(self, affine: ChannelAffine) -> ChannelAffine:
        """Return what folding `affine` does to `tap`: a bias behind it takes the offset."""
        if self.bias_inside:
            return affine
        return ChannelAffine(gain=affine.gain, offset=np.zeros(self.channels))


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
    place = _gain_place(graph, node, reference)
    if isinstance(place, str):
        return place
    weight = reference.inputs[1]
    channels = int(weight.shape[weight_axis(reference, len(weight.shape))])
    groups = int(reference.attrs.get("group", 1)) if reference.op == "ConvTranspose" else 1
    bias_inside = node.op != "MatMul"
    bias_slot, offset, reason = _bias_place(graph, node, inside=bias_inside)
    # A gain of the output is one of the bias inside of the op as well.
    gain: GainKind = "none" if bias_inside and not offset else place.kind
    return Site(
        linear=reference.name,
        op=reference.op,
        node=node,
        tap=node.outputs[0].name,
        axis=1 if reference.op in ("Conv", "ConvTranspose") else -1,
        channels=channels * groups,
        gain=gain,
        gain_slot=place.slot,
        gain_axis=place.axis,
        offset=offset,
        bias_slot=bias_slot,
        bias_inside=bias_inside,
        reasons=(*place.reasons, *([reason] if reason else [])),
        shared=is_shared(graph, node.inputs[1]),
        groups=groups,
        rounding=place.rounding,
    )


def fold(graph: Graph, site: Site, affine: ChannelAffine) -> None:
    """Absorb `affine` into the constants of `site`; what cannot be absorbed must be 1 or 0.

    Raises:
        InternalError: a gain is not positive; the clip of the fit is there to prevent that.
    """
    if not (affine.gain > 0.0).all():  # a scale is positive, and engines rely on it
        raise InternalError(f"{site.linear}: a gain of {affine.gain.min()} cannot be folded")
    if (affine.gain != 1.0).any():
        _fold_gain(graph, site, affine.gain)
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


def _fold_gain(graph: Graph, site: Site, gain: Array) -> None:
    slot, node = site.gain_slot, site.node
    dequantized = slot.node is not node
    if dequantized and is_shared(graph, node.inputs[1]):
        slot = Slot(node=own_dequantizer(graph, node, slot.node), index=slot.index)
    if site.rounding is not None:
        old = site.rounding.weight
        axis = weight_axis(node, old.ndim) % old.ndim
        weight = scaled_weight(old, gain, axis=axis, groups=site.groups)
        requantize(graph, slot.node, site.rounding, weight)
        return
    values = array_of(slot.constant)
    if site.gain_axis is None:
        scaled = values.astype(np.float64) * gain[0]
    else:
        groups = 1 if dequantized else site.groups
        scaled = scaled_weight(values, gain, axis=site.gain_axis, groups=groups)
    if dequantized and slot.node.attrs.get("block_size"):
        # Scales of blocks are stored in 16 bits where that loses nothing; a step of float16 more or
        # less in a scale is far below the error of the integers.
        wide = values.astype(np.float64)
        scaled = as_half(scaled) if np.array_equal(as_half(wide), wide) else scaled
    slot.write(graph, scaled.astype(values.dtype))


def is_shared(graph: Graph, tensor: Tensor) -> bool:
    """True when more than one op reads `tensor`; a body of control flow may."""
    return len(graph.consumers(tensor)) > 1 or tensor.name in graph.captured


def own_dequantizer(graph: Graph, node: Node, shared: Node) -> Node:
    """Give `node` a DequantizeLinear of its own, from the same integers."""
    old = node.inputs[1]
    weight = graph.variable(old.name, old.dtype, old.shape)
    numbers = [graph.constant(t.name, array_of(t)) for t in shared.inputs[1:]]
    dequantizer = graph.make(
        "DequantizeLinear",
        [shared.inputs[0], *numbers],
        [weight],
        name=shared.name,
        attrs=dict(shared.attrs),
    )
    graph.add(dequantizer, before=node)
    graph.set_input(node, 1, weight)
    return dequantizer


@dataclass(frozen=True, slots=True, kw_only=True)
class _GainPlace:
    """Where a gain goes: see `Site`."""

    slot: Slot
    kind: GainKind
    axis: int | None
    reasons: tuple[str, ...] = ()
    rounding: Rounding | None = None


def _gain_place(graph: Graph, node: Node, reference: Node) -> _GainPlace | str:
    weight = node.inputs[1]
    rank = len(reference.inputs[1].shape)
    axis = weight_axis(node, rank) % rank
    grouped = node.op == "ConvTranspose" and int(node.attrs.get("group", 1)) > 1
    if isinstance(weight, Constant):
        return _GainPlace(slot=Slot(node=node, index=1), kind="channel", axis=axis)
    dq = graph.producer(weight)
    if dq is None or dq.op != "DequantizeLinear" or not isinstance(dq.inputs[1], Constant):
        return "its weight is neither a constant nor dequantized"
    slot = Slot(node=dq, index=1)
    scale = array_of(dq.inputs[1])
    blocked = bool(dq.attrs.get("block_size", 0))
    stored_axis = int(dq.attrs.get("axis", 1)) % rank
    fixed_grid = bool((np.frexp(scale)[0] == 0.5).all())
    if not fixed_grid and not grouped:
        if blocked and stored_axis != axis:
            return _GainPlace(slot=slot, kind="channel", axis=axis)
        if not blocked and scale.size > 1 and stored_axis == axis:
            return _GainPlace(slot=slot, kind="channel", axis=0)
    rounding = find_rounding(dq, reference.inputs[1])
    if isinstance(rounding, Rounding):
        return _GainPlace(slot=slot, kind="channel", axis=axis, rounding=rounding)
    if fixed_grid:
        reason = f"its scales are powers of two: a gain would leave that grid, and {rounding}"
        return _GainPlace(slot=slot, kind="none", axis=None, reasons=(reason,))
    if grouped:
        reason = f"the groups of the ConvTranspose share its scales, and {rounding}: one gain"
    elif scale.size == 1:
        reason = f"one scale for the whole weight, and {rounding}: one gain"
    else:
        reason = f"its scales do not lie along the output channels, and {rounding}: one gain"
    return _GainPlace(slot=slot, kind="tensor", axis=None, reasons=(reason,))


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
        if out.name in graph.captured:
            return None, False, "a body of control flow reads it in front of its bias"
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
