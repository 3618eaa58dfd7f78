"""Which channel of a site each element of a tensor belongs to, through the ops that move channels.

`labels` is an integer array of the rank of the tensor; an axis along which nothing changes has
length 1, whatever the length of the tensor. Label 0 means: this element keeps its scale. So heads
that a Reshape splits off, slices of a fused projection and parts of a Concat need no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Node, Tensor, array_of
from qpass.passes.normalize.folding import integers_of

Labels = NDArray[np.int64]

RESHAPES: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
MOVERS: Final = RESHAPES | {
    "Concat", "Expand", "Gather", "ReduceMean", "Slice", "Split", "Transpose",
}  # fmt: skip


def reduced(labels: Labels) -> Labels:
    """Shorten every axis along which all labels are equal to length 1."""
    for axis in range(labels.ndim):
        if labels.shape[axis] <= 1:  # an empty tensor has no first label
            continue
        first = labels.take([0], axis=axis)
        if (labels == first).all():
            labels = first
    return labels


def varying(labels: Labels) -> list[int]:
    """Return the axes along which the labels change."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def along(axis: int, rank: int, labels: Labels) -> Labels:
    """Return a vector of labels as an array of `rank` axes that changes along `axis`."""
    return labels.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def vector(labels: Labels, axis: int, length: int) -> Labels | None:
    """Return the labels along one axis; None when they change along another one as well."""
    if any(other != axis % labels.ndim for other in varying(labels)):
        return None
    if labels.size not in (1, length):
        return None
    return np.broadcast_to(labels.ravel(), (length,)).copy()


def move_forward(node: Node, index: int, labels: Labels) -> list[tuple[Tensor, Labels]] | None:
    """Return the labels of the outputs of a mover, None when they cannot be told.

    Args:
        node: an op of `MOVERS`.
        index: which input has the labels.
        labels: of that input.
    """
    out = node.outputs[0]
    if node.op in RESHAPES:
        moved = reshaped(labels, node.inputs[0].shape, out.shape)
        return None if moved is None else [(out, moved)]
    if node.op == "Transpose":
        return [(out, labels.transpose(_perm(node, labels.ndim)))]
    if node.op == "Expand":
        rank = _rank(out)
        if rank is None or not _repeats(node, varying(labels), labels.ndim):
            return None
        return [(out, labels.reshape([1] * (rank - labels.ndim) + list(labels.shape)))]
    if node.op == "ReduceMean":
        axes = _averaged(node, labels.ndim)
        if axes is None or set(axes) & set(varying(labels)):
            return None
        return [(out, labels if node.attrs.get("keepdims", 1) else labels.squeeze(axes))]
    if node.op == "Concat":
        axis, spans = _concat_spans(node)
        if spans is None:
            return None
        return [(out, _filled(labels, axis, spans[index], spans[-1].stop))]
    axis, picks = _picks(node)
    size = _size(node.inputs[0], axis)
    if picks is None or size is None:
        return None
    wide = np.repeat(labels, size, axis=axis) if labels.shape[axis] == 1 else labels
    found = []
    for tensor, pick in picks:
        part = wide.take(pick, axis=axis)
        found.append((tensor, part if part.ndim == _rank(tensor) else None))
    if any(part is None for _, part in found):
        return None
    return [(tensor, reduced(part)) for tensor, part in found if part is not None and tensor.name]


def move_backward(node: Node, tensor: Tensor, labels: Labels) -> list[tuple[int, Labels]] | None:
    """Return (input index, labels) of what a mover makes `tensor` of; None when unknown."""
    if node.op in RESHAPES:
        moved = reshaped(labels, node.outputs[0].shape, node.inputs[0].shape)
        return None if moved is None else [(0, moved)]
    if node.op == "Transpose":
        return [(0, labels.transpose(np.argsort(_perm(node, labels.ndim))))]
    if node.op == "Expand":
        rank = _rank(node.inputs[0])
        if rank is None or not _repeats(node, varying(labels), labels.ndim):
            return None
        return [(0, labels.reshape(labels.shape[labels.ndim - rank :]))]
    if node.op == "ReduceMean":
        keeps = bool(node.attrs.get("keepdims", 1))
        axes = _averaged(node, _rank(node.inputs[0]))
        if axes is None or (keeps and set(axes) & set(varying(labels))):
            return None
        return [(0, labels if keeps else np.expand_dims(labels, axes))]
    if node.op == "Concat":
        axis, spans = _concat_spans(node)
        if spans is None:
            return None
        if labels.shape[axis] == 1:
            return [(index, labels) for index in range(len(node.inputs))]
        parts = [labels.take(np.arange(s.start, s.stop), axis=axis) for s in spans]
        return [(index, reduced(part)) for index, part in enumerate(parts)]
    axis, picks = _picks(node)
    size = _size(node.inputs[0], axis)
    if picks is None or size is None:
        return None
    pick = next(pick for made, pick in picks if made is tensor)
    if np.ndim(pick) == 0:
        labels, pick = np.expand_dims(labels, axis), np.array([pick])
    if labels.shape[axis] == 1 and size > 1 and len(varying(labels)):
        return [(0, labels)]  # selected along an axis without channels: all of it may be scaled
    shape = list(labels.shape)
    shape[axis] = size
    whole = np.zeros(shape, np.int64)
    where = (slice(None),) * axis + (pick,)
    whole[where] = labels
    return [(0, reduced(whole))]


