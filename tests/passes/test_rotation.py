"""Changes of basis: exact in every engine, and refused wherever they would not be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.modelfile import load_model
from qpass.passes.norm_gain import fold_norm_gains
from qpass.passes.normalize import check_normalized, normalize
from qpass.passes.norms import rewrite_norms
from qpass.passes.rotation.hadamard import solve_mean_keeping_rotation, solve_rotation
from qpass.passes.rotation.heads import rotate_heads
from qpass.passes.rotation.stream import center_streams, rotate_streams
from qpass.report.model import PassReport
from tests import oracle, small_models

# A rotation mixes all channels: every product of the network is summed in another order.
TOLERANCE = 3e-6
DIGITS = Path(__file__).parents[2] / "models" / "digits_vit.onnx"
HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def feeds_of(graph: Graph) -> dict[str, np.ndarray]:
    random = np.random.default_rng(8)
    shapes = {t.name: [s if isinstance(s, int) else 2 for s in t.shape] for t in graph.inputs}
    return {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def same(graph: Graph, wanted: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> None:
    check_normalized(graph)
    for engine in oracle.ENGINES:
        error = oracle.relative_error(engine(graph.to_model(), feeds), wanted)
        assert error < TOLERANCE, engine


# ---------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("size", [1, 2, 3, 12, 20, 36, 64, 192, 384, 768])
def test_rotations_are_orthogonal(size: int) -> None:
    for rotation in (solve_rotation(size, 0), solve_mean_keeping_rotation(size, 0)):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(size), atol=1e-13)
    kept = np.ones(size) @ solve_mean_keeping_rotation(size, 0)
    np.testing.assert_allclose(kept, np.ones(size), atol=1e-13)


@pytest.mark.parametrize("size", [2, 8, 12, 64, 192, 384, 768])
def test_hadamard_sizes_have_entries_of_one_size(size: int) -> None:
    np.testing.assert_allclose(np.abs(solve_rotation(size, 3)), size**-0.5, rtol=1e-12)


@pytest.mark.parametrize("size", [64, 192, 768])
def test_an_outlier_is_spread(size: int) -> None:
    spike = np.zeros(size)
    spike[5] = 1.0
    spread = spike @ solve_mean_keeping_rotation(size, 0)
    assert np.abs(spread).max() < 4 * size**-0.5  # 1 without a rotation


def test_a_seed_gives_one_rotation() -> None:
    first, again, other = (solve_rotation(64, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# ---------------------------------------------------------------------------- whole networks


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"rotate": "heads"}, {"rotate-heads": 8}),
        ({"rotate": "stream"}, {"norm-gain": 9, "rotate-stream": 29}),
        ({"rms": True}, {"norm-gain": 9, "rms-norm": 9}),
        (
            {"rotate": "all", "rms": True},
            {"norm-gain": 9, "rotate-stream": 29, "rms-norm": 9, "rotate-heads": 8},
        ),
    ],
    ids=["heads", "stream", "rms", "everything"],
)
@pytest.mark.parametrize("opset", [20, 23])
def test_digits_vit(options: dict[str, Any], changed: dict[str, int], opset: int) -> None:
    graph = load_model(DIGITS, opset=opset)
    normalize(graph)
    feeds = feeds_of(graph)
    wanted = oracle.ort_plain(graph.to_model(), feeds)
    before = Counter(node.op for node in graph.nodes)
    reports = rewrite_norms(graph, **options)
    assert {r.name: r.changed for r in reports if r.changed} == changed
    assert not any(r.refusals for r in reports)
    after = Counter(node.op for node in graph.nodes)
    if not options.get("rms"):
        assert after == before  # constants only
    elif opset >= 23:
        assert after == before - Counter(LayerNormalization=9) + Counter(RMSNormalization=9)
    else:
        chain = Counter(dict.fromkeys(["Pow", "ReduceMean", "Sqrt", "Div", "Add", "Mul"], 9))
        assert after == before - Counter(LayerNormalization=9) + chain
    same(graph, wanted, feeds)


def test_the_stream_of_the_rotated_network_is_the_rotated_stream() -> None:
    graph = load_model(DIGITS, opset=21)
    normalize(graph)
    feeds = feeds_of(graph)
    name = next(n for n in graph.nodes if n.op == "LayerNormalization").inputs[0].name
    before = oracle.ort_plain(graph.to_model(taps=[name]), feeds)[name]
    rewrite_norms(graph, rotate="stream", seed=7)
    after = oracle.ort_plain(graph.to_model(taps=[name]), feeds)[name]
    rotated = before.astype(np.float64) @ solve_mean_keeping_rotation(64, 7)
    np.testing.assert_allclose(after, rotated, atol=1e-5 * np.abs(before).max())
    assert np.abs(after - before).max() > 0.1


# ---------------------------------------------------------------------------- refusals

STREAM = {
    "e": (16, 16), "places": (1, 5, 16), "w": (16, 24), "v": (24, 16), "g": (16,), "c": (16,),
    "head": (16, 4), "wide": (32, 4), "g2": (32,), "c2": (32,), "table": (9, 16), "scale": (16,),
}  # fmt: skip
BLOCK = """
    s0 = MatMul(x, e)
    s = Add(s0, places)
    n = LayerNormalization(s, g, c)
    u = MatMul(n, w)
    a = Relu(u)
    d = MatMul(a, v)
    r = Add(s, d)
