"""Which Gathers look words up, and which of their tables are tied to a head.

An embedding gathers rows of a constant matrix along axis 0 by an index that is computed. Tables of
factors (the cosines and sines of rotary positions) look the same, but their rows are multiplied
with activations that do not come from the row itself: every error of theirs is one of all
channels, and they are no weights. They stay float.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qpass.graph import LINEAR_OPS, Constant, Graph, Node, array_of

# Ops between a table and what is made of its rows.
_MOVERS: Final = frozenset({
    "Cast", "Concat", "Expand", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
})  # fmt: skip


def is_lookup(node: Node) -> bool:
    """True for Gather of rows from a constant float matrix."""
    table = node.inputs[0] if node.op == "Gather" and node.inputs else None
    return (
        isinstance(table, Constant)
        and node.domain in (None, "", "ai.onnx")
        and len(table.shape) == 2
        and table.dtype == np.float32
        and node.attrs.get("axis", 0) == 0
        and not isinstance(node.inputs[1], Constant)
    )


def weight_place(node: Node) -> int:
    """Return which input of a layer holds its weight: 0 of an embedding, 1 of a linear op."""
    return 0 if node.op == "Gather" else 1


def embeddings(graph: Graph) -> dict[str, Node]:
    """Return the Gathers of `graph` that look words up, by name."""
    return {
        node.name: node
        for node in graph.nodes
        if is_lookup(node) and not _multiplies_others(graph, node)
    }


def _multiplies_others(graph: Graph, node: Node) -> bool:
    """True when rows, moved at most, are factors of activations that do not depend on them."""
    made = {node.outputs[0].name}
    for other in graph.nodes:
        if any(tensor.name in made for tensor in other.inputs):
            made.update(tensor.name for tensor in other.outputs)
    waiting, seen = [node.outputs[0]], {node.outputs[0].name}
    while waiting:
        tensor = waiting.pop()
        for reader, index in graph.consumers(tensor):
            if reader.op == "Mul":
                other = reader.inputs[1 - index]
                if not isinstance(other, Constant) and other.name not in made:
                    return True
            elif reader.op in _MOVERS:
                fresh = [out for out in reader.outputs if out.name not in seen]
                seen.update(out.name for out in fresh)
                waiting.extend(fresh)
    return False


def tied_tables(graph: Graph, heads: set[str]) -> dict[str, str]:
    """Return the embeddings whose table is the weight of a head: node name -> name of the head.

    A table counts as tied when it is the same constant, or holds the same numbers as the weight or
    its transpose (exporters fold the Transpose between the two).
    """
    found: dict[str, str] = {}
    tables = embeddings(graph)
    for node in graph.nodes:
        if node.name not in heads or node.op not in LINEAR_OPS:
            continue
        weight = node.inputs[1]
        if not isinstance(weight, Constant) or len(weight.shape) != 2:
            continue
        for name, lookup in tables.items():
            if name not in found and _same_numbers(lookup.inputs[0], weight):
                found[name] = node.name
    return found


def _same_numbers(table: Constant, weight: Constant) -> bool:
    if table is weight:
        return True
    shape = tuple(table.shape)
    if tuple(weight.shape) not in (shape, shape[::-1]):
        return False
    a, b = array_of(table), array_of(weight)
    return (shape == b.shape and np.array_equal(a, b)) or (
        shape == b.shape[::-1] and np.array_equal(a, b.T)
    )
