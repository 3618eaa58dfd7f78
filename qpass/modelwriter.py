"""Write a model constant by constant, in protobuf's wire format.

What it does
    Everything but the initializers is encoded by protobuf. Initializers follow one at a time, their
    raw data streamed from memory or from the data file in which they lie, into the model file or
    into a new data file.
Why it is correct
    A repeated field of a message may come in pieces, and fields may come in any order; the sizes of
    constants are known before they are read, so the length of the graph can be written first.
Why
    `SerializeToString` needs all constants in memory three times: arrays, protos, bytes.
Reference
    https://protobuf.dev/programming-guides/encoding/, https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import onnx
from onnx import TensorProto

from qpass.constants import ExternalValues
from qpass.errors import InternalError
from qpass.external import inline_raw, is_external, read_chunks, stored_bytes
from qpass.graph import Constant, Graph
from qpass.protos import without_graph
from qpass.skim import varint

EXTERNAL_MIN: Final = 1024  # bytes; smaller constants stay in the model file
ALIGNMENT: Final = 4096  # bytes; a memory page, so that engines can map the data
LENGTH_DELIMITED: Final = 2
GRAPH: Final = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
INITIALIZER: Final = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
RAW_DATA: Final = TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """An initializer: its encoded proto, and the values that still have to follow it."""

    proto: bytes
    values: Any = None  # None, an array, a TensorProto or ExternalValues
    raw_bytes: int = 0

    @property
    def raw_head(self) -> bytes:
        return _field_head(RAW_DATA, self.raw_bytes) if self.values is not None else b""

    @property
    def size(self) -> int:
        return len(self.proto) + len(self.raw_head) + self.raw_bytes


class ModelWriter:
    """Writes one export of a graph; the values of its constants come from the graph."""

    def __init__(self, graph: Graph, model: onnx.ModelProto | None) -> None:
        """Take `model`, or a fresh export of `graph`, as what is to be written."""
        self._model = graph.to_model(stub_above=EXTERNAL_MIN - 1) if model is None else model
        self._folder = graph.folder or Path()
        self._constants = {constant.name: constant for constant in graph.constants()}

    @property
    def constant_bytes(self) -> int:
        """Bytes of all initializers together."""
        return sum(map(stored_bytes, self._model.graph.initializer))

    def reads(self, file: Path) -> bool:
        """True when a constant that is to be written lies in `file`."""
        held = [_held(constant) for constant in self._constants.values()]
        places = {values.path for values in held if isinstance(values, ExternalValues)}
        return file.exists() and any(file.samefile(place) for place in places)

    def write(
        self,
        model_file: BinaryIO,
        metadata: Mapping[str, str],
        *,
        data_file: BinaryIO | None = None,
        location: str = "",
    ) -> None:
        """Write the model; with a `data_file`, called `location`, large constants go there."""
        entries = [
            self._entry(tensor, data_file, location) for tensor in self._model.graph.initializer
        ]
        heads = [_field_head(INITIALIZER, entry.size) for entry in entries]
        rest = self._graph_without_initializers()
        total = len(rest) + sum(len(h) + e.size for h, e in zip(heads, entries, strict=True))
        model_file.write(self._header(metadata))
        model_file.write(_field_head(GRAPH, total))
        model_file.write(rest)
        for head, entry in zip(heads, entries, strict=True):
            model_file.write(head + entry.proto + entry.raw_head)
            if entry.values is not None:
                _write_values(model_file, entry.values, entry.raw_bytes)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        header = without_graph(self._model)
        header.ClearField("graph")
        header.functions.extend(self._model.functions)
        merged = {entry.key: entry.value for entry in header.metadata_props} | dict(metadata)
        del header.metadata_props[:]
        for key in sorted(merged):
            header.metadata_props.add(key=key, value=merged[key])
        return bytes(header.SerializeToString(deterministic=True))

    def _graph_without_initializers(self) -> bytes:
        light = onnx.GraphProto()
        for field, value in self._model.graph.ListFields():
            if field.number == INITIALIZER:
                continue
            if isinstance(value, str):
                setattr(light, field.name, value)
            else:
                getattr(light, field.name).extend(value)
        return bytes(light.SerializeToString(deterministic=True))

    def _entry(self, tensor: TensorProto, data_file: BinaryIO | None, location: str) -> _Entry:
        values = self._values(tensor)
        size = stored_bytes(tensor)
        large = size >= EXTERNAL_MIN and tensor.data_type != TensorProto.STRING
        if isinstance(values, TensorProto) and not large:
            named = TensorProto()
            named.CopyFrom(values)
            named.name = tensor.name
            return _Entry(proto=named.SerializeToString(deterministic=True))
        head = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        described = _described(values, tensor)
        if described.doc_string:
            head.doc_string = described.doc_string
        head.metadata_props.extend(described.metadata_props)
        if data_file is None or not large:
            proto = head.SerializeToString(deterministic=True)
            return _Entry(proto=proto, values=values, raw_bytes=size)
        data_file.write(bytes(-data_file.tell() % ALIGNMENT))
        head.data_location = TensorProto.EXTERNAL
        places = (("location", location), ("offset", data_file.tell()), ("length", size))
        for key, value in places:
            head.external_data.add(key=key, value=str(value))
        _write_values(data_file, values, size)
        return _Entry(proto=head.SerializeToString(deterministic=True))

    def _values(self, tensor: TensorProto) -> Any:
        """Return what holds the values: an array, a TensorProto with data, or ExternalValues."""
        if not is_external(tensor):
            return tensor
        constant = self._constants.get(tensor.name)
        if constant is not None:
            return _held(constant)
        return ExternalValues(tensor, self._folder)


def _held(constant: Constant) -> Any:
    values = constant._values
    if isinstance(values, ExternalValues | np.ndarray):
        return values
    return values.tensor  # graphsurgeon's lazy values wrap the TensorProto of the source


def _described(values: Any, tensor: TensorProto) -> TensorProto:
    """Return the proto that has the doc string: an export without data does not carry it."""
    if isinstance(values, TensorProto):
        return values
    return values.tensor if isinstance(values, ExternalValues) else tensor


def _write_values(stream: BinaryIO, values: Any, size: int) -> None:
    written = 0
    for piece in _pieces(values):
        stream.write(piece)
        written += len(piece)
    if written != size:
        raise InternalError(f"a constant has {written} bytes, not {size}")


def _pieces(values: Any) -> Iterable[Any]:
    if isinstance(values, ExternalValues):
        return read_chunks(values)
    if isinstance(values, TensorProto):
        return [inline_raw(values)]
    return [np.ascontiguousarray(values).reshape(-1).view(np.uint8).data]


def _field_head(number: int, size: int) -> bytes:
    return varint(number << 3 | LENGTH_DELIMITED) + varint(size)
