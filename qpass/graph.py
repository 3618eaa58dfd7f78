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
from qpass.errors import InternalError
from qpass.order import stable_order
from qpass.protos import free_names, node_extras, put_bodies_back, take_bodies, without_graph

__all__ = ["LINEAR_OPS", "Constant", "Graph", "Node", "Tensor", "Variable", "array_of"]

LINEAR_OPS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SHARED_LIMIT: Final = 1024  # bytes: constants up to this size are unshared on load

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR


class Graph:
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
    def nodes(self) -> list[Node]:
        """The nodes in topological order (a list of this moment: edits go through `add`)."""
        if self._before or self._after or self._removed:
            merged: list[Node] = []
            for node in self._nodes:
                self._place(node, merged)
            self._nodes = merged
            self._before, self._after, self._removed = {}, {}, set()
        return self._nodes

    def _place(self, node: Node, merged: list[Node]) -> None:
        for extra in self._before.get(id(node), ()):
            self._place(extra, merged)
        if id(node) not in self._removed:
            merged.append(node)
        for extra in self._after.get(id(node), ()):
            self._place(extra, merged)

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

    def tensors(self) -> dict[str, Tensor]:
        """Return every named tensor of the graph (bodies of control flow excluded)."""
        found = {tensor.name: tensor for tensor in self.inputs}
        for node in self.nodes:
            for tensor in (*node.inputs, *node.outputs, *node.captured):
                if tensor.name:
                    found[tensor.name] = tensor
        return found

    def constants(self) -> Iterator[Constant]:
        """Iterate over the constants in order of first use."""
        return (t for t in self.tensors().values() if isinstance(t, Constant))

    def is_output(self, tensor: Tensor) -> bool:
        """True when `tensor` is an output of the graph."""
        return any(output is tensor for output in self.outputs)

    @staticmethod
    def producer(tensor: Tensor) -> Node | None:
        """Return the node that makes `tensor`, None for inputs and constants."""
        return tensor.inputs[0] if tensor.inputs else None

    @staticmethod
    def consumers(tensor: Tensor) -> list[tuple[Node, int]]:
        """Return each (node, input index) that reads `tensor`, in order of first use."""
        seen: dict[int, Node] = {id(node): node for node in tensor.outputs}
        return [
            (node, index)
            for node in seen.values()
            for index, read in enumerate(node.inputs)
            if read is tensor
        ]

    # ------------------------------------------------------------------ editing

    def unique_name(self, base: str) -> str:
        """Return `base`, or `base` with the first free number; the name is taken from now on."""
        name, number = base, self._numbers.get(base, 1)
        while name in self._names:
            name, number = f"{base}_{number}", number + 1
        self._numbers[base] = number  # the next search begins here: naming n tensors is linear
        self._names.add(name)
        return name

    def variable(self, base: str, dtype: Any = None, shape: Any = None) -> Variable:
        """Make a tensor with a free name."""
        return Variable(self.unique_name(base), dtype=dtype, shape=shape)

    def constant(self, base: str, array: NDArray[Any]) -> Constant:
        """Make a constant of any ONNX dtype, int4 and fp8 included, with a free name."""
        name = self.unique_name(base)
        array = np.asarray(array)
        if array.dtype.kind in "biuf" and array.dtype.itemsize * 8 != 4:
            return Constant(name, np.array(array, order="C"))
        return Constant(name, LazyValues(numpy_helper.from_array(array, name)))

    def make(
        self,
        op: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        name: str,
        attrs: dict[str, Any] | None = None,
        domain: str | None = None,
    ) -> Node:
        """Make a node with a free name; `add` puts it into the graph."""
        node = Node(op, self.unique_name(name), attrs or {}, list(inputs), list(outputs), domain)
        node.extra, node.captured = onnx.NodeProto(), []
        return node

    def add(self, node: Node, *, before: Node | None = None, after: Node | None = None) -> None:
        """Insert `node` next to an anchor, or at the end."""
        if before is not None:
            self._before.setdefault(id(before), []).append(node)
        elif after is not None:
            self._after.setdefault(id(after), []).insert(0, node)
        else:
            self.nodes.append(node)

    def remove(self, node: Node) -> None:
        """Take `node` out and unhook its tensors."""
        for index in reversed(range(len(node.inputs))):
            _drop(node.inputs[index].outputs, node)
            list.pop(node.inputs, index)
        for index in reversed(range(len(node.outputs))):
            _drop(node.outputs[index].inputs, node)
            list.pop(node.outputs, index)
        self._removed.add(id(node))

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        """Make `node` read `tensor` at `index` (appended when one past the end)."""
        if index == len(node.inputs):
            list.append(node.inputs, tensor)
        else:
            _drop(node.inputs[index].outputs, node)
            list.__setitem__(node.inputs, index, tensor)
        list.append(tensor.outputs, node)

    def set_output(self, node: Node, index: int, tensor: Tensor) -> None:
        """Make `node` write `tensor` at `index`."""
        _drop(node.outputs[index].inputs, node)
        list.__setitem__(node.outputs, index, tensor)
        list.append(tensor.inputs, node)

    def drop_input(self, node: Node, index: int) -> None:
        """Remove the last inputs of `node` from `index` on."""
        while len(node.inputs) > index:
            _drop(node.inputs[-1].outputs, node)
            list.pop(node.inputs)

    def replace_uses(self, old: Tensor, new: Tensor) -> None:
        """Let every consumer of `old` read `new`; names of graph outputs are kept.

        When `old` is a graph output its producer is replaced by the one of `new`, which then writes
        the tensor `old`, for users address outputs by name.
        """
        if self.is_output(old):
            maker, producer = self.producer(new), self.producer(old)
            if maker is None:
                msg = f"graph output {old.name} cannot become an alias of {new.name}"
                raise InternalError(msg)
            if producer is not None:
                slot = next(i for i, t in enumerate(producer.outputs) if t is old)
                self.set_output(producer, slot, self.variable(f"{old.name}_unused"))
            slot = next(i for i, t in enumerate(maker.outputs) if t is new)
            self.set_output(maker, slot, old)
            old, new = new, old
        for node, index in self.consumers(old):
            self.set_input(node, index, new)

    def sort(self) -> None:
        """Restore topological order; nodes that are in order already keep their places."""
        nodes = self.nodes
        position = {id(node): i for i, node in enumerate(nodes)}
        needs = [
            {
                position[id(maker)]
                for tensor in (*node.inputs, *node.captured)
                for maker in tensor.inputs
                if id(maker) in position
            }
            for node in nodes
        ]
        self._nodes = [nodes[i] for i in stable_order(needs)]

    def remove_unused(self) -> int:
        """Remove nodes whose outputs nobody reads; return how many went."""
        kept = {tensor.name for tensor in self.outputs}
        gone = 0
        for node in reversed(list(self.nodes)):
            if not any(t.name in kept or t.outputs for t in node.outputs):
                self.remove(node)
                gone += 1
            else:
                kept |= {tensor.name for tensor in node.captured}
        return gone

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
            elif tensor.name not in known and tensor.dtype is not None:
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


def _drop(items: list[Any], item: Any) -> None:
    """Remove one entry by identity from a list that graphsurgeon keeps in step with others."""
    for index, found in enumerate(items):
        if found is item:
            list.pop(items, index)
            return
    raise InternalError("a tensor and its node disagree about being connected")
