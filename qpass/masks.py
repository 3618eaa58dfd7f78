"""Find attention masks: large negative values that stand for "not this one", not for a signal.

A mask constant (-inf, -1e9, -1e4) is added to attention scores or chosen by Where before Softmax.
In a range it would take all steps of a scale; quantized itself it would end at the low end of the
scores, and what was masked would be seen again.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qpass.graph import Constant, Graph, Tensor, array_of

MASK_VALUE: Final = -1e4  # masks add this or less

# What comes out of these holds the mask if anything that goes in does.
CARRIERS: Final = frozenset({
    "Add", "Cast", "Concat", "Div", "Expand", "Gather", "Identity", "Mul", "Reshape", "Slice",
    "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip


def holds_mask(tensor: Tensor) -> bool:
    """True when `tensor` is a float32 constant with a value at or below `MASK_VALUE`."""
    if not isinstance(tensor, Constant) or tensor.dtype != np.float32:
        return False
    values = array_of(tensor)
    return bool((values <= MASK_VALUE).any())


def masked_tensors(graph: Graph) -> frozenset[str]:
    """Return the names of the tensors that carry mask values, through ops that pass them on."""
    masked: set[str] = set()
    for node in graph.nodes:
        if node.op not in CARRIERS:
            continue
        if any(t.name in masked or holds_mask(t) for t in node.inputs):
            masked |= {t.name for t in node.outputs if t.name}
    return frozenset(masked)
