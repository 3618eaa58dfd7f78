"""Constants of any dtype, in memory or on disk: the second half of the graphsurgeon seam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx_graphsurgeon import Constant
from onnx_graphsurgeon.ir.tensor import LazyValues


class ExternalValues(LazyValues):  # type: ignore[misc]
    """A constant in an external data file: read on demand and never kept."""

    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        """Remember where the bytes of `tensor` lie below `folder`."""
        super().__init__(tensor)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        self.path = folder / entries["location"]
        self.offset = int(entries.get("offset", "0"))

    def load(self) -> NDArray[Any]:
        """Read the whole array from disk."""
        dtype = helper.tensor_dtype_to_np_dtype(self.tensor.data_type)
        shape = tuple(self.tensor.dims)
        if dtype.itemsize * 8 == _bits(self.tensor.data_type):
            count = int(np.prod(shape, dtype=np.int64))
            flat = np.fromfile(self.path, dtype=dtype, count=count, offset=self.offset)
            return flat.reshape(shape)
        inline = onnx.TensorProto()
        inline.CopyFrom(self.tensor)
        inline.ClearField("external_data")
        inline.data_location = onnx.TensorProto.DEFAULT
        size = (int(np.prod(shape, dtype=np.int64)) * _bits(self.tensor.data_type) + 7) // 8
        inline.raw_data = np.fromfile(self.path, np.uint8, size, offset=self.offset).tobytes()
        return numpy_helper.to_array(inline)


def _bits(data_type: int) -> int:
    name = onnx.TensorProto.DataType.Name(data_type)
    for bits, tail in ((4, ("INT4", "FLOAT4E2M1")), (2, ("INT2",))):
        if name.endswith(tail):
            return bits
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def array_of(constant: Constant) -> NDArray[Any]:
    """Return the values of a constant without changing how it is held."""
    values = constant._values
    if isinstance(values, ExternalValues):
        return values.load()
    if isinstance(values, LazyValues):
        return numpy_helper.to_array(values.tensor)
    return np.asarray(values)


def constant_proto(
    constant: Constant, *, stub_above: int | None = None, inline: bool = False
) -> onnx.TensorProto:
    """Return the TensorProto of a constant.

    Args:
        constant: any constant.
        stub_above: leave the data out above this many bytes.
        inline: read external data into the proto instead of referring to its file.
    """
    values = constant._values
    if stub_above is not None and values.nbytes > stub_above:
        data_type = (
            values.tensor.data_type
            if isinstance(values, LazyValues)
            else helper.np_dtype_to_tensor_dtype(values.dtype)
        )
        stub = onnx.TensorProto(name=constant.name, data_type=data_type, dims=values.shape)
        stub.data_location = onnx.TensorProto.EXTERNAL
        stub.external_data.add(key="location", value="stub")
        return stub
    if inline and isinstance(values, ExternalValues):
        return numpy_helper.from_array(values.load(), constant.name)
    if isinstance(values, LazyValues):
        proto = onnx.TensorProto()
        proto.CopyFrom(values.tensor)
        proto.name = constant.name
        return proto
    return numpy_helper.from_array(np.asarray(values), constant.name)
