"""External data: where the bytes of a tensor lie, whether they are there, how they are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qpass.constants import ExternalValues
from qpass.errors import ModelError
from qpass.walk import all_tensors

CHUNK: Final = 16 << 20  # bytes copied at a time
NARROW_BITS: Final = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


def element_bits(data_type: int) -> int:
    """Return the bits of one stored element; ValueError for a type that has no fixed size."""
    name = TensorProto.DataType.Name(data_type)
    if name in ("STRING", "UNDEFINED"):
        raise ValueError(f"elements of {name} have no fixed size")
    return NARROW_BITS.get(name) or int(helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def stored_bytes(tensor: TensorProto) -> int:
    """Return the bytes that the values of `tensor` take on disk."""
    if tensor.data_type == TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    count = 1
    for dim in tensor.dims:
        count *= dim
    return (count * element_bits(tensor.data_type) + 7) // 8


def is_external(tensor: TensorProto) -> bool:
    """True when the values of `tensor` lie in another file."""
    external: bool = tensor.data_location == TensorProto.EXTERNAL
    return external


def external_place(tensor: TensorProto) -> tuple[str, int, int | None]:
    """Return (location, offset, length) of an external tensor.

    Raises:
        ModelError: the entries are missing, are no numbers, or lead out of the model's folder.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"tensor {tensor.name}"
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else None
    except ValueError as error:
        raise ModelError("an external data entry is not a number", where=where) from error
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if not location or posix.is_absolute() or windows.drive or windows.root:
        raise ModelError(f"external data location {location!r} is not relative", where=where)
    # Only the text is judged: caches of model hubs are made of symbolic links, which are fine.
    if ".." in windows.parts:
        raise ModelError(
            f"external data location {location!r} leads out of the model's folder",
            where=where,
            fix="keep the data file beside the model and save the model again",
        )
    if offset < 0:
        raise ModelError(f"external data offset {offset} is negative", where=where)
    return location, offset, length


def check_external(model: onnx.ModelProto, folder: Path) -> None:
    """Check that every external tensor finds its bytes below `folder`; ModelError if not."""
    sizes: dict[str, int] = {}
    for tensor in all_tensors(model):
        if not is_external(tensor):
            continue
        location, offset, length = external_place(tensor)
        where = f"tensor {tensor.name}"
        file = folder / location
        if location not in sizes:
            if not file.is_file():
                raise ModelError(
                    f"the external data file {location} is missing",
                    where=f"{where}, looked for {file}",
                    fix="put the data file beside the model; models above 2 GB have two files",
                )
            sizes[location] = file.stat().st_size
        try:
            needed = stored_bytes(tensor)
        except ValueError as error:
            raise ModelError(f"external data cannot be used: {error}", where=where) from error
        if length is not None and length < needed:
            raise ModelError(
                f"external data has {length} bytes where {needed} are needed", where=where
            )
        if offset + needed > sizes[location]:
            raise ModelError(
                f"the external data file {location} is too short: "
                f"{sizes[location]} bytes, {offset + needed} needed",
                where=where,
                fix="the download or copy was cut off: get the file again",
            )


def external_files(model: onnx.ModelProto, folder: Path) -> tuple[Path, ...]:
    """Return the data files that `model` refers to, sorted."""
    locations = {external_place(t)[0] for t in all_tensors(model) if is_external(t)}
    return tuple(folder / location for location in sorted(locations))


def read_values(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    """Return the values of a tensor, inline or external."""
    if is_external(tensor):
        return ExternalValues(tensor, folder).load()
    return numpy_helper.to_array(tensor)


def make_inline(tensor: TensorProto, folder: Path) -> None:
    """Read the bytes of an external tensor into it."""
    raw = b"".join(read_chunks(ExternalValues(tensor, folder)))
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = raw


def read_chunks(values: ExternalValues) -> Iterator[bytes]:
    """Yield the stored bytes of an external constant, at most `CHUNK` at a time."""
    left = stored_bytes(values.tensor)
    with values.path.open("rb") as stream:
        stream.seek(values.offset)
        while left:
            piece = stream.read(min(left, CHUNK))
            if not piece:
                raise ModelError(f"{values.path.name} became shorter while it was read")
            left -= len(piece)
            yield piece


def inline_raw(tensor: TensorProto) -> bytes:
    """Return the stored bytes of an inline tensor, whichever field holds them."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return bytes(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name).raw_data)
