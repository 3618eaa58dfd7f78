"""Where the compensation of a residual block attaches in the quantized graph, and the edit there.

What it does
    ``y = x + f(x)`` becomes ``y = (x + f(x)) + z``: the block's Add writes a new tensor, and a
    second Add the tensor that the Add wrote before, so that all readers see the corrected sum.
    `z` is what the caller computes from the block's input as the quantized graph knows it.
Which input
    The entry of the block where its readers get it from a DequantizeLinear; else the input of the
    branch's first linear op (behind the normalization) where that comes from one; else the entry in
    float. The first two cost no Q of their own, and let an engine run the map in integers.
Integer sums
    Where both operands of the Add come from DequantizeLinear and a Q reads the sum, an engine adds
    integers. There the uncorrected sum and `z` get a Q of their own, so that it goes on to do so.
Preconditions
    `insert_qdq` has run, biases are still float. Names of the two graphs agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Graph, Node, Tensor
from qpass.passes.blocks import Block
from qpass.passes.channel_affine import Array, ChannelAffine
from qpass.passes.fold_affine import Site, find_site
from qpass.passes.insert_qdq import dequantize_node
from qpass.qparams import QParams

QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
# Ops that a Q behind them may absorb.
CLIPS: Final = frozenset({"Clip", "Relu"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a block is compensated, by names of the quantized graph.

    `x` is the input of the compensation and `x_float` the tensor of the float graph that it stands
    for; `stored` says that `x` comes from integers; `sum` is the output of the Add; `integer_sum`
    that the Add runs on integers.
    """

    block: Block
    x: str
    x_float: str
    stored: bool
    sum: str
    integer_sum: bool


def find_place(
    graph: Graph, nodes: Mapping[str, Node], block: Block, *, integer: bool
) -> Place | str:
    """Return where `block` can be compensated in the quantized graph, or why nowhere.

    Args:
        graph: the quantized graph.
        nodes: its nodes by name.
        block: found in the float graph.
        integer: prefer an input that comes from integers to the entry of the block.
    """
    add = nodes.get(block.add)
    if add is None or add.op != "Add":
        return "the quantized graph computes its sum in another way"
    tensors = graph.tensors()
    place = None
    for name in (block.entry, block.first if integer else None):
        restored = None if name is None else _restored(graph, tensors[name])
        if restored is not None and name is not None:
            place = restored.name, name
            break
    x, x_float = place or (block.entry, block.entry)
    out = add.outputs[0]
    return Place(
        block=block,
        x=x,
        x_float=x_float,
        stored=place is not None,
        sum=out.name,
        integer_sum=_reads_integers(graph, add) and _is_stored(graph, out),
    )


def bias_before(graph: Graph, nodes: Mapping[str, Node], last: Node, add: Node) -> Site | None:
    """Return the bias of the branch's last linear op if it is added to the block's output as it is.

    Args:
        graph: the quantized graph.
        nodes: its nodes by name.
        last: that op in the float graph.
        add: the sum at the end of the block.
    """
    site = find_site(graph, nodes, last)
    if isinstance(site, str) or not site.offset:
        return None
    end = site.node
    if site.bias_slot is not None and site.bias_slot.node is not end:
        end = site.bias_slot.node
    out = end.outputs[0]
    alone = len(graph.consumers(out)) == 1 and not graph.is_output(out)
    return site if alone and any(tensor is out for tensor in add.inputs) else None


def shift(offset: Array) -> ChannelAffine:
    """Return the correction that adds `offset`."""
    return ChannelAffine(gain=np.ones(offset.size), offset=offset.astype(np.float64))


def attach(
    graph: Graph, add: Node, z: Tensor, *, numbers: tuple[QParams, QParams] | None = None
) -> Node:
    """Add `z` to the output of `add` and return the new Add.

    Args:
        graph: the quantized graph; the caller sorts it.
        add: the sum at the end of the block.
        z: the compensation, of the shape of the sum.
        numbers: of the uncorrected sum and of `z`, where the sum runs on integers.
    """
    out = add.outputs[0]
    plain: Tensor = graph.variable(f"{out.name}_uncompensated", out.dtype, out.shape)
    graph.set_output(add, 0, plain)
    if numbers is not None:
        plain, z = (
            quantized(graph, tensor, own) for tensor, own in zip((plain, z), numbers, strict=True)
        )
    corrected = graph.make("Add", [plain, z], [out], name=f"{add.name}_compensated")
    graph.add(corrected, after=add)
    return corrected


def quantized(graph: Graph, tensor: Tensor, numbers: QParams) -> Tensor:
    """Put a pair of Q and DQ behind `tensor` and return what DQ gives."""
    stored = graph.variable(
        f"{tensor.name}_quantized", np.dtype(numbers.storage.numpy), tensor.shape
    )
    restored: Tensor = graph.variable(f"{tensor.name}_dequantized", tensor.dtype, tensor.shape)
    scale = graph.constant(f"{tensor.name}_scale", numbers.scale)
    zero = graph.common_constant(f"{tensor.name}_zero_point", numbers.zero_point)
    q = graph.make(QUANTIZE, [tensor, scale, zero], [stored], name=f"{tensor.name}_Q")
    graph.add(q)
    graph.add(dequantize_node(graph, stored, restored, numbers, tensor.name, (scale, zero)))
    return restored


def stored_weight(graph: Graph, name: str, integers: np.ndarray, numbers: QParams) -> Tensor:
    """Put integer weights with their DQ into the graph and return what DQ gives."""
    stored = graph.constant(f"{name}_quantized", integers)
    restored: Tensor = graph.variable(f"{name}_dequantized", np.dtype(np.float32), integers.shape)
    graph.add(dequantize_node(graph, stored, restored, numbers, name))
    return restored


def _restored(graph: Graph, tensor: Tensor) -> Tensor | None:
    """Return what the DQ behind the Q of `tensor` gives, or `tensor` where a DQ makes it."""
    maker = graph.producer(tensor)
    if maker is not None and maker.op == DEQUANTIZE:
        return tensor
    for node, index in graph.consumers(tensor):
        if node.op != QUANTIZE or index != 0:
            continue
        for reader, _ in graph.consumers(node.outputs[0]):
            if reader.op == DEQUANTIZE:
                found: Tensor = reader.outputs[0]
                return found
    return None


def _reads_integers(graph: Graph, add: Node) -> bool:
    makers = [graph.producer(tensor) for tensor in add.inputs]
    return all(maker is not None and maker.op == DEQUANTIZE for maker in makers)


def _is_stored(graph: Graph, tensor: Tensor) -> bool:
    """True when a Q reads `tensor`, itself or behind an op that the Q absorbs."""
    readers = [node for node, _ in graph.consumers(tensor)]
    if len(readers) == 1 and readers[0].op in CLIPS:
        readers = [node for node, _ in graph.consumers(readers[0].outputs[0])]
    return any(node.op == QUANTIZE for node in readers)