"""


def block(tail: str, head: str = BLOCK, outputs: str = "float[A,B,C] y") -> Graph:
    random = np.random.default_rng(3)
    body = head + tail
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    made = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in STREAM.items()
        if name in words
    }
    if "merged" in words:
        made["merged"] = np.array([2, 2, 32])
        made["even"] = np.array([0, 1, 2, 3])
    graph = Graph.from_text(f"{HEAD} g (float[2,5,16] x) => ({outputs}) {{ {body} }}", **made)
    for node in graph.nodes:
        node.name = f"node_{node.outputs[0].name}"
    normalize(graph)
    return graph


NORMED = "m = LayerNormalization(r, g, c) y = MatMul(m, head)"


def test_a_block_rotates_and_centres() -> None:
    graph = block(NORMED)
    feeds = feeds_of(graph)
    wanted = oracle.reference(graph.to_model(), feeds)
    assert fold_norm_gains(graph).changed == 2
    assert rotate_streams(graph, 0).changed == 5  # e, places, v; w, head
    assert center_streams(graph).changed == 2
    same(graph, wanted, feeds)


@pytest.mark.parametrize(
    ("tail", "rotation", "centring"),
    [
        ("m = LayerNormalization(r, g, c) y = Softmax(m)",
         "node_m has a gain or bias that does not fold", ""),
        ("t = Relu(r) m = LayerNormalization(r, g, c) p = MatMul(m, head) q = MatMul(t, head) "
         "y = Add(p, q)", "node_t reads it: Relu is not linear", "node_t reads it: Relu"),
        ("z = MatMul(r, head) m = LayerNormalization(r, g, c) p = MatMul(m, head) y = Add(p, z)",
         "", "node_z reads it without a norm"),
        ("f = Gather<axis = 1>(r, even) f1 = Reshape(f, merged) m = LayerNormalization(f1, g2, c2) "
         "y = MatMul(m, wide)", "node_f1 reads it: Reshape is not linear", "node_f1 reads it"),
        ("k = Mul(r, scale) m = LayerNormalization(k, g, c) y = MatMul(m, head)",
         "node_k reads it: Mul is not linear", "node_k reads it: Mul"),
    ],
    ids=["gain_stays", "raw_reader", "raw_linear_reader", "patch_merging", "gain_in_the_stream"],
)  # fmt: skip
def test_streams_that_are_refused(tail: str, rotation: str, centring: str) -> None:
    for run, reason in ((lambda g: rotate_streams(g, 0), rotation), (center_streams, centring)):
        graph = block(tail)
        feeds = feeds_of(graph)
        wanted = oracle.reference(graph.to_model(), feeds)
        fold_norm_gains(graph)
        before = graph.fingerprint()
        report: PassReport = run(graph)
        if reason:
            assert report.refusals[0].reason.startswith(reason)
            assert report.changed == 0
            assert graph.fingerprint() == before
        same(graph, wanted, feeds)


def test_a_stream_that_leaves_the_model_is_refused() -> None:
    for run in (lambda g: rotate_streams(g, 0), center_streams):
        graph = block(NORMED, outputs="float[A,B,C] y, float[2,5,16] r")
        fold_norm_gains(graph)
        assert run(graph).refusals[0].reason == "r is an output of the model"


def test_a_stream_that_enters_the_model_is_refused() -> None:
    graph = block(NORMED, head=BLOCK.replace("s0 = MatMul(x, e)", "s0 = Add(x, x)"))
    fold_norm_gains(graph)
    assert rotate_streams(graph, 0).refusals[0].reason == "x is an input of the model"


def test_post_norm_streams_are_refused() -> None:
    graph = block("m = LayerNormalization(r, g, c) z = MatMul(m, e) q = Add(m, z) "
                  "o = LayerNormalization(q, g, c) y = MatMul(o, head)")  # fmt: skip
    report = fold_norm_gains(graph)
    assert "Add is not linear" in report.refusals[0].reason
    assert rotate_streams(graph, 0).changed == 0
    assert any("does not fold" in r.reason for r in rotate_streams(graph, 0).refusals)


def test_embeddings_and_tables_are_writers() -> None:
    text = f"""{HEAD} g (int64[2,5] tokens) => (float[2,5,4] y) {{
        s0 = Gather(table, tokens) s = Add(s0, places)
        m = LayerNormalization(s, g, c) y = MatMul(m, head) }}"""
    random = np.random.default_rng(3)
    made = {
        name: random.standard_normal(STREAM[name]).astype(np.float32)
        for name in ("table", "places", "g", "c", "head")
    }
    graph = Graph.from_text(text, **made)
    normalize(graph)
    feeds = {"tokens": random.integers(0, 9, (2, 5))}
    wanted = oracle.reference(graph.to_model(), feeds)
    reports = rewrite_norms(graph, rotate="stream", rms=True)
    assert {r.name: r.changed for r in reports if r.changed} == {
        "norm-gain": 1, "rotate-stream": 3, "rms-norm": 1,
    }  # fmt: skip
    same(graph, wanted, feeds)


# ---------------------------------------------------------------------------- gains of norms


def test_gain_folds_through_the_choice_of_a_token() -> None:
    graph = token_graph()
    feeds = feeds_of(graph)
    wanted = oracle.reference(graph.to_model(), feeds)
    assert fold_norm_gains(graph) == PassReport(name="norm-gain", changed=1)
    norm = next(n for n in graph.nodes if n.op == "LayerNormalization")
    assert (array_of(norm.inputs[1]) == 1).all()
    assert not array_of(norm.inputs[2]).any()
    same(graph, wanted, feeds)
    assert fold_norm_gains(graph).changed == 0


def token_graph() -> Graph:
    random = np.random.default_rng(3)
    made = {n: random.standard_normal(STREAM[n]).astype(np.float32) for n in ("g", "c", "head")}
    text = f"""{HEAD} g (float[2,5,16] x) => (float[2,4] y) {{
        m = LayerNormalization(x, g, c) t = Gather<axis = 1>(m, one) y = Gemm(t, head) }}"""
    graph = Graph.from_text(text, **made, one=np.array(1))
    normalize(graph)
    return graph


# ---------------------------------------------------------------------------- heads


def attention(change: tuple[str, str] = ("", "")) -> Graph:
    text = small_models.TRANSFORMER
    graph = small_models.transformer()
    if not change[0]:
        return graph
    constants = {c.name: array_of(c) for c in graph.constants()}
    constants["by_channel"] = np.linspace(0.5, 2, 16, dtype=np.float32)
    assert text.count(change[0]) == 1
    text = text.replace(*change)
    return small_models.from_text(
        text, **{name: value for name, value in constants.items() if name in text}
    )


def test_heads_of_one_projection() -> None:
    graph = attention()
    normalize(graph)
    feeds = feeds_of(graph)
    wanted = oracle.ort_plain(graph.to_model(), feeds)
    taps = ["q", "v", "context"]
    before = oracle.ort_plain(graph.to_model(taps=taps), feeds)
    assert rotate_heads(graph, 5) == PassReport(name="rotate-heads", changed=2)
    after = oracle.ort_plain(graph.to_model(taps=taps), feeds)
    for tap in taps:
        rotated = before[tap].astype(np.float64) @ solve_rotation(16, 5)
        np.testing.assert_allclose(after[tap], rotated, atol=2e-6 * np.abs(rotated).max())
    check_normalized(graph)
    for engine in oracle.ENGINES[1:]:  # the reference evaluator has no Gelu without a body
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < TOLERANCE, engine


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (("scores = MatMul (q, k)", "q2 = Mul (q, by_channel) scores = MatMul (q2, k)"),
         ["operand 0 does not come straight from a linear op with constant weights"]),
        (("scores = MatMul (q, k)", "q2 = Sigmoid (q) scores = MatMul (q2, k)"),
         ["operand 0 does not come straight from a linear op with constant weights"]),
        (("merged = Reshape (turned, whole)", "t2 = Mul (turned, by_channel) "
          "merged = Reshape (t2, whole)"), ["node_t2 reads the heads: Mul is not linear"]),
        (("context = MatMul (p, v)", "v2 = Add (v, by_channel) context = MatMul (p, v2)"),
         ["operand 1 does not come straight from a linear op with constant weights"]),
    ],
    ids=["scaled_by_channel", "computed_query", "scaled_heads", "value_with_an_offset"],
)  # fmt: skip
def test_heads_that_are_refused(change: tuple[str, str], reasons: list[str]) -> None:
    graph = attention(change)
    normalize(graph)
    feeds = feeds_of(graph)
    wanted = oracle.ort_plain(graph.to_model(), feeds)
    report = rotate_heads(graph, 5)
    assert report.changed == 1  # the other pair
    assert [r.reason for r in report.refusals] == reasons
    assert oracle.relative_error(oracle.ort_plain(graph.to_model(), feeds), wanted) < TOLERANCE


def test_channels_that_something_else_reads_are_refused() -> None:
    graph = attention(("y = Add (x1, down)", "y0 = Add (x1, down) y = Add (y0, v0)"))
    normalize(graph)
    report = rotate_heads(graph, 5)
    assert report.changed == 1
    assert report.refusals[0].reason.startswith("node_y reads the same channels of node_qkv0")
