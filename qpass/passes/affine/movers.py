"""Where the channels of a tensor go when an op moves, selects or averages whole channels.

An op is a mover of channels when each element of its output is an element, or a mean of elements,
of one channel of its input, and the channels keep their number and order along one axis. Every map
that acts on the channels alone (gain and offset, rotation) then gives the same before it and
behind it: selecting and averaging are linear, and their weights sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from qpass.graph import Node
from qpass.passes.normalize.folding import integers_of, rank_of

_RESHAPES: Final = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def moved_axis(node: Node, index: int, axis: int) -> int | None:
    """Return the axis of the outputs that has the channels of input `index` at `axis`.

    Args:
        node: any node.
        index: which of its inputs.
        axis: axis of the channels there, not negative.

    Returns:
        None when `node` is not a mover of these channels.
    """
    move = _MOVERS.get(node.op)
    if move is None or node.domain not in (None, "", "ai.onnx"):
        return None
    if index > 0 and node.op != "Concat":
        return None
    return move(node, axis)


def source_axis(node: Node, index: int, axis: int) -> int | None:
    """Return the axis of input `index` whose channels a mover puts at `axis` of its outputs."""
    rank = rank_of(node.inputs[index])
    for candidate in range(rank or 0):
        size = node.inputs[index].shape[candidate]
        same = size == node.outputs[0].shape[axis] if node.outputs[0].shape is not None else False
        if same and moved_axis(node, index, candidate) == axis:
            return candidate
    return None


def data_indices(node: Node) -> range:
    """Return which inputs of a mover carry channels."""
    return range(len(node.inputs)) if node.op == "Concat" else range(1)


def _reshaped(node: Node, axis: int) -> int | None:
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None or not isinstance(before[axis], int):
        return None
    behind = _product(before[axis + 1 :])
    if behind is None:
        return None
    found = [
        place
        for place, size in enumerate(after)
        if size == before[axis] and _product(after[place + 1 :]) == behind
    ]
    return found[0] if found else None


def _product(sizes: Any) -> int | None:
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _transposed(node: Node, axis: int) -> int | None:
    perm = node.attrs.get("perm")
    rank = rank_of(node.inputs[0])
    if perm is None:
        return None if rank is None else rank - 1 - axis
    return list(perm).index(axis)


def _gathered(node: Node, axis: int) -> int | None:
    rank, width = rank_of(node.inputs[0]), rank_of(node.inputs[1])
    if rank is None or width is None:
        return None
    along = int(node.attrs.get("axis", 0)) % rank
    if along == axis:
        return None
    return axis + width - 1 if along < axis else axis


def _sliced(node: Node, axis: int) -> int | None:
    rank, axes = rank_of(node.inputs[0]), integers_of(node, "axes", 3)
    if rank is None or axes is None or axis in [a % rank for a in axes]:
        return None
    return axis


def _along_another(node: Node, axis: int) -> int | None:
    """Split and Concat: nothing happens to the channels when they go along another axis."""
    rank = rank_of(node.inputs[0])
    default = None if node.op == "Concat" else 0
    along = node.attrs.get("axis", default)
    if rank is None or along is None or int(along) % rank == axis:
        return None
    return axis


def _expanded(node: Node, axis: int) -> int | None:
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None:
        return None
    place = axis + len(after) - len(before)
    same = isinstance(before[axis], int) and before[axis] == after[place]
    return place if same else None


def _averaged(node: Node, axis: int) -> int | None:
    rank, axes = rank_of(node.inputs[0]), integers_of(node, "axes", 1)
    if rank is None or not axes:
        return None
    axes = [a % rank for a in axes]
    if axis in axes:
        return None
    return axis if node.attrs.get("keepdims", 1) else axis - sum(a < axis for a in axes)


def _pooled(node: Node, axis: int) -> int | None:
    """Average pooling without padding: every output is a mean of elements of one channel."""
    unpadded = not any(node.attrs.get("pads", ())) and not node.attrs.get("ceil_mode", 0)
    unpadded = unpadded and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return axis if axis == 1 and unpadded else None


_MOVERS: Final[dict[str, Callable[[Node, int], int | None]]] = {
    "AveragePool": _pooled,
    "Concat": _along_another,
    "Expand": _expanded,
    "Gather": _gathered,
    "GlobalAveragePool": _pooled,
    "ReduceMean": _averaged,
    "Slice": _sliced,
    "Split": _along_another,
    "Transpose": _transposed,
    **dict.fromkeys(_RESHAPES, _reshaped),
}
