"""Which linear ops are stem and head, and how many bits each op gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qpass.bits import bits_of_nodes, stem_and_head
from qpass.errors import RecipeError
from qpass.graph import Graph
from qpass.plan import Plan, read_plan
from qpass.program import Precision
from qpass.targets import TARGETS
from tests.planning import ORT, cnn, decision, planned
from tests.small_models import from_text, policy_of, residual_cnn, transformer

CHAIN = "a = Conv (x, w) r = Relu (a) m = Conv (r, w) c = Conv (m, w) y = Sigmoid (c)"
MATRICES = {f"w{i}": np.eye(8, dtype=np.float32) + i for i in range(4)}


def model(body: str, inputs: str, output: str = "float[2,8] y") -> Graph:
    text = f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({output}) {{{body}}}'
    return from_text(text, **{k: v for k, v in MATRICES.items() if k in body})


def bits(plan: Plan) -> dict[str, str]:
    return {n.name.removeprefix("node_"): n.bits for n in plan.nodes if n.bits}


def ends(graph: Graph) -> dict[str, str]:
    return {name.removeprefix("node_"): end for name, end in stem_and_head(graph).items()}


# ------------------------------------------------------------------ ends


def test_ends_of_a_chain() -> None:
    assert ends(cnn(CHAIN)) == {"a": "stem", "c": "head"}


def test_ends_of_a_residual_network() -> None:
    assert ends(residual_cnn()) == {"stem": "stem", "logits": "head"}


def test_every_input_has_its_stem_and_every_output_its_head() -> None:
    body = """
        a = MatMul (x, w0) b = MatMul (t, w1) s = Add (a, b) m = MatMul (s, w2)
        y = MatMul (m, w3) z = MatMul (m, w0)
    """
    graph = model(body, "float[2,8] x, float[2,8] t", "float[2,8] y, float[2,8] z")
    assert ends(graph) == {"a": "stem", "b": "stem", "y": "head", "z": "head"}


def test_a_skip_path_makes_no_stem() -> None:
    """The input reaches b without a layer, but a had a part in it."""
    body = "a = MatMul (x, w0) s = Add (x, a) b = MatMul (s, w1) y = MatMul (b, w2)"
    assert ends(model(body, "float[2,8] x")) == {"a": "stem", "y": "head"}


def test_an_output_on_the_way_makes_no_head() -> None:
    """Keys that are kept for the next token are an output, and read inside of the model."""
    body = "a = MatMul (x, w0) k = MatMul (a, w1) y = MatMul (k, w2)"
    graph = model(body, "float[2,8] x", "float[2,8] y, float[2,8] k")
    assert ends(graph) == {"a": "stem", "y": "head"}


def test_an_embedding_is_the_first_layer() -> None:
    body = "e = Gather (w0, x) a = MatMul (e, w1) b = MatMul (a, w2) y = MatMul (b, w3)"
    assert ends(model(body, "int64[2] x")) == {"y": "head"}


def test_products_of_activations_are_no_layers() -> None:
    assert ends(transformer()) == {"qkv0": "stem", "down0": "head"}


# ------------------------------------------------------------------ bits


@pytest.mark.parametrize(
    ("precision", "edge"),
    [("w8a8", "w8a8"), ("w4a8", "w8a8"), ("w4a4", "w8a8"), ("w8a4", "w8a8"), ("w4a16", "w8a16"),
     ("w3a8", "w8a8"), ("w7a8", "w8a8")],
)  # fmt: skip
def test_stem_and_head_have_8_bits(precision: str, edge: str) -> None:
    plan = planned(cnn(CHAIN), precision=precision)
    assert bits(plan) == {"a": edge, "m": precision, "c": edge}
    reasons = {n.name: n.because for n in plan.nodes}
    assert ("stem of the model" in reasons["node_a"]) == (edge != precision)
    assert ("head of the model" in reasons["node_c"]) == (edge != precision)
    assert "of the model" not in reasons["node_m"]


def test_the_ends_may_go_as_low_as_the_rest() -> None:
    plan = planned(cnn(CHAIN), precision="w4a8", low_bit_edges=True)
    assert set(bits(plan).values()) == {"w4a8"}


def test_one_constant_read_with_two_widths_has_integers_for_each() -> None:
    kernel = np.ones((16, 16, 3, 3), np.float32)  # small constants are copied for each reader
    body = CHAIN.replace("Conv", "Conv <pads = [1, 1, 1, 1]>").replace("w)", "k)")
    plan = planned(cnn(body, k=kernel), precision="w4a8")
    assert [e.node for e in decision(plan, "k").edges or ()] == ["node_a", "node_c"]
    assert decision(plan, "k").spec.bits == 8
    assert [e.node for e in decision(plan, "k#1").edges or ()] == ["node_m"]
    assert decision(plan, "k#1").spec.bits == 4


def test_only_inputs_of_linear_ops_go_below_8_bits() -> None:
    """The sum is made of 8 bits; the convolution behind it reads a pair of its own."""
    body = """
        a = Conv (x, w) m = Conv (a, v) s = Add (a, m) c = Conv (s, v) d = Conv (c, v)
        y = Sigmoid (d)
    """
    plan = planned(cnn(body), precision="w4a4")
    everyone = {d.tensor: d.spec.bits for d in plan.activations() if d.edges is None}
    some = {d.tensor: d.spec.bits for d in plan.activations() if d.edges is not None}
    # c is read by the head alone, which wants 8 bits.
    assert everyone == {"a": 8, "m": 8, "s": 8, "c": 8, "d": 8}
    assert some == {"x": 8, "a": 4, "s": 4}


def test_movers_carry_the_width_of_their_reader() -> None:
    body = """
        a = Conv (x, w) p = MaxPool <kernel_shape = [1, 1]> (a) m = Conv (p, v) c = Conv (m, v)
        y = Sigmoid (c)
    """
    plan = planned(cnn(body), precision="w4a4")
    assert {d.tensor: d.spec.bits for d in plan.activations()} == {
        "x": 8, "a": 4, "p": 4, "m": 8, "c": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "precision", "found"),
    [
        ("vitis-xint8", "w4a8", "w8a8"),
        ("tensorrt", "w4a8", "w8a8"),
        ("qnn-htp", "w3a8", "w4a8"),
        ("qnn-htp", "w4a8", "w4a8"),
        ("ort-x86", "w3a8", "w3a8"),
    ],
)
def test_a_target_without_such_narrow_products_gets_wider_ones(
    target: str, precision: str, found: str
) -> None:
    plan = planned(cnn(CHAIN), TARGETS[target], precision)
    assert bits(plan)["m"] == found
    reason = {n.name: n.because for n in plan.nodes}["node_m"]
    assert ("narrower than target" in reason) == (found != precision)


# ------------------------------------------------------------------ bits of single nodes


def test_nodes_have_bits_of_their_own_by_name_and_pattern() -> None:
    own = {
        "node_?": Precision.parse("w5a8"),
        "node_m": Precision.parse("w3a8"),
        "*": Precision.parse("w2a8"),
    }
    plan = planned(cnn(CHAIN), precision="w4a8", node_bits=own)
    assert bits(plan) == {"a": "w5a8", "m": "w3a8", "c": "w5a8"}
    reasons = {n.name: n.because for n in plan.nodes}
    assert reasons["node_m"] == "rule ort-x86/Conv; w3a8 by choice"
    assert reasons["node_a"] == "rule ort-x86/Conv; w5a8 by choice: node_?"


def test_a_choice_that_changes_nothing_leaves_the_reason() -> None:
    policy = policy_of("w4a8", node_bits={"node_a": Precision.parse("w8a8")})
    assert "stem" in bits_of_nodes(cnn(CHAIN), policy, ORT)["node_a"].reason


def test_bits_of_nodes_that_are_not_there_are_named() -> None:
    with pytest.raises(RecipeError, match="matches no Conv, Gemm, MatMul or embedding") as error:
        planned(cnn(CHAIN), node_bits={"node_aa": Precision.parse("w4a8")})
    assert "node_a" in (error.value.fix or "")
    with pytest.raises(RecipeError, match="node_r"):  # not a linear op
        planned(cnn(CHAIN), node_bits={"node_r": Precision.parse("w4a8")})


def test_integer_activations_of_a_node_need_a_run_that_has_some() -> None:
    for name in ("node_a", "node_*"):
        with pytest.raises(RecipeError, match="leaves all activations in float") as error:
            policy_of("w8", node_bits={name: Precision.parse("w4a8")})
        assert "--bits '*=w8'" in (error.value.fix or "")
    plan = planned(cnn(CHAIN), precision="w8a8", node_bits={"node_m": Precision.parse("w8")})
    assert {n.name: n.precision for n in plan.nodes}["node_m"] == "stored"


def test_bits_of_an_edited_plan_file_are_read_back(tmp_path: Path) -> None:
    plan = planned(cnn(CHAIN), precision="w4a8")
    path = tmp_path / "plan.json"
    text = plan.to_json()
    assert text.count('"bits": "w4a8"') == 1
    path.write_text(text.replace('"bits": "w4a8"', '"bits": "w6a8"'))
    again = planned(cnn(CHAIN), precision="w4a8", node_bits=read_plan(path).node_bits)
    assert bits(again) == {"a": "w8a8", "m": "w6a8", "c": "w8a8"}
    path.write_text(text.replace('"bits": "w4a8"', '"bits": "int4"'))
    with pytest.raises(RecipeError, match="int4"):
        read_plan(path)
