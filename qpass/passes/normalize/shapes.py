"""Sizes that are known become constants; sizes that change from run to run stay computed.

Exporters read a shape, take sizes out of it and put them together again for Reshape, because the
batch is free. Which sizes are known comes from shape inference with data propagation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.normalize.constant_folding import become_constant
from qpass.passes.normalize.folding import Array, FoldResult, integers_of


def fold_shapes(graph: Graph) -> FoldResult:
    """Turn Shape, and Gather and Slice behind it, into constants where the sizes are known."""
    result = FoldResult()
    for node in list(graph.nodes):
        sizes = _sizes(graph, node)
        if sizes is None or not all(isinstance(size, int) for size in sizes.ravel()):
            continue
        if graph.is_output(node.outputs[0]):
            continue
        if become_constant(graph, node, 0, sizes.astype(np.int64)):
            result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def fold_reshape_targets(graph: Graph) -> FoldResult:
    """Write the target of a Reshape as a constant where at most one of its sizes is free."""
    result = FoldResult()
    names = {size for tensor in graph.inputs for size in tensor.shape or () if size}
    for node in graph.nodes:
        if node.op != "Reshape" or isinstance(node.inputs[1], Constant):
            continue
        target = _target(node.inputs[0].shape, node.outputs[0].shape, names)
        if target is not None:
            graph.set_input(node, 1, graph.constant(f"{node.name}_shape", target))
            result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def _target(before: Any, after: Any, names: set[Any]) -> Array | None:
    """Return the target of a Reshape from its shapes, None when it depends on more than one size.

    Args:
        before: shape of what is reshaped: integers, and names of sizes that are free.
        after: shape of the result.
        names: the free sizes that inputs of the graph have: equal names are equal sizes.
    """
    if after is None or 0 in after or 0 in (before or ()):
        return None  # with a size of 0, -1 would not be defined
    sizes = list(after)
    free = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    if len(free) == 2 and before is not None:
        # One of the two may cancel against the same name on the other side.
        rest = [size for size in before if not isinstance(size, int)]
        equal = [axis for axis in free if sizes[axis] in names and [sizes[axis]] == rest]
        if len(equal) == 1:
            known = math.prod(size for size in sizes if isinstance(size, int))
            count = math.prod(size for size in before if isinstance(size, int))
            other = next(axis for axis in free if axis != equal[0])
            if count % known == 0:
                sizes[other], free = count // known, equal
    if len(free) > 1:
        return None
    return np.array([-1 if axis in free else size for axis, size in enumerate(sizes)], np.int64)


def _sizes(graph: Graph, node: Node) -> Array | None:
    """Return what `node` reads out of a shape: integers, and names for sizes that are free."""
    if node.op == "Shape":
        return _shape_values(node)
    if node.op not in ("Gather", "Slice"):
        return None
    maker = graph.producer(node.inputs[0])
    sizes = _shape_values(maker) if maker is not None and maker.op == "Shape" else None
    if sizes is None:
        return None
    return _gathered(sizes, node) if node.op == "Gather" else _sliced(sizes, node)


def _shape_values(node: Node) -> Array | None:
    source: Tensor = node.inputs[0]
    if source.shape is None:
        return None
    sizes: list[Any] = list(source.shape)
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(sizes))
    return np.array(sizes[start:end], object)


def _gathered(sizes: Array, node: Node) -> Array | None:
    indices = node.inputs[1]
    if not isinstance(indices, Constant):
        return None
    places = array_of(indices)
    if places.size and not -len(sizes) <= places.min() <= places.max() < len(sizes):
        return None
    return np.asarray(np.take(sizes, places), object)


def _sliced(sizes: Array, node: Node) -> Array | None:
    starts, ends = integers_of(node, "starts", 1), integers_of(node, "ends", 2)
    steps = integers_of(node, "steps", 4)
    if starts is None or ends is None or (steps is None and len(node.inputs) > 4):
        return None
    step = steps[0] if steps else 1
    return sizes[starts[0] : ends[0] : step] if step > 0 else None
