"""Constant folding: what it computes, what it leaves, and how it survives what it cannot run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.graph import Constant, Graph, array_of
from qpass.passes.normalize import constant_folding, normalize
from tests import oracle

HEADER = '<ir_version: 10, opset_import: ["": 21, "com.example": 1]> g '


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_a_result_that_grows_too_much_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constant_folding, "GROWTH_LIMIT", 1000)
    body = "(float[4,100] x) => (float[4,100] y) { e = Expand(w, s) y = Add(x, e) }"
    constants = {"w": np.ones((1, 100), np.float32), "s": np.array([4, 100])}
    graph = Graph.from_text(HEADER + body, **constants)
    report = normalize(graph)  # 1600 bytes from 400 + 16
    assert ops(graph) == ["Expand", "Add"]
    assert [row.rule for row in report.refusals] == ["fold constants"]

    monkeypatch.setattr(constant_folding, "GROWTH_LIMIT", 1200)
    normalize(graph)
    assert ops(graph) == ["Add"]


def test_a_chain_is_measured_against_what_it_starts_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reshape and Transpose of a large weight add nothing, though their inputs are no constants."""
    monkeypatch.setattr(constant_folding, "GROWTH_LIMIT", 0)
    body = (
        "(float[2,64] x) => (float[2,32] y) { r = Reshape(w, s) t = Transpose(r) y = MatMul(x, t) }"
    )
    weight = np.random.default_rng(0).standard_normal((2, 16, 64)).astype(np.float32)
    graph = Graph.from_text(HEADER + body, w=weight, s=np.array([32, 64]))
    normalize(graph)
    assert ops(graph) == ["Gemm"]
    np.testing.assert_array_equal(array_of(graph.nodes[0].inputs[1]), weight.reshape(32, 64).T)


def test_what_the_engine_cannot_run_is_refused_and_the_rest_is_folded() -> None:
    """One bad op does not keep the others from being folded; its readers stay too."""
    body = """(float[2] x) => (float[2] y) {
        bad = Reshape (w, wrong)
        worse = Neg (bad)
        good = Neg (w)
        a = Add (x, good)
        y = Add (a, worse)
    }"""
    constants = {"w": np.array([1, 2], np.float32), "wrong": np.array([3])}
    graph = Graph.from_text(HEADER + body, **constants)
    result = constant_folding.fold_constants(graph)
    assert ops(graph) == ["Reshape", "Neg", "Add", "Add"]
    assert [row.where for row in result.refusals] == ["Reshape_0"]
    np.testing.assert_array_equal(array_of(graph.node("Add_3").inputs[1]), [-1, -2])


@pytest.mark.parametrize(
    "made",
    ["r = RandomNormal<shape=[2]>()", "r = com.example.Custom(w)", "r, m = Dropout(w, p, yes)"],
)
def test_random_and_foreign_ops_stay(made: str) -> None:
    body = f"(float[2] x) => (float[2] y) {{ {made} y = Add(x, r) }}"
    constants = {"w": np.ones(2, np.float32), "p": np.float32(0.5), "yes": np.array(True)}
    used = {name: np.asarray(value) for name, value in constants.items() if name in made}
    graph = Graph.from_text(HEADER + body, **used)
    before = ops(graph)
    normalize(graph)
    assert ops(graph) == before


def test_each_reader_of_a_small_result_gets_a_copy_and_a_large_one_is_shared() -> None:
    body = "(float[4] x) => (float[4] y) { k = Neg(w) a = Add(x, k) b = Mul(a, k) y = Sub(b, k) }"
    graph = Graph.from_text(HEADER + body, w=np.arange(4, dtype=np.float32))
    normalize(graph)
    assert len({id(node.inputs[1]) for node in graph.nodes}) == 3

    large = body.replace("[4]", "[500]")
    graph = Graph.from_text(HEADER + large, w=np.arange(500, dtype=np.float32))
    normalize(graph)
    assert len({id(node.inputs[1]) for node in graph.nodes}) == 1


def test_a_constant_takes_over_the_name() -> None:
    body = "(float[4] x) => (float[4] y) { k = Neg(w) y = Add(x, k) }"
    graph = Graph.from_text(HEADER + body, w=np.arange(4, dtype=np.float32))
    normalize(graph)
    assert graph.nodes[0].inputs[1].name == "k"


def test_text_constants_are_folded() -> None:
    node = helper.make_node("Constant", [], ["s"], value_strings=["a", "b"])
    made = helper.make_graph(
        [node, helper.make_node("Equal", ["x", "s"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [2])],
        [helper.make_tensor_value_info("y", TensorProto.BOOL, [2])],
    )
    graph = Graph(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)]))
    normalize(graph)
    assert ops(graph) == ["Equal"]
    assert array_of(graph.nodes[0].inputs[1]).tolist() == ["a", "b"]


def branching() -> onnx.ModelProto:
    """Return If(flag, x + k, x - k) where k = -w is computed outside of the branches."""
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["same", "k"], [f"{op}_y"], name=f"{op}_inside")],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, [3])],
        )
        for op in ("Add", "Sub")
    ]
    nodes = [
        helper.make_node("Neg", ["w"], ["k"], name="neg"),
        helper.make_node("Identity", ["flag"], ["f"], name="gone"),
        helper.make_node("Identity", ["x"], ["same"], name="stays"),
        helper.make_node(
            "If", ["f"], ["y"], name="if", then_branch=branches[0], else_branch=branches[1]
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(np.arange(3, dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("flag", [True, False])
def test_bodies_of_control_flow_find_what_they_read(flag: bool) -> None:
    graph = Graph(branching())
    feeds = {"x": np.ones(3, np.float32), "flag": np.array(flag)}
    wanted = oracle.ort_plain(graph.to_model(), feeds)
    normalize(graph)
    assert [node.name for node in graph.nodes] == ["stays", "if"]
    captured = {tensor.name: tensor for tensor in graph.node("if").captured}
    assert isinstance(captured["k"], Constant)
    assert oracle.relative_error(oracle.ort_plain(graph.to_model(), feeds), wanted) == 0.0


@pytest.mark.parametrize(
    ("picked", "folds"),
    [
        ("g = Gather<axis=0>(s, last)", True),
        ("g = Gather<axis=0>(s, first)", False),
        ("g = Slice(s, one, three)", True),
        ("g = Slice(s, one, two)", True),
        ("g = Slice(s, zero, three)", False),
        ("g = Slice(s, three, zero, zero, back)", True),
    ],
)
def test_only_known_sizes_of_a_shape_become_constants(picked: str, folds: bool) -> None:
    body = f"(float[N,2,6] x) => (int64[M] y) {{ s = Shape(x) {picked} y = Neg(g) }}"
    numbers = {
        "zero": [0],
        "one": [1],
        "two": [2],
        "three": [3],
        "last": [-1],
        "first": [0],
        "back": [-1],
    }
    used = {name: np.array(value) for name, value in numbers.items() if name in picked}
    graph = Graph.from_text(HEADER + body, **used)
    feeds = {"x": np.zeros((5, 2, 6), np.float32)}
    wanted = oracle.ort_plain(graph.to_model(), feeds)
    normalize(graph)
    known = folds and "back" not in picked  # backwards is left to the engine
    assert ("Shape" not in ops(graph)) == known
    np.testing.assert_array_equal(oracle.ort_plain(graph.to_model(), feeds)["y"], wanted["y"])
