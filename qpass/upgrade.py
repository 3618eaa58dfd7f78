"""Bring a model to a newer opset: local functions inlined, ops converted, nothing else lost.

What it does
    onnx's inliner and version converter work on a skeleton: the model without its large constants,
    which become graph inputs. Only the nodes, and what the converter did to small constants, are
    taken over into the model; large constants never move.
Why
    The converter parses the whole model into its own structures, fails on external data and on
    dtypes newer than itself, and drops node metadata, quantization annotations and doc strings.
    Every node carries a token through the conversion, so that its own strings come back.
Reference
    https://onnx.ai/onnx/api/version_converter.html
"""

from __future__ import annotations

import re
from typing import Final

import onnx
from onnx import TensorProto, helper, inliner, version_converter

from qpass.errors import ModelError
from qpass.external import inline_raw, is_external, stored_bytes
from qpass.protos import without_graph
from qpass.walk import all_nodes, node_label, nodes_below
from qpass.wellformed import ONNX_DOMAINS, onnx_opset

SMALL: Final = 1024  # bytes; shapes, axes and scales, which converters look into
PLAIN_TYPES: Final = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
NODE_MARK: Final = "qpass-node-"
FAILED_OP: Final = re.compile(r"\bfor (?:op )?([A-Z]\w+)")
CONSTANTS_ARE_NO_INPUTS: Final = 4  # first IR version where initializers need not be inputs
# Ops that the converter of onnx 1.23 passes on although their meaning changed at the second
# opset: the scale of GroupNormalization was per group and is per channel.
SILENTLY_WRONG: Final = {"GroupNormalization": (18, 21)}


def inline_functions(model: onnx.ModelProto) -> None:
    """Replace calls of local functions by their nodes, in place.

    Raises:
        ModelError: a function cannot be inlined.
    """
    if not model.functions:
        return
    skeleton = skeleton_of(model)
    skeleton.functions.extend(model.functions)
    originals = _number_nodes(skeleton)
    version = onnx_opset(model)
    mixed = any(
        entry.version != version
        for function in model.functions
        for entry in function.opset_import
        if entry.domain in ONNX_DOMAINS
    )
    try:
        if mixed:  # the converter of single functions wants the types of their arguments
            skeleton = onnx.shape_inference.infer_shapes(skeleton)
        inlined = inliner.inline_local_functions(skeleton, convert_version=mixed)
    except Exception as error:  # the C++ inliner raises bare exceptions
        raise ModelError(f"onnx cannot inline the local functions: {error}") from error
    if inlined.functions:
        names = ", ".join(function.name for function in inlined.functions)
        raise ModelError(f"local functions cannot be inlined: {names}")
    _take_over(model, inlined, originals)
    local = {function.domain for function in model.functions}
    used = {node.domain for node in all_nodes(inlined)}
    del model.functions[:]
    kept = [o for o in model.opset_import if o.domain not in local or o.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def upgrade_opset(model: onnx.ModelProto, opset: int) -> None:
    """Convert `model` to `opset`, in place; a model that is as new already is left alone.

    Raises:
        ModelError: onnx has no conversion for one of the ops.
    """
    present = onnx_opset(model)
    if present < opset:
        for node in all_nodes(model):
            first, changed = SILENTLY_WRONG.get(node.op_type, (opset, opset))
            if node.domain in ONNX_DOMAINS and first <= present < changed <= opset:
                raise _cannot_convert(present, opset, node.op_type, node_label(node))
        skeleton = skeleton_of(model)
        originals = _number_nodes(skeleton)
        try:
            converted = version_converter.convert_version(skeleton, opset)
        except Exception as error:  # the C++ converter raises bare exceptions
            found = FAILED_OP.search(str(error))
            op = found[1] if found else str(error)
            label = next((node_label(n) for n in all_nodes(model) if n.op_type == op), "")
            raise _cannot_convert(present, opset, op, label) from error
        _take_over(model, converted, originals)
        next(o for o in model.opset_import if o.domain in ONNX_DOMAINS).version = opset
    raise_ir_version(model)


def raise_ir_version(model: onnx.ModelProto) -> None:
    """Raise the IR version to what the imported operator sets need; never lower it."""
    needed = helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = max(model.ir_version, needed, CONSTANTS_ARE_NO_INPUTS)


def _cannot_convert(present: int, opset: int, op: str, node: str) -> ModelError:
    return ModelError(
        f"onnx cannot convert the model from opset {present} to {opset}: {op}",
        where=f"node {node}" if node else "",
        fix=f"export the model at opset {opset}",
    )


def _is_small(tensor: TensorProto) -> bool:
    plain = tensor.data_type in PLAIN_TYPES and not is_external(tensor)
    return plain and stored_bytes(tensor) <= SMALL


def skeleton_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` whose large constants are graph inputs."""
    light = without_graph(model)
    raise_ir_version(light)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        if _is_small(tensor):
            graph.initializer.append(tensor)
        else:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return light


def _number_nodes(skeleton: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Put a token into the doc string of every node; return the nodes' own strings by number."""
    originals = []
    for number, node in enumerate(all_nodes(skeleton)):
        original = onnx.NodeProto(name=node.name, doc_string=node.doc_string)
        original.metadata_props.extend(node.metadata_props)
        originals.append(original)
        node.doc_string = f"{NODE_MARK}{number}"
    return originals


def _take_over(
    model: onnx.ModelProto, converted: onnx.ModelProto, originals: list[onnx.NodeProto]
) -> None:
    """Move the nodes and the small constants of `converted` into `model`."""
    for node in nodes_below(converted.graph.node):
        if not node.doc_string.startswith(NODE_MARK):
            continue
        original = originals[int(node.doc_string.removeprefix(NODE_MARK))]
        node.ClearField("doc_string")
        del node.metadata_props[:]
        if original.doc_string:
            node.doc_string = original.doc_string
        node.metadata_props.extend(original.metadata_props)
    graph = model.graph
    del graph.node[:]
    graph.node.extend(converted.graph.node)
    _take_over_constants(graph, converted.graph)
    made = {name for node in graph.node for name in node.output}
    stale = [i for i, value in enumerate(graph.value_info) if value.name not in made]
    for index in reversed(stale):
        del graph.value_info[index]


def _take_over_constants(graph: onnx.GraphProto, converted: onnx.GraphProto) -> None:
    """Update small constants in place: large ones are neither copied nor moved."""
    small = {tensor.name: tensor for tensor in converted.initializer}
    for index in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[index]
        if not _is_small(tensor):
            continue
        fresh = small.pop(tensor.name, None)
        if fresh is None:
            del graph.initializer[index]
        elif not _same_values(fresh, tensor):
            tensor.CopyFrom(fresh)
    graph.initializer.extend(small.values())


def _same_values(first: TensorProto, second: TensorProto) -> bool:
    same_type = first.data_type == second.data_type and first.dims == second.dims
    return same_type and inline_raw(first) == inline_raw(second)
