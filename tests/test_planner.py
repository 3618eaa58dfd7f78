"""Which nodes and tensors become integers, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qpass.errors import ModelError, RecipeError
from qpass.graph import Graph
from qpass.targets import OpRule
from qpass.targets.specs import U8
from tests.planning import (
    FULL,
    MATRIX,
    OPENVINO,
    ORT,
    RANDOM,
    captured,
    cnn,
    decision,
    planned,
    resident,
    two_kinds,
    why,
)
from tests.small_models import from_text, transformer

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


# ------------------------------------------------------------------ precision and policy


def test_bits_choose_the_storage() -> None:
    plan = planned(cnn("c = Conv (x, w) y = Sigmoid (c)"), precision="w4a16", low_bit_edges=True)
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


@pytest.mark.parametrize(
    ("precision", "ends"),
    [("w8a8", (-127, 127)), ("w7a8", (-63, 63)), ("w4a8", (-8, 7)), ("w3a8", (-4, 3))],
)
def test_few_bits_use_every_integer(precision: str, ends: tuple[int, int]) -> None:
    weights = planned(transformer(), precision=precision, low_bit_edges=True).weights()
    found = {(d.spec.qmin, d.spec.qmax) for d in weights if d.kind == "weight"}
    assert found == {ends}
