"""Nodes that do nothing go; names of graph outputs stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qpass.graph import SHARED_LIMIT, Constant, Graph, Node, Tensor, array_of
from qpass.passes.normalize.folding import (
    FoldResult,
    element_type,
    given_input,
    integers_of,
    rank_of,
)

# Exporters write "to the end" as INT_MAX or INT64_MAX; no axis is that long.
TO_THE_END: Final = 2**31 - 1


def remove_no_ops(graph: Graph) -> FoldResult:
    """Remove nodes that change nothing.

    Identity; Dropout at inference; Concat of one; Cast to the same type; Transpose, Reshape,
    Expand, Pad and Slice that provably keep what they read; Squeeze behind the same Unsqueeze, and
    the reverse.
    """
    result = FoldResult()
    for node in list(graph.nodes):
        if is_removable(graph, node):
            source = _unchanged_source(graph, node)
            graph.replace_uses(node.outputs[0], source)
            graph.remove(node)
            result.changed += 1
        elif node.op == "Dropout":
            result.refuse("remove Dropout", node, _live_dropout(graph, node) or "it is an output")
    return result


def is_removable(graph: Graph, node: Node) -> bool:
    """True when `node` changes nothing and no name depends on it."""
    source = _unchanged_source(graph, node)
    return source is not None and bool(source.name) and _may_go(graph, node, source)


def merge_transposes(graph: Graph) -> FoldResult:
    """Let a Transpose of a Transpose read the source of the first, with both permutations."""
    result = FoldResult()
    for node in graph.nodes:
        first = graph.producer(node.inputs[0]) if node.op == "Transpose" else None
        if first is None or first.op != "Transpose":
            continue
        inner, outer = _permutation(first), _permutation(node)
        if inner is not None and outer is not None:
            graph.set_input(node, 0, first.inputs[0])
            node.attrs["perm"] = [inner[axis] for axis in outer]
            result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def unshare_small_constants(graph: Graph) -> FoldResult:
    """Give each reader of a small constant a copy, so that edits of one do not reach another.

    The copies are merged again when the graph is written, as those that `Graph` makes on load.
    """
    result = FoldResult()
    for node in graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, Constant) or len(tensor.outputs) < 2:
                continue
            if tensor._values.nbytes <= SHARED_LIMIT:
                copy = graph.constant(tensor.name, array_of(tensor))
                copy.copy_of = getattr(tensor, "copy_of", tensor.name)
                graph.set_input(node, index, copy)
                result.changed += 1
    return result


def _may_go(graph: Graph, node: Node, source: Tensor) -> bool:
    """False where only a node can give the value a name that somebody outside relies on."""
    out = node.outputs[0]
    if out.name in graph.captured:
        return False
    if not graph.is_output(out):
        return True
    if graph.producer(source) is None or graph.is_output(source):
        return False  # an input, constant or output that is an output under a second name
    return source.name not in graph.captured


def _live_dropout(graph: Graph, node: Node) -> str:
    """Return why a Dropout has to stay, or nothing."""
    if len(node.outputs) > 1 and (node.outputs[1].outputs or graph.is_output(node.outputs[1])):
        return "its mask is used"
    training = given_input(node, 2)
    if training is None:
        return ""
    if not isinstance(training, Constant):
        return "training_mode is not constant"
    return "training_mode is true" if array_of(training).any() else ""


def _unchanged_source(graph: Graph, node: Node) -> Tensor | None:
    """Return the tensor whose values `node` repeats, None when it computes something."""
    if not node.inputs or not node.outputs or node.domain not in (None, "", "ai.onnx"):
        return None
    source: Tensor = node.inputs[0]
    if node.op in ("Squeeze", "Unsqueeze"):
        return _undone(graph, node)
    if node.op == "Dropout":
        return None if _live_dropout(graph, node) else source
    return source if node.op in _CHECKS and _CHECKS[node.op](node) else None


def _undone(graph: Graph, node: Node) -> Tensor | None:
    """Return x for Squeeze(Unsqueeze(x)) and Unsqueeze(Squeeze(x)) of the same axes."""
    first = graph.producer(node.inputs[0])
    if first is None or {first.op, node.op} != {"Squeeze", "Unsqueeze"}:
        return None
    # The axes of both count in the tensor with the ones, so equal numbers are equal axes.
    axes = [integers_of(one, "axes", 1) for one in (first, node)]
    if axes[0] is None or axes[1] is None:
        return None
    rank = rank_of(node.inputs[0] if first.op == "Unsqueeze" else first.inputs[0])
    if rank is not None:
        axes = [[axis % rank for axis in one or ()] for one in axes]
    same = sorted(axes[0] or ()) == sorted(axes[1] or ())
    source: Tensor = first.inputs[0]
    return source if same else None


def _permutation(node: Node) -> list[int] | None:
    if "perm" in node.attrs:
        return [int(axis) for axis in node.attrs["perm"]]
    rank = rank_of(node.inputs[0])
    return None if rank is None else list(reversed(range(rank)))


def _keeps_type(node: Node) -> bool:
    return element_type(node.inputs[0]) == int(node.attrs["to"])


def _keeps_order(node: Node) -> bool:
    permutation = _permutation(node)
    return permutation is not None and permutation == sorted(permutation)


def _keeps_shape(node: Node) -> bool:
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None or len(before) != len(after):
        return False
    unknown = [
        position
        for position, (one, other) in enumerate(zip(before, after, strict=True))
        if not (isinstance(one, int) and one == other)
    ]
    # Reshape keeps the number of elements: one size that is not known follows from the others.
    countable = node.op == "Reshape" and len(unknown) == 1 and 0 not in [*before, *after]
    free = countable and not all(isinstance(shape[unknown[0]], int) for shape in (before, after))
    return not unknown or free


def _adds_nothing(node: Node) -> bool:
    pads = integers_of(node, "pads", 1)
    return pads is not None and not any(pads)


def _takes_everything(node: Node) -> bool:
    starts, ends = integers_of(node, "starts", 1), integers_of(node, "ends", 2)
    steps = integers_of(node, "steps", 4)
    if starts is None or ends is None or (steps is None and given_input(node, 4) is not None):
        return False
    if given_input(node, 3) is not None and integers_of(node, "axes", 3) is None:
        return False
    if any(starts) or any(step != 1 for step in steps or ()):
        return False
    axes = integers_of(node, "axes", 3) or list(range(len(starts)))
    sizes = [None if node.inputs[0].shape is None else node.inputs[0].shape[axis] for axis in axes]
    return all(
        end >= TO_THE_END or (isinstance(size, int) and end >= size)
        for size, end in zip(sizes, ends, strict=True)
    )


_CHECKS: Final[dict[str, Callable[[Node], bool]]] = {
    "Identity": lambda _: True,
    "Cast": _keeps_type,
    "Transpose": _keeps_order,
    "Reshape": _keeps_shape,
    "Expand": _keeps_shape,
    "Pad": _adds_nothing,
    "Slice": _takes_everything,
    "Concat": lambda node: len(node.inputs) == 1,
}
