"""The one mutable object: an ONNX graph, and the only place that touches onnx-graphsurgeon.

The module closes holes of onnx-graphsurgeon 0.6 that were measured on real models:

1. constants of any dtype (int4, fp8) travel as packed TensorProto; external data stays on disk and
   is read when asked for;
2. edits go by identity: graphsurgeon compares nodes by structure and tensors by name, which is
   quadratic and can hit the wrong node;
3. nodes are inserted next to an anchor, order is kept, sorting is stable and iterative;
4. small shared constants get one copy per use and are merged again when the graph is written;
5. metadata, domains, doc strings and node metadata survive;
6. bodies of If, Loop and Scan stay as they are (`captured` names what they read from outside).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.parser
import onnx.printer
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx_graphsurgeon import Constant, Node, Tensor, Variable
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from qpass.constants import ExternalValues, array_of, constant_proto
from qpass.editing import EditableGraph
from qpass.protos import free_names, node_extras, put_bodies_back, take_bodies, without_graph

__all__ = ["LINEAR_OPS", "Constant", "Graph", "Node", "Tensor", "Variable", "array_of"]

LINEAR_OPS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SHARED_LIMIT: Final = 1024  # bytes: constants up to this size are unshared on load

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR


class Graph(EditableGraph):
    """An ONNX graph with identity-based editing.

    Invariants after construction: nodes are in topological order and named, small constants have
    one consumer each, no constant is a graph input.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        """Import `model`; external data is looked up below `folder`."""
        self.header = onnx.ModelProto()
        self.header.CopyFrom(without_graph(model))
        self.folder = folder
        self.name = model.graph.name
        self.doc_string = model.graph.doc_string
        self.annotations = list(model.graph.quantization_annotation)
        self._value_types: dict[str, onnx.ValueInfoProto] = {
            value.name: value for value in (*model.graph.input, *model.graph.output)
        }
        bodies, extras = take_bodies(model), node_extras(model)
        imported = gs.import_onnx(model)
        put_bodies_back(model, bodies)
        self.inputs: list[Tensor] = list(imported.inputs)
        self.outputs: list[Tensor] = list(imported.outputs)
        self._nodes: list[Node] = list(imported.nodes)
        self._before: dict[int, list[Node]] = {}
        self._after: dict[int, list[Node]] = {}
        self._removed: set[int] = set()
        self._names: set[str] = set()
        self._common: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._numbers: dict[str, int] = {}  # base name -> first number that was not tried
        self._adopt(extras, bodies, model)
        self.captured = frozenset(t.name for node in self._nodes for t in node.captured)
        self._unshare_small_constants()

    def _adopt(
        self,
        extras: Sequence[onnx.NodeProto],
        bodies: dict[int, list[onnx.AttributeProto]],
        model: onnx.ModelProto,
    ) -> None:
        """Attach what graphsurgeon drops, name the nameless, hook up external data."""
        by_name = {t.name: t for n in self._nodes for t in (*n.inputs, *n.outputs) if t.name}
        by_name |= {t.name: t for t in (*self.inputs, *self.outputs)}
        initializers = {proto.name: proto for proto in model.graph.initializer}
        self._names |= {node.name for node in self._nodes} | set(by_name) | set(initializers)
        for index, (node, extra) in enumerate(zip(self._nodes, extras, strict=True)):
            node.extra = extra
            node.captured = []
            for attribute in bodies.get(index, []):
                node.attrs[attribute.name] = attribute.g
                for name in free_names(attribute.g):
                    if name not in by_name and name in initializers:
                        by_name[name] = Constant(name, LazyValues(initializers[name]))
                    if name in by_name:
                        node.captured.append(by_name[name])
            if not node.name:
                node.name = self.unique_name(f"{node.op}_{index}")
        for tensor in by_name.values():
            lazy = getattr(tensor, "_values", None)
            if isinstance(lazy, LazyValues) and lazy.tensor.external_data:
                tensor._values = ExternalValues(lazy.tensor, self.folder or Path())
                tensor.data_location = None

    def _unshare_small_constants(self) -> None:
        for node in self._nodes:
            for index, tensor in enumerate(node.inputs):
                if not isinstance(tensor, Constant) or len(tensor.outputs) < 2:
                    continue
                if tensor._values.nbytes <= SHARED_LIMIT:
                    copy = self.constant(tensor.name, array_of(tensor))
                    copy.copy_of = tensor.name
                    self.set_input(node, index, copy)

    # ------------------------------------------------------------------ reading

    @classmethod
    def from_text(cls, text: str, **constants: NDArray[Any]) -> Graph:
        """Parse ONNX text and attach `constants` as initializers."""
        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(
            numpy_helper.from_array(array, name) for name, array in constants.items()
        )
        return cls(model)

    @property
    def opset(self) -> int:
        """Version of the default ONNX operator set."""
        version: int = next(
            o.version for o in self.header.opset_import if o.domain in ("", "ai.onnx")
        )
        return version

    def node(self, name: str) -> Node:
        """Return the node called `name`; KeyError when there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def constants(self) -> Iterator[Constant]:
        """Iterate over the constants in order of first use."""
        return (t for t in self.tensors().values() if isinstance(t, Constant))

    # ------------------------------------------------------------------ writing

    def to_model(
        self, *, taps: Iterable[str] = (), stub_above: int | None = None, inline: bool = False
    ) -> onnx.ModelProto:
        """Export a ModelProto. External constants keep their reference into `folder`.

        Args:
            taps: names of tensors to add to the outputs.
            stub_above: leave the data of constants above this many bytes out (shape inference).
            inline: read external data into the model, so that it runs anywhere.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.header)
        graph = model.graph
        graph.name = self.name or "qpass"
        graph.doc_string = self.doc_string
        alias = self._aliases()
        for node in self.nodes:
            proto = self.proto_of(node)
            for i, name in enumerate(proto.input):
                proto.input[i] = alias.get(name, name)
            graph.node.append(proto)
        graph.input.extend(self._value_info(tensor) for tensor in self.inputs)
        graph.output.extend(self._value_info(tensor) for tensor in self.outputs)
        tensors = self.tensors()
        known = {value.name for value in (*graph.input, *graph.output)}
        for tensor in tensors.values():
            if isinstance(tensor, Constant):
                if tensor.name not in alias:
                    graph.initializer.append(
                        constant_proto(tensor, stub_above=stub_above, inline=inline)
                    )
            elif tensor.name not in known and tensor.dtype is not None and not _is_implied(tensor):
                graph.value_info.append(self._value_info(tensor))
        graph.output.extend(
            self._value_info(tensors[name]) for name in dict.fromkeys(taps) if name not in known
        )
        graph.quantization_annotation.extend(self.annotations)
        return model

    @staticmethod
    def proto_of(node: Node) -> onnx.NodeProto:
        """Export one node with its metadata and bodies."""
        proto: onnx.NodeProto = OnnxExporter.export_node(node)
        proto.MergeFrom(node.extra)
        return proto

    def _aliases(self) -> dict[str, str]:
        """Map copies that `_unshare_small_constants` made, and nobody changed, to their source."""
        by_name = {tensor.name: tensor for tensor in self.constants()}
        alias = {}
        for tensor in by_name.values():
            source = by_name.get(getattr(tensor, "copy_of", ""))
            if source is None or source.dtype != tensor.dtype:
                continue
            if tuple(source.shape) != tuple(tensor.shape):  # lazy values have a list
                continue
            if array_of(source).tobytes() == array_of(tensor).tobytes():
                alias[tensor.name] = source.name
        return alias

    def _value_info(self, tensor: Tensor) -> onnx.ValueInfoProto:
        if tensor.name in self._value_types:
            return self._value_types[tensor.name]
        info: onnx.ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, False)
        return info

    def infer_shapes(self) -> None:
        """Fill in dtype and shape of every tensor that onnx can infer."""
        stub = self.to_model(stub_above=SHARED_LIMIT)
        inferred = onnx.shape_inference.infer_shapes(stub, data_prop=True)
        tensors = self.tensors()
        for value in inferred.graph.value_info:
            tensor = tensors.get(value.name)
            if isinstance(tensor, Variable) and value.type.HasField("tensor_type"):
                fresh = gs.importers.onnx_importer.OnnxImporter.import_tensor(value)
                tensor.dtype, tensor.shape = fresh.dtype, fresh.shape

    def to_text(self) -> str:
        """Print the structure (ops, edges, types) without constant values, for golden files."""
        model = self.to_model()
        for tensor in model.graph.initializer:
            model.graph.value_info.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        del model.graph.initializer[:]
        text: str = onnx.printer.to_text(model)
        return text

    def fingerprint(self) -> str:
        """Return the sha256 of structure and constants."""
        digest = hashlib.sha256(self.to_text().encode())
        for constant in self.constants():
            digest.update(constant.name.encode())
            digest.update(np.ascontiguousarray(array_of(constant)).tobytes())
        return digest.hexdigest()

    def copy(self) -> Graph:
        """Return an independent graph that shares the arrays of the constants."""
        twin: Graph = object.__new__(Graph)
        twin.header, twin.folder = onnx.ModelProto(), self.folder
        twin.header.CopyFrom(self.header)
        twin.name, twin.doc_string = self.name, self.doc_string
        twin.annotations, twin._value_types = self.annotations, self._value_types
        twin._before, twin._after, twin._removed = {}, {}, set()
        twin._names, twin.captured = set(self._names), self.captured
        twin._common = dict(self._common)
        twin._numbers = dict(self._numbers)
        made: dict[int, Tensor] = {}

        def clone(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                fresh = tensor.copy()
                if hasattr(tensor, "copy_of"):
                    fresh.copy_of = tensor.copy_of
                made[id(tensor)] = fresh
            return made[id(tensor)]

        twin._nodes = []
        for node in self.nodes:
            inputs, outputs = [clone(t) for t in node.inputs], [clone(t) for t in node.outputs]
            fresh = Node(node.op, node.name, dict(node.attrs), inputs, outputs, node.domain)
            fresh.extra, fresh.captured = node.extra, [clone(t) for t in node.captured]
            twin._nodes.append(fresh)
        twin.inputs = [clone(tensor) for tensor in self.inputs]
        twin.outputs = [clone(tensor) for tensor in self.outputs]
        return twin


def _is_implied(tensor: Tensor) -> bool:
    """True for what Q and DQ make: its type follows from theirs, and the file stays smaller."""
    return any(node.op in ("QuantizeLinear", "DequantizeLinear") for node in tensor.inputs)
