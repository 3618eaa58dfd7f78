"""What a model file contains, read without its weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from qpass.external import stored_bytes
from qpass.lint.view import LINEAR, attribute, infer_shapes
from qpass.modelfile import data_files
from qpass.skim import skim
from qpass.walk import all_nodes, all_tensors, bodies_of, graphs_of, node_label
from qpass.wellformed import ONNX_DOMAINS, is_quantized_op

Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSummary:
    """An input or output; dims are numbers, names, or None; the shape is None without a rank."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSummary:
    """The constants of one dtype."""

    dtype: str
    count: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSummary:
    """The linear ops of one type with constant float weights: what can be quantized.

    `macs` are multiply-accumulates of one run, an unknown first dimension (the batch) taken as 1;
    None when another dimension is unknown.
    """

    op: str
    count: int
    weight_bytes: int
    macs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BodySummary:
    """The body of a control flow node."""

    node: str
    op: str
    attribute: str
    nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """What `qpass inspect` shows; sizes are bytes on disk."""

    path: str
    ir_version: int
    opsets: dict[str, int]  # by domain; the ONNX operators are ""
    producer: str
    inputs: tuple[ValueSummary, ...]
    outputs: tuple[ValueSummary, ...]
    nodes: int
    op_counts: dict[str, int]  # most frequent first; foreign domains as domain::op
    weights: tuple[WeightSummary, ...]
    file_bytes: int
    external_bytes: int
    external_files: tuple[str, ...]
    missing_files: tuple[str, ...]
    quantizable: tuple[LinearSummary, ...]
    quantized_ops: dict[str, int]
    control_flow: tuple[BodySummary, ...]
    functions: tuple[str, ...]
    metadata: dict[str, str]  # the entries of qpass begin with "qpass."

    @property
    def total_bytes(self) -> int:
        """Bytes of the model file and its data files."""
        return self.file_bytes + self.external_bytes

    @property
    def quantized(self) -> bool:
        """True when the model holds quantized ops already."""
        return bool(self.quantized_ops)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: plain dicts, lists, numbers and text."""
        return {
            **dataclasses.asdict(self),
            "total_bytes": self.total_bytes,
            "quantized": self.quantized,
        }


def inspect_model(path: str | Path) -> ModelSummary:
    """Summarize a model file; weights, inline or external, are not read.

    Raises:
        ModelError: there is no such file, or it is not an ONNX model.
    """
    path = Path(path)
    model = skim(path)
    files = data_files(model, path)
    present = [file for file in files if file.is_file()]
    ops = Counter(_op_name(node) for node in all_nodes(model))
    quantized = Counter(node.op_type for node in all_nodes(model) if is_quantized_op(node))
    return ModelSummary(
        path=str(path),
        ir_version=model.ir_version,
        opsets={
            "" if entry.domain in ONNX_DOMAINS else entry.domain: entry.version
            for entry in model.opset_import
        },
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=_inputs(model),
        outputs=tuple(_value(value) for value in model.graph.output),
        nodes=ops.total(),
        op_counts=dict(ops.most_common()),
        weights=_weights(model),
        file_bytes=path.stat().st_size,
        external_bytes=sum(file.stat().st_size for file in present),
        external_files=tuple(_relative(file, path) for file in files),
        missing_files=tuple(_relative(file, path) for file in files if file not in present),
        quantizable=_quantizable(model),
        quantized_ops=dict(quantized.most_common()),
        control_flow=tuple(_bodies(model)),
        functions=tuple(f"{f.domain}::{f.name}" for f in model.functions),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _relative(file: Path, path: Path) -> str:
    return file.relative_to(path.parent).as_posix()


def _op_name(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}::{node.op_type}"


def _inputs(model: onnx.ModelProto) -> tuple[ValueSummary, ...]:
    """Return the inputs that a caller feeds: old models list their constants too."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return tuple(_value(value) for value in model.graph.input if value.name not in constants)


def _value(value: onnx.ValueInfoProto) -> ValueSummary:
    kind = value.type
    if not kind.HasField("tensor_type"):
        return ValueSummary(name=value.name, dtype=str(kind.WhichOneof("value")), shape=None)
    dtype = TensorProto.DataType.Name(kind.tensor_type.elem_type).lower()
    if not kind.tensor_type.HasField("shape"):
        return ValueSummary(name=value.name, dtype=dtype, shape=None)
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in kind.tensor_type.shape.dim
    )
    return ValueSummary(name=value.name, dtype=dtype, shape=shape)


def _weights(model: onnx.ModelProto) -> tuple[WeightSummary, ...]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for tensor in all_tensors(model):
        dtype = TensorProto.DataType.Name(tensor.data_type).lower()
        count[dtype] += 1
        size[dtype] += stored_bytes(tensor)
    return tuple(
        WeightSummary(dtype=dtype, count=count[dtype], bytes=total)
        for dtype, total in size.most_common()
    )


def _bodies(model: onnx.ModelProto) -> list[BodySummary]:
    return [
        BodySummary(
            node=node_label(node),
            op=node.op_type,
            attribute=name,
            nodes=sum(len(graph.node) for graph in graphs_of(body)),
        )
        for node in all_nodes(model)
        for name, body in bodies_of(node)
    ]


def _quantizable(model: onnx.ModelProto) -> tuple[LinearSummary, ...]:
    """Sum up the linear ops of the main graph whose weights are float constants."""
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    shapes: Mapping[str, Shape] = infer_shapes(model)
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    macs: dict[str, int | None] = {}
    for node in model.graph.node:
        weight = constants.get(node.input[1]) if node.op_type in LINEAR else None
        if weight is None or weight.data_type not in floats:
            continue
        op = node.op_type
        count[op] += 1
        size[op] += stored_bytes(weight)
        total, one = macs.get(op, 0), _macs(node, weight, shapes)
        macs[op] = None if total is None or one is None else total + one
    return tuple(
        LinearSummary(op=op, count=number, weight_bytes=size[op], macs=macs[op])
        for op, number in count.most_common()
    )


def _macs(node: onnx.NodeProto, weight: TensorProto, shapes: Mapping[str, Shape]) -> int | None:
    """Return the multiply-accumulates of one linear op.

    Each output element takes one product per weight that it reads; a transposed convolution is
    counted from its input, whose elements each meet all weights of their group.
    """
    transposed = node.op_type == "ConvTranspose"
    shape = shapes.get(node.input[0] if transposed else node.output[0])
    if shape is None:
        return None
    dims = [1 if dim is None and index == 0 else dim for index, dim in enumerate(shape)]
    if None in dims:
        return None
    if node.op_type == "MatMul":
        depth = weight.dims[-2] if len(weight.dims) > 1 else weight.dims[0]
    elif node.op_type == "Gemm":
        depth = weight.dims[1 if attribute(node, "transB", 0) else 0]
    else:
        depth = prod(weight.dims[1:])
    return prod(dim or 0 for dim in dims) * int(depth)
