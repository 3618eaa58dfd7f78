"""onnxruntime's CPU provider on ARM64: S8 activations and weights.

The selectors are those of `ort_x86`, so the rules are the same in another type: on ARM the kernels
for S8 times S8 are the fast ones, and no transformer turns S8 into U8.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Final

from qpass.qparams import TensorSpec
from qpass.targets import ort_x86
from qpass.targets.ort_x86 import SELECTORS
from qpass.targets.schema import OpRule, Target
from qpass.targets.specs import S8

GUIDE: Final = (
    "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html "
    "(data type selection; onnxruntime 1.23)"
)
# Ranges that begin at zero (behind Relu) get zero point -128: a Q that does the work of the Relu.
S8_TO_U8: Final = (
    "https://github.com/microsoft/onnxruntime/blob/v1.23.0/onnxruntime/core/optimizer/"
    "qdq_transformer/qdq_s8_to_u8.cc (not applied where S8 is allowed, as on ARM64)"
)


def _signed(spec: TensorSpec | None) -> TensorSpec | None:
    return None if spec is None else S8


def _on_arm(rule: OpRule) -> OpRule:
    """Return a rule of x86-64 in S8; what was measured there says nothing here."""
    selector = rule.source.partition(";")[0]
    return replace(
        rule,
        activation=_signed(rule.activation),
        lhs=_signed(rule.lhs),
        rhs=_signed(rule.rhs),
        source=f"{selector}; S8S8 on ARM64: {GUIDE}",
    )


TARGET: Final = Target(
    name="ort-arm",
    title="onnxruntime CPU, ARM64 with dot product instructions",
    # The same file runs on x86-64, but there S8 activations fall back to float.
    engine="onnxruntime" if platform.machine().lower() in ("aarch64", "arm64") else "none",
    opset=21,
    rules=tuple(_on_arm(rule) for rule in ort_x86.RULES),
    bias="int32",
    activation=S8,
    weight_rules=ort_x86.WEIGHT_RULES,
    matmul_bias_rank=3,
    zero_points_below=5,
    sum_before_norm=True,
    sources=(SELECTORS, S8_TO_U8, GUIDE),
    notes=(
        "Taken from documentation and source; it is verified in the engine only where qpass runs "
        "on ARM64.",
        "On x86-64 this dialect is slow: S8 activations with several readers run in float there.",
    ),
)
