"""Cut a graph into segments: slices of the execution order with few tensors across each cut.

A segment ends where a single tensor carries all that the layers before it have made (the output of
a residual block), or, where no such place comes, after `MOST` layers. Tensors that no layer had a
part in (masks, positions, the inputs) do not count: they carry no error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qpass.embeddings import embeddings
from qpass.graph import Graph, Node
from qpass.units import is_weighted, reads

MOST: Final = 8  # layers of a segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """`outputs` are read behind the segment.

    `carriers` are those of the outputs that layers had a part in: an error can be in no other.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    carriers: tuple[str, ...]


def segments(graph: Graph) -> list[Segment]:
    """Return the segments of `graph`, which is not changed, in execution order."""
    nodes = list(graph.nodes)
    known = {node.name for node in nodes if is_weighted(node)} | embeddings(graph).keys()
    last_use = {tensor.name: len(nodes) for tensor in graph.outputs}
    for number, node in enumerate(nodes):
        for name in reads(node):
            last_use[name] = max(last_use.get(name, 0), number)
    found: list[Segment] = []
    made: set[str] = set()  # alive, and a layer had a part in it
    alive: set[str] = set()
    start, layers = 0, 0
    for number, node in enumerate(nodes):
        fed = any(name in made for name in reads(node)) or node.name in known
        outputs = {tensor.name for tensor in node.outputs if tensor.name}
        alive |= outputs
        made |= outputs if fed else set()
        alive = {name for name in alive if last_use.get(name, -1) > number}
        made &= alive
        layers += node.name in known
        final = number == len(nodes) - 1
        ripe = layers and len(made) == 1 and not _followed_inside(graph, node, nodes, number)
        if final or ripe or layers >= MOST:
            part = nodes[start : number + 1]
            found.append(
                Segment(
                    nodes=tuple(part),
                    outputs=tuple(sorted(alive)),
                    carriers=tuple(sorted(made)),
                )
            )
            start, layers = number + 1, 0
    return found


def _followed_inside(graph: Graph, node: Node, nodes: list[Node], number: int) -> bool:
    """True when the only reader comes next and is no layer: the cut is better behind it."""
    if number + 1 >= len(nodes) or is_weighted(nodes[number + 1]):
        return False
    readers = graph.consumers(node.outputs[0])
    return len(readers) == 1 and readers[0][0] is nodes[number + 1]
