"""What a model must be before qpass works on it; every breach is a ModelError that names the place.

Constraints:
    W1 the ONNX operator set is imported, once, in a version that the installed onnx knows;
    W2 every tensor has a known dtype, and inline data of the size that its shape needs;
    W3 every tensor is made once, by an input, an initializer or a node;
    W4 every tensor is made before it is read (which also excludes cycles);
    W5 every op has a definition: in ONNX, or in onnxruntime for the domain com.microsoft;
    W6 nothing is quantized yet;
    W7 nodes of one graph have different names, or none: onnxruntime refuses anything else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import onnx
from onnx import TensorProto

from qpass.errors import ModelError
from qpass.external import is_external, stored_bytes
from qpass.walk import all_nodes, all_tensors, bodies_of, node_label

ONNX_DOMAINS: Final = ("", "ai.onnx")
QUANTIZED_OP: Final = re.compile(
    r"QuantizeLinear|DequantizeLinear|QLinear\w+|QGemm|QAttention|QMoE|QOrdered\w+"
    r"|MatMulInteger\w*|ConvInteger|DynamicQuantize\w+|MatMulNBits|MatMulBnb4|GatherBlockQuantized"
)
KNOWN_TYPES: Final = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}


def is_quantized_op(node: onnx.NodeProto) -> bool:
    """True for Q, DQ and every op that computes on quantized integers."""
    return QUANTIZED_OP.fullmatch(node.op_type) is not None


def check_wellformed(model: onnx.ModelProto) -> None:
    """Check W1 to W4 on a model whose external data may be absent."""
    _check_opset(model)
    _check_types(model)
    _check_definitions(model.graph, [])


def onnx_opset(model: onnx.ModelProto) -> int:
    """Return the version of the ONNX operator set that the model imports (W1)."""
    versions = {o.version for o in model.opset_import if o.domain in ONNX_DOMAINS}
    if len(versions) != 1:
        found = f"imports versions {sorted(versions)}" if versions else "does not import any"
        raise ModelError(
            f"the model {found} of the ONNX operator set",
            where="opset_import",
            fix="export the model again; one version of the domain '' is needed",
        )
    return int(versions.pop())


def _check_opset(model: onnx.ModelProto) -> None:
    version, newest = onnx_opset(model), onnx.defs.onnx_opset_version()
    if version > newest:
        raise ModelError(
            f"the model has opset {version}; the installed onnx {onnx.__version__} "
            f"knows opsets up to {newest}",
            where="opset_import",
            fix="install a newer onnx, or export the model at an older opset",
        )


def _check_types(model: onnx.ModelProto) -> None:
    for tensor in all_tensors(model):
        where = f"tensor {tensor.name}"
        if tensor.data_type not in KNOWN_TYPES:
            raise ModelError(f"unknown dtype {tensor.data_type}", where=where)
        if any(dim < 0 for dim in tensor.dims):
            raise ModelError(f"a constant has shape {list(tensor.dims)}", where=where)
        if tensor.HasField("raw_data") and not is_external(tensor):
            needed = stored_bytes(tensor)
            if len(tensor.raw_data) != needed:
                raise ModelError(
                    f"the data of a constant has {len(tensor.raw_data)} bytes, "
                    f"its shape {list(tensor.dims)} needs {needed}",
                    where=where,
                    fix="the file is damaged: export or download it again",
                )
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type
        if kind.HasField("tensor_type") and kind.tensor_type.elem_type not in KNOWN_TYPES:
            raise ModelError(
                f"unknown dtype {kind.tensor_type.elem_type}", where=f"tensor {value.name}"
            )


def _check_definitions(graph: onnx.GraphProto, outer: Sequence[set[str]]) -> None:
    """Check W3 and W4 for `graph` and its bodies, which may read the tensors of `outer`."""
    inputs = [value.name for value in graph.input]
    initializers = [tensor.name for tensor in graph.initializer]
    _check_unique(inputs, "two graph inputs are called")
    _check_unique(initializers, "two initializers are called")
    _check_unique([value.name for value in graph.output], "two graph outputs are called")
    made = set(inputs) | set(initializers) | {t.values.name for t in graph.sparse_initializer}
    scopes = [*outer, made]
    for node in graph.node:
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise _undefined(graph, node, name)
        for _, body in bodies_of(node):
            _check_definitions(body, scopes)
        for name in filter(None, node.output):
            if name in made:
                raise ModelError(
                    f"the tensor {name!r} is made twice",
                    where=f"node {node_label(node)}",
                    fix="tensor names must be unique in a graph: export the model again",
                )
            made.add(name)
    for value in graph.output:
        if not any(value.name in scope for scope in scopes):
            raise ModelError(f"no node makes the graph output {value.name!r}", where=graph.name)


def _check_unique(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ModelError(f"{what} {name!r}", fix="tensor names must be unique in a graph")
        seen.add(name)


def _undefined(graph: onnx.GraphProto, reader: onnx.NodeProto, name: str) -> ModelError:
    where = f"node {node_label(reader)}"
    maker = next((node for node in graph.node if name in node.output), None)
    if maker is None:
        return ModelError(f"nothing makes the tensor {name!r} that a node reads", where=where)
    return ModelError(
        f"the tensor {name!r} is read before node {node_label(maker)} makes it",
        where=where,
        fix="ONNX wants nodes in topological order, without cycles: sort the graph",
    )


def check_float(model: onnx.ModelProto) -> None:
    """Check W6: raise ModelError that names the first quantized node."""
    for node in all_nodes(model):
        if is_quantized_op(node):
            raise ModelError(
                f"the model is quantized already: it has a {node.op_type}",
                where=f"node {node_label(node)}",
                fix="give the float model; `qpass lint` judges a quantized one",
            )


def check_node_names(graph: onnx.GraphProto) -> None:
    """Check W7 for `graph` and its bodies: raise ModelError that names the second bearer."""
    seen: set[str] = set()
    for node in graph.node:
        if node.name and node.name in seen:
            raise ModelError(
                f"two nodes are called {node.name!r}, which onnxruntime refuses",
                where=f"the second is of type {node.op_type} and makes {', '.join(node.output)}",
                fix="give each node a name of its own, for example: for i, node in "
                "enumerate(model.graph.node): node.name = f'{node.op_type}_{i}'",
            )
        seen.add(node.name)
        for _, body in bodies_of(node):
            check_node_names(body)


def check_ops(model: onnx.ModelProto) -> None:
    """Check W5: raise ModelError that names the first op without a definition."""
    versions = {o.domain: o.version for o in model.opset_import}
    versions[""] = onnx_opset(model)
    runtime_ops: frozenset[tuple[str, str]] | None = None
    for node in all_nodes(model):
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        newest = versions.get(domain)
        if newest and onnx.defs.has(node.op_type, max_inclusive_version=newest, domain=domain):
            continue
        if runtime_ops is None:
            runtime_ops = _runtime_ops()
        # onnxruntime lists ONNX's ops too, but which opset they need is for onnx to say.
        known_to_onnx = not domain and onnx.defs.has(node.op_type)
        if (domain, node.op_type) in runtime_ops and not known_to_onnx:
            continue
        where = f"node {node_label(node)}"
        if not domain:
            raise ModelError(f"opset {newest} has no op {node.op_type!r}", where=where)
        raise ModelError(
            f"the op {node.op_type!r} of the domain {domain!r} has no definition in onnx or "
            "onnxruntime",
            where=where,
            fix="replace custom ops by ONNX ops, or give the model a local function for them",
        )


def _runtime_ops() -> frozenset[tuple[str, str]]:
    """Return the (domain, op) pairs that the installed onnxruntime has a schema for."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return frozenset((schema.domain, schema.name) for schema in state.get_all_operator_schema())
