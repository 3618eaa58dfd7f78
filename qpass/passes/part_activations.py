"""Keep Relu and Clip apart from the products of integers in front of them.

What it does
    Relu and Clip behind a Gemm or MatMul with integer weights or inputs become Max and Min. Those
    behind integers whose work a Q does stay: its range begins at zero, and the engine drops them.
Why it is needed
    onnxruntime 1.31 takes a Relu or Clip with one reader for the end of a group with a Q behind it.
    Where there is none, or one that reaches below zero, no kernel is found for the group, and the
    product in front stays a float Gemm or MatMul behind DequantizeLinear. Behind a product of float
    activations with integer weights they hide it from MatMulNBits, whatever follows.
Why it is correct
    ``Relu(x)`` is ``max(x, 0)``, and Clip a Max and a Min.
Preconditions
    Q and DQ are in the graph.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from qpass.graph import Constant, Graph, Node, array_of
from qpass.report.model import PassReport


def part_activations(graph: Graph) -> PassReport:
    """Write Relu and Clip behind products of integers as Max and Min where no Q does their work."""
    changed = 0
    for node in list(graph.nodes):
        dq = graph.producer(node.inputs[1]) if node.op in ("Gemm", "MatMul") else None
        if dq is None or dq.op != "DequantizeLinear":
            continue
        readers = graph.consumers(node.outputs[0])
        if len(readers) == 1 and readers[0][0].op == "Add":  # the two become one Gemm
            readers = graph.consumers(readers[0][0].outputs[0])
        if len(readers) != 1 or readers[0][0].op not in ("Relu", "Clip"):
            continue
        if not (_reads_integers(graph, node) and _is_saturation(graph, readers[0][0])):
            _as_max_and_min(graph, readers[0][0])
            changed += 1
    return PassReport(name="part_activations", changed=changed)


def _reads_integers(graph: Graph, node: Node) -> bool:
    """True where the activations of a product are integers, too: the engine makes one op of it."""
    maker = graph.producer(node.inputs[0])
    return maker is not None and maker.op == "DequantizeLinear"


def _is_saturation(graph: Graph, node: Node) -> bool:
    """True when the one reader is a Q that begins at zero: it does what Relu and Clip would."""
    readers = graph.consumers(node.outputs[0])
    if len(readers) != 1 or readers[0][0].op != "QuantizeLinear":
        return False
    zero_point = readers[0][0].inputs[2]
    if not isinstance(zero_point, Constant):
        return False
    lowest = int(ml_dtypes.iinfo(zero_point.dtype).min)
    return bool((array_of(zero_point).astype(np.int64) == lowest).all())


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
