"""Whether it matters how large a linear op's output is, beyond how close it is to the float one.

A Softmax turns the size of its input into the sharpness of its output, and a user who reads the
outputs of the graph may compare them with thresholds. A norm or a layer behind takes what size it
gets: its own correction brings it back.
"""

from __future__ import annotations

from typing import Final

from qpass.graph import Constant, Graph, Node

# Ops that hand the size of what they read on to what they make.
_HANDS_ON: Final = frozenset(
    {
        "Add", "DequantizeLinear", "Div", "Flatten", "Identity", "MatMul", "Mul", "QuantizeLinear",
        "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip


def scale_matters(graph: Graph, linear: Node) -> bool:
    """Return True when a Softmax or an output of `graph` gets the output of `linear` in its size.

    Args:
        graph: the float graph.
        linear: one of its linear ops.
    """
    waiting, seen = list(linear.outputs), set()
    while waiting:
        tensor = waiting.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        if graph.is_output(tensor):
            return True
        for node, _ in graph.consumers(tensor):
            if node.op == "Softmax":
                return True
            weighted = node.op == "MatMul" and any(isinstance(t, Constant) for t in node.inputs)
            if node.op in _HANDS_ON and not weighted:
                waiting.extend(node.outputs)
    return False
