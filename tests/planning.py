"""Small graphs to plan, and questions to ask a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qpass.errors import ModelError
from qpass.graph import Graph
from qpass.plan import Decision, Plan
from qpass.planner import plan as make_plan
from qpass.targets import TARGETS, Target
from tests.small_models import from_text, policy_of

RANDOM = np.random.default_rng(1)
KERNEL = RANDOM.standard_normal((16, 16, 1, 1)).astype(np.float32)
MATRIX = RANDOM.standard_normal((16, 16)).astype(np.float32)

ORT, OPENVINO = TARGETS["ort-x86"], TARGETS["openvino"]
FULL = replace(ORT, name="full", scheme="full")


def cnn(body: str, outputs: str = "float[1,16,8,8] y", **constants: Any) -> Graph:
    """A graph of `body`, from x to y, with kernels w and v and a bias b."""
    text = (
        f'<ir_version: 10, opset_import: ["": 21]> g (float[1,16,8,8] x) => ({outputs}) {{{body}}}'
    )
    kernels = {"w": KERNEL, "v": KERNEL + 1, "b": np.ones(16, np.float32), **constants}
    return from_text(text, **{k: np.asarray(v) for k, v in kernels.items() if k in body})


def planned(graph: Graph, target: Target = ORT, precision: str = "w8a8", **options: Any) -> Plan:
    return make_plan(graph, target, policy_of(precision, **options))


def resident(plan: Plan) -> set[str]:
    return {d.tensor for d in plan.activations() if d.edges is None}


def decision(plan: Plan, key: str) -> Decision:
    return next(d for d in plan.decisions if d.key == key)


def why(plan: Plan, node: str) -> tuple[str, str]:
    return next((n.precision, n.because) for n in plan.nodes if n.name == f"node_{node}")


def captured() -> Graph:
    """Conv -> Relu, and an If whose body reads what is between them."""
    return from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (bool flag, float[1,16,8,8] x) => (float[1,16,8,8] y, float[1,16,8,8] z)
        {
            c = Conv (x, w)
            r = Relu (c)
            y = Sigmoid (r)
            z = If (flag) <
                then_branch = yes () => (float[1,16,8,8] t) { t = Neg (c) },
                else_branch = no () => (float[1,16,8,8] e) { e = Identity (x) }
            >
        }
        """,
        w=KERNEL,
    )


TWO_KINDS = """
    c = Conv (x, w) n = Reshape (c, s)
    t = Transpose <perm = [0, 1, 3, 2]> (n) m = MatMul (t, n) d = Conv (c, v) y = Add (d, m)
"""


def two_kinds() -> Graph:
    """A convolution's output is read by a convolution (U8) and, moved, by a product (S8)."""
    return cnn(TWO_KINDS, s=np.array([1, 16, 8, 8]))


def plan_or_none(graph: Graph, target: Target) -> Plan | None:
    try:
        return planned(graph, target)
    except ModelError:
        return None
