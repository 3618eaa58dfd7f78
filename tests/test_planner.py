"""What the planner decides, and why: on small graphs, with small targets of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import ModelError, RecipeError
from qpass.graph import Graph
from qpass.passes.insert_qdq import insert_qdq
from qpass.plan import Decision, Plan, read_plan
from qpass.planner import plan as make_plan
from qpass.qparams import choose_qparams
from qpass.targets import TARGETS, OpRule, Target
from qpass.targets.specs import S8_SYMMETRIC, S8_WEIGHT, U8
from tests.small_models import from_text, policy_of, residual_cnn, transformer
from tests.strategies import graphs

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


# ------------------------------------------------------------------ regions


def test_a_convolution_makes_its_output_resident_behind_the_activation() -> None:
    plan = planned(cnn("c = Conv (x, w) r = Relu (c) y = Sigmoid (r)"))
    assert resident(plan) == {"r"}
    assert why(plan, "c")[0] == "integer"
    assert why(plan, "r") == ("passthrough", "absorbed by the Q behind node_c")
    assert [(e.node, e.index) for e in decision(plan, "x").edges or ()] == [("node_c", 0)]


def test_an_activation_with_two_readers_is_absorbed() -> None:
    plan = planned(cnn("c = Conv (x, w) r = Relu (c) d = Conv (r, v) y = Add (d, r)"))
    assert "r" in resident(plan)
    assert "c" not in resident(plan)


def test_an_activation_beside_another_reader_is_not_absorbed() -> None:
    plan = planned(cnn("c = Conv (x, w) r = Relu (c) s = Sigmoid (c) y = Mul (r, s)"))
    assert resident(plan) == {"c"}
    assert why(plan, "r")[0] == "float"


def test_a_graph_output_is_not_hidden_in_an_absorbed_activation() -> None:
    graph = cnn("c = Conv (x, w) y = Relu (c)", outputs="float[1,16,8,8] y, float[1,16,8,8] c")
    assert resident(planned(graph)) == {"c"}


def test_a_tensor_that_a_body_reads_is_not_hidden_in_an_absorbed_activation() -> None:
    assert resident(planned(captured())) == {"c"}


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


@pytest.mark.parametrize(
    ("clip", "absorbed"),
    [
        ("Clip (c, low, high)", True),
        ("Clip (c, low)", True),
        ("Clip (c)", True),
        ('Clip (c, "", high)', True),
        ("Clip (c, above, high)", False),  # more than saturation at the ends of a range with zero
        ("Clip (c, below, below)", False),
        ("Clip (c, x0, high)", False),  # a bound that is computed
    ],
)
def test_clip_is_absorbed_where_a_range_can_do_its_work(clip: str, absorbed: bool) -> None:
    bounds = {"low": -1.0, "high": 6.0, "above": 0.5, "below": -0.5}
    constants = {k: np.float32(v) for k, v in bounds.items()}
    clip = clip.replace('""', "")
    body = f"x0 = ReduceMax <keepdims = 0> (x) c = Conv (x, w) r = {clip} y = Sigmoid (r)"
    assert resident(planned(cnn(body, **constants))) == ({"r"} if absorbed else {"c"})


def test_followers_join_between_integers_and_are_pruned_in_front_of_float() -> None:
    body = """
        a = Conv (x, w) d = Conv (a, v)
        s = Add (a, d) r = Relu (s) p = MaxPool <kernel_shape = [1, 1]> (r) e = Conv (p, w)
        q = Add (e, p) f = Relu (q) y = Sigmoid (f)
    """
    plan = planned(cnn(body))
    assert resident(plan) == {"a", "d", "r", "p", "e"}
    assert why(plan, "s")[0] == "integer"
    assert why(plan, "r")[0] == "passthrough"
    for node in ("q", "f"):  # what Add had absorbed is given back
        assert why(plan, node) == ("float", "nothing behind it runs in integers")


def test_a_follower_needs_all_inputs_in_integers() -> None:
    plan = planned(cnn("a = Conv (x, w) s = Sigmoid (x) t = Add (a, s) y = Conv (t, v)"))
    assert why(plan, "t") == ("float", "rule ort-x86/Add: input 1 (s) is float")


def test_float_output_leaves_the_residual_path_alone() -> None:
    plan = planned(transformer())
    assert resident(plan) == set()
    assert {n.name for n in plan.nodes if n.precision == "integer"} == {
        f"node_{name}" for name in ("qkv0", "scores", "context", "proj0", "up0", "down0")
    }


def test_all_outputs_of_split_are_resident_with_one_scale() -> None:
    body = """
        c = Conv (x, w) l, r = Split <axis = 1, num_outputs = 2> (c)
        m = Concat <axis = 1> (l, r) y = Conv (m, v)
    """
    plan = planned(cnn(body))
    assert {"c", "l", "r", "m"} <= resident(plan)
    assert {decision(plan, name).group for name in "clr"} == {"c"}
    assert decision(plan, "m").group is None


def test_unused_outputs_do_not_disturb() -> None:
    plan = planned(cnn("c = Conv (x, w) y = Sigmoid (x) u = Conv (c, v)"))
    assert {d.tensor for d in plan.activations()} == {"x", "c", "u"}


# ------------------------------------------------------------------ linear ops and weights


@pytest.mark.parametrize(("transposed", "axis"), [(0, 1), (1, 0)])
def test_gemm_weights_have_a_scale_per_output_channel(transposed: int, axis: int) -> None:
    graph = from_text(
        f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,16] x) => (float[2,16] y) {{ y = Gemm <transB = {transposed}> (x, w) }}
        """,
        w=MATRIX,
    )
    assert decision(planned(graph), "w").spec.axis == axis


