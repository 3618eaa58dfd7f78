"""Check that what the user wants speaks of the model, and that a plan quantizes anything of it."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from qpass.embeddings import is_lookup
from qpass.errors import ModelError, RecipeError
from qpass.graph import LINEAR_OPS, Constant, Graph
from qpass.plan import Plan
from qpass.program import Policy
from qpass.targets.schema import Target


def check_policy(graph: Graph, policy: Policy, target: Target) -> None:
    """Raise RecipeError for the first wish that concerns nothing in `graph`, or no target like it.

    A target that wants every op between Q and DQ runs nothing with float activations.
    """
    _check_weights_alone(policy, target)
    _check_kept(graph, policy)
    _check_bits(graph, policy)
    tensors = graph.tensors()
    for name in policy.ranges:
        if name not in tensors:
            raise RecipeError(f"the plan pins the range of {name}, which is not in the model")
        if isinstance(tensors[name], Constant):
            raise RecipeError(
                f"the plan pins the range of {name}, which is a constant",
                fix="the range of a constant is that of its values; set it to null",
            )


def _check_weights_alone(policy: Policy, target: Target) -> None:
    given = [policy.precision, *policy.node_bits.values()]
    alone = next((precision for precision in given if precision.activation is None), None)
    if alone is not None and target.scheme == "full":
        raise RecipeError(
            f"{alone} leaves activations in float, and target {target.name} runs integers alone: "
            "everything would fall back to the CPU",
            fix=f"choose integer activations, such as w{max(alone.weight, target.narrowest)}a8, or "
            "for weights alone a target that takes them: ort-x86, ort-arm, openvino, tensorrt",
        )
    if policy.asymmetric_weights and any(not rule.zero_points for rule in target.weight_rules):
        raise RecipeError(
            f"target {target.name} takes no zero points of weights",
            fix="leave --asymmetric-weights out",
        )


def _check_kept(graph: Graph, policy: Policy) -> None:
    names = [node.name for node in graph.nodes]
    for pattern in policy.keep:
        single = replace(policy, keep=(pattern,), float_nodes={})
        if not any(single.reason_to_keep(name) for name in names):
            raise RecipeError(
                f"--keep {pattern!r} matches no node",
                fix="`qpass plan` lists the node names; patterns use *, ? and [ ]",
            )


def _check_bits(graph: Graph, policy: Policy) -> None:
    linear = [node.name for node in graph.nodes if node.op in LINEAR_OPS or is_lookup(node)]
    known = set(linear)
    for pattern, precision in policy.node_bits.items():
        if pattern in known or any(fnmatchcase(name, pattern) for name in linear):
            continue
        near = get_close_matches(pattern, linear, 3)
        raise RecipeError(
            f"{pattern!r}, which is to be {precision}, matches no Conv, Gemm, MatMul or embedding",
            fix=f"did you mean {', '.join(near)}?" if near else "`qpass plan` lists the nodes",
        )


def check_result(plan: Plan, target: Target) -> None:
    """Raise ModelError for a plan that quantizes nothing."""
    if any(d.kind != "constant" for d in plan.decisions):
        return
    reasons = sorted({n.because for n in plan.nodes if target.rule_for(n.op)})
    raise ModelError(
        f"no op of the model can be quantized for target {target.name}",
        where="; ".join(reasons[:5]) or "the model has no Conv, Gemm or MatMul with weights",
        fix="`qpass plan` shows the reason for each node",
    )
