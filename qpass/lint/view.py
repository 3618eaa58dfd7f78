"""A read-only view of a quantized ONNX graph: who makes and reads what, and with which numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from qpass.external import read_values
from qpass.upgrade import skeleton_of
from qpass.walk import bodies_of
from qpass.wellformed import ONNX_DOMAINS

LINEAR: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Ops that hand integers on unchanged.
MOVERS: Final = frozenset(
    {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand", "Tile",
     "Identity", "Split", "Concat", "MaxPool", "DepthToSpace", "SpaceToDepth", "Pad"}
)  # fmt: skip
ABSORBED: Final = ("Relu", "Clip")  # fuse between a linear op and its Q
QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
# Input indices of (values, scale, zero point) of the ops that compute on integers.
OPERATOR_SLOTS: Final[dict[str, tuple[tuple[int, int, int], ...]]] = {
    "QLinearConv": ((0, 1, 2), (3, 4, 5), (-1, 6, 7)),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5), (-1, 6, 7)),
    "QLinearAdd": ((0, 1, 2), (3, 4, 5), (-1, 6, 7)),
    "QLinearMul": ((0, 1, 2), (3, 4, 5), (-1, 6, 7)),
    "QGemm": ((0, 1, 2), (3, 4, 5), (-1, 7, 8)),
}
SIGNED_8: Final = TensorProto.INT8
UNSIGNED_8: Final = TensorProto.UINT8
BITS_16: Final = frozenset({TensorProto.INT16, TensorProto.UINT16})
BITS_4: Final = frozenset({TensorProto.INT4, TensorProto.UINT4})
BITS_2: Final = frozenset({TensorProto.INT2, TensorProto.UINT2})
FLOAT_8: Final = frozenset(
    {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ,
     TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ}
)  # fmt: skip
FLOATS: Final = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One place where scale and zero point are used: a Q, a DQ, or an operand of QLinear ops."""

    node: NodeProto
    source: str  # tensor that goes in; for an output of a QLinear op the tensor that comes out
    result: str  # tensor that comes out; "" for operands of QLinear ops
    scale_name: str
    zero_point_name: str
    data_type: int  # of the integers
    axis: int
    axis_given: bool
    block_size: int
    constant: bool  # `source` is a constant, or the Q of one


