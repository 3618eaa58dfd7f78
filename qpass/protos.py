"""Questions about protos, and parts that graphsurgeon does not carry: headers, metadata, bodies."""

from __future__ import annotations

import onnx


def without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of everything of `model` but its functions and what its graph computes."""
    header = onnx.ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
    )
    header.opset_import.extend(model.opset_import)
    header.metadata_props.extend(model.metadata_props)
    header.graph.metadata_props.extend(model.graph.metadata_props)
    return header


def node_extras(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return, for each node, a NodeProto with only the fields that graphsurgeon drops."""
    extras = []
    for node in model.graph.node:
        extra = onnx.NodeProto()
        if node.doc_string:
            extra.doc_string = node.doc_string
        extra.metadata_props.extend(node.metadata_props)
        extras.append(extra)
    return extras


def take_bodies(model: onnx.ModelProto) -> dict[int, list[onnx.AttributeProto]]:
    """Remove the graph attributes of control flow nodes; return them by node index."""
    bodies: dict[int, list[onnx.AttributeProto]] = {}
    for index, node in enumerate(model.graph.node):
        taken = [a for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        if taken:
            bodies[index] = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in taken]
            rest = [a for a in node.attribute if a.type != onnx.AttributeProto.GRAPH]
            kept = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in rest]
            del node.attribute[:]
            node.attribute.extend(kept)
    return bodies


def put_bodies_back(model: onnx.ModelProto, bodies: dict[int, list[onnx.AttributeProto]]) -> None:
    """Undo `take_bodies`."""
    for index, attributes in bodies.items():
        model.graph.node[index].attribute.extend(attributes)


def free_names(graph: onnx.GraphProto) -> list[str]:
    """Return the tensor names that a control flow body reads from outside, in order."""
    made = {value.name for value in graph.input} | {proto.name for proto in graph.initializer}
    free: dict[str, None] = {}
    for node in graph.node:
        names = list(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names += free_names(attribute.g)
        free.update((name, None) for name in names if name and name not in made)
        made |= set(node.output)
    free.update((value.name, None) for value in graph.output if value.name not in made)
    return list(free)


def has_narrow_activations(model: onnx.ModelProto) -> bool:
    """True where a Q gives integers of 4 bits."""
    narrow = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4)
    }
    return any(
        node.op_type == "QuantizeLinear" and not narrow.isdisjoint(node.input)
        for node in model.graph.node
    )
