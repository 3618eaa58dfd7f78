"""Half precision models compute in float32 inside; their inputs and outputs keep their dtype.

The CPU kernels that multiply integers return float32, and onnxruntime has few float16 kernels: a
half precision graph would run through Casts around every op. The result is not the half precision
one bit by bit but the more exact one: nothing is rounded to half inside, and nothing overflows.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.normalize.folding import FoldResult, element_type

HALF_TYPES: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOAT32: Final = np.dtype(np.float32)


def to_float32(graph: Graph) -> FoldResult:
    """Turn half precision constants, Casts and tensors into float32; `changed` counts constants.

    A model with control flow is refused: what is inside of the bodies is not converted.
    """
    result = FoldResult()
    half = [tensor for tensor in graph.tensors().values() if _is_half(tensor)]
    if not half:
        return result
    for node in graph.nodes:
        if any(isinstance(value, onnx.GraphProto) for value in node.attrs.values()):
            result.refuse("float32", node, "the model is half precision and has control flow")
            return result
    boundary = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in half:
        if isinstance(tensor, Constant):
            tensor.values = array_of(tensor).astype(np.float32)
            result.changed += 1
        elif id(tensor) not in boundary:
            tensor.dtype = FLOAT32
    for node in graph.nodes:
        for key in ("to", "dtype"):
            if node.attrs.get(key) in HALF_TYPES and id(node.outputs[0]) not in boundary:
                node.attrs[key] = int(TensorProto.FLOAT)
        value = node.attrs.get("value")
        if isinstance(value, Constant) and _is_half(value):
            value.values = array_of(value).astype(np.float32)
    result.changed += sum(_widen_input(graph, t) for t in graph.inputs if _is_half(t))
    result.changed += sum(_narrow_output(graph, t) for t in graph.outputs if _is_half(t))
    return result


def _is_half(tensor: Tensor) -> bool:
    return element_type(tensor) in HALF_TYPES


def _casts_to(node: Node, data_type: int | None) -> bool:
    return bool(node.op == "Cast" and node.attrs["to"] == data_type)


def _widen_input(graph: Graph, tensor: Tensor) -> int:
    """Put a Cast behind a graph input; return how many Casts that took."""
    readers = [(n, i) for n, i in graph.consumers(tensor) if not _casts_to(n, TensorProto.FLOAT)]
    if not readers:
        return 0
    wide = graph.variable(f"{tensor.name}_float32", FLOAT32, tensor.shape)
    attrs = {"to": int(TensorProto.FLOAT)}
    cast = graph.make("Cast", [tensor], [wide], name=f"{tensor.name}_cast", attrs=attrs)
    graph.add(cast, before=graph.nodes[0])
    for node, index in readers:
        graph.set_input(node, index, wide)
    return 1


def _narrow_output(graph: Graph, tensor: Tensor) -> int:
    """Put a Cast in front of a graph output; return how many Casts that took."""
    maker, half_type = graph.producer(tensor), element_type(tensor)
    if maker is None or _casts_to(maker, half_type):
        return 0
    readers = graph.consumers(tensor)
    wide = graph.variable(f"{tensor.name}_float32", FLOAT32, tensor.shape)
    slot = next(i for i, out in enumerate(maker.outputs) if out is tensor)
    graph.set_output(maker, slot, wide)
    for node, index in readers:
        graph.set_input(node, index, wide)
    attrs = {"to": half_type}
    cast = graph.make("Cast", [wide], [tensor], name=f"{tensor.name}_cast", attrs=attrs)
    graph.add(cast, after=maker)
    return 1
