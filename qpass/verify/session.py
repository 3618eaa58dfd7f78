"""The settings of an engine that decide what a file computes; they go into its metadata.

MatMulNBits, the kernel for integer weights behind float activations, has an accuracy level. At 4,
onnxruntime's own choice, activations are rounded to 8 bits block by block inside of the kernel
(measured on 1.31.1: 43 to 49 dB against levels 0 to 3, which compute in float32). The graph
cannot say which is meant, so the file's metadata do, under `SESSION_KEY`: verification uses them,
and so should whoever loads the file.

Others keep onnxruntime 1.31.1 from refusing files with activations below 8 bits: its fusion of
Clip with the Q behind calls their zero points an error, and from 8-bit weights behind them it makes
integer kernels that it then finds invalid. No CPU kernel has such integers: they run in float.

OpenVINO 2026.4.1 corrupts the memory of its process where it pushes activations of 4 bits through a
Concat, so its integer transformations are off for such files (`openvino_trial` says more). The
property is an internal one of its CPU plugin, for there is no public one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from qpass.plan import Plan
from qpass.targets import TARGETS
from qpass.verify.engines import EngineName

SESSION_KEY: Final = "qpass.session"
TARGET_KEY: Final = "qpass.target"
NBITS: Final = "MatMulNBits"
ACCURACY_LEVEL: Final = "session.qdq_matmulnbits_accuracy_level"
IN_FLOAT: Final = "session.disable_quant_qdq"
NARROW_IN_FLOAT: Final[Mapping[str, str]] = {
    "optimization.disable_specified_optimizers": "ClipQuantRewrite",
    IN_FLOAT: "1",
}
INTEGER_PASSES: Final = "LP_TRANSFORMS_MODE"
NARROW_IN_OPENVINO: Final[Mapping[str, str]] = {INTEGER_PASSES: "NO"}
# What an engine needs for activations below 8 bits; "reference" runs every op as it is written.
NARROW: Final[Mapping[str, Mapping[str, str]]] = {
    "ort": NARROW_IN_FLOAT,
    "openvino": NARROW_IN_OPENVINO,
    "reference": {},
}


def entries_for(plan: Plan, engine: EngineName, accuracy_level: int) -> dict[str, str]:
    """Return what a result needs: session entries of onnxruntime, or properties of OpenVINO.

    Most need none. MatMulNBits computes in float32 where it stands in for another engine's kernel.
    """
    entries = {}
    if engine == "ort" and any(node.precision == "weights" for node in plan.nodes):
        entries[ACCURACY_LEVEL] = str(accuracy_level if is_for_onnxruntime(plan) else 0)
    return {**entries, **(NARROW[engine] if plan.has_narrow_activations else {})}


def is_for_onnxruntime(plan: Plan) -> bool:
    """True when the kernel for weights behind float activations is onnxruntime's."""
    rules = TARGETS[plan.target].weight_rules if plan.target in TARGETS else ()
    return any(rule.kernel == NBITS for rule in rules)


def loading_note(plan: Plan, engine: EngineName, accuracy_level: int) -> list[str]:
    """Say how a result is to be loaded, where that is not as any other file.

    What a file for OpenVINO needs in onnxruntime is said as well: its metadata know one engine.
    """
    own = entries_for(plan, engine, accuracy_level)
    if not is_for_onnxruntime(plan):
        own.pop(ACCURACY_LEVEL, None)
    notes = []
    if own:
        how = "session entries of onnxruntime" if engine == "ort" else "properties of OpenVINO"
        record = f"which its metadata record as {SESSION_KEY}"
        notes.append(f"load it with these {how}, {record}: {_pairs(own)}")
    if engine == "openvino":
        other = entries_for(plan, "ort", accuracy_level)
        other.pop(ACCURACY_LEVEL, None)  # without it the file loads, too
        if other:
            notes.append(f"onnxruntime loads it with these session entries only: {_pairs(other)}")
    return notes


def _pairs(entries: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(entries.items()))


def recorded_entries(metadata: Mapping[str, str], engine: str = "") -> dict[str, str]:
    """Return the entries that the metadata of a file ask for; none for files of other makers.

    With an `engine`, none for files that were made for the other one.
    """
    made_for = TARGETS.get(metadata.get(TARGET_KEY, ""))
    if engine and made_for is not None and made_for.own_engine != engine:
        return {}
    try:
        entries: Any = json.loads(metadata.get(SESSION_KEY, "{}"))
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in entries.items()} if isinstance(entries, dict) else {}
