"""Rows that no output sees: dead ones change nothing, live ones do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qpass.graph import Graph
from qpass.passes.live_rows import DEAD, LiveRows, row_counts
from qpass.passes.round_weights import round_weights
from qpass.passes.rounding.measure import _pick
from tests.rounded import numbers_of, quantized_at
from tests.small_models import from_text, transformer

WIDTH = 8
BLOCK = """
<ir_version: 10, opset_import: ["": 21]>
block (float[B,T,8] x) => (float[B,M,3] y)
{{
    n = LayerNormalization (x, one, zero)
    q = MatMul (n, q_w)
    k = MatMul (n, k_w)
    v = MatMul (n, v_w)
    kt = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul (q, kt)
    p = Softmax <axis = -1> (s)
    c = MatMul (p, v)
    o = MatMul (c, o_w)
    x1 = Add (x, o)
    n1 = LayerNormalization (x1, one, zero)
    f = MatMul (n1, f_w)
    g = Gelu (f)
    h = MatMul (g, h_w)
    x2 = Add (x1, h)
    t = {read}
    y = MatMul (t, y_w)
}}
"""
LAYERS = ("q", "k", "v", "o", "f", "h")
INDICES = {
    "first": np.array([0], np.int64),
    "some": np.array([3, 1], np.int64),
    "start": np.array([1], np.int64),
    "end": np.array([4], np.int64),
    "axis": np.array([1], np.int64),
}


def block(read: str) -> Graph:
    random = np.random.default_rng(4)
    sizes = dict.fromkeys(("q_w", "k_w", "v_w", "o_w", "f_w", "h_w"), (WIDTH, WIDTH))
    weights = {
        name: (random.standard_normal(size) / 4.0).astype(np.float32)  # every token sees all
        for name, size in {**sizes, "y_w": (WIDTH, 3)}.items()
    }
    norm = {"one": np.ones(WIDTH, np.float32), "zero": np.zeros(WIDTH, np.float32)}
    return from_text(BLOCK.format(read=read), **weights, **norm, **INDICES)


def seen_by_changes(graph: Graph, layer: str, tokens: int) -> list[bool]:
    """Change the output of a layer row by row, and look whether the model's outputs change."""
    random = np.random.default_rng(5)
    feeds = {"x": random.standard_normal((2, tokens, WIDTH)).astype(np.float32)}
    evaluator = ReferenceEvaluator(graph.to_model())
    (wanted,) = evaluator.run(None, feeds)
    found = []
    for row in range(tokens):
        moved = graph.copy()
        bump = np.zeros((1, tokens, 1), np.float32)
        bump[:, row] = 1.0
        tensor = next(node for node in moved.nodes if node.name == f"node_{layer}").outputs[0]
        changed = moved.variable("changed", tensor.dtype, tensor.shape)
        moved.replace_uses(tensor, changed)
        # One number for all channels would vanish in a norm, or in the softmax for a key.
        sides = np.linspace(-1.0, 2.0, WIDTH, dtype=np.float32)
        add = moved.make(
            "Add", [tensor, moved.constant("bump", bump * sides)], [changed], name="bump"
        )
        moved.add(add, after=moved.producer(tensor))
        (got,) = ReferenceEvaluator(moved.to_model()).run(None, feeds)
        found.append(bool((got != wanted).any()))
    return found


@pytest.mark.parametrize(
    "read",
    [
        "Gather <axis = 1> (x2, first)",
        "Gather <axis = 1> (x2, some)",
        "Slice (x2, start, end, axis)",
        "Relu (x2)",
        "ReduceMean <keepdims = 1> (x2, axis)",
    ],
)
def test_rows_are_live_where_a_change_shows(read: str):
    graph, tokens = block(read), 5
    live = LiveRows(graph).of({"x": np.zeros((2, tokens, WIDTH), np.float32)})
    for layer in LAYERS:
        wanted = seen_by_changes(graph, layer, tokens)
        if all(wanted):
            assert f"node_{layer}" not in live
        else:
            np.testing.assert_array_equal(live[f"node_{layer}"], [wanted] * 2)


def test_all_rows_are_live_where_all_are_read():
    graph = transformer()
    assert not LiveRows(graph).of({"x": np.zeros((2, 6, 32), np.float32)})


def test_what_is_not_known_counts_as_read():
    """The rows to read are computed at run time; so is the shape behind an op of another domain."""
    text = BLOCK.replace("float[B,T,8] x", "float[B,T,8] x, int64[1] rows").format(
        read="Gather <axis = 1> (x2, rows)"
    )
    plain = block("Relu (x2)")
    constants = {tensor.name: tensor.values for tensor in plain.constants() if tensor.name in text}
    graph = from_text(text, **constants)
    feeds = {"x": np.zeros((1, 5, WIDTH), np.float32), "rows": np.array([0], np.int64)}
    assert not LiveRows(graph).of(feeds)


def test_each_shape_of_feeds_has_its_own():
    live = LiveRows(block("Gather <axis = 1> (x2, first)"))
    for samples, tokens in ((1, 3), (4, 7), (1, 3)):
        found = live.of({"x": np.zeros((samples, tokens, WIDTH), np.float32)})
        assert found["node_h"].shape == (samples, tokens)
        assert found["node_h"].sum() == samples


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_live_rows_are_picked_first_and_count_most(rows: list[bool], quota: int, seed: int):
    live = np.array(rows)
    counts = row_counts(live)
    assert counts.mean() == pytest.approx(1.0)
    if live.any() and not live.all():
        assert counts[~live].max() / counts[live].min() == pytest.approx(DEAD)
    picked = _pick(live.size, quota, np.random.default_rng(seed), live)
    assert picked.size == min(quota, live.size) == np.unique(picked).size
    assert live[picked].sum() == min(live.sum(), picked.size)


CLASSIFIER = """
<ir_version: 10, opset_import: ["": 21]>
classifier (float[B,20,16] x) => (float[B,1,12] y)
{
    f = MatMul (x, f_w)
    t = Gather <axis = 1> (f, first)
    y = Identity (t)
}
"""


def test_rounding_spends_itself_on_the_rows_that_are_read(monkeypatch: pytest.MonkeyPatch):
    """The first token lies in a few directions, the nineteen others in the rest."""
    random = np.random.default_rng(8)
    reference = from_text(
        CLASSIFIER,
        f_w=(random.standard_normal((16, 12)) / 4.0).astype(np.float32),
        first=np.array([0], np.int64),
    )
    basis, _ = np.linalg.qr(random.standard_normal((16, 16)))

    def batch() -> dict[str, np.ndarray]:
        x = random.standard_normal((4, 20, 12)) @ basis[:12]
        x[:, 0] = random.standard_normal((4, 6)) @ basis[10:]
        return {"x": x.astype(np.float32)}

    batches, unseen = [batch() for _ in range(24)], batch()
    errors = []
    for of in (LiveRows.of, lambda *_: {}):
        monkeypatch.setattr(LiveRows, "of", of)
        graph, table, plan = quantized_at(reference, "w3a8")
        numbers = numbers_of(plan, table)
        round_weights(reference, graph, batches, numbers, method="gptq", threads=1)
        got, wanted = (
            ReferenceEvaluator(one.to_model()).run(None, unseen)[0] for one in (graph, reference)
        )
        errors.append(float(np.square(got - wanted).sum()))
    assert errors[0] < errors[1] / 2.0
