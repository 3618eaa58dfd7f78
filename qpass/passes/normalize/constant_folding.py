"""Nodes whose inputs are all constants become constants.

Never through Q or DQ, which carry meaning; never random ops or control flow; never where the result
would make the file much larger. Everything foldable is computed in one session of onnxruntime with
optimizations off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from qpass.graph import SHARED_LIMIT, Constant, Graph, Node, Tensor, array_of
from qpass.passes.normalize.folding import Array, FoldResult, static_shape
from qpass.verify.engines import ORT_ERRORS, session_options

NEVER: Final = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "RandomNormal", "RandomUniform",
    "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout", "If", "Loop",
    "Scan", "SequenceMap",
})  # fmt: skip
# A folded result may be larger than what it was made from by this many bytes.
GROWTH_LIMIT: Final = 16 << 20
RULE: Final = "fold constants"


def fold_constant_nodes(graph: Graph) -> FoldResult:
    """Turn Constant nodes into constants; one that makes a graph output stays for its name."""
    result = FoldResult()
    for node in list(graph.nodes):
        values = _constant_values(node) if node.op == "Constant" else None
        if values is not None and become_constant(graph, node, 0, values):
            result.changed += 1
    return result


def _constant_values(node: Node) -> Array | None:
    for key, value in node.attrs.items():
        if key == "value":
            return array_of(value)
        if key in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if key in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
        if key in ("value_string", "value_strings"):
            return np.asarray(value, object)
    return None


def become_constant(graph: Graph, node: Node, slot: int, values: Array) -> bool:
    """Let everybody who reads output `slot` of `node` read `values`; False when nobody does.

    The constant takes over the name, unless the tensor is a graph output. The node goes when
    nothing needs it any more.
    """
    tensor = node.outputs[slot]
    readers, stays = graph.consumers(tensor), graph.is_output(tensor)
    if stays and not readers:
        return False
    captured = tensor.name in graph.captured
    constant = graph.constant(tensor.name, values)
    if not stays:
        constant.name, tensor.name = tensor.name, constant.name
    if captured and not stays:  # bodies of control flow go by name
        for other in graph.nodes:
            other.captured = [constant if t is tensor else t for t in other.captured]
    for reader, index in readers:
        graph.set_input(reader, index, constant)
    if not any(out.outputs or graph.is_output(out) for out in node.outputs):
        graph.remove(node)
    return True


def fold_constants(graph: Graph) -> FoldResult:
    """Compute every node that depends on constants alone."""
    result = FoldResult()
    foldable = _foldable(graph, result)
    if not foldable:
        return result
    members = {id(node) for node in foldable}
    wanted = [
        (node, slot)
        for node in foldable
        for slot, tensor in enumerate(node.outputs)
        if tensor.name in graph.captured or any(id(r) not in members for r in tensor.outputs)
    ]
    computed = _compute(graph, foldable, [node.outputs[slot] for node, slot in wanted], result)
    for node, slot in wanted:
        tensor = node.outputs[slot]
        if tensor.name in computed:
            become_constant(graph, node, slot, computed[tensor.name])
            result.changed += 1
    if result.changed:
        graph.remove_unused()
    return result


def _foldable(graph: Graph, result: FoldResult) -> list[Node]:
    """Return the nodes that depend on constants alone and do not grow, in order."""
    sizes: dict[int, float] = {}  # tensor -> bytes of the constants behind it
    foldable = []
    for node in graph.nodes:
        inputs = {id(tensor): tensor for tensor in node.inputs if tensor.name}
        if not all(isinstance(t, Constant) or id(t) in sizes for t in inputs.values()):
            continue
        if node.op in NEVER or node.domain not in (None, "", "ai.onnx"):
            continue
        if any(graph.is_output(tensor) for tensor in node.outputs):
            continue
        source = sum(
            float(t._values.nbytes) if isinstance(t, Constant) else sizes[id(t)]
            for t in inputs.values()
        )
        known = [_static_bytes(tensor) for tensor in node.outputs]
        if any(size is not None and size > source + GROWTH_LIMIT for size in known):
            _refuse_growth(result, node, max(size or 0 for size in known))
            continue
        foldable.append(node)
        for tensor, size in zip(node.outputs, known, strict=True):
            sizes[id(tensor)] = source if size is None else min(source, size)
    return foldable


def _static_bytes(tensor: Tensor) -> int | None:
    shape = static_shape(tensor)
    if shape is None or tensor.dtype is None or isinstance(tensor.dtype, int):
        return None
    return math.prod(shape) * int(np.dtype(tensor.dtype).itemsize)


def _refuse_growth(result: FoldResult, node: Node, size: float) -> None:
    result.refuse(
        RULE, node, f"the result takes {size / 2**20:.0f} MiB more than its sources allow"
    )


def _compute(
    graph: Graph, nodes: Sequence[Node], wanted: Sequence[Tensor], result: FoldResult
) -> dict[str, Array]:
    """Return the values of `wanted`; what the engine cannot compute is left out and refused."""
    with suppress(*ORT_ERRORS):
        return _run(graph, nodes, [tensor.name for tensor in wanted], {})
    # One of them is at fault. One by one they tell which, and the others are still computed.
    known: dict[str, Array] = {}
    failed: set[int] = set()
    for node in nodes:
        if any(id(tensor) in failed for tensor in node.inputs):
            failed |= {id(tensor) for tensor in node.outputs}
            continue
        try:
            known |= _run(graph, [node], [t.name for t in node.outputs if t.name], known)
        except ORT_ERRORS as error:
            failed |= {id(tensor) for tensor in node.outputs}
            result.refuse(RULE, node, f"the engine says: {error}".splitlines()[0][:200])
    return {tensor.name: known[tensor.name] for tensor in wanted if tensor.name in known}


def _run(
    graph: Graph, nodes: Sequence[Node], outputs: Sequence[str], known: Mapping[str, Array]
) -> dict[str, Array]:
    """Run `nodes` once; large constants are fed, for a model proto ends at 2 GiB."""
    values: dict[str, Array] = {
        t.name: array_of(t) for n in nodes for t in n.inputs if isinstance(t, Constant)
    }
    read = {tensor.name for node in nodes for tensor in node.inputs}
    values |= {name: value for name, value in known.items() if name in read}
    fed = {k: v for k, v in values.items() if v.nbytes > SHARED_LIMIT and v.dtype.kind in "biuf"}
    opsets = list(graph.header.opset_import)
    types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in fed.items()}
    model = helper.make_model(
        helper.make_graph(
            [graph.proto_of(node) for node in nodes],
            "constants",
            [helper.make_tensor_value_info(k, t, fed[k].shape) for k, t in types.items()],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(v, k) for k, v in values.items() if k not in fed],
        ),
        opset_imports=opsets,
        # That of the model may be newer than what the engine knows.
        ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True),
    )
    session = ort.InferenceSession(
        model.SerializeToString(),
        session_options(optimize=False),
        providers=["CPUExecutionProvider"],
    )
    return dict(zip(outputs, _arrays(session.run(list(outputs), fed)), strict=True))


def _arrays(results: Iterable[Any]) -> list[Array]:
    """Return the results of a run; TypeError for sequences, which no constant can hold."""
    arrays = list(results)
    if not all(isinstance(value, np.ndarray) for value in arrays):
        raise TypeError("the result is not a tensor")
    return arrays
