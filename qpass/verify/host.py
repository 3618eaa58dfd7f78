"""What this machine's CPU can show about a file that is for another kind of CPU."""

from __future__ import annotations

from pathlib import Path

from qpass.modelfile import read_metadata
from qpass.plan import Plan
from qpass.saturation import exact_entries, saturates
from qpass.targets import TARGETS, Target
from qpass.verify.engines import KEEP_SIGNED, EngineName
from qpass.verify.openvino_trial import has_narrow_activations
from qpass.verify.session import (
    ACCURACY_LEVEL,
    NARROW,
    TARGET_KEY,
    entries_for,
    recorded_entries,
)


def config_for(plan: Plan, target: Target, engine: EngineName, level: int) -> dict[str, str]:
    """Return what an engine is given to verify a result: entries of sessions, or properties.

    Args:
        plan: of the result.
        target: that it is for.
        engine: that looks at it.
        level: accuracy level of onnxruntime's MatMulNBits.
    """
    host = session_entries(target) if engine == "ort" else {}
    return {**host, **entries_for(plan, engine, level)}


def config_of(path: Path, engine: EngineName) -> dict[str, str]:
    """Return the same for a file, by its metadata; nothing for a file of another maker.

    The metadata know one engine. Another one has its own way to take activations of 4 bits.
    """
    metadata = read_metadata(path)
    target = TARGETS.get(metadata.get(TARGET_KEY, ""))
    if target is None:
        return recorded_entries(metadata, engine)
    host = session_entries(target) if engine == "ort" else {}
    if engine == target.own_engine:
        return {**host, **recorded_entries(metadata, engine)}
    # Kernels of onnxruntime that stand in for those of another engine compute in float32.
    level = {ACCURACY_LEVEL: "0"} if engine == "ort" else {}
    narrow = NARROW[engine] if has_narrow_activations(path) else {}
    return {**host, **level, **narrow}


def session_entries(target: Target) -> dict[str, str]:
    """Return the session entries of onnxruntime that a file of `target` is verified with.

    A dialect of other hardware is only computed here, so its types stay what they are. A dialect
    that needs VNNI is computed as a CPU with VNNI does it.
    """
    if target.needs_vnni:
        return dict(exact_entries())
    if target.engine != "none":
        return {}
    # onnxruntime has no kernel for signed activations times the unsigned weights of exact products.
    exact = {} if target.activation.storage.signed else exact_entries()
    return {**exact, **KEEP_SIGNED}


def shows_speed(target: Target) -> bool:
    """Return True when times measured here say something about the CPUs that `target` is for."""
    return not (target.needs_vnni and saturates())


def saturation_note(target: Target) -> str:
    """Return what to tell a user whose CPU computes files of `target` wrongly; "" elsewhere."""
    if shows_speed(target):
        return ""
    verified = (
        "The file was verified with session.x64quantprecision=1, which is exact as VNNI is, but "
        "slower; set it wherever the file runs on such a CPU."
        if target.engine == "onnxruntime"
        else "What OpenVINO shows here, in accuracy and speed, is not what a CPU with VNNI shows."
    )
    return (
        "THIS CPU HAS NO VNNI: its kernels saturate sums of 8-bit products. "
        f"{verified} For CPUs like this one compile with --target {target.name}-avx2."
    )