@dataclass(slots=True)
class View:
    """Index of one ModelProto, built in one walk; values are read when asked for."""

    model: onnx.ModelProto
    folder: Path
    constants: dict[str, TensorProto] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    consumers: dict[str, list[tuple[NodeProto, int]]] = field(default_factory=dict)
    captured: set[str] = field(default_factory=set)  # read by bodies of control flow
    outputs: set[str] = field(default_factory=set)
    slots: list[Slot] = field(default_factory=list)
    by_result: dict[str, Slot] = field(default_factory=dict)
    _values: dict[str, NDArray[Any]] = field(default_factory=dict)
    _shapes: dict[str, tuple[int | None, ...]] | None = None

    def __post_init__(self) -> None:
        """Build the index."""
        graph = self.model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants.update(
                    (node.output[0], a.t) for a in node.attribute if a.name == "value"
                )
            for name in node.output:
                self.producers[name] = node
            for index, name in enumerate(node.input):
                self.consumers.setdefault(name, []).append((node, index))
            for _, body in bodies_of(node):
                self.captured |= _names_in(body)
        for node in graph.node:
            for slot in self._slots_of(node):
                self.slots.append(slot)
                if slot.result:
                    self.by_result[slot.result] = slot

    # ------------------------------------------------------------------ the graph

    @property
    def nodes(self) -> Iterator[NodeProto]:
        """The nodes of the main graph, in order."""
        return iter(self.model.graph.node)

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set; 1 when there is none."""
        imports = self.model.opset_import
        return max((o.version for o in imports if o.domain in ONNX_DOMAINS), default=1)

    def readers(self, name: str) -> list[NodeProto]:
        """Return the nodes that read a tensor."""
        return [node for node, _ in self.consumers.get(name, ())]

    def values(self, name: str) -> NDArray[Any] | None:
        """Return the values of a constant, None when `name` is no constant."""
        if name not in self.constants:
            return None
        if name not in self._values:
            self._values[name] = read_values(self.constants[name], self.folder)
        return self._values[name]

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return the shape of a tensor, None for unknown ranks; unknown dims are None."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        if self._shapes is None:
            self._shapes = infer_shapes(self.model)
        return self._shapes.get(name)

    # ------------------------------------------------------------------ quantization

    @property
    def pairs(self) -> Iterator[Slot]:
        """The slots of Q and DQ nodes."""
        return (slot for slot in self.slots if slot.result)

    @property
    def quantizers(self) -> Iterator[Slot]:
        """The slots of QuantizeLinear nodes."""
        return (slot for slot in self.pairs if slot.node.op_type == QUANTIZE)

    @property
    def dequantizers(self) -> Iterator[Slot]:
        """The slots of DequantizeLinear nodes."""
        return (slot for slot in self.pairs if slot.node.op_type == DEQUANTIZE)

    def scale(self, slot: Slot) -> NDArray[Any] | None:
        """Return the scale of a slot as float64, None when it is computed."""
        values = self.values(slot.scale_name)
        return None if values is None else values.astype(np.float64)

    def zero_point(self, slot: Slot) -> NDArray[Any] | None:
        """Return the zero point as int64; absent ones are 0, computed ones None."""
        if not slot.zero_point_name:
            return np.zeros((), np.int64)
        values = self.values(slot.zero_point_name)
        if values is None or slot.data_type in FLOAT_8:
            return None
        return values.astype(np.int64)

    def dequantizer(self, name: str) -> Slot | None:
        """Return the DQ that makes the tensor `name`."""
        slot = self.by_result.get(name)
        return slot if slot is not None and slot.node.op_type == DEQUANTIZE else None

    def quantizer_behind(self, name: str) -> Slot | None:
        """Return the Q that is the only reader of the tensor `name`."""
        readers = self.readers(name)
        if len(readers) != 1 or readers[0].op_type != QUANTIZE or name in self.outputs:
            return None
        return self.by_result.get(readers[0].output[0])

    def linears(self) -> Iterator[Linear]:
        """The linear ops whose operands both come from a DQ."""
        for node in self.nodes:
            if node.op_type in LINEAR and len(node.input) >= 2:
                data, (weight, order) = self.dequantizer(node.input[0]), self.weight_of(node)
                if data is not None and weight is not None:
                    yield Linear(node=node, data=data, weight=weight, order=order)

    def weight_of(self, node: NodeProto) -> tuple[Slot | None, tuple[int, ...] | None]:
        """Return the DQ of the second operand, and the axes of a Transpose in between."""
        producer = self.producers.get(node.input[1])
        if producer is not None and producer.op_type == "Transpose":
            axes = attribute(producer, "perm", None)
            return self.dequantizer(producer.input[0]), tuple(axes) if axes else None
        return self.dequantizer(node.input[1]), None

    def output_of(self, node: NodeProto) -> tuple[NodeProto | None, Slot | None]:
        """Return the Relu or Clip behind a linear op, and the only Q behind both."""
        name, readers = node.output[0], self.readers(node.output[0])
        if len(readers) == 1 and readers[0].op_type in ABSORBED and name not in self.outputs:
            return readers[0], self.quantizer_behind(readers[0].output[0])
        return None, self.quantizer_behind(name)

    def _slots_of(self, node: NodeProto) -> Iterator[Slot]:
        if node.op_type in (QUANTIZE, DEQUANTIZE) and len(node.input) >= 2:
            zero_point = node.input[2] if len(node.input) > 2 else ""
            attributes = {a.name: a.i for a in node.attribute}
            yield Slot(
                node=node,
                source=node.input[0],
                result=node.output[0],
                scale_name=node.input[1],
                zero_point_name=zero_point,
                data_type=self._data_type(node, zero_point, attributes.get("output_dtype", 0)),
                axis=attributes.get("axis", 1),
                axis_given="axis" in attributes,
                block_size=attributes.get("block_size", 0),
                constant=self._is_constant(node.input[0]),
            )
        for value, scale, zero in OPERATOR_SLOTS.get(node.op_type, ()):
            if scale < len(node.input) and node.input[scale]:
                zero_point = node.input[zero] if zero < len(node.input) else ""
                source = node.output[0] if value < 0 else node.input[value]
                yield Slot(
                    node=node,
                    source=source,
                    result="",
                    scale_name=node.input[scale],
                    zero_point_name=zero_point,
                    data_type=self._data_type(node, zero_point, 0),
                    axis=0 if node.op_type == "QLinearConv" else -1,
                    axis_given=True,
                    block_size=0,
                    constant=source in self.constants,
                )

    def _is_constant(self, name: str) -> bool:
        slot = self.by_result.get(name)
        return name in self.constants or (slot is not None and slot.constant)

    def _data_type(self, node: NodeProto, zero_point: str, output_dtype: int) -> int:
        if zero_point in self.constants:
            return int(self.constants[zero_point].data_type)
        if output_dtype:
            return output_dtype
        if node.op_type == DEQUANTIZE:
            if node.input[0] in self.constants:
                return int(self.constants[node.input[0]].data_type)
            if node.input[0] in self.by_result:  # nodes are in topological order
                return self.by_result[node.input[0]].data_type
        return UNSIGNED_8


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear op with the DQ of its activation (or left operand) and of its weight."""

    node: NodeProto
    data: Slot
    weight: Slot
    order: tuple[int, ...] | None  # of a Transpose between the weight's DQ and the op

    @property
    def output(self) -> str:
        """Name of the result."""
        name: str = self.node.output[0]
        return name

    def channel_axis(self, rank: int) -> int:
        """Return the axis of the output channels in a weight of `rank` dimensions."""
        if self.node.op_type == "Gemm":
            return 0 if attribute(self.node, "transB", 0) else 1
        return {"Conv": 0, "ConvTranspose": 1}.get(self.node.op_type, rank - 1)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return the value of an attribute of `node`, or `default`."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def type_name(data_type: int) -> str:
    """Return ONNX's lower case name of a dtype."""
    name: str = TensorProto.DataType.Name(data_type)
    return name.lower()


def _names_in(graph: onnx.GraphProto) -> set[str]:
    names = {name for node in graph.node for name in node.input}
    names |= {value.name for value in graph.output}
    for node in graph.node:
        for _, body in bodies_of(node):
            names |= _names_in(body)
    return names


def infer_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of tensors that onnx can infer; unknown dims are None."""
    skeleton = skeleton_of(model)
    # A model that cannot be inferred has the shapes that it declares.
    with suppress(onnx.shape_inference.InferenceError):
        skeleton = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    graph = skeleton.graph
    found: dict[str, tuple[int | None, ...]] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            found[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else None
                for dim in value.type.tensor_type.shape.dim
            )
    return found
