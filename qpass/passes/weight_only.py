"""Give a graph the forms in which kernels read integer weights behind float activations.

What it does
    `straighten_gemms`: a Gemm with transB = 1 gets its weight transposed and transB = 0.
    `gather_blocks`: Gather from a table behind DequantizeLinear becomes GatherBlockQuantized.
    `part_transposes`: Gemm with integer weights behind a Transpose becomes MatMul and Sub.
    `half_scales`: scales of blocks are stored in 16 bits.
Why it is correct
    ``x @ W^T`` reads the same numbers from ``W^T`` stored as a matrix; rows of a table are the same
    whether they are dequantized before they are gathered or after; a scale goes through float16
    only where that gives the same number back.
Preconditions
    `straighten_gemms` works on the float graph, the others behind `insert_qdq`; `half_scales` comes
    last, for other passes look for constants. Which is wanted comes from the target's rules.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
from onnx import TensorProto

from qpass.graph import Constant, Graph, array_of
from qpass.report.model import PassReport, Refusal

STRAIGHT: Final = "straighten_gemms"
CONTRIBUTED: Final = "com.microsoft"
FLOAT: Final = int(TensorProto.FLOAT)


def straighten_gemms(graph: Graph, names: Collection[str]) -> PassReport:
    """Store the weights of Gemms, by name, as the kernels read them: [K, N], transB = 0."""
    changed, refusals = 0, []
    straight: dict[str, Constant] = {}  # by name of the old weight: one copy for all its readers
    for node in graph.nodes:
        if node.name not in names or node.op != "Gemm" or not node.attrs.get("transB", 0):
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
    return PassReport(name=STRAIGHT, changed=changed, refusals=tuple(refusals))


def part_transposes(graph: Graph) -> PassReport:
    """Keep a Transpose apart from the product of float activations with integer weights behind it.

    onnxruntime 1.31 makes one Gemm with transA of Transpose and Gemm, and of Transpose, MatMul and
    Add, before it looks for DequantizeLinear; MatMulNBits takes no transA. MatMul and a Sub of the
    negative bias are left alone.
    """
    changed, refusals = 0, []
    for node in graph.nodes:
        dq = graph.producer(node.inputs[1]) if node.op == "Gemm" else None
        turned = graph.producer(node.inputs[0]) if dq is not None else None
        if dq is None or dq.op != "DequantizeLinear" or turned is None or turned.op != "Transpose":
            continue
        if not isinstance(dq.inputs[0], Constant):
            continue  # the DQ of an activation
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        plain = all(
            node.attrs.get(name, usual) == usual
            for name, usual in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0))
        )
        if not plain or not isinstance(bias, Constant | None):
            reason = "its bias is computed" if plain else "it scales or transposes"
            refusals.append(Refusal(rule="part transposes", where=node.name, reason=reason))
            continue
        node.op, node.attrs = "MatMul", {}
        while len(node.inputs) > 2:
            graph.drop_input(node, 2)
        if bias is not None:
            out = node.outputs[0]
            product = graph.variable(f"{out.name}_product", out.dtype, out.shape)
            negative = graph.constant(f"{bias.name}_negative", -array_of(bias))
            graph.set_output(node, 0, product)
            graph.add(
                graph.make("Sub", [product, negative], [out], name=f"{node.name}_bias"), after=node
            )
        changed += 1
    graph.remove_unused()
    return PassReport(name="part_transposes", changed=changed, refusals=tuple(refusals))


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
