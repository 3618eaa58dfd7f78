"""Targets by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Final

from qpass.errors import RecipeError
from qpass.targets import avx2, openvino, ort_arm, ort_x86, qnn_htp, tensorrt, vitis_xint8
from qpass.targets.schema import OpRule, Target

__all__ = ["TARGETS", "OpRule", "Target", "load_target"]

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        ort_x86.TARGET,
        avx2.ORT,
        ort_arm.TARGET,
        openvino.TARGET,
        avx2.OPENVINO,
        tensorrt.TARGET,
        qnn_htp.TARGET,
        vitis_xint8.TARGET,
    )
}


def load_target(name: str) -> Target:
    """Return the target called `name`; RecipeError when there is none."""
    try:
        return TARGETS[name]
    except KeyError:
        near = get_close_matches(name.lower(), TARGETS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(
            f"there is no target called {name!r}", fix=f"{hint}choose one of: {', '.join(TARGETS)}"
        ) from None
