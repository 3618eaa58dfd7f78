"""The session settings of onnxruntime that decide what a file computes; they go into its metadata.

MatMulNBits, the kernel for integer weights behind float activations, has an accuracy level. At 4,
onnxruntime's own choice, activations are rounded to 8 bits block by block inside of the kernel
(measured on 1.31.1: 43 to 49 dB against levels 0 to 3, which compute in float32). The graph
cannot say which is meant, so the file's metadata do, under `SESSION_KEY`: verification uses them,
and so should whoever loads the file.

Others keep onnxruntime 1.31.1 from refusing files with activations below 8 bits: its fusion of
Clip with the Q behind calls their zero points an error, and from 8-bit weights behind them it makes
integer kernels that it then finds invalid. No CPU kernel has such integers: they run in float.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from qpass.plan import Plan
from qpass.targets import Target

SESSION_KEY: Final = "qpass.session"
ACCURACY_LEVEL: Final = "session.qdq_matmulnbits_accuracy_level"
IN_FLOAT: Final = "session.disable_quant_qdq"
NARROW_IN_FLOAT: Final[Mapping[str, str]] = {
    "optimization.disable_specified_optimizers": "ClipQuantRewrite",
    IN_FLOAT: "1",
}
BYTE: Final = 8


def entries_for(plan: Plan, target: Target, accuracy_level: int) -> dict[str, str]:
    """Return the entries that a result needs in onnxruntime; most need none."""
    if target.engine == "openvino":
        return {}
    entries = {}
    if any(node.precision == "weights" for node in plan.nodes):
        entries[ACCURACY_LEVEL] = str(accuracy_level)
    if any(decision.spec.storage.bits < BYTE for decision in plan.activations()):
        entries |= NARROW_IN_FLOAT
    return entries


def recorded_entries(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that the metadata of a file ask for; none for files of other makers."""
    try:
        entries: Any = json.loads(metadata.get(SESSION_KEY, "{}"))
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in entries.items()} if isinstance(entries, dict) else {}
