"""Which rows (tokens) of what a linear op makes can reach an output of the model at all.

What it does
    A classifier reads the class token and drops the others, so behind its last attention the errors
    of all others show nowhere. Truth values walk back from the outputs: through ops that work
    element by element or row by row, through products, and through those that only move values,
    which are run on the numbers of the elements. What an op is not known to drop counts as read.
What it is good for
    Sums over rows (of roundings, refits and corrections) are spent on the rows that count.
Preconditions
    The graph is normalized. No sample runs: shapes follow from those of the feeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.attention import MOVERS, run_alone
from qpass.submodel import Feeds
from qpass.units import is_weighted

Array = NDArray[Any]
Shape = tuple[int, ...]

STUB_ABOVE: Final = 1024  # elements of constants whose values no shape depends on
ELEMENTWISE: Final = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow",
    "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish",
    "Tanh", "Where",
})  # fmt: skip
ROWWISE: Final = frozenset({
    "LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax",
})  # fmt: skip
REDUCING: Final = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
DEAD: Final = 0.02  # what a dead row counts beside a live one: few live rows may not span a layer


class LiveRows:
    """Live rows of the linear ops of a graph, for feeds of any shapes."""

    def __init__(self, graph: Graph) -> None:
        """Look at nothing yet."""
        self._graph = graph
        self._found: dict[tuple[tuple[str, Shape], ...], dict[str, Array]] = {}

    def of(self, feeds: Feeds) -> Mapping[str, Array]:
        """Return truth values by name of a MatMul or Gemm some of whose rows are dead.

        Args:
            feeds: one batch; only its shapes count.

        Returns:
            Of the shape of the output, the channels left out.
        """
        key = tuple(sorted((name, np.shape(array)) for name, array in feeds.items()))
        if key not in self._found:
            self._found[key] = _live_rows(self._graph, dict(key))
        return self._found[key]


def row_counts(live: Array) -> Array:
    """Return what each row counts, float64, in units of the mean over all."""
    counts: Array = np.where(live, 1.0, DEAD)
    counts /= counts.mean()
    return counts


def _live_rows(graph: Graph, given: Mapping[str, Shape]) -> dict[str, Array]:
    shapes = _shapes(graph, given)
    walk = _Walk(shapes=shapes, opset=graph.opset)
    for tensor in graph.outputs:
        walk.add(tensor, walk.all_of(tensor))
    found = {}
    for node in reversed(graph.nodes):
        for tensor in node.captured:
            walk.add(tensor, None)
        walk.visit(node)
        live = walk.live.get(node.outputs[0].name) if node.outputs else None
        if node.op in ("Gemm", "MatMul") and is_weighted(node) and live is not None and live.ndim:
            rows = np.asarray(live.any(axis=-1))
            if not rows.all():
                found[node.name] = rows
        walk.forget(node)
    return found


def _shapes(graph: Graph, given: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes that are known with these inputs."""
    model = graph.to_model(stub_above=STUB_ABOVE)
    for value in model.graph.input:
        if value.name in given:
            del value.type.tensor_type.shape.dim[:]
            for size in given[value.name]:
                value.type.tensor_type.shape.dim.add().dim_value = size
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    found = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input):
        sizes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in sizes):
            found[value.name] = tuple(d.dim_value for d in sizes)
    return found


class _Walk:
    """Truth values of tensors by name: None where all of a tensor of unknown shape is read."""

    def __init__(self, *, shapes: Mapping[str, Shape], opset: int) -> None:
        self._shapes, self._opset = shapes, opset
        self.live: dict[str, Array | None] = {}

    def all_of(self, tensor: Tensor) -> Array | None:
        """Return that all of a tensor is read."""
        shape = self._shapes.get(tensor.name)
        return None if shape is None else np.ones(shape, bool)

    def add(self, tensor: Tensor, live: Array | None) -> None:
        """Note a reader of a tensor."""
        if isinstance(tensor, Constant) or not tensor.name:
            return
        before = self.live.get(tensor.name, False)
        if live is None or before is None:
            self.live[tensor.name] = None
        else:
            self.live[tensor.name] = live | before

    def forget(self, node: Node) -> None:
        """Drop what is known of a node's outputs: all that read them have been visited."""
        for tensor in node.outputs:
            self.live.pop(tensor.name, None)

    def visit(self, node: Node) -> None:
        """Note what a node reads of its inputs; those behind it have been visited."""
        out = node.outputs[0].name if node.outputs else ""
        if all(tensor.name not in self.live for tensor in node.outputs):
            return  # nobody reads it
        known = all(self.live.get(tensor.name, False) is not None for tensor in node.outputs)
        for index, tensor in enumerate(node.inputs):
            shape = self._shapes.get(tensor.name)
            live = None
            if known and shape is not None and not isinstance(tensor, Constant):
                live = self._read(node, index, shape, self.live.get(out))
            self.add(tensor, self.all_of(tensor) if live is None else live)

    def _read(self, node: Node, index: int, shape: Shape, out: Array | None) -> Array | None:
        """Return what is read of an input; None: this is not known, so all."""
        if node.op in MOVERS and index == 0:
            return self._moved(node, shape)
        if out is None:
            return None
        if node.op in ELEMENTWISE:
            return _unbroadcast(out, shape)
        last = int(node.attrs.get("axis", -1)) in (-1, out.ndim - 1)
        if node.op in ROWWISE and index == 0 and last:
            return np.broadcast_to(out.any(axis=-1, keepdims=True), shape)
        if node.op in REDUCING and index == 0 and out.ndim == len(shape):
            return np.broadcast_to(out, shape)
        if node.op == "Gemm" and index == 0 and not node.attrs.get("transA", 0):
            return np.broadcast_to(out.any(axis=-1, keepdims=True), shape)
        if node.op == "MatMul" and min(len(shape), out.ndim) >= 2:
            axis = -1 if index == 0 else -2
            read = out.any(axis=axis, keepdims=True)
            whole = (*read.shape[:-2], *shape[-2:])
            return _unbroadcast(np.broadcast_to(read, whole), shape)
        return None

    def _moved(self, node: Node, shape: Shape) -> Array | None:
        constants = [tensor for tensor in node.inputs[1:] if tensor.name]
        if not all(isinstance(tensor, Constant) for tensor in constants):
            return None
        numbers = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        outputs = [tensor for tensor in node.outputs if tensor.name]
        values = {tensor.name: array_of(tensor) for tensor in constants}
        places = run_alone(node, numbers, values, [t.name for t in outputs], self._opset)
        live = np.zeros(numbers.size, bool)
        for tensor, place in zip(outputs, places, strict=True):
            read = self.live.get(tensor.name)
            if read is not None:
                live[place[read]] = True
        return live.reshape(shape)


def _unbroadcast(live: Array, shape: Sequence[int]) -> Array:
    """Return what is read of an operand that was broadcast to the shape of `live`."""
    read = np.asarray(live.any(axis=tuple(range(live.ndim - len(shape)))))
    spread = tuple(i for i, size in enumerate(shape) if size == 1 != read.shape[i])
    return np.asarray(read.any(axis=spread, keepdims=True)) if spread else read