def reshaped(labels: Labels, before: Any, after: Any) -> Labels | None:
    """Follow a reshape, which keeps the row-major order of elements.

    Trailing axes of equal product hold the same elements in the same order, whatever the sizes in
    front of them are, so these may be unknown.
    """
    if before is None or after is None:
        return None
    axes = varying(labels)
    if not axes:
        return np.broadcast_to(labels.ravel()[:1], (1,) * len(after)).reshape([1] * len(after))
    for start in range(axes[0], -1, -1):
        inner = _product(before[start:])
        if inner is None:
            return None
        for place in range(len(after)):
            if _product(after[place:]) != inner:
                continue
            suffix = np.broadcast_to(
                labels.reshape(labels.shape[start:]), tuple(before[start:])
            ).reshape(tuple(after[place:]))
            return reduced(suffix.reshape((1,) * place + suffix.shape))
    return None


def _product(sizes: Sequence[Any]) -> int | None:
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _rank(tensor: Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def _size(tensor: Tensor, axis: int) -> int | None:
    size = tensor.shape[axis] if tensor.shape is not None else None
    return size if isinstance(size, int) else None


def _perm(node: Node, rank: int) -> list[int]:
    perm = node.attrs.get("perm")
    return list(range(rank))[::-1] if perm is None else [int(p) for p in perm]


def _repeats(node: Node, axes: Sequence[int], rank: int) -> bool:
    """True when Expand leaves `axes` of a tensor of `rank`, its input or output, as they are."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None or any(axis < rank - len(before) for axis in axes):
        return False
    return all(before[axis - rank] == after[axis - rank] for axis in axes)


def _averaged(node: Node, rank: int | None) -> tuple[int, ...] | None:
    """Return the axes that ReduceMean averages over, None when they are not known."""
    axes = integers_of(node, "axes", 1)
    if rank is None or not axes:
        return None
    return tuple(sorted(axis % rank for axis in axes))


def _filled(labels: Labels, axis: int, span: slice, size: int) -> Labels:
    shape = list(labels.shape)
    shape[axis] = size
    whole = np.zeros(shape, np.int64)
    whole[(slice(None),) * axis + (span,)] = labels
    return reduced(whole)


def _concat_spans(node: Node) -> tuple[int, list[slice] | None]:
    rank = _rank(node.outputs[0])
    if rank is None:
        return 0, None
    axis = int(node.attrs["axis"]) % rank
    sizes = [_size(tensor, axis) for tensor in node.inputs]
    if any(size is None for size in sizes):
        return axis, None
    ends = np.cumsum([size for size in sizes if size is not None]).tolist()
    return axis, [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _picks(node: Node) -> tuple[int, list[tuple[Tensor, Any]] | None]:
    """Return the axis that Split, Slice or Gather selects along, and what each output takes."""
    rank = _rank(node.inputs[0])
    if rank is None:
        return 0, None
    if node.op == "Split":
        axis = int(node.attrs.get("axis", 0)) % rank
        sizes = [_size(tensor, axis) for tensor in node.outputs]
        if any(size is None for size in sizes):
            return axis, None
        ends = np.cumsum([size for size in sizes if size is not None]).tolist()
        spans = zip([0, *ends[:-1]], ends, strict=True)
        picks = [np.arange(a, b) for a, b in spans]
        return axis, list(zip(node.outputs, picks, strict=True))
    if node.op == "Gather":
        axis, where = int(node.attrs.get("axis", 0)) % rank, node.inputs[1]
        if not isinstance(where, Constant) or array_of(where).ndim > 1:
            return axis, None
        size = _size(node.inputs[0], axis)
        pick = array_of(where).astype(np.int64)
        if size is None:
            return axis, None
        return axis, [(node.outputs[0], np.asarray(np.where(pick < 0, pick + size, pick)))]
    starts, ends = integers_of(node, "starts", 1), integers_of(node, "ends", 2)
    axes, steps = integers_of(node, "axes", 3), integers_of(node, "steps", 4)
    if starts is None or ends is None or len(starts) != 1:
        return 0, None
    axis = (0 if axes is None else axes[0]) % rank
    size = _size(node.inputs[0], axis)
    step = 1 if steps is None else steps[0]
    if size is None:
        return axis, None
    return axis, [(node.outputs[0], np.arange(size)[slice(starts[0], ends[0], step)])]
