"""What every fold returns, and questions that several of them ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.report.model import Refusal

Array = NDArray[Any]


@dataclass(slots=True)
class FoldResult:
    """How many places a fold changed, and where it could not, with the reason."""

    changed: int = 0
    refusals: list[Refusal] = field(default_factory=list)

    def refuse(self, rule: str, node: Node, reason: str) -> None:
        """Note that `rule` did not apply at `node`."""
        self.refusals.append(Refusal(rule=rule, where=node.name, reason=reason))


def sole_reader(graph: Graph, tensor: Tensor) -> Node | None:
    """Return the only node that reads `tensor`, None when there are more or it leaves the graph."""
    readers = tensor.outputs
    if len(readers) != 1 or graph.is_output(tensor) or tensor.name in graph.captured:
        return None
    node: Node = readers[0]
    return node


def given_input(node: Node, index: int) -> Tensor | None:
    """Return an optional input, None where it is left out."""
    if index >= len(node.inputs) or not node.inputs[index].name:
        return None
    tensor: Tensor = node.inputs[index]
    return tensor


def constant_of(tensor: Tensor) -> Array | None:
    """Return the values of a float constant in float64, None for anything else."""
    if not isinstance(tensor, Constant):
        return None
    values = array_of(tensor)
    return values.astype(np.float64) if values.dtype.kind == "f" else None


def scalar_of(tensor: Tensor) -> float | None:
    """Return the value of a float constant with one element."""
    if not isinstance(tensor, Constant) or tensor._values.nbytes > 8:
        return None
    values = constant_of(tensor)
    return float(values.ravel()[0]) if values is not None and values.size == 1 else None


def integers_of(node: Node, name: str, index: int) -> list[int] | None:
    """Return integers that are an attribute in old opsets and an input in new ones.

    None when they are not given, or not constant.
    """
    if name in node.attrs:
        return [int(value) for value in node.attrs[name]]
    tensor = given_input(node, index)
    return [int(v) for v in array_of(tensor).ravel()] if isinstance(tensor, Constant) else None


def other_input(node: Node, tensor: Tensor) -> Tensor | None:
    """Return the other input of a binary node."""
    if len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return None
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def rank_of(tensor: Tensor) -> int | None:
    """Return the rank of a tensor, None when it is not known."""
    return None if tensor.shape is None else len(tensor.shape)


def static_shape(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the shape of a tensor whose every size is known, None otherwise."""
    shape = tensor.shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return tuple(shape)


def element_type(tensor: Tensor) -> int | None:
    """Return the TensorProto data type of a tensor, None when it is not known."""
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, int):
        return dtype
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def write_constant(graph: Graph, node: Node, index: int, values: Array) -> None:
    """Give the constant input `index` of `node` other values; nobody else sees them."""
    tensor = node.inputs[index]
    if len(tensor.outputs) == 1 and not graph.is_output(tensor) and not _captured(graph, tensor):
        tensor.values = np.array(values, order="C")
    else:
        graph.set_input(node, index, graph.constant(tensor.name, values))


def _captured(graph: Graph, tensor: Tensor) -> bool:
    return tensor.name in graph.captured
