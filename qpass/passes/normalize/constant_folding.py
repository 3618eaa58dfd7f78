"""Nodes whose inputs are all constants become constants.

Never through Q or DQ, which carry meaning; never random ops or control flow; never where the result
would make the file much larger. Everything foldable is computed in one session of onnxruntime with
optimizations off.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.normalize.folding import FoldResult

NEVER: Final = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "RandomNormal", "RandomUniform",
    "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout", "If", "Loop",
    "Scan",
})  # fmt: skip
# A folded result may be larger than what it was made from by this many bytes.
GROWTH_LIMIT: Final = 16 << 20


def fold_constant_nodes(graph: Graph) -> FoldResult:
    """Turn Constant nodes into constants, and Shape of a static tensor."""
    result = FoldResult()
    for node in list(graph.nodes):
        values = _constant_values(node) if node.op == "Constant" else _static_shape(node)
        if values is not None and not graph.is_output(node.outputs[0]):
            _become_constant(graph, node.outputs[0], values)
            graph.remove(node)
            result.changed += 1
    return result


def _constant_values(node: Node) -> np.ndarray | None:
    for key, value in node.attrs.items():
        if key == "value":
            return array_of(value)
        if key in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if key in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    return None


def _static_shape(node: Node) -> np.ndarray | None:
    if node.op != "Shape":
        return None
    shape = node.inputs[0].shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    end = node.attrs.get("end", len(shape))
    return np.array(list(shape)[node.attrs.get("start", 0) : end], np.int64)


def _become_constant(graph: Graph, tensor: Tensor, values: np.ndarray) -> None:
    """Let every reader of `tensor` read a constant of its own."""
    for node, index in graph.consumers(tensor):
        copy = graph.constant(tensor.name, values)
        graph.set_input(node, index, copy)
    if tensor.name in graph.captured:  # bodies of control flow go by name
        constant = Constant(tensor.name, np.array(values, order="C"))
        for node in graph.nodes:
            node.captured = [constant if t is tensor else t for t in node.captured]


def fold_constants(graph: Graph) -> FoldResult:
    """Compute every node that depends on constants alone."""
    result = FoldResult()
    known: set[int] = set()
    foldable: list[Node] = []
    for node in graph.nodes:
        if node.op in NEVER or node.domain not in (None, "", "ai.onnx") or node.captured:
            continue
        inputs = [tensor for tensor in node.inputs if tensor.name]
        constant = all(isinstance(t, Constant) or id(t) in known for t in inputs)
        if constant and not any(graph.is_output(t) for t in node.outputs):
            foldable.append(node)
            known |= {id(tensor) for tensor in node.outputs}
    if not foldable:
        return result
    members = {id(node) for node in foldable}
    wanted = [
        tensor
        for node in foldable
        for tensor in node.outputs
        if any(id(reader) not in members for reader in tensor.outputs)
    ]
    if not wanted:
        graph.remove_unused()
        return result
    for tensor, values in zip(wanted, _compute(graph, foldable, wanted), strict=True):
        if values.nbytes > _source_bytes(graph, tensor) + GROWTH_LIMIT:
            maker = graph.producer(tensor)
            assert maker is not None
            result.refuse("constant folding", maker, f"the result has {values.nbytes} bytes")
            continue
        _become_constant(graph, tensor, values)
        result.changed += 1
    graph.remove_unused()
    return result


def _source_bytes(graph: Graph, tensor: Tensor) -> int:
    """Return the bytes of the constants that the producer of `tensor` reads directly."""
    maker = graph.producer(tensor)
    inputs = [] if maker is None else maker.inputs
    return sum(t._values.nbytes for t in inputs if isinstance(t, Constant))


def _compute(graph: Graph, nodes: list[Node], wanted: list[Tensor]) -> list[np.ndarray]:
    constants = {t.name: t for n in nodes for t in n.inputs if isinstance(t, Constant)}
    model = helper.make_model(
        helper.make_graph(
            [graph.proto_of(node) for node in nodes],
            "constants",
            [],
            [onnx.ValueInfoProto(name=tensor.name) for tensor in wanted],
            [numpy_helper.from_array(array_of(t), name) for name, t in constants.items()],
        ),
        opset_imports=list(graph.header.opset_import),
        ir_version=graph.header.ir_version,
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[np.ndarray] = session.run([tensor.name for tensor in wanted], {})
    return outputs