def linear(op: str, **constants: Any) -> Graph:
    head = '<ir_version: 10, opset_import: ["": 21]>'
    text = f"{head} g (float[4,2,16] x) => (float[4,2,16] y) {{{op}}}"
    return from_text(text, **{k: np.asarray(v) for k, v in constants.items()})


def test_matmul_weights_of_rank_3_have_one_scale() -> None:
    graph = linear("y = MatMul (x, w)", w=np.stack([MATRIX] * 4))
    spec = decision(planned(graph), "w").spec
    assert (spec.granularity, spec.axis) == ("per_tensor", None)
    assert decision(planned(linear("y = MatMul (x, w)", w=MATRIX)), "w").spec.axis == 1


def test_per_channel_matmul_can_be_switched_off() -> None:
    graph = linear("y = MatMul (x, w)", w=MATRIX)
    plan = planned(graph, replace(ORT, per_channel_matmul=False))
    assert decision(plan, "w").spec.granularity == "per_tensor"


def test_shared_weights_are_one_decision() -> None:
    graph = from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,32] x) => (float[2,32] y)
        {
            a = MatMul (x, w)
            y = MatMul (a, w)
        }
        """,
        w=RANDOM.random((32, 32), np.float32),
    )
    (weight,) = planned(graph).weights()
    assert [e.node for e in weight.edges or ()] == ["node_a", "node_y"]


def test_weights_shared_along_two_axes_are_two_decisions() -> None:
    graph = from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,32] x) => (float[2,32] y)
        {
            a = Gemm <transB = 1> (x, w)
            y = Gemm (a, w)
        }
        """,
        w=RANDOM.random((32, 32), np.float32),
    )
    assert {d.key: d.spec.axis for d in planned(graph).weights()} == {"w": 0, "w#1": 1}


