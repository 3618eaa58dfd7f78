"""Affine maps of channels fold forward: the function stays, the nodes go, and refusals say why."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.passes.affine import fold_channel_affines
from qpass.passes.normalize import check_normalized, normalize
from qpass.passes.unified_norm import recognize_unified_norms
from qpass.report.model import PassReport
from tests import oracle

# Folding multiplies weights by gains before the sum and not behind it: float32 then differs by a
# few roundings of sums of 16 to 150 products, about 1e-7 each, relative to the largest output.
TOLERANCE = 2e-6
HEAD = '<ir_version: 10, opset_import: ["": 21]>'
RANDOM_SHAPES = {
    "gamma": (16,), "beta": (16,), "w": (16, 24), "w2": (16, 24), "b": (24,), "square": (16, 16),
    "by_place": (5, 24), "column": (16, 1, 1), "column_beta": (16, 1, 1), "c1": (24, 16, 1, 1),
    "c3": (24, 16, 3, 3), "depthwise": (16, 1, 3, 3), "grouped": (32, 4, 1, 1), "cb": (24,),
    "transposed": (16, 8, 2, 2), "wt": (24, 16), "stack": (2, 16, 24), "vector": (16,),
    "scale": (16,), "shift": (16,), "mean": (16,), "rows": (5,), "tokens": (5, 1),
    "head": (4, 24),
}  # fmt: skip


def constants(text: str) -> dict[str, np.ndarray]:
    """Seeded constants for the names that `text` uses."""
    random = np.random.default_rng(4)
    made: dict[str, np.ndarray] = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in RANDOM_SHAPES.items()
    }
    made["variance"] = random.uniform(0.5, 2, 16).astype(np.float32)
    made["half"], made["eps"] = np.float32(0.5), np.float32(1e-5)
    made["first"], made["to"] = np.array(0), np.array([1, 4, 10])
    made["last"] = np.array([-1])
    made["zeros"], made["holes"] = np.zeros(16, np.float32), made["gamma"].copy()
    made["holes"][3] = 0
    made["huge"] = np.full(16, 3e38, np.float32)
    made["broken"] = made["gamma"].copy()
    made["broken"][1] = np.inf
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: value for name, value in made.items() if name in words}


def graph_of(body: str, shape: str = "2,5,16", outputs: str = "float[2,5,24] y") -> Graph:
    text = f"{HEAD} g (float[{shape}] x) => ({outputs}) {{ {body} }}"
    graph = Graph.from_text(text, **constants(body))
    for node in graph.nodes:
        node.name = f"node_{node.outputs[0].name}"
    normalize(graph)
    return graph


def feeds_of(graph: Graph) -> dict[str, np.ndarray]:
    random = np.random.default_rng(8)
    return {t.name: random.standard_normal(t.shape).astype(np.float32) for t in graph.inputs}


def fold(graph: Graph) -> PassReport:
    """Fold, and check what every fold must keep: meaning, order, stability."""
    feeds = feeds_of(graph)
    wanted = oracle.reference(graph.to_model(), feeds)
    report = fold_channel_affines(graph)
    check_normalized(graph)
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < TOLERANCE, engine
    text = graph.to_text()
    assert fold_channel_affines(graph).changed == 0
    assert graph.to_text() == text
    return report


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


FOLDED = {
    "mul": "m = Mul(x, gamma) y = MatMul(m, w)",
    "mul_from_the_left": "m = Mul(gamma, x) y = MatMul(m, w)",
    "div": "m = Div(x, gamma) y = MatMul(m, w)",
    "one_number": "m = Mul(x, half) y = MatMul(m, w)",
    "add": "m = Add(x, beta) p = MatMul(m, w) y = Add(p, b)",
    "sub": "m = Sub(x, beta) p = MatMul(m, w) y = Add(b, p)",
    "sub_from": "m = Sub(beta, x) p = MatMul(m, w) y = Add(p, b)",
    "chain": "d = Div(x, scale) m = Mul(d, gamma) n = Add(m, beta) p = MatMul(n, w) y = Add(p, b)",
    "bias_by_place": "m = Add(x, beta) p = MatMul(m, w) y = Add(p, by_place)",
    "zero_gain": "m = Mul(x, holes) n = Add(m, beta) p = MatMul(n, w) y = Add(p, b)",
    "stack": "m = Mul(x, gamma) n = Add(m, beta) p = MatMul(n, stack) y = Add(p, b)",
    "through_a_transpose": "m = Mul(x, gamma) t = Transpose<perm = [1, 0, 2]>(m) p = MatMul(t, w) "
    "y = Transpose<perm = [1, 0, 2]>(p)",
}


@pytest.mark.parametrize("body", FOLDED.values(), ids=FOLDED.keys())
def test_folds_into_a_matmul(body: str) -> None:
    graph = graph_of(body)
    report = fold(graph)
    assert report.changed == 1
    assert not report.refusals
    assert ops(graph)["Mul"] == ops(graph)["Div"] == ops(graph)["Sub"] == 0
    assert ops(graph)["Add"] == ("Add(p" in body or "Add(b, p" in body)


def test_an_offset_becomes_a_bias_where_there_was_none() -> None:
    graph = graph_of("m = Mul(x, gamma) n = Add(m, beta) y = MatMul(n, w)")
    assert fold(graph).changed == 1
    assert [node.op for node in graph.nodes] == ["MatMul", "Add"]
    assert graph.nodes[-1].outputs[0].name == "y"


def test_every_reader_takes_it() -> None:
    graph = graph_of(
        "m = Mul(x, gamma) n = Add(m, beta) p = MatMul(n, w) q = MatMul(n, w2) y = Mul(p, q)"
    )
    assert fold(graph).changed == 2
    assert ops(graph) == {"MatMul": 2, "Add": 2, "Mul": 1}


def test_a_weight_with_two_readers_is_folded_for_each() -> None:
    graph = graph_of("m = Mul(x, gamma) p = MatMul(m, w) q = MatMul(x, w) y = Add(p, q)")
    assert fold(graph).changed == 1
    assert ops(graph)["Mul"] == 0


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("t = Gather<axis = 1>(n, first) y = Gemm(t, w, b)", "float[2,24] y"),
        ("t = ReduceMean<keepdims = 0, axes = [1]>(n) y = Gemm(t, w, b)", "float[2,24] y"),
        ("t = Transpose<perm = [1, 2, 0]>(n) s = Gather<axis = 2>(t, first) "
         "y = Gemm<transB = 1>(s, wt, b)", "float[5,24] y"),
        ("a, c = Split<axis = 0, num_outputs = 2>(n) p = MatMul(a, w) q = MatMul(c, w2) "
         "y = Concat<axis = 0>(p, q)", "float[2,5,24] y"),
        ("a, c = Split<axis = 0, num_outputs = 2>(n) t = Concat<axis = 0>(c, a) "
         "p = MatMul(t, w) y = Add(p, b)", "float[2,5,24] y"),
    ],
    ids=["one_token", "mean_of_tokens", "transposed", "both_parts", "rolled"],
)  # fmt: skip
def test_folds_through_ops_that_move_channels(body: str, outputs: str) -> None:
    if "axes" in body:  # an attribute before opset 18, an input since
        body = body.replace("<keepdims = 0, axes = [1]>(n)", "<keepdims = 0>(n, one)")
    text = f"m = Mul(x, gamma) n = Add(m, beta) {body}"
    model = f"{HEAD} g (float[2,5,16] x) => ({outputs}) {{ {text} }}"
    extra = {"one": np.array([1])} if "one)" in body else {}
    graph = Graph.from_text(model, **constants(text), **extra)
    normalize(graph)
    report = fold(graph)
    assert report.changed >= 1
    assert not report.refusals
    assert ops(graph)["Mul"] == 0


def test_gemm_that_reads_its_operand_transposed() -> None:
    text = "m = Mul(x, tall) n = Add(m, tall_beta) y = Gemm<transA = 1>(n, w, b)"
    random = np.random.default_rng(1)
    tall = {name: random.standard_normal((16, 1)).astype(np.float32) for name in
            ("tall", "tall_beta")}  # fmt: skip
    model = f"{HEAD} g (float[16,5] x) => (float[5,24] y) {{ {text} }}"
    graph = Graph.from_text(model, **constants(text), **tall)
    normalize(graph)
    assert fold(graph).changed == 1
    assert [node.op for node in graph.nodes] == ["Gemm"]


CONVS = {
    "pointwise": ("n = Add(m, column_beta) y = Conv(n, c1, cb)", 1, 0),
    "without_bias": ("n = Add(m, column_beta) y = Conv(n, c1)", 1, 0),
    "not_padded": ("n = Add(m, column_beta) y = Conv(n, c3, cb)", 1, 0),
    "padded_gain": ("y = Conv<pads = [1, 1, 1, 1]>(m, c3, cb)", 1, 0),
    "padded_offset_stays": ("n = Add(m, column_beta) y = Conv<pads = [1, 1, 1, 1]>(n, c3, cb)",
                            1, 1),
    "grouped": ("n = Add(m, column_beta) y = Conv<group = 4>(n, grouped)", 1, 0),
    "depthwise": ("n = Add(m, column_beta) y = Conv<group = 16>(n, depthwise)", 1, 0),
    "transposed_gain": ("y = ConvTranspose<strides = [2, 2]>(m, transposed)", 1, 0),
    "transposed_offset_stays": ("n = Add(m, column_beta) y = ConvTranspose(n, transposed)", 1, 1),
    "pooled": ("n = Add(m, column_beta) p = AveragePool<kernel_shape = [2, 2]>(n) "
               "y = Conv(p, c1, cb)", 1, 0),
    "batch_norm": ("n = BatchNormalization(m, scale, shift, mean, variance) y = Conv(n, c1, cb)",
                   1, 0),
}  # fmt: skip


@pytest.mark.parametrize(("body", "changed", "adds"), CONVS.values(), ids=CONVS.keys())
def test_folds_into_a_convolution(body: str, changed: int, adds: int) -> None:
    text = f"m = Mul(x, column) {body}"
    model = f"{HEAD} g (float[2,16,6,6] x) => (float[A,B,C,D] y) {{ {text} }}"
    graph = Graph.from_text(model, **constants(text))
    normalize(graph)
    report = fold(graph)
    assert report.changed == changed
    assert ops(graph)["Mul"] == ops(graph)["BatchNormalization"] == 0
    assert ops(graph)["Add"] == adds


def test_what_is_not_linear_keeps_its_own_affine() -> None:
    graph = graph_of(
        "m = Mul(x, gamma) n = Add(m, beta) p = MatMul(n, square) y = Add(p, n)",
        outputs="float[2,5,16] y",
    )
    report = fold(graph)
    assert report.changed == 1
    assert [r.reason for r in report.refusals] == ["node_y: Add is not linear"]
    product = next(node for node in graph.nodes if node.op == "MatMul")
    assert product.inputs[0].name == "x"
    assert ops(graph)["Mul"] == 1


REFUSED = {
    "softmax": ("m = Mul(x, gamma) s = Softmax(m) y = MatMul(s, w)", "Softmax is not linear"),
    "right_operand": ("m = Mul(x, tokens) y = MatMul(head5, m)", "reads it as operand 1"),
    "other_axis": ("m = Mul(x, tokens) y = MatMul(m, w)", "does not take axis 1 as its channels"),
    "computed_weights": ("m = Mul(x, gamma) t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(m, t)",
                         "the weights of MatMul are not constant"),
    "mean_of_channels": ("m = Mul(x, gamma) t = ReduceMean(m, last) y = MatMul(t, one_row)",
                         "ReduceMean is not linear"),
    "joined_with_another": ("m = Mul(x, gamma) t = Concat<axis = 1>(m, x) y = MatMul(t, w)",
                            "node_t joins it with something else"),
    "overflow": ("m = Mul(x, huge) y = MatMul(m, w)", "what it is folded to is not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_say_why(body: str, reason: str) -> None:
    model = f"{HEAD} g (float[2,5,16] x) => (float[A,B,C] y) {{ {body} }}"
    extra = {"head5": np.ones((3, 5), np.float32)} if "head5" in body else {}
    if "one_row" in body:
        extra["one_row"] = np.ones((1, 4), np.float32)
    graph = Graph.from_text(model, **constants(body), **extra)
    for node in graph.nodes:
        node.name = f"node_{node.outputs[0].name}"
    normalize(graph)
    before = graph.to_text()
    report = fold_channel_affines(graph)
    assert report.changed == 0
    assert reason in report.refusals[0].reason
    assert graph.to_text() == before


@pytest.mark.parametrize(
    "body",
    [
        "m = Mul(x, broken) y = MatMul(m, w)",
        "m = Div(half, x) y = MatMul(m, w)",
        "m = Div(x, zeros) y = MatMul(m, w)",
        "m = Mul(x, x) y = MatMul(m, w)",
    ],
    ids=["not_finite", "one_over_x", "division_by_zero", "square"],
)
def test_what_is_no_affine_is_left_alone(body: str) -> None:
    graph = graph_of(body)
    before = graph.to_text()
    assert fold_channel_affines(graph) == PassReport(name="affine", changed=0)
    assert graph.to_text() == before


def test_an_output_of_the_model_keeps_its_values() -> None:
    outputs = "float[2,5,24] y, float[2,5,16] m"
    graph = graph_of("m = Mul(x, gamma) y = MatMul(m, w)", outputs=outputs)
    report = fold(graph)
    assert report.refusals[0].reason == "it is an output of the model"
    assert ops(graph)["Mul"] == 1


def test_a_bias_alone_behind_a_matmul_is_no_chain() -> None:
    graph = graph_of("p = MatMul(x, square) n = Add(p, beta) y = MatMul(n, w)")
    before = graph.to_text()
    assert fold_channel_affines(graph).changed == 0
    assert graph.to_text() == before


def test_the_gain_of_a_written_out_norm_stays_with_it() -> None:
    graph = graph_of(
        "q = Mul(x, x) m = ReduceMean(q, last) a = Add(m, eps) s = Sqrt(a) d = Div(x, s) "
        "n = Mul(d, gamma) y = MatMul(n, w)"
    )
    before = graph.to_text()
    report = fold_channel_affines(graph)
    assert report.changed == 0
    assert "the gain of a norm" in report.refusals[0].reason
    assert graph.to_text() == before


def test_a_constant_that_stretches_the_data_is_no_affine() -> None:
    graph = graph_of("m = Mul(x, gamma) y = MatMul(m, w)", shape="2,5,1")
    before = graph.to_text()
    assert fold_channel_affines(graph).changed == 0
    assert graph.to_text() == before


def test_long_chains_become_mul_and_add() -> None:
    graph = graph_of(
        "d = Div(x, scale) m = Mul(d, gamma) n = Add(m, beta) s = Softmax(n) y = MatMul(s, w)"
    )
    feeds = feeds_of(graph)
    wanted = oracle.reference(graph.to_model(), feeds)
    assert recognize_unified_norms(graph).changed == 1
    assert [node.op for node in graph.nodes] == ["Mul", "Add", "Softmax", "MatMul"]
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < TOLERANCE
    assert recognize_unified_norms(graph).changed == 0
