"""Half precision models compute in float32 inside; their inputs and outputs keep their dtype.

The CPU kernels that multiply integers return float32, and onnxruntime has few float16 kernels: a
half precision graph would run through Casts around every op.
"""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np
from onnx import TensorProto

from qpass.graph import Constant, Graph, Tensor, array_of
from qpass.passes.normalize.folding import FoldResult

HALF: Final = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
HALF_TYPES: Final = {TensorProto.FLOAT16: HALF[0], TensorProto.BFLOAT16: HALF[1]}


def _is_half(tensor: Tensor) -> bool:
    dtype = tensor.dtype
    if isinstance(dtype, int):
        return dtype in HALF_TYPES
    return dtype is not None and np.dtype(dtype) in HALF


def _half_type(tensor: Tensor) -> int:
    dtype = tensor.dtype
    if isinstance(dtype, int):
        return dtype
    return next(number for number, half in HALF_TYPES.items() if half == np.dtype(dtype))


def to_float32(graph: Graph) -> FoldResult:
    """Turn half precision constants, Casts and tensors into float32; `changed` counts constants."""
    result = FoldResult()
    tensors = list(graph.tensors().values())
    if not any(_is_half(tensor) for tensor in tensors):
        return result
    boundary = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in tensors:
        if not _is_half(tensor):
            continue
        if isinstance(tensor, Constant):
            tensor.values = array_of(tensor).astype(np.float32)
            result.changed += 1
        elif id(tensor) not in boundary:
            tensor.dtype = np.dtype(np.float32)
    for node in graph.nodes:
        for key in ("to", "dtype"):
            if node.attrs.get(key) in HALF_TYPES and node.op not in ("CastLike",):
                node.attrs[key] = TensorProto.FLOAT
        value = node.attrs.get("value")
        if isinstance(value, Constant) and _is_half(value):
            value.values = array_of(value).astype(np.float32)
    for tensor in graph.inputs:
        if _is_half(tensor) and tensor.outputs:
            wide = graph.variable(f"{tensor.name}_float32", np.dtype(np.float32), tensor.shape)
            readers = graph.consumers(tensor)
            cast = graph.make(
                "Cast",
                [tensor],
                [wide],
                name=f"{tensor.name}_cast",
                attrs={"to": TensorProto.FLOAT},
            )
            graph.add(cast, before=graph.nodes[0])
            for node, index in readers:
                graph.set_input(node, index, wide)
            result.changed += 1
    for tensor in graph.outputs:
        maker = graph.producer(tensor)
        if _is_half(tensor) and maker is not None:
            wide = graph.variable(f"{tensor.name}_float32", np.dtype(np.float32), tensor.shape)
            readers = graph.consumers(tensor)
            slot = next(i for i, out in enumerate(maker.outputs) if out is tensor)
            graph.set_output(maker, slot, wide)
            for node, index in readers:
                graph.set_input(node, index, wide)
            attrs = {"to": _half_type(tensor)}
            cast = graph.make("Cast", [wide], [tensor], name=f"{tensor.name}_cast", attrs=attrs)
            graph.add(cast, after=maker)
            result.changed += 1
    return result
