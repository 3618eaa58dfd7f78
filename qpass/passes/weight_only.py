"""Give a graph the forms in which kernels read integer weights behind float activations.

What it does
    `straighten_gemms`: a Gemm with transB = 1 gets its weight transposed and transB = 0.
    `part_activations`: Relu and Clip behind such a product become Max and Min.
    `gather_blocks`: Gather from a table behind DequantizeLinear becomes GatherBlockQuantized.
    `half_scales`: scales of blocks are stored in 16 bits.
Why it is correct
    ``x @ W^T`` reads the same numbers from ``W^T`` stored as a matrix; rows of a table are the same
    whether they are dequantized before they are gathered or after; ``Relu(x)`` is ``max(x, 0)`` and
    Clip a Max and a Min; a scale goes through float16
    only where that gives the same number back.
Preconditions
    `straighten_gemms` works on the float graph, the others behind `insert_qdq`; `half_scales` comes
    last, for other passes look for constants. Which is wanted comes from the target's rules.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from onnx import TensorProto

from qpass.graph import Constant, Graph, Node, array_of
from qpass.report.model import PassReport, Refusal

CONTRIBUTED: Final = "com.microsoft"
FLOAT: Final = int(TensorProto.FLOAT)


def straighten_gemms(graph: Graph) -> PassReport:
    """Store the weights of Gemm as the kernels read them: [K, N], transB = 0."""
    changed, refusals = 0, []
    straight: dict[str, Constant] = {}  # by name of the old weight: one copy for all its readers
    for node in graph.nodes:
        if node.op != "Gemm" or not node.attrs.get("transB", 0):
            continue
        weight = node.inputs[1]
        if not isinstance(weight, Constant):
            reason = "its weight is computed"
            refusals.append(Refusal(rule="transB", where=node.name, reason=reason))
            continue
        if weight.name not in straight:
            turned = np.ascontiguousarray(array_of(weight).T)
            straight[weight.name] = graph.constant(f"{weight.name}_transposed", turned)
        graph.set_input(node, 1, straight[weight.name])
        node.attrs["transB"] = 0
        changed += 1
    graph.remove_unused()
    return PassReport(name="straighten_gemms", changed=changed, refusals=tuple(refusals))


def part_activations(graph: Graph) -> PassReport:
    """Write Relu and Clip behind products with integer weights as Max and Min.

    onnxruntime 1.31 takes a Relu or Clip that has one reader for the end of a group with a Q behind
    it; there is none, and the product in front stays a float MatMul behind DequantizeLinear.
    """
    changed = 0
    for node in list(graph.nodes):
        dq = graph.producer(node.inputs[1]) if node.op in ("Gemm", "MatMul") else None
        if dq is None or dq.op != "DequantizeLinear" or not isinstance(dq.inputs[0], Constant):
            continue
        readers = graph.consumers(node.outputs[0])
        if len(readers) == 1 and readers[0][0].op == "Add":  # the two become one Gemm
            readers = graph.consumers(readers[0][0].outputs[0])
        if len(readers) == 1 and readers[0][0].op in ("Relu", "Clip"):
            _as_max_and_min(graph, readers[0][0])
            changed += 1
    return PassReport(name="part_activations", changed=changed)


def _as_max_and_min(graph: Graph, node: Node) -> None:
    zero = graph.constant(f"{node.name}_zero", np.zeros((), np.float32))
    low, high = zero, None
    if node.op == "Clip":
        low, high = [*(t if t.name else None for t in node.inputs[1:]), None, None][:2]
    while len(node.inputs) > 1:
        graph.drop_input(node, len(node.inputs) - 1)
    limits = [(op, limit) for op, limit in (("Max", low), ("Min", high)) if limit is not None]
    node.op, last = "Identity", node
    node.attrs = {}
    for op, limit in limits:
        if last.op == "Identity":
            last.op = op
            last.inputs.append(limit)
            continue
        out = last.outputs[0]
        middle = graph.variable(f"{node.name}_low", out.dtype, out.shape)
        graph.set_output(last, 0, middle)
        graph.add(graph.make(op, [middle, limit], [out], name=f"{node.name}_{op}"), after=last)


def gather_blocks(graph: Graph) -> PassReport:
    """Gather integer rows first and dequantize those alone (com.microsoft.GatherBlockQuantized).

    onnxruntime runs Gather behind a blocked DequantizeLinear as it stands: the whole table is made
    float at every call. Its own Gather takes no 4-bit types.
    """
    changed, refusals = 0, []
    for node in graph.nodes:
        dq = graph.producer(node.inputs[0]) if node.op == "Gather" else None
        if dq is None or dq.op != "DequantizeLinear" or not isinstance(dq.inputs[0], Constant):
            continue
        table, block = dq.inputs[0], dq.attrs.get("block_size", 0)
        bits = 4 if np.dtype(table.dtype).name in ("int4", "uint4") else 8
        if not block or dq.attrs.get("axis", 1) != 1 or node.attrs.get("axis", 0) != 0:
            reason = "it has no blocks along the rows of its table"
            refusals.append(Refusal(rule="gather blocks", where=node.name, reason=reason))
            continue
        graph.set_input(node, 0, table)
        node.inputs.extend(dq.inputs[1:])
        node.op, node.domain = "GatherBlockQuantized", CONTRIBUTED
        node.attrs = {"block_size": block, "gather_axis": 0, "quantize_axis": 1, "bits": bits}
        changed += 1
    if changed and all(entry.domain != CONTRIBUTED for entry in graph.header.opset_import):
        graph.header.opset_import.add(domain=CONTRIBUTED, version=1)
    graph.remove_unused()
    return PassReport(name="gather_blocks", changed=changed, refusals=tuple(refusals))


def half_scales(graph: Graph) -> PassReport:
    """Store the scales of blocks as float16 behind a Cast where that loses nothing.

    A scale in float32 for 32 weights of 4 bits is a fifth of the file. Engines fold the Cast when
    they load the model (measured: onnxruntime 1.31.1 and OpenVINO 2026.4.1), so their kernels see
    constants as before.
    """
    changed, refusals = 0, []
    for node in list(graph.nodes):
        place = 2 if node.op == "GatherBlockQuantized" else 1
        if not node.attrs.get("block_size") or not isinstance(node.inputs[place], Constant):
            continue
        scale = node.inputs[place]
        values = array_of(scale)
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            reason = "its scales are no numbers of float16"
            refusals.append(Refusal(rule="half scales", where=node.name, reason=reason))
            continue
        stored = graph.constant(f"{scale.name}_half", half)
        wide = graph.variable(f"{scale.name}_wide", np.dtype(np.float32), values.shape)
        cast = graph.make("Cast", [stored], [wide], name=f"{scale.name}_Cast", attrs={"to": FLOAT})
        graph.add(cast, before=node)
        graph.set_input(node, place, wide)
        changed += 1
    return PassReport(name="half_scales", changed=changed, refusals=tuple(refusals))
