"""Which constant an offset of a whole site can be subtracted from.

An offset by channel that one constant adds (a bias, a position embedding) arrives unchanged behind
moves of channels and behind a sum with something that does not carry it. Behind a product whose
left rows sum to one (softmax(A) V) it is an offset of the columns. Where it arrives at every linear
op of the site exactly once, all of them can make up for it in the biases that they have; in a
residual stream that is the constant in front of the first block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qpass.graph import Graph, Node
from qpass.passes.equalize.labels import MOVERS
from qpass.passes.equalize.linear import has_bias, rows_sum_to_one
from qpass.passes.equalize.site import Product, Reader, Slot

# Means and extremes over all places of a channel move with it; windows may look at padding.
POOLS: Final = ("GlobalAveragePool", "GlobalMaxPool")
# Ops whose constant is added to their output, and the input that it is.
BIASES: Final = {"BatchNormalization": 2, "Conv": 2, "Gemm": 2, "LayerNormalization": 2}


def find_shift(
    graph: Graph, readers: Sequence[Reader], products: Sequence[Product], slots: Sequence[Slot]
) -> Slot | None:
    """Return the slot that an offset of a site can be subtracted from, None when there is none.

    Args:
        graph: in topological order.
        readers: linear ops of the site; all have to make up for the offset.
        products: products of activations of the site.
        slots: constants of the site.
    """
    if not readers or any(r.linear.obstacle or not has_bias(graph, r.linear) for r in readers):
        return None
    if any(product.both or not rows_sum_to_one(graph, product.node) for product in products):
        return None
    sums = {id(product.node) for product in products}
    ends = {id(reader.linear.node) for reader in readers}
    for slot in slots:
        if _adds(slot) and _carries(graph, slot, ends, sums):
            return slot
    return None


def _adds(slot: Slot) -> bool:
    if slot.node.op == "Add":
        return True
    return slot.index == (0 if slot.node.op == "Sub" else BIASES.get(slot.node.op))


def _carries(graph: Graph, slot: Slot, ends: set[int], sums: set[int]) -> bool:
    """True when the offset arrives at all of `ends` once, and at nothing else."""
    carried, arrived = {id(slot.node.outputs[0])}, set()
    for node in graph.nodes:
        hits = [i for i, tensor in enumerate(node.inputs) if id(tensor) in carried]
        if not hits or node.op == "Shape":
            continue
        if id(node) in ends and hits == [0]:
            arrived.add(id(node))
        elif _passes(node, hits, sums):
            carried |= {id(out) for out in node.outputs}
        else:
            return False
    return arrived == ends


def _passes(node: Node, hits: list[int], sums: set[int]) -> bool:
    if node.op == "Concat":
        return len(hits) == len(node.inputs)
    if node.op in MOVERS or node.op in POOLS:
        return hits == [0]
    if node.op == "Add":
        return len(hits) == 1
    if node.op == "Sub":
        return hits == [0]
    return node.op == "MatMul" and id(node) in sums and hits == [1]
