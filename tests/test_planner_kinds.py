"""Which kind of integers a tensor becomes, and what must never become one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpass.errors import ModelError
from qpass.graph import Graph
from qpass.plan import Decision
from qpass.targets import TARGETS
from qpass.targets.specs import S8_SYMMETRIC, U8
from tests.planning import (
    KERNEL,
    MATRIX,
    OPENVINO,
    ORT,
    cnn,
    decision,
    plan_or_none,
    planned,
    two_kinds,
    why,
)
from tests.small_models import from_text, transformer
from tests.strategies import graphs

# ------------------------------------------------------------------ kinds of integers


def test_attention_operands_get_their_own_kinds() -> None:
    plan = planned(transformer(), OPENVINO)
    specs = {d.tensor: d.spec for d in plan.activations()}
    assert specs["q"] == specs["k"] == specs["v"] == S8_SYMMETRIC
    assert specs["p"] == U8  # from Softmax: its low end is zero


def test_operands_without_a_kind_of_their_own_are_like_activations() -> None:
    rules = tuple(
        replace(r, lhs=None, lhs_nonnegative=None, rhs=None) if "MatMul" in r.ops else r
        for r in OPENVINO.rules
    )
    plan = planned(transformer(), replace(OPENVINO, rules=rules))
    assert {d.spec for d in plan.activations()} == {U8}


def test_tied_tensors_have_one_kind_and_other_readers_a_pair_of_their_own() -> None:
    plan = planned(two_kinds(), OPENVINO)
    tied = [d for d in plan.activations() if d.group is not None]
    assert {d.tensor for d in tied} == {"c", "n", "t"}
    assert {d.spec for d in tied} == {U8}
    own = [d for d in plan.activations() if d.tensor in "nt" and d.edges is not None]
    assert {(d.key, d.spec) for d in own} == {("n#1", S8_SYMMETRIC), ("t#1", S8_SYMMETRIC)}


def test_a_resident_tensor_takes_the_kind_that_all_readers_want() -> None:
    body = "c = Conv (x, w) m = MatMul (c, c) y = Sigmoid (m)"
    plan = planned(cnn(body), OPENVINO)
    assert [(d.key, d.spec) for d in plan.activations() if d.tensor == "c"] == [("c", S8_SYMMETRIC)]


@given(graphs(), st.sampled_from(sorted(TARGETS)))
def test_ties_are_a_partition_with_one_kind_each(graph: Graph, name: str) -> None:
    plan = plan_or_none(graph, TARGETS[name])
    groups: dict[str, list[Decision]] = {}
    for found in plan.activations() if plan else ():
        if found.group is not None:
            assert found.edges is None
            groups.setdefault(found.group, []).append(found)
    for root, members in groups.items():
        assert root in {d.tensor for d in members}
        assert len(members) > 1
        assert len({d.tensor for d in members}) == len(members)
        assert len({d.spec for d in members}) == 1


def test_concat_can_be_tied_to_all_its_inputs() -> None:
    rules = tuple(replace(r, tie=True) if "Concat" in r.ops else r for r in ORT.rules)
    body = "a = Conv (x, w) d = Conv (x, v) m = Concat <axis = 1> (a, d) y = Conv (m, wide)"
    graph = cnn(body, wide=np.ones((16, 32, 1, 1), np.float32))
    plan = planned(graph, replace(ORT, rules=rules))
    assert {decision(plan, name).group for name in "adm"} == {"a"}


# ------------------------------------------------------------------ masks and other dtypes


MASKED = {
    "added": "m = Add (s, low)",
    "chosen": "m = Where (flag, s, low)",
    "computed": "f = Sub (one, keep) g = Mul (f, low1) m = Add (s, g)",
    "moved": "g = Reshape (low, shape) h = Expand (g, shape) m = Add (s, h)",
}


@pytest.mark.parametrize("value", [-np.inf, -1e4, -1e9])
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_masks_are_never_quantized(case: str, value: float, name: str) -> None:
    """Neither the constant nor the scores with the mask in them, whatever quantizes around them."""
    mask = np.where(np.arange(64).reshape(1, 1, 8, 8) % 3, 0.0, value).astype(np.float32)
    values = {
        "low": mask, "low1": np.float32(value), "one": np.float32(1), "flag": mask == 0,
        "keep": (mask == 0).astype(np.float32), "shape": np.array([1, 1, 8, 8]),
    }  # fmt: skip
    body = f"s = Conv (x, w) {MASKED[case]} p = Softmax (m) y = Conv (p, v)"
    constants = {k: v for k, v in values.items() if f"{k})" in body or f"{k}," in body}
    plan = planned(cnn(body, **constants), TARGETS[name])
    quantized = {d.tensor for d in plan.decisions}
    assert not quantized & {"m", "g", "h", "low", "low1"}
    assert why(plan, "m")[0] == why(plan, "p")[0] == "float"
    if TARGETS[name].scheme == "full":
        assert "holds an attention mask" in why(plan, "p")[1]


def test_a_masked_tensor_that_has_to_be_quantized_keeps_the_mask_out_of_its_range() -> None:
    low = np.where(np.arange(8) > 5, -1e9, 0.0).astype(np.float32)
    plan = planned(cnn("m = Add (x, low) y = Conv (m, w)", low=low))
    assert decision(plan, "m").mask_below == -1e4


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_integers_of_the_model_are_left_alone(name: str) -> None:
    graph = from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[1,16,8,8] x, int64[4] n) => (float[1,16,8,8] y, int64[4] k)
        {
            c = Conv (x, w)
            k = Add (n, one)
            j = Concat <axis = 0> (lead, tail)
            r = Reshape (c, j)
            y = Conv (r, v)
        }
        """,
        w=KERNEL,
        v=KERNEL + 1,
        one=np.array([1]),
        lead=np.array([1, 16]),
        tail=np.array([8, 8]),
    )
    plan = planned(graph, TARGETS[name])
    assert {d.tensor for d in plan.decisions} <= {"x", "c", "r", "y", "w", "v"}
    assert why(plan, "k")[0] == why(plan, "j")[0] == "float"


def test_float16_stays_float() -> None:
    graph = from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float16[2,16] x) => (float16[2,16] y) { y = MatMul (x, w) }
        """,
        w=MATRIX.astype(np.float16),
    )
    with pytest.raises(ModelError, match="float16"):
        planned(graph)


# ------------------------------------------------------------------ residual Add, one input only


TENSORRT = TARGETS["tensorrt"]


def test_only_the_skip_input_gets_q() -> None:
    plan = planned(cnn("r = Relu (x) c = Conv (r, w) s = Add (c, r) y = Relu (s)"), TENSORRT)
    edges = decision(plan, "r").edges or ()
    assert {(e.node, e.index) for e in edges} == {("node_c", 0), ("node_s", 1)}
    assert {d.tensor for d in plan.activations()} == {"r"}


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv (x, w) d = Conv (x, v) y = Add (c, d)",  # both computed
        "c = Conv (x, w) s = Sigmoid (x) t = Relu (c) y = Add (s, t)",  # none
        "c = Conv (x, w) y = Add (c, k)",  # a constant
    ],
)
def test_other_adds_stay_float(body: str) -> None:
    constants = {"k": np.ones((16, 1, 1), np.float32)} if "k)" in body else {}
    plan = planned(cnn(body, **constants), TENSORRT)
    assert why(plan, "y") == ("float", "rule tensorrt/Add: not a residual Add")
    assert {d.tensor for d in plan.activations()} == {"x"}
