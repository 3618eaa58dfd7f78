"""One linear op that can be rounded: where its constants are, and writing new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.fold_affine import Site, Slot, find_site, fold
from qpass.passes.live_rows import row_counts
from qpass.passes.requantize import scaled_weight
from qpass.passes.residual import skip_of
from qpass.passes.rounding.grid import Grid, grid_of
from qpass.passes.rounding.layout import Layout, layout_of
from qpass.passes.row_weights import NormedSum, find_normed_sum
from qpass.qparams import QParams
from qpass.stream import Pair

Array = NDArray[Any]


@dataclass(slots=True, kw_only=True)
class Layer:
    """A linear op in both graphs.

    original, node
        It in the float and in the quantized graph.
    output
        Name of what it makes in the graph that is aimed at.
    skip
        The other operand of the residual sum behind it, if it is known by then.
    normed_sum
        That sum, if a norm reads it.
    offsets
        What `write_offset` has added to the bias so far, float64.
    wanted
        The float weight that was rounded, refitted or not, float64 [groups, inputs, outputs].
    guide
        Roots of the weights of the rows for each batch, see `guide`.
    live
        For each batch which rows an output can see, None: all of them; see `live_rows`.
    rescaled
        Whether `rescale` has changed its numbers.
    together
        Whether errors of its output channels make up for one another (`output_metric`).
    spare
        Other integers, [groups, inputs, outputs], and what the offset would change by with them.
    """

    original: Node
    node: Node
    output: str
    layout: Layout
    site: Site
    numbers: QParams
    stored: Slot
    skip: Pair | None = None
    normed_sum: NormedSum | None = None
    offsets: list[Array] = field(default_factory=list)
    wanted: Array | None = None
    guide: Sequence[Array] | None = None
    live: Sequence[Array | None] = ()
    rescaled: bool = False
    together: bool = False
    spare: tuple[Array, Array] | None = None

    @property
    def name(self) -> str:
        """The name of the op."""
        return str(self.original.name)

    def guided(self, batch: int, normed: Array | None) -> Array | None:
        """Return the weights of the rows of a batch, [samples, ..., 1]; Conv [samples, 1, ..].

        Args:
            batch: its number.
            normed: the weights by the norm behind, of that shape, if there is one.
        """
        if self.guide is None:
            live = self.live[batch] if self.live else None
            if live is None:
                return normed
            counts = row_counts(live)[..., None]
            return counts if normed is None else counts * normed
        roots = np.expand_dims(self.guide[batch], self.site.axis)
        return roots if normed is None else roots * np.sqrt(normed)

    def weight(self) -> Array:
        """Return the float weight, float64 [groups, inputs, outputs]."""
        return self.layout.matrix(array_of(self.original.inputs[1]).astype(np.float64))

    def grid(self) -> Grid:
        """Return the integers that the weight can take."""
        return grid_of(self.numbers, self.layout)

    def integers(self) -> Array:
        """Return the integers that are there now, float64 [groups, inputs, outputs]."""
        stored = array_of(self.stored.constant).astype(np.int32)
        return self.layout.matrix(stored.astype(np.float64))

    def bias(self) -> Array:
        """Return the bias that the output includes in the float graph, float64; zero if none."""
        if not self.site.bias_inside or len(self.original.inputs) < 3:
            return np.zeros(())
        bias = self.original.inputs[2]
        return array_of(bias).astype(np.float64) if bias.name else np.zeros(())

    def write(self, graph: Graph, integers: Array) -> None:
        """Store integers [groups, inputs, outputs]."""
        stored = self.layout.restore(integers).astype(np.int32)
        self.stored.write(graph, stored.astype(self.numbers.storage.numpy))

    def take_spare(self, graph: Graph) -> None:
        """Store the integers that were kept beside those in the graph, where there are any."""
        if self.spare is None:
            return
        integers, offset = self.spare
        self.write(graph, integers)
        if self.site.offset:
            self.write_offset(graph, offset)

    def rescale(self, graph: Graph, shares: Array) -> None:
        """Multiply the scales of each output [groups, 1, outputs] by a share, see `can_rescale`."""
        axis = self.site.gain_axis
        assert axis is not None
        scale = scaled_weight(self.numbers.scale, shares.ravel(), axis=axis).astype(np.float32)
        self.numbers, self.rescaled = replace(self.numbers, scale=scale), True
        self.write_scale(graph, scale)

    def write_scale(self, graph: Graph, scale: Array) -> None:
        """Store scales, float32, in the shape that they have."""
        self.site.gain_slot.write(graph, scale)

    def write_offset(self, graph: Graph, offset: Array) -> None:
        """Add `offset`, one number for each output channel, to the bias."""
        offset = offset.ravel()
        self.offsets.append(offset)
        # The slot of the bias is looked up again: a bias may have been made since.
        site = find_site(graph, {self.node.name: self.node}, self.original)
        assert isinstance(site, Site)
        fold(graph, site, ChannelAffine(gain=np.ones(site.channels), offset=offset))


def find_layers(
    reference: Graph,
    quantized: Graph,
    numbers: Mapping[str, QParams],
    aims: Mapping[str, Node] | None = None,
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the linear ops that can be rounded, and why others cannot, both by name.

    Args:
        reference: the float graph.
        quantized: the same graph after `insert_qdq`.
        numbers: of the weights, by name of the linear op.
        aims: nodes by name of the graph that is aimed at; None: those of `reference`.
    """
    if aims is None:
        aims = {node.name: node for node in reference.nodes}
    nodes = {node.name: node for node in quantized.nodes}
    places = {node.name: i for i, node in enumerate(reference.nodes)}
    layers: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    for original in reference.nodes:
        if original.name not in numbers:
            continue
        output = str(aims[original.name].outputs[0].name)
        found = _find_layer(quantized, nodes, original, numbers[original.name], output)
        if isinstance(found, str):
            refused[original.name] = found
        else:
            found.skip = skip_of(reference, nodes, places, original, aims)
            if found.skip is not None:
                found.normed_sum = find_normed_sum(reference, original)
            layers[original.name] = found
    return layers, refused


def _find_layer(
    graph: Graph, nodes: Mapping[str, Node], original: Node, numbers: QParams, output: str
) -> Layer | str:
    layout = layout_of(original)
    if isinstance(layout, str):
        return layout
    site = find_site(graph, nodes, original)
    if isinstance(site, str):
        return site
    dq = graph.producer(site.node.inputs[1])
    if dq is None or dq.op != "DequantizeLinear" or not isinstance(dq.inputs[0], Constant):
        return "its weight is not dequantized in front of it"
    stored = Slot(node=dq, index=0)
    if site.shared or len(graph.consumers(stored.constant)) > 1:
        return "another op reads the same integers"
    has_bias = len(original.inputs) > 2 and original.inputs[2].name
    if site.bias_inside and has_bias and not isinstance(original.inputs[2], Constant):
        return "its bias is computed at run time"
    return Layer(
        original=original,
        node=site.node,
        output=output,
        layout=layout,
        site=site,
        numbers=numbers,
        stored=stored,
    )