REFUSED = {
    "beta": ("y = Gemm <beta = 0.5> (x, w, b)", "alpha, beta"),
    "alpha": ("y = Gemm <alpha = 2.0> (x, w)", "alpha, beta"),
    "transA": ("y = Gemm <transA = 1> (x, w)", "alpha, beta"),
    "nan": ("y = Gemm (x, bad)", "NaN or infinity"),
    "left": ("y = Gemm (w, x)", "left operand"),
    "variable": ("y = Gemm (x, x)", "not constant"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_linear_ops_that_stay_float_say_why(case: str) -> None:
    body, reason = REFUSED[case]
    values = {"w": MATRIX, "b": np.ones(16, np.float32), "bad": np.full((16, 16), np.nan)}
    constants = {
        k: v.astype(np.float32) for k, v in values.items() if f"{k})" in body or f"{k}," in body
    }
    graph = from_text(
        f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[16,16] x) => (float[16,16] y) {{ {body} }}
        """,
        **constants,
    )
    with pytest.raises(ModelError, match="no op of the model") as caught:
        planned(graph)
    assert reason in str(caught.value)


def test_a_bias_free_gemm_may_have_any_beta() -> None:
    graph = from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[16,16] x) => (float[16,16] y) { y = Gemm <beta = 0.5> (x, w) }
        """,
        w=MATRIX,
    )
    assert why(planned(graph), "y")[0] == "integer"


def test_few_channels_stay_float() -> None:
    target = replace(
        ORT,
        rules=tuple(replace(r, min_channels=17 if r.role == "linear" else 0) for r in ORT.rules),
    )
    with pytest.raises(ModelError, match="fewer than 17 channels"):
        planned(cnn("y = Conv (x, w)"), target)


def test_the_default_of_an_attribute_counts() -> None:
    body = "c = Conv (x, w) r = Resize{} (c, , s) y = Conv (r, v)"
    sizes = {"s": np.ones(4, np.float32)}
    assert "r" in resident(planned(cnn(body.format(""), **sizes)))
    plan = planned(cnn(body.format(' <mode = "linear">'), **sizes))
    assert why(plan, "r") == ("float", "rule ort-x86/Resize: mode is 'linear'")


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


TWO_KINDS = """
    c = Conv (x, w) n = Reshape (c, s)
    t = Transpose <perm = [0, 1, 3, 2]> (n) m = MatMul (t, n) d = Conv (c, v) y = Add (d, m)
"""


def two_kinds() -> Graph:
    """A convolution's output is read by a convolution (U8) and, moved, by a product (S8)."""
    return cnn(TWO_KINDS, s=np.array([1, 16, 8, 8]))


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


# ------------------------------------------------------------------ the full scheme


def test_full_scheme_takes_inputs_and_outputs() -> None:
    plan = planned(cnn("a = Relu (x) c = Conv (a, w) y = Add (c, x)"), FULL)
    assert resident(plan) == {"x", "a", "c", "y"}


def test_full_scheme_does_not_part_a_convolution_from_its_activation() -> None:
    relu = OpRule(ops=frozenset({"Relu"}), role="follow", source="test", activation=U8)
    target = replace(FULL, rules=(*FULL.rules, relu))
    plan = planned(cnn("c = Conv (x, w) r = Relu (c) s = Relu (r) y = Conv (s, v)"), target)
    assert resident(plan) == {"x", "r", "s", "y"}
    assert why(plan, "r") == ("passthrough", "absorbed by the Q behind node_c")
    assert why(plan, "s")[0] == "integer"


def test_full_scheme_skips_ops_without_a_rule() -> None:
    plan = planned(cnn("c = Conv (x, w) t = Tanh (c) y = Conv (t, v)"), FULL)
    assert resident(plan) == {"x", "c", "t", "y"}
    assert why(plan, "t") == ("float", "target full has no integer Tanh")


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


# ------------------------------------------------------------------ precision and policy


def test_bits_choose_the_storage() -> None:
    plan = planned(cnn("c = Conv (x, w) y = Sigmoid (c)"), precision="w4a16")
    assert decision(plan, "w").spec.storage.name == "int4"
    assert decision(plan, "x").spec.storage.name == "uint16"


def test_weights_only() -> None:
    plan = planned(cnn("c = Conv (x, w) r = Relu (c) y = Add (r, x)"), precision="w4")
    assert [d.tensor for d in plan.decisions] == ["w"]
    assert why(plan, "r")[1] == "target ort-x86 has no integer Relu"
    assert why(plan, "y")[1] == "weights only: activations stay float"


def test_dynamic_activations_have_no_pair_in_front_of_matmul() -> None:
    """make_dynamic rewrites exactly the MatMuls that the plan leaves without one."""
    plan = planned(transformer(), activations="dynamic")
    assert {d.tensor for d in plan.activations()} == {"q", "k", "p", "v"}  # no weights: static
    assert why(plan, "up0") == ("integer", "rule ort-x86/MatMul: range of the input at run time")
    narrow = planned(transformer(), activations="dynamic", precision="w4a8")
    assert "n2" in {d.tensor for d in narrow.activations()}  # MatMulInteger has no 4 bits


def test_kept_nodes_stay_float_with_the_users_reason() -> None:
    graph = cnn("c = Conv (x, w) r = Relu (c) d = Conv (r, v) y = Sigmoid (d)")
    plan = planned(graph, keep=("node_r",))
    assert "c" in resident(plan)
    assert "r" not in resident(plan)
    plan = planned(graph, keep=("node_[c]",))
    assert why(plan, "c") == ("float", "user: --keep node_[c]")
    assert why(planned(graph, float_nodes={"node_d": "slow"}), "d") == ("float", "slow")


def test_a_pattern_without_a_match_is_an_error() -> None:
    with pytest.raises(RecipeError, match="matches no node"):
        planned(cnn("y = Conv (x, w)"), keep=("conv*",))


@pytest.mark.parametrize(("name", "message"), [("gone", "not in the model"), ("w", "a constant")])
def test_a_pinned_range_needs_an_activation(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(cnn("y = Conv (x, w)"), ranges={name: (0.0, 1.0)})


def test_pinned_ranges_reach_the_decisions() -> None:
    plan = planned(cnn("y = Conv (x, w)"), ranges={"x": (-1.0, 2.0)})
    assert decision(plan, "x").pinned == (-1.0, 2.0)


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(ModelError, match="no Conv, Gemm or MatMul"):
        planned(cnn("y = Relu (x)"))


def test_keys_are_unique_even_when_a_tensor_looks_like_one() -> None:
    graph = two_kinds()
    graph.tensors()["d"].name = "n#1"
    keys = [d.key for d in planned(graph, OPENVINO).decisions]
    assert len(set(keys)) == len(keys)
    assert {"n", "n#1"} < set(keys)


# ------------------------------------------------------------------ the plan as a whole


def plan_or_none(graph: Graph, target: Target) -> Plan | None:
    try:
        return planned(graph, target)
    except ModelError:
        return None


def small_graphs() -> Iterator[Graph]:
    yield residual_cnn()
    yield transformer()
    yield two_kinds()
    yield captured()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_everything_has_a_because(name: str) -> None:
    for graph in small_graphs():
        plan = planned(graph, TARGETS[name])
        assert all(d.because for d in plan.decisions)
        assert all(n.because for n in plan.nodes)
        assert [n.name for n in plan.nodes] == [n.name for n in graph.nodes]


@given(graphs(), st.sampled_from(sorted(TARGETS)))
def test_plans_are_deterministic(graph: Graph, name: str) -> None:
    first, again = (plan_or_none(g, TARGETS[name]) for g in (graph, Graph(graph.to_model())))
    assert (first is None) == (again is None)
    if first is not None and again is not None:
        assert first.to_json() == again.to_json()
        assert all(d.because for d in first.decisions)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_plan_file_gives_the_same_plan_again(tmp_path: Path, name: str) -> None:
    for graph in small_graphs():
        plan = planned(
            graph, TARGETS[name], ranges={"x": (-1.0, 2.0)} if "x" in graph.tensors() else {}
        )
        path = tmp_path / "plan.json"
        path.write_text(plan.to_json())
        back = read_plan(path)
        assert (back.target, back.precision) == (name, "w8a8")
        assert back.node_names == {n.name for n in plan.nodes}
        again = planned(graph, TARGETS[name], float_nodes=back.float_nodes, ranges=back.ranges)
        assert again.decisions == plan.decisions
        assert [(n.precision, n.because) for n in again.nodes] == [
            (n.precision, n.because) for n in plan.nodes
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("[]", "schema 1"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 1, "nodes": [{"name": "n", "precision": "int8"}]}', "int8"),
        (
            '{"schema": 1, "nodes": [], "tensors": [{"tensor": "t", "range": [1]}]}',
            "damaged",
        ),
    ],
)
def test_bad_plan_files_are_the_users_mistake(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_plan(path)


def test_time_is_linear_in_the_number_of_nodes() -> None:
    """1,000 blocks of Conv, Relu, Conv, Add, Relu with one kernel: nothing may be quadratic."""
    nodes, last = [helper.make_node("Conv", ["x", "w"], ["stem"], name="stem")], "stem"
    for i in range(1_000):
        a, r, c, s, out = (f"{kind}{i}" for kind in ("a", "r", "c", "s", "o"))
        nodes += [
            helper.make_node("Conv", [last, "w"], [a], name=f"conv{i}"),
            helper.make_node("Relu", [a], [r], name=f"relu{i}"),
            helper.make_node("Conv", [r, "w"], [c], name=f"second{i}"),
            helper.make_node("Add", [c, last], [s], name=f"add{i}"),
            helper.make_node("Relu", [s], [out], name=f"last{i}"),
        ]
        last = out
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 32, 4, 4]) for n in ("x", last)
    ]
    kernel = numpy_helper.from_array(np.ones((32, 32, 1, 1), np.float32), "w")
    model = helper.make_model(
        helper.make_graph(nodes, "long", infos[:1], infos[1:], [kernel]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    graph = Graph(model)
    begin = time.process_time()
    plan = planned(graph)
    numbers = {
        d.key: choose_qparams(d.spec, -np.ones(32), np.ones(32))
        if d.spec.axis is not None
        else choose_qparams(d.spec, -1.0, 1.0)
        for d in plan.decisions
    }
    insert_qdq(graph, plan, numbers)
    seconds = time.process_time() - begin
    # The stem is one more, and nothing behind the last Add is integer.
    assert len(plan.integer_nodes()) == 1_000 * 3
    assert sum(n.op == "QuantizeLinear" for n in graph.nodes) == 1_000 * 3 + 1
    assert seconds < 2.5  # of the processor; 20,000 nodes may take 10
    onnx.checker.check_model(graph.to_model())


def test_the_specs_of_the_tables_are_not_changed_by_planning() -> None:
    planned(residual_cnn())
    assert S8_WEIGHT.axis == 0
