"""Which rule of a target covers a node, and which of its tensors that concerns: pure questions."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from qpass.graph import Constant, Node, Tensor, array_of
from qpass.program import Policy, Precision
from qpass.targets.schema import OpRule, Target

DYNAMIC_BITS: Final = 8  # DynamicQuantizeLinear and MatMulInteger know no other width
NOT_FINITE: Final = "its weight holds NaN or infinity"  # so do tables of embeddings
# The value of an attribute that is not written.
DEFAULTS: Final[dict[tuple[str, str], int | str]] = {("Resize", "mode"): "nearest"}


def match_rule(node: Node, target: Target, policy: Policy) -> tuple[OpRule | None, str]:
    """Return the rule that may apply to `node`, or None and the reason why none does."""
    kept = policy.reason_to_keep(node.name)
    if kept is not None:
        return None, kept
    rules = [rule for rule in target.rules if node.op in rule.ops]
    if node.domain not in (None, "", "ai.onnx") or not rules:
        return None, f"target {target.name} has no integer {node.op}"
    reason = ""
    for rule in rules:
        reason = _wrong_attributes(node, rule)
        if not reason and rule.role == "linear":
            reason = _linear_obstacle(node, rule, policy)
        if not reason:
            return rule, ""
    return None, f"rule {target.name}/{node.op}: {reason}"


def _wrong_attributes(node: Node, rule: OpRule) -> str:
    found = {key: node.attrs.get(key, DEFAULTS.get((node.op, key))) for key, _ in rule.attributes}
    wrong = [f"{key} is {found[key]!r}" for key, value in rule.attributes if found[key] != value]
    return ", ".join(wrong)


def _linear_obstacle(node: Node, rule: OpRule, policy: Policy) -> str:
    data, weight = node.inputs[0], node.inputs[1]
    if not (is_float32(data) and is_float32(weight)):
        other = weight if is_float32(data) else data
        return f"computes in {other.dtype}, not in float32"
    if isinstance(data, Constant):
        return "its left operand is a constant"
    if not isinstance(weight, Constant):
        if rule.constant_weight:
            return "the weights are not constant"
        if policy.precision.activation is None:
            return "there are no weights to quantize alone"
        return ""
    if len(weight.shape) < 2:
        return "its weight is a vector"
    if not all(weight.shape):
        return "its weight is empty"
    if min(weight.shape[:2]) < rule.min_channels:
        return f"fewer than {rule.min_channels} channels: no gain in integers"
    if node.op == "Gemm":
        factors = (node.attrs.get("alpha", 1.0), node.attrs.get("transA", 0))
        scaled_bias = len(node.inputs) > 2 and node.attrs.get("beta", 1.0) != 1.0
        if factors != (1.0, 0) or scaled_bias:
            return "Gemm with alpha, beta or transA"
    if not np.isfinite(array_of(weight)).all():
        return NOT_FINITE
    return ""


def weight_axis(node: Node, rank: int) -> int:
    """Return the axis of the output channels in the weight of a linear op (ONNX operators)."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return rank - 1


def is_dynamic(node: Node, precision: Precision, policy: Policy) -> bool:
    """True when the range of the input is found at run time: a MatMul with a matrix of weights.

    `precision` is that of the node.
    """
    weight = node.inputs[1]
    return (
        policy.activations == "dynamic"
        and node.op == "MatMul"
        and isinstance(weight, Constant)
        and len(weight.shape) == 2
        and (precision.weight, precision.activation) == (DYNAMIC_BITS, DYNAMIC_BITS)
    )


def channel_axis(node: Node) -> int:
    """Return the axis of the channels in the activations of a linear op."""
    return 1 if node.op in ("Conv", "ConvTranspose") else -1


def is_float32(tensor: Tensor) -> bool:
    """True when the dtype of `tensor` is float32, or unknown."""
    return tensor.dtype is None or tensor.dtype == np.float32


def data_inputs(node: Node, rule: OpRule) -> list[tuple[int, Tensor]]:
    """Return the inputs that carry data; movers have shapes and indices behind the first."""
    inputs = [(i, t) for i, t in enumerate(node.inputs) if t.name]
    return inputs[:1] if rule.role == "passthrough" else inputs


def data_outputs(node: Node) -> list[Tensor]:
    """Return the outputs that carry data: all of Split, the first of everything else."""
    return [t for t in node.outputs if t.name] if node.op == "Split" else [node.outputs[0]]


def is_absorbable(node: Node) -> bool:
    """True when a Q can do the work of `node`: Relu, or Clip at constants around zero.

    Ranges always hold zero, so a Clip to [1, 6] is more than saturation at the ends of a range.
    """
    if node.op != "Clip":
        return True
    ends = clip_ends(node)
    return ends is not None and ends[0] <= 0.0 <= ends[1]


def clip_ends(node: Node) -> tuple[float, float] | None:
    """Return where a Clip ends, infinite where it does not; None if that is not constant."""
    ends = [-math.inf, math.inf]
    for place, tensor in enumerate(node.inputs[1:3]):
        if tensor.name:
            if not isinstance(tensor, Constant):
                return None
            ends[place] = float(array_of(tensor))
    return ends[0], ends[1]
