"""Where the channels of a tensor arrive: numbers in place of values, through ops that only move.

Exporters take heads out of a projection with Split, Slice, or Reshape and Transpose, before or
after the bias, for one projection of q, k and v or for three. Names say nothing, so the number of
its channel takes the place of each value, the moving ops are run on that, and what arrives at a
reader is read off. Sizes that are free get different primes, so that no axis passes for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.normalize.folding import constant_of, integers_of, scalar_of

Ids = NDArray[np.int64]
_PRIMES: Final = (2, 3, 5, 7, 11, 13)
_LIMIT: Final = 1 << 26  # elements of one tensor of numbers: 512 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Input `index` of `node` holds, at each place, the channel number in `ids`.

    biases: constants that were added on the way while the channels still lay along `axis`; each is
    (node, index of the constant).
    """

    node: Node | None  # None: an output of the graph, or a body of control flow
    index: int
    ids: Ids
    biases: tuple[tuple[Node, int], ...]


class Sizes:
    """Numbers for free sizes: the same name has the same number everywhere."""

    def __init__(self) -> None:
        """Start with no names."""
        self._numbers: dict[str, int] = {}

    def shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Return the shape of `tensor` with numbers for its free sizes."""
        if tensor.shape is None or any(size in (None, "") for size in tensor.shape):
            return None
        return tuple(self._number(size) for size in tensor.shape)

    def _number(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        prime = _PRIMES[len(self._numbers) % len(_PRIMES)]
        return self._numbers.setdefault(str(size), prime)

    def solve(self, tensor: Tensor, elements: int) -> tuple[int, ...] | None:
        """Return the shape of a tensor of so many elements; one size may be new."""
        sizes = list(tensor.shape or ())
        new = [i for i, s in enumerate(sizes) if not isinstance(s, int) and s not in self._numbers]
        if not sizes or len(new) > 1:
            return None
        known = [self._numbers[s] if isinstance(s, str) and i not in new else s
                 for i, s in enumerate(sizes)]  # fmt: skip
        rest = math.prod(s for i, s in enumerate(known) if i not in new)
        if new:
            if rest == 0 or elements % rest:
                return None
            known[new[0]] = elements // rest
        return tuple(known) if math.prod(known) == elements else None


def arrivals(graph: Graph, tensor: Tensor, axis: int) -> list[Arrival] | str:
    """Return where the channels of `tensor`, numbered along `axis`, are read, or why not known.

    Ops that move values, scale by one number or add a constant along the channels are followed;
    every other reader is an arrival.
    """
    sizes = Sizes()
    shape = sizes.shape(tensor)
    if shape is None:
        return f"the shape of {tensor.name} is not known"
    if math.prod(shape) > _LIMIT:
        return f"{tensor.name} is too large to be followed"
    row = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    first: Ids = np.broadcast_to(row, shape)
    found: list[Arrival] = []
    waiting: list[tuple[Tensor, Ids, tuple[tuple[Node, int], ...], int | None]] = [
        (tensor, first, (), axis)
    ]
    while waiting:
        current, ids, biases, where = waiting.pop()
        if graph.is_output(current) or current.name in graph.captured:
            found.append(Arrival(node=None, index=0, ids=ids, biases=biases))
        for node, index in graph.consumers(current):
            operand = _bias_operand(node, index, where, ids.shape)
            if node.op == "Shape":
                continue
            if operand is not None:
                waiting.append((node.outputs[0], ids, (*biases, (node, operand)), where))
            elif _is_scaling(node, index):
                waiting.append((node.outputs[0], ids, biases, where))
            elif index == 0 and node.op in _MOVES and (moved := _move(node, ids, sizes)):
                waiting += [(t, i, biases, None) for t, i in zip(node.outputs, moved, strict=True)]
            else:
                found.append(Arrival(node=node, index=index, ids=ids, biases=biases))
    return found


def _bias_operand(node: Node, index: int, axis: int | None, shape: Sequence[int]) -> int | None:
    """Return the input of an Add or Sub that is a constant along the channels."""
    if node.op not in ("Add", "Sub") or axis is None or len(node.inputs) != 2:
        return None
    values = constant_of(node.inputs[1 - index])
    if values is None or values.size == 1:
        return None if values is None else 1 - index
    place, behind = axis - len(shape) + values.ndim, shape[len(shape) - values.ndim :]
    if values.ndim > len(shape) or place < 0 or values.shape[place] != shape[axis]:
        return None
    stretches = any(size not in (1, full) for size, full in zip(values.shape, behind, strict=True))
    return None if stretches else 1 - index


def _is_scaling(node: Node, index: int) -> bool:
    if node.op not in ("Mul", "Div") or (node.op == "Div" and index != 0):
        return False
    return scalar_of(node.inputs[1 - index]) is not None


def _move(node: Node, ids: Ids, sizes: Sizes) -> list[Ids] | None:
    try:
        return _MOVES[node.op](node, ids, sizes)
    except (ValueError, IndexError):  # sizes that do not fit: the numbers chosen are not possible
        return None


def _reshape(node: Node, ids: Ids, sizes: Sizes) -> list[Ids] | None:
    target = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op == "Reshape" and isinstance(target, Constant):
        wanted = [int(v) for v in array_of(target).ravel()]
        if not node.attrs.get("allowzero", 0):
            wanted = [ids.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
        return [ids.reshape(wanted)]
    shape = sizes.solve(node.outputs[0], ids.size)
    return None if shape is None else [ids.reshape(shape)]


def _transpose(node: Node, ids: Ids, _: Sizes) -> list[Ids]:
    return [np.transpose(ids, node.attrs.get("perm"))]


def _split(node: Node, ids: Ids, _: Sizes) -> list[Ids] | None:
    axis = int(node.attrs.get("axis", 0)) % ids.ndim
    shapes = [out.shape for out in node.outputs]
    widths = [s[axis] for s in shapes if s is not None and isinstance(s[axis], int)]
    if len(widths) != len(shapes) or sum(widths) != ids.shape[axis]:
        return None
    return list(np.split(ids, np.cumsum(widths)[:-1], axis=axis))


def _slice(node: Node, ids: Ids, _: Sizes) -> list[Ids] | None:
    starts, ends = integers_of(node, "starts", 1), integers_of(node, "ends", 2)
    axes, steps = integers_of(node, "axes", 3), integers_of(node, "steps", 4)
    if starts is None or ends is None or axes is None or (steps is None and len(node.inputs) > 4):
        return None
    picks = [slice(None)] * ids.ndim
    for number, axis in enumerate(axes):
        step = steps[number] if steps else 1
        if step < 0:
            return None
        picks[axis % ids.ndim] = slice(starts[number], ends[number], step)
    return [ids[tuple(picks)]]


def _gather(node: Node, ids: Ids, _: Sizes) -> list[Ids] | None:
    if not isinstance(node.inputs[1], Constant):
        return None
    return [np.take(ids, array_of(node.inputs[1]), axis=int(node.attrs.get("axis", 0)))]


def _expand(node: Node, ids: Ids, sizes: Sizes) -> list[Ids] | None:
    shape = sizes.shape(node.outputs[0])
    return None if shape is None else [np.broadcast_to(ids, shape)]


_MOVES: Final[dict[str, Callable[[Node, Ids, Sizes], list[Ids] | None]]] = {
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Identity": _reshape,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
