"""x86-64 without VNNI (AVX2, early AVX-512): weights of 7 bits, so that no product saturates.

The kernels for u8 times s8 add pairs of products in int16 there; see `qpass.saturation`. With
weights in [-63, 63] every pair fits, and the same fast kernels are exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qpass.targets import openvino, ort_x86
from qpass.targets.schema import OpRule, Target, with_bits

WEIGHT_BITS: Final = 7
GUIDE: Final = (
    "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html "
    "(when and why to use reduce_range; onnxruntime 1.23)"
)
NOTE: Final = "Weights have 7 bits: pairs of products of 8-bit weights saturate without VNNI."


def _reduced(rule: OpRule) -> OpRule:
    """Return a rule with narrower weights; the rest is what the CPU with VNNI wants."""
    if rule.weight is None:
        return rule
    return replace(
        rule, weight=with_bits(rule.weight, WEIGHT_BITS), source=f"{rule.source}; {GUIDE}"
    )


def _without_vnni(target: Target, name: str, title: str) -> Target:
    return replace(
        target,
        name=name,
        title=title,
        rules=tuple(_reduced(rule) for rule in target.rules),
        needs_vnni=False,
        sources=(*target.sources, GUIDE),
        notes=(NOTE, *target.notes),
    )


ORT: Final = _without_vnni(
    ort_x86.TARGET, "ort-x86-avx2", "onnxruntime CPU, x86-64 without VNNI (AVX2)"
)
OPENVINO: Final = _without_vnni(
    openvino.TARGET, "openvino-avx2", "OpenVINO CPU, x86-64 without VNNI (AVX2)"
)
