"""Insert Q and DQ as a plan and its numbers say: the only step from float to integers.

What it does
    Activations get QuantizeLinear and DequantizeLinear, on the edges that the plan lists or behind
    the producer for all readers, and a Clip where their type is wider than their bits. Constants
    become integers with a DequantizeLinear.
Why it is correct
    It decides nothing: where, which kind and which numbers come from `Plan` and `QTable`. Original
    tensor names stay on the float side of Q, so that both graphs can be compared layer by layer;
    names of graph outputs, and of tensors that bodies of control flow read, stay with the readers.
Preconditions
    The graph is the one that the plan was made for, without Q or DQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qpass.dtypes import INT32
from qpass.errors import InternalError
from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.plan import Decision, Plan
from qpass.qparams import QParams, quantize
from qpass.report.model import PassReport

RANGE_KEY = "qpass.range"  # metadata of a Q: "fixed" ranges are the user's, no pass moves them
CHUNK_ELEMENTS = 1 << 24  # weights are quantized in pieces of this many elements


def insert_qdq(graph: Graph, plan: Plan, qparams: Mapping[str, QParams]) -> PassReport:
    """Insert every decision of `plan` into `graph`; `changed` counts the tensors."""
    tensors = graph.tensors()
    nodes = {node.name: node for node in graph.nodes}
    for decision in plan.decisions:
        numbers, tensor = qparams[decision.key], tensors[decision.tensor]
        if decision.kind == "activation":
            keep_name = graph.is_output(tensor) or tensor.name in graph.captured
            _insert_pair(graph, nodes, decision, tensor, numbers, keep_name=keep_name)
        else:
            _insert_constant(graph, nodes, decision, tensor, numbers)
    graph.remove_unused()
    graph.sort()  # pairs behind a graph input stand before the first node, in order of insertion
    return PassReport(name="insert_qdq", changed=len(plan.decisions))


def quantizer_name(key: str) -> str:
    """Return the name of the QuantizeLinear of a decision."""
    return f"{key}_Q"


def dequantize_node(
    graph: Graph,
    source: Tensor,
    out: Tensor,
    numbers: QParams,
    name: str,
    constants: tuple[Constant, Constant] | None = None,
) -> Node:
    """Make the DequantizeLinear from `source` to `out`; the axis is always written.

    `constants` are scale and zero point where they exist already; else they are made here.
    """
    attrs = {} if numbers.axis is None else {"axis": numbers.axis}
    if numbers.block_size is not None:
        attrs["block_size"] = numbers.block_size
    if constants is None:
        # Constants of its own: where session.x64quantprecision is set (see `qpass.saturation`),
        # onnxruntime 1.31 does not load a file in which weights share a zero point.
        constants = (
            graph.constant(f"{name}_scale", numbers.scale),
            graph.constant(f"{name}_zero_point", numbers.zero_point),
        )
    inputs: list[Tensor] = [source, *constants]
    if numbers.storage is INT32 or _needs_no_zero_point(numbers):
        inputs.pop()  # it is 0 by definition (onnx, DequantizeLinear) and would cost as much again
    return graph.make("DequantizeLinear", inputs, [out], name=f"{name}_DQ", attrs=attrs)


def _needs_no_zero_point(numbers: QParams) -> bool:
    """True for blocks without zero points, where they would be as many as there are blocks."""
    blocks = numbers.block_size is not None and numbers.storage.signed
    return blocks and not numbers.zero_point.astype(np.int64).any()


def _insert_pair(
    graph: Graph,
    nodes: Mapping[str, Node],
    decision: Decision,
    tensor: Tensor,
    numbers: QParams,
    *,
    keep_name: bool,
) -> None:
    readers = (
        graph.consumers(tensor)
        if decision.edges is None
        else [(nodes[edge.node], edge.index) for edge in decision.edges]
    )
    for node, index in readers:
        if node.inputs[index] is not tensor:
            raise InternalError(f"{node.name} does not read {tensor.name}: the plan is stale")
    producer = graph.producer(tensor)
    restored = graph.variable(f"{decision.key}_dequantized", tensor.dtype, tensor.shape)
    if keep_name and decision.edges is None and producer is not None:
        # The old name is what DQ returns; the float tensor gets a new one.
        floating = graph.variable(f"{decision.key}_float", tensor.dtype, tensor.shape)
        slot = next(i for i, out in enumerate(producer.outputs) if out is tensor)
        graph.set_output(producer, slot, floating)
        tensor, restored = floating, tensor
    stored = graph.variable(
        f"{decision.key}_quantized", np.dtype(numbers.storage.numpy), tensor.shape
    )
    constants = (
        graph.constant(f"{decision.key}_scale", numbers.scale),
        graph.common_constant(f"{decision.key}_zero_point", numbers.zero_point),
    )
    name = quantizer_name(decision.key)
    narrow = (numbers.qmin, numbers.qmax) != (numbers.storage.qmin, numbers.storage.qmax)
    clip = _clip(graph, decision, tensor, numbers) if narrow else None
    source = tensor if clip is None else clip.outputs[0]
    q = graph.make("QuantizeLinear", [source, *constants], [stored], name=name)
    if decision.pinned is not None or narrow:
        q.extra.metadata_props.add(key=RANGE_KEY, value="fixed")
    dq = dequantize_node(graph, stored, restored, numbers, decision.key, constants)
    for node, index in readers:
        graph.set_input(node, index, restored)
    made = [node for node in (clip, q, dq) if node is not None]
    if producer is not None:
        for node in reversed(made):
            graph.add(node, after=producer)
    else:
        anchor = graph.nodes[0]
        for node in made:
            graph.add(node, before=anchor)


def _clip(graph: Graph, decision: Decision, tensor: Tensor, numbers: QParams) -> Node:
    """Make the Clip in front of a Q whose storage type holds more integers than are wanted.

    A Q saturates at the ends of its type, so 6 bits in a byte would reach four times as far.
    """
    zero, scale = int(numbers.zero_point), float(numbers.scale)
    limits = [
        graph.constant(f"{decision.key}_{end}", np.array((q - zero) * scale, np.float32))
        for end, q in (("low", numbers.qmin), ("high", numbers.qmax))
    ]
    clipped = graph.variable(f"{decision.key}_clipped", tensor.dtype, tensor.shape)
    return graph.make("Clip", [tensor, *limits], [clipped], name=f"{decision.key}_Clip")


def _insert_constant(
    graph: Graph,
    nodes: Mapping[str, Node],
    decision: Decision,
    tensor: Tensor,
    numbers: QParams,
) -> None:
    assert decision.edges is not None
    readers = [(nodes[edge.node], edge.index) for edge in decision.edges]
    stored = graph.constant(f"{decision.key}_quantized", quantize_in_chunks(tensor, numbers))
    for node, index in readers:
        restored = graph.variable(f"{decision.key}_dequantized", np.dtype(np.float32), tensor.shape)
        graph.add(dequantize_node(graph, stored, restored, numbers, decision.key), before=node)
        graph.set_input(node, index, restored)


def quantize_in_chunks(tensor: Constant, numbers: QParams) -> np.ndarray:
    """Quantize a constant; large ones in pieces, so that temporaries stay small."""
    values = array_of(tensor)
    if values.size <= CHUNK_ELEMENTS or values.ndim < 2:
        return quantize(values, numbers)
    out = np.empty(values.shape, numbers.storage.numpy)
    rows = max(1, CHUNK_ELEMENTS // (values.size // values.shape[0]))
    along_rows = numbers.axis in (0, -values.ndim)
    block = 1
    if numbers.block_size is not None and along_rows:
        block = numbers.block_size
        rows = max(rows // block, 1) * block  # whole blocks
    for start in range(0, values.shape[0], rows):
        piece = slice(start, start + rows)
        part = numbers
        if along_rows or numbers.block_size is not None:  # blocks: scales have all axes
            scales = slice(start // block, (start + rows) // block)
            part = replace(
                numbers, scale=numbers.scale[scales], zero_point=numbers.zero_point[scales]
            )
        out[piece] = quantize(values[piece], part)
    return out
