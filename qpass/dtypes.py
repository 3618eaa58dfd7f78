"""Storage types of quantized tensors: bounds, ONNX enum and numpy dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from onnx import TensorProto


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageType:
    """An integer type that ONNX can store and QuantizeLinear can produce."""

    name: str  # ONNX's own name, lower case
    bits: int
    signed: bool
    onnx: int  # TensorProto.DataType
    numpy: Any  # dtype that onnx.numpy_helper packs into `onnx`

    @property
    def qmin(self) -> int:
        """Smallest integer of the type."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer of the type."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


def _storage(name: str, bits: int, *, signed: bool, numpy: Any) -> StorageType:
    enum = TensorProto.DataType.Value(name.upper())
    return StorageType(name=name, bits=bits, signed=signed, onnx=enum, numpy=numpy)


INT4: Final = _storage("int4", 4, signed=True, numpy=ml_dtypes.int4)
UINT4: Final = _storage("uint4", 4, signed=False, numpy=ml_dtypes.uint4)
INT8: Final = _storage("int8", 8, signed=True, numpy=np.int8)
UINT8: Final = _storage("uint8", 8, signed=False, numpy=np.uint8)
INT16: Final = _storage("int16", 16, signed=True, numpy=np.int16)
UINT16: Final = _storage("uint16", 16, signed=False, numpy=np.uint16)
INT32: Final = _storage("int32", 32, signed=True, numpy=np.int32)

STORAGE_TYPES: Final = (INT4, UINT4, INT8, UINT8, INT16, UINT16, INT32)


def storage_for(bits: int, *, signed: bool) -> StorageType:
    """Return the smallest storage type that holds integers of `bits` bits (2 to 16)."""
    for candidate in STORAGE_TYPES:
        if candidate.signed is signed and candidate.bits >= bits and candidate is not INT32:
            return candidate
    msg = f"no ONNX storage type holds {bits}-bit integers"
    raise ValueError(msg)


def storage_of(onnx_enum: int) -> StorageType:
    """Return the storage type of a TensorProto data type; KeyError when it is no quantized type."""
    for candidate in STORAGE_TYPES:
        if candidate.onnx == onnx_enum:
            return candidate
    raise KeyError(onnx_enum)
