"""Corrections of what linear ops read: gains into the input channels of their weights.

What it does
    ``W (gain * x + offset) + b == (W diag(gain)) x + (b + W offset)``: a correction per channel in
    front of a MatMul, Gemm or Conv goes into its weight and its bias. It is for activations that no
    op before can correct: behind GELU, gates and residual sums, and what the Q itself did to them.
Why it is exact
    In real arithmetic always, but for the offset of a Conv with padding: what it pads with are
    zeros, which would need the offset too. The integers of the weight change: those of a column
    that gets a gain are rounded again, half to even, on the grid of the output channel. Scales stay
    unless a weight outgrows its integers. So whoever folds has to look at the output again.
What is refused
    Weights with one scale for all output channels or scales in powers of two: the gains of the
    outputs need another rounding of the float weight (see `requantize`), and there is only one.
    Blocks of scales, ConvTranspose and weights of more than two dimensions in MatMul. Depthwise
    Conv: the gain of its input is that of its output.
What stays right
    Every op that reads the tensor decides for itself. An op that cannot take the correction still
    reads what it read. A weight that several ops share gets a DequantizeLinear of its own.
Preconditions
    As for `fold_affine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes.channel_affine import Array, ChannelAffine
from qpass.passes.fold_affine import Site, find_site, fold, is_shared, own_dequantizer
from qpass.passes.requantize import Rounding, find_grid, solve_rounding, write_integers
from qpass.passes.rounding.layout import Layout, layout_of

PADDED = "its zero padding would need the offset too"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSite:
    """The input of a linear op in the quantized graph.

    original
        The op in the float graph.
    node
        The op in the quantized graph.
    layout
        Its matrix form; arrays [groups, inputs, outputs] below are meant.
    rounding
        How its integers came from its weight; None: the weight is float.
    no_offset
        Why it cannot take an offset; empty: it can.
    output
        Where its output is corrected: the bias there takes the offset.
    """

    original: Node
    node: Node
    layout: Layout
    rounding: Rounding | None
    no_offset: str
    output: Site

    @property
    def tap(self) -> str:
        """Name of what it reads."""
        return str(self.node.inputs[0].name)

    @property
    def float_tap(self) -> str:
        """Name of what it reads in the float graph."""
        return str(self.original.inputs[0].name)

    @property
    def channels(self) -> int:
        """How many input channels it has."""
        return self.layout.groups * self.layout.inputs // self.layout.columns_per_channel

    def float_weight(self) -> Array:
        """Return the weight of the float graph, float64 [groups, inputs, outputs]."""
        return self.layout.matrix(array_of(self.original.inputs[1]).astype(np.float64))

    def weight(self) -> Array:
        """Return what the weight stands for now, float64 [groups, inputs, outputs]."""
        if self.rounding is None:
            return self.layout.matrix(array_of(self.node.inputs[1]).astype(np.float64))
        return self.layout.matrix(self.rounding.values(self.rounding.nearest()))

    def columns(self, values: Array) -> Array:
        """Spread one number for each input channel over the inputs: [groups, inputs]."""
        spread = np.repeat(values, self.layout.columns_per_channel)
        return spread.reshape(self.layout.groups, self.layout.inputs)

    def scaled(self, gain: Array) -> NewWeight:
        """Return the weight with a gain for each input channel."""
        layout, rounding = self.layout, self.rounding
        given = array_of(self.node.inputs[1]) if rounding is None else rounding.weight
        wanted = layout.matrix(given.astype(np.float64)) * self.columns(gain)[:, :, None]
        if rounding is None:
            values = layout.restore(wanted).astype(given.dtype)
            return NewWeight(stands_for=layout.matrix(values.astype(np.float64)), values=values)
        integers, scale = solve_rounding(rounding, layout.restore(wanted))
        values = rounding.values(integers - rounding.along(rounding.zero), scale)
        return NewWeight(stands_for=layout.matrix(values), values=integers, scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWeight:
    """A changed weight: what it stands for, [groups, inputs, outputs], and what is stored.

    `values` are integers where there is a `scale`, else the float weight itself.
    """

    stands_for: Array
    values: Array
    scale: Array | None = None


def find_input_site(graph: Graph, nodes: Mapping[str, Node], original: Node) -> InputSite | str:
    """Return how the input of a linear op can be corrected in its constants, or why it cannot.

    Args:
        graph: the quantized graph.
        nodes: its nodes by name.
        original: linear op of the float graph, with a constant weight.
    """
    output = find_site(graph, nodes, original)
    if isinstance(output, str):
        return output
    node = output.node
    if original.op == "ConvTranspose" or len(original.inputs[1].shape) < 2:
        return f"{original.op} with such a weight is no product of rows and columns"
    layout = layout_of(original)
    if isinstance(layout, str):
        return layout.partition(":")[0]
    if layout.inputs == layout.columns_per_channel:
        return "each of its outputs reads one channel: the gain of the output is that of the input"
    rounding: Rounding | None = None
    if not isinstance(node.inputs[1], Constant):
        dequantizer = graph.producer(node.inputs[1])
        found = find_grid(dequantizer, original.inputs[1])
        if isinstance(found, str):
            return found
        if output.gain != "channel" or output.rounding is not None:
            return "one scale for all its outputs: their gains need the float weight as it is"
        rounding = found
    no_offset = ""
    if not output.offset:
        no_offset = output.reasons[-1]
    elif any(layout.pads) or layout.auto_pad.startswith("SAME"):
        no_offset = PADDED
    return InputSite(
        original=original,
        node=node,
        layout=layout,
        rounding=rounding,
        no_offset=no_offset,
        output=output,
    )


def fold_into_input(graph: Graph, site: InputSite, affine: ChannelAffine) -> None:
    """Absorb ``gain * x + offset`` in front of the op; an offset it cannot take must be 0."""
    shift = np.einsum("gi,gio->go", site.columns(affine.offset), site.weight()).ravel()
    if (affine.gain != 1.0).any():
        _write(graph, site, site.scaled(affine.gain))
    if shift.any():
        fold(graph, site.output, ChannelAffine(gain=np.ones(shift.size), offset=shift))


def _write(graph: Graph, site: InputSite, weight: NewWeight) -> None:
    node = site.node
    if weight.scale is None:
        old = node.inputs[1]
        new = graph.constant(old.name, weight.values)
        graph.set_input(node, 1, new)
        if not old.outputs and old.name not in graph.captured:
            new.name = old.name
        return
    dequantizer = graph.producer(node.inputs[1])
    if is_shared(graph, node.inputs[1]):
        dequantizer = own_dequantizer(graph, node, dequantizer)
    write_integers(graph, dequantizer, weight.values, weight.scale)
