"""Targets by name."""

from __future__ import annotations

from typing import Final

from qpass.errors import RecipeError
from qpass.targets import openvino, ort_arm, ort_x86, qnn_htp, tensorrt, vitis_xint8
from qpass.targets.schema import OpRule, Target

__all__ = ["TARGETS", "OpRule", "Target", "load_target"]

TARGETS: Final[dict[str, Target]] = {
    module.TARGET.name: module.TARGET
    for module in (ort_x86, ort_arm, openvino, tensorrt, qnn_htp, vitis_xint8)
}


def load_target(name: str) -> Target:
    """Return the target called `name`; RecipeError when there is none."""
    try:
        return TARGETS[name]
    except KeyError:
        raise RecipeError(
            f"there is no target called {name!r}", fix=f"choose one of: {', '.join(TARGETS)}"
        ) from None
