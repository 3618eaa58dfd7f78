"""Read the structure of an ONNX file of any size without reading its weights.

What it does
    Walks the protobuf wire format over a memory map and copies everything but long `raw_data`. Each
    such tensor becomes an external one that points back into the same file, so that its values can
    still be read when somebody asks.
Why
    An inline model of 1.9 GB needs 4 GB to be parsed; its structure is a few hundred kilobytes.
Reference
    The wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Final

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qpass.errors import ModelError

INLINE_LIMIT: Final = 1024  # bytes; shapes, axes and scalars stay inline for shape inference
RAW_DATA: Final = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number
LENGTH_DELIMITED: Final = 2
FIXED_SIZES: Final = {1: 8, 5: 4}  # wire type: bytes


def skim(path: Path, *, limit: int = INLINE_LIMIT) -> onnx.ModelProto:
    """Return the model in `path`; tensors above `limit` bytes stay in the file.

    Raises:
        ModelError: there is no such file, or it is not an ONNX model.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            skimmer = _Skimmer(data, path.name, limit)
            skeleton = skimmer.message(0, len(data), onnx.ModelProto.DESCRIPTOR)
        model: onnx.ModelProto = onnx.ModelProto.FromString(bytes(skeleton))
    except OSError as error:
        raise ModelError(f"cannot read the model: {error.strerror}", where=str(path)) from error
    except (DecodeError, IndexError, ValueError) as error:
        raise not_onnx(path) from error
    if not model.HasField("graph"):
        raise not_onnx(path)
    return model


def not_onnx(path: Path) -> ModelError:
    """Return the error for a file whose bytes are no ONNX model, with a guess what they are."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return ModelError(f"{path.name} is empty", where=str(path), fix="export the model again")
    if head.startswith(b"version https://git-lfs"):
        return ModelError(
            f"{path.name} is a Git LFS pointer, not the model",
            where=str(path),
            fix="fetch the file itself: git lfs pull",
        )
    guess = "it is a zip archive, such as a PyTorch checkpoint; " if head[:2] == b"PK" else ""
    return ModelError(
        f"{path.name} is not an ONNX model",
        where=str(path),
        fix=f"{guess}give a file that torch.onnx.export or another exporter wrote",
    )


class _Skimmer:
    """Copies messages and leaves long raw data out."""

    def __init__(self, data: mmap.mmap, location: str, limit: int) -> None:
        self._data = data
        self._location = location
        self._limit = limit

    def message(self, start: int, end: int, descriptor: Any) -> bytearray:
        """Return the lighter bytes of the message that lies at `start` to `end`."""
        result = bytearray()
        position = start
        while position < end:
            begin = position
            tag, position = self._varint(position)
            number, wire = tag >> 3, tag & 7
            if wire != LENGTH_DELIMITED:
                position = self._skip(position, wire)
                result += self._data[begin:position]
                continue
            length, content = self._varint(position)
            position = content + length
            if position > end:
                raise ValueError("a field is longer than its message")
            field = descriptor.fields_by_number.get(number)
            if length <= self._limit or field is None:
                result += self._data[begin:position]
            elif field.message_type is not None:
                inner = self.message(content, position, field.message_type)
                result += varint(tag) + varint(len(inner)) + inner
            elif descriptor is onnx.TensorProto.DESCRIPTOR and number == RAW_DATA:
                result += self._reference(content, length)
            else:
                result += self._data[begin:position]
        return result

    def _reference(self, offset: int, length: int) -> bytes:
        tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", self._location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        reference: bytes = tensor.SerializeToString()
        return reference

    def _skip(self, position: int, wire: int) -> int:
        if wire == 0:
            return self._varint(position)[1]
        if wire not in FIXED_SIZES:
            raise ValueError(f"wire type {wire} is not used by ONNX")
        return position + FIXED_SIZES[wire]

    def _varint(self, position: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7


def varint(value: int) -> bytes:
    """Encode a non-negative integer as protobuf does: seven bits a byte, lowest first."""
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
