"""Walks over every graph, node and tensor of a ModelProto, bodies and functions included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import AttributeProto


def bodies_of(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield (attribute name, graph) of each body of a control flow node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield `graph` and every body below it."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        waiting.extend(body for node in current.node for _, body in bodies_of(node))


def nodes_below(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield `nodes` and every node in their bodies."""
    for node in nodes:
        yield node
        for _, body in bodies_of(node):
            for graph in graphs_of(body):
                yield from graph.node


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of the model: main graph, bodies, local functions."""
    yield from nodes_below(model.graph.node)
    for function in model.functions:
        yield from nodes_below(function.node)


def inner_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that is not an initializer of the main graph."""
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
    for top in model.graph.node:
        for _, body in bodies_of(top):
            for graph in graphs_of(body):
                yield from graph.initializer


def all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant tensor of the model."""
    yield from model.graph.initializer
    yield from inner_tensors(model)


def node_label(node: onnx.NodeProto) -> str:
    """Return how messages call a node: its name, or its op and first output."""
    output = next((name for name in node.output if name), "")
    return node.name or f"{node.op_type} that makes {output!r}"
