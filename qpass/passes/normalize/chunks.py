"""Slices that cut a tensor into neighbouring pieces become one Split, as newer exporters write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Graph, Node, Tensor
from qpass.passes.normalize.folding import FoldResult, given_input, integers_of, rank_of

SPLIT_OPSET: Final = 13  # the sizes became an input


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The indices `start` to `end` (exclusive) of `axis` that one Slice takes."""

    node: Node
    axis: int
    start: int
    end: int


def recognize_split(graph: Graph) -> FoldResult:
    """Replace Slices that together take every index of an axis once by a Split."""
    result = FoldResult()
    if graph.opset < SPLIT_OPSET:
        return result
    order = {id(node): position for position, node in enumerate(graph.nodes)}
    sources: dict[int, Tensor] = {}
    for node in graph.nodes:
        if node.op == "Slice":
            sources[id(node.inputs[0])] = node.inputs[0]
    for source in sources.values():
        pieces = _pieces(source)
        if pieces:
            _write(graph, source, pieces, order)
            result.changed += 1
    return result


def _pieces(source: Tensor) -> list[Piece]:
    """Return the Slices that tile one axis of `source` in order, or nothing."""
    found = [_piece(node) for node in source.outputs if node.op == "Slice"]
    pieces = [piece for piece in found if piece is not None]
    if len(pieces) < 2 or len({piece.axis for piece in pieces}) != 1:
        return []
    pieces.sort(key=lambda piece: piece.start)
    borders = [0, *(piece.end for piece in pieces)]
    tiled = all(piece.start == border for piece, border in zip(pieces, borders, strict=False))
    return pieces if tiled and borders[-1] == source.shape[pieces[0].axis] else []


def _piece(node: Node) -> Piece | None:
    """Read a Slice along one axis of known size with step 1."""
    starts, ends = integers_of(node, "starts", 1), integers_of(node, "ends", 2)
    steps, axes = integers_of(node, "steps", 4), integers_of(node, "axes", 3)
    rank = rank_of(node.inputs[0])
    constant = all(
        given_input(node, i) is None or v is not None for i, v in ((3, axes), (4, steps))
    )
    if starts is None or ends is None or rank is None or not constant or len(starts) != 1:
        return None
    axis = (axes[0] if axes else 0) % rank
    size = node.inputs[0].shape[axis]
    if not isinstance(size, int) or (steps or [1]) != [1]:
        return None
    start, end, _ = slice(starts[0], ends[0]).indices(size)
    return Piece(node=node, axis=axis, start=start, end=end) if start < end else None


def _write(graph: Graph, source: Tensor, pieces: list[Piece], order: dict[int, int]) -> None:
    first = min((piece.node for piece in pieces), key=lambda node: order[id(node)])
    sizes = np.array([piece.end - piece.start for piece in pieces], np.int64)
    outputs = [piece.node.outputs[0] for piece in pieces]
    for piece in pieces:
        graph.remove(piece.node)
    inputs = [source, graph.constant(f"{first.name}_sizes", sizes)]
    attrs = {"axis": pieces[0].axis}
    split = graph.make("Split", inputs, outputs, name=f"{first.name}_split", attrs=attrs)
    graph.add(split, before=first)
