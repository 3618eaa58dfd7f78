"""Model files: read with everything checked that can be wrong, written atomically and lazily.

Weights in external data files are never read whole: loading leaves them on disk, saving copies them
in pieces. What is saved is a function of the graph alone: same graph, same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

from qpass.errors import ModelError
from qpass.external import (
    check_external,
    external_files,
    is_external,
    make_inline,
    stored_bytes,
)
from qpass.graph import Graph
from qpass.modelwriter import ModelWriter
from qpass.skim import not_onnx, skim
from qpass.upgrade import inline_functions, raise_ir_version, upgrade_opset
from qpass.walk import all_nodes, inner_tensors
from qpass.wellformed import (
    ONNX_DOMAINS,
    check_float,
    check_node_names,
    check_ops,
    check_wellformed,
)

EXTERNAL_ABOVE: Final = 1_500_000_000  # bytes of constants; protobuf ends at 2 GiB
DENSE_LIMIT: Final = 64 << 20  # bytes; larger sparse constants are refused

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------- reading


def load_model(
    path: str | Path, *, opset: int | None = None, allow_quantized: bool = False
) -> Graph:
    """Read a model, check it, and bring it to at least `opset`; external data stays on disk.

    Args:
        path: the .onnx file; its data files are looked up in its folder.
        opset: version of the ONNX operator set to convert older models to; None: keep.
        allow_quantized: accept models that hold quantized ops already, and nodes of one name.

    Raises:
        ModelError: the file is no model, damaged, incomplete, quantized already, uses ops that
            nobody defines, or cannot be converted.
    """
    path = Path(path)
    model = read_proto(path)
    _normalize_header(model)
    check_wellformed(model)
    check_external(model, path.parent)
    for tensor in inner_tensors(model):
        if is_external(tensor):
            make_inline(tensor, path.parent)
    _make_dense(model.graph)
    _remove_constant_inputs(model.graph)
    if not allow_quantized:  # as the file has them: inlining makes more, which get numbers below
        check_node_names(model.graph)
    inline_functions(model)
    if not allow_quantized:
        check_float(model)
    check_ops(model)
    if opset is not None:
        upgrade_opset(model, opset)
    raise_ir_version(model)
    _make_node_names_unique(model.graph)
    return Graph(model, path.parent)


def read_proto(path: Path) -> onnx.ModelProto:
    """Parse a model file without its external data.

    Raises:
        ModelError: there is no such file, or it is not an ONNX model.
    """
    if path.is_dir():
        raise ModelError(f"{path} is a folder", fix="give the .onnx file inside of it")
    if not path.exists():
        raise ModelError(f"there is no file {path}")
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read the model: {error.strerror}", where=str(path)) from error
    except DecodeError as error:
        raise not_onnx(path) from error
    if not model.HasField("graph"):
        raise not_onnx(path)
    return model


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a model file without reading its weights."""
    return {entry.key: entry.value for entry in skim(Path(path)).metadata_props}


def model_bytes(path: str | Path) -> int:
    """Return the bytes that a model takes on disk, its external data files included."""
    path = Path(path)
    files = {path, *data_files(skim(path), path)}
    return sum(file.stat().st_size for file in files)


def data_files(skeleton: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """Return the external data files of a model that `skim` read from `path`."""
    return tuple(file for file in external_files(skeleton, path.parent) if file != path)


def _normalize_header(model: onnx.ModelProto) -> None:
    """Write the default domain as '' everywhere: graph passes compare it."""
    for entry in model.opset_import:
        if entry.domain in ONNX_DOMAINS:
            entry.domain = ""
    for node in all_nodes(model):
        if node.domain in ONNX_DOMAINS:
            node.domain = ""


def _make_dense(graph: onnx.GraphProto) -> None:
    for sparse in graph.sparse_initializer:
        name, dtype = sparse.values.name, sparse.values.data_type
        dense = TensorProto(name=name, data_type=dtype, dims=sparse.dims)
        if stored_bytes(dense) > DENSE_LIMIT:
            raise ModelError(
                f"a sparse constant has {stored_bytes(dense)} bytes when it is dense",
                where=f"tensor {name}",
                fix="store it as a dense initializer and save the model again",
            )
        values = numpy_helper.to_array(sparse.values)
        places = numpy_helper.to_array(sparse.indices)
        array = np.zeros(tuple(sparse.dims), values.dtype)
        flat = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), array.shape)
        array.reshape(-1)[flat] = values
        graph.initializer.append(numpy_helper.from_array(array, name))
    del graph.sparse_initializer[:]


def _remove_constant_inputs(graph: onnx.GraphProto) -> None:
    """Before IR version 4 every initializer was listed as an input too."""
    constants = {tensor.name for tensor in graph.initializer}
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in constants:
            del graph.input[index]


def _make_node_names_unique(graph: onnx.GraphProto) -> None:
    """Plans and reports address nodes by name: a second bearer of a name gets a number."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for node in graph.node:
        if node.name and node.name in seen:
            number = 1
            while f"{node.name}_{number}" in taken:
                number += 1
            logger.info("two nodes are called %s: the second becomes _%d", node.name, number)
            node.name = f"{node.name}_{number}"
            taken.add(node.name)
        seen.add(node.name)


# ---------------------------------------------------------------------------- writing


def save_model(
    graph: Graph,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    external: bool | None = None,
    model: onnx.ModelProto | None = None,
) -> int:
    """Write a graph atomically; return the bytes on disk.

    Constants are written one at a time; those that lie in data files are copied in pieces of
    16 MiB. An external model gets one data file, `<file name>.data`, pages of 4096 bytes.

    Args:
        graph: the graph; its constants are read, not changed.
        path: the .onnx file to make or replace.
        metadata: entries to add to the metadata of the model.
        external: write constants of 1 KiB and more to a data file; None: above 1.5 GB in total.
        model: write this export of `graph` instead of a fresh one.

    Raises:
        ModelError: there is no such folder, or the output would overwrite the data that the
            graph still reads.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ModelError(f"there is no folder {path.parent}", fix="make it first")
    writer = ModelWriter(graph, model)
    if external is None:
        external = writer.constant_bytes > EXTERNAL_ABOVE
    data = path.with_name(f"{path.name}.data")
    in_use = writer.reads(data)
    if external and in_use:
        raise ModelError(
            f"{data.name} holds weights that the graph still reads",
            where=str(data),
            fix="write the result to another file than the input",
        )
    entries = metadata or {}
    with _replacing(path) as model_file:
        if external:
            with _replacing(data) as data_file:
                writer.write(model_file, entries, data_file=data_file, location=data.name)
        else:
            writer.write(model_file, entries)
    if not external and not in_use:
        data.unlink(missing_ok=True)  # left by an earlier result with external data
    return path.stat().st_size + (data.stat().st_size if external else 0)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when all went well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
