"""Gains of queries fitted to the scores: the closed form is right, exact, and found in graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes import compensate as module
from qpass.passes.attention import Shapes
from qpass.passes.attention_scores import (
    RIDGE,
    Scores,
    ScoreSums,
    find_scores,
    solve_scores,
)
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.compensate import compensate
from qpass.passes.fold_affine import Site, find_site, fold
from qpass.stream import Pair
from qpass.submodel import Submodel
from qpass.verify.metrics import sqnr_db
from tests.folds import graph_of, normal, run

Array = np.ndarray[Any, Any]
WIDTH, HEADS, SIZE = 8, 2, 4

FUSED = """
[qkv] h0 = MatMul (x, w)
h = Add (h0, b)
q0, k0, v0 = Split <axis = -1, num_outputs = 3> (h)
q1 = Reshape (q0, heads)
k1 = Reshape (k0, heads)
v1 = Reshape (v0, heads)
q2 = Mul (q1, root)
q = Transpose <perm = [0, 2, 1, 3]> (q2)
k = Transpose <perm = [0, 2, 3, 1]> (k1)
v = Transpose <perm = [0, 2, 1, 3]> (v1)
[product] s = MatMul (q, k)
p = Softmax <axis = -1> (s)
y = MatMul (p, v)
"""
# One head, two projections; which of them runs last differs.
APART = """
{first}
{last}
q = Div (qb, root)
k = Transpose <perm = [0, 2, 1]> (kb)
[product] s = MatMul (q, k)
p = Softmax <axis = -1> (s)
y = MatMul (p, x)
"""
LINES = {
    "query": "[query] qa = MatMul (x, w) qb = Add (qa, b)",
    "key": "[key] ka = MatMul (x, u) kb = Add (ka, c)",
}


def fused(*, body: str = FUSED) -> Graph:
    constants = {
        "w": normal((WIDTH, 3 * WIDTH), seed=1) / 2,
        "b": normal((3 * WIDTH,), seed=2),
        "heads": np.array([0, 0, HEADS, SIZE]),
        "root": np.float32(0.5),
    }
    return graph_of(f"float[N,5,{WIDTH}] x", f"float[N,{HEADS},5,{SIZE}] y", body, **constants)


def apart(last: str = "key") -> Graph:
    first = "query" if last == "key" else "key"
    constants = {
        "w": normal((WIDTH, WIDTH), seed=1), "u": normal((WIDTH, WIDTH), seed=3),
        "b": normal((WIDTH,), seed=2), "c": normal((WIDTH,), seed=4), "root": np.float32(2.0),
    }  # fmt: skip
    body = APART.format(first=LINES[first], last=LINES[last])
    return graph_of(f"float[N,5,{WIDTH}] x", f"float[N,5,{WIDTH}] y", body, **constants)


def sample(count: int = 4, seed: int = 0) -> dict[str, Array]:
    return {"x": normal((count, 5, WIDTH), seed=seed)}


def scores_of(graph: Graph) -> dict[str, tuple[Scores, ...]]:
    return find_scores(graph, Shapes(graph=graph, sample=sample()))


def site_of(graph: Graph, name: str) -> Site:
    site = find_site(graph, {node.name: node for node in graph.nodes}, graph.node(name))
    assert isinstance(site, Site)
    return site


# ------------------------------------------------------------------ where


def test_heads_of_a_fused_projection_are_found_with_the_factor_of_the_queries():
    found = scores_of(fused())
    assert list(found) == ["qkv"]
    (scores,) = found["qkv"]
    assert (scores.product.name, scores.taker, scores.linear) == ("product", "query", "qkv")
    numbers = np.arange(WIDTH).reshape(HEADS, SIZE)
    np.testing.assert_array_equal(scores.query.channels, numbers)
    np.testing.assert_array_equal(scores.key.channels, numbers + WIDTH)
    assert (scores.query.factor, scores.key.factor) == (0.5, 1.0)


@pytest.mark.parametrize("last", ["query", "key"])
def test_of_two_projections_the_one_that_runs_last_takes_the_gains(last):
    found = scores_of(apart(last))
    ((name, (scores,)),) = found.items()
    assert (name, scores.taker) == (last, last)
    assert scores.query.factor == 0.5
    np.testing.assert_array_equal(scores.query.channels, np.arange(WIDTH)[None])


NOT_FOUND = {
    "positions are added": ("q = Transpose <perm = [0, 2, 1, 3]> (q2)",
                            "q3 = Add (q2, b0) q = Transpose <perm = [0, 2, 1, 3]> (q3)"),
    "queries go elsewhere": ("p = Softmax", "z = Abs (q1) p = Softmax"),
    "no Softmax": ("Softmax <axis = -1>", "Relu"),
    "a norm of the queries": ("q2 = Mul (q1, root)",
                              "q9 = Mul (q1, root) q2 = LayerNormalization (q9, g)"),
}  # fmt: skip


@pytest.mark.parametrize("why", NOT_FOUND)
def test_what_is_more_than_a_product_of_two_projections_is_left_alone(why):
    old, new = NOT_FOUND[why]
    body = FUSED.replace(old, new)
    extra = {"b0": normal((SIZE,)), "g": np.ones(SIZE, np.float32)}
    constants = {
        "w": normal((WIDTH, 3 * WIDTH)), "b": normal((3 * WIDTH,)),
        "heads": np.array([0, 0, HEADS, SIZE]), "root": np.float32(0.5),
        **{name: values for name, values in extra.items() if f"{name})" in body},
    }  # fmt: skip
    outputs = f"float[N,{HEADS},5,{SIZE}] y"
    if why == "queries go elsewhere":
        outputs += ", float[A,B,C,D] z"
    graph = graph_of(f"float[N,5,{WIDTH}] x", outputs, body, **constants)
    assert scores_of(graph) == {}


# ------------------------------------------------------------------ how


def operands(graph: Graph, feeds: dict[str, Array]) -> tuple[Array, Array]:
    """Return queries and keys as the product reads them, float64."""
    tapped = graph.copy()
    tapped.outputs = [tapped.tensors()[name] for name in ("q", "k")]
    q, k = run(tapped, feeds)
    return q.astype(np.float64), k.astype(np.float64)


def sums_of(scores: Scores, wanted: Graph, got: Graph, count: int = 6) -> ScoreSums:
    pair = Pair(float_name="q", quantized_name="q"), Pair(float_name="k", quantized_name="k")
    sums = ScoreSums(scores=scores, pairs=pair)
    for batch in range(count):
        (q, k), (qq, kk) = (operands(g, sample(seed=batch)) for g in (wanted, got))
        sums.update((q, qq), (k, kk), held=batch >= count - 2)
    return sums


def disturbed(graph: Graph, steps: int = 2) -> Graph:
    """Return a copy whose projections are off by coarse rounding of their weights."""
    graph = graph.copy()
    for name in ("qkv", "query", "key"):
        for node in [n for n in graph.nodes if n.name == name]:
            weight = array_of(node.inputs[1])
            graph.set_input(
                node, 1, graph.constant(f"{name}_rough", np.trunc(weight * steps) / steps)
            )
    return graph


def best_gains(wanted: Graph, got: Graph, count: int = 4) -> Array:
    """Solve the ridge regression of all scores on the products of channels, head by head."""
    rows: list[list[Array]] = [[] for _ in range(HEADS)]
    sides: list[list[Array]] = [[] for _ in range(HEADS)]
    for batch in range(count):
        (q, k), (qq, kk) = (operands(g, sample(seed=batch)) for g in (wanted, got))
        k, kk = (x - x.mean(axis=-1, keepdims=True) for x in (k, kk))
        q, k, qq, kk = (x.reshape(len(x), -1, *x.shape[-2:]) for x in (q, k, qq, kk))
        for head in range(q.shape[1]):
            products = np.einsum("bic,bcj->bijc", qq[:, head], kk[:, head])
            rows[head].append(products.reshape(-1, products.shape[-1]))
            sides[head].append((q[:, head] @ k[:, head]).ravel())
    gains = []
    for parts, side in zip(rows, sides, strict=True):
        if parts:
            x, y = np.concatenate(parts), np.concatenate(side)
            ridge = RIDGE * np.square(x).sum() / x.shape[1]
            left = x.T @ x + ridge * np.eye(x.shape[1])
            gains.append(np.linalg.solve(left, x.T @ y + ridge))
    return np.array(gains)


@pytest.mark.parametrize("kind", ["fused", "query", "key"])
def test_the_gains_are_those_of_a_regression_on_all_scores(kind):
    """With a correction at work that was folded after the operands were fetched."""
    wanted = fused() if kind == "fused" else apart(kind)
    got = disturbed(wanted)
    ((name, (scores,)),) = scores_of(wanted).items()
    site = site_of(got, name)
    random = np.random.default_rng(8)
    done = ChannelAffine(
        gain=random.uniform(0.8, 1.2, site.channels), offset=random.normal(0, 0.2, site.channels)
    )
    found = solve_scores(sums_of(scores, wanted, got), site, done)
    assert isinstance(found, ChannelAffine), found
    corrected = got.copy()
    fold(corrected, site_of(corrected, name), done)
    best = np.clip(best_gains(wanted, corrected), 0.5, 2.0)
    side = scores.query if scores.taker == "query" else scores.key
    gains = found.gain[side.channels] / done.gain[side.channels]
    moved = (gains != 1.0).any(axis=1)  # heads that did not get worse on held-out samples
    assert moved.any()
    np.testing.assert_allclose(gains[moved], best[moved], rtol=2e-4)
    # Other channels keep what they had.
    others = np.ones(site.channels, bool)
    others[side.channels] = False
    np.testing.assert_array_equal(found.gain[others], done.gain[others])
    np.testing.assert_array_equal(found.offset[others], done.offset[others])
    # Folded, queries are those with `done`, times the gains: the bias behind the op as well.
    whole = got.copy()
    fold(whole, site_of(whole, name), found)
    (before, keys), (after, new_keys) = (operands(g, sample(seed=9)) for g in (corrected, whole))
    if scores.taker == "query":
        shape = (1, -1, 1, SIZE) if kind == "fused" else (1, 1, WIDTH)
        np.testing.assert_allclose(after, before * gains.reshape(shape), rtol=1e-4, atol=1e-5)
    else:
        new_keys, keys = (x - x.mean(axis=-1, keepdims=True) for x in (new_keys, keys))
        scaled = keys * gains.reshape(1, WIDTH, 1)
        np.testing.assert_allclose(new_keys, scaled, rtol=1e-4, atol=1e-5)


def test_scores_that_are_right_already_get_no_gains():
    graph = fused()
    ((name, (scores,)),) = scores_of(graph).items()
    site = site_of(graph, name)
    sums = sums_of(scores, graph, graph)
    found = solve_scores(sums, site, ChannelAffine.identity(site.channels))
    assert isinstance(found, ChannelAffine) is False
    assert "not surely get better" in str(found)


def test_refusals_say_why():
    graph = fused()
    scores = scores_of(graph)["qkv"][0]
    sums, site = sums_of(scores, graph, disturbed(graph)), site_of(graph, "qkv")
    identity = ChannelAffine.identity(site.channels)
    none = ScoreSums(scores=scores, pairs=sums.pairs)
    for query in (np.full((4, HEADS, 5, SIZE), np.nan), np.zeros((4, HEADS, 5, SIZE))):
        other = ScoreSums(scores=scores, pairs=sums.pairs)
        for held in (False, True):
            other.update((query, query), (np.ones((4, HEADS, SIZE, 5)),) * 2, held=held)
        reason = "not finite" if np.isnan(query).any() else "constant"
        assert reason in str(solve_scores(other, site, identity))
    assert "too few samples" in str(solve_scores(none, site, identity))
    bias = site.bias_slot
    assert bias is not None
    bias.write(graph, np.tile(array_of(bias.constant), (5, 1)))
    assert "row to row" in str(solve_scores(sums, site_of(graph, "qkv"), identity))
    bare = fused(body=FUSED.replace("h = Add (h0, b)", "h = Mul (h0, b)"))
    assert "would not follow" in str(solve_scores(sums, site_of(bare, "qkv"), identity))


# ------------------------------------------------------------------ in a walk


def correlated(seed: int) -> dict[str, Array]:
    """Channels that follow two directions: errors of one can be made up for by others."""
    main = normal((8, 5, 2), seed=seed) @ normal((2, WIDTH), seed=77)
    return {"x": (main + 0.1 * normal((8, 5, WIDTH), seed=seed + 1000)).astype(np.float32)}


def test_a_walk_fits_the_scores_without_a_run_more(monkeypatch):
    executed: Counter[str] = Counter()
    real = Submodel.run

    def counting(self: Submodel, feeds: Any) -> Any:
        executed.update(self.ops)
        return real(self, feeds)

    monkeypatch.setattr(Submodel, "run", counting)
    scores, counts = [], []
    for off in (False, True):
        if off:
            monkeypatch.setattr(module, "find_scores", lambda *_: {})
        reference = fused()
        quantized = disturbed(reference, 4)
        structure = quantized.to_text()
        executed.clear()
        result = compensate(reference, quantized, [correlated(i) for i in range(16)])
        counts.append(executed["MatMul"])
        assert result.method == "cwac"
        assert quantized.to_text() == structure
        unseen = [correlated(100 + i) for i in range(8)]
        want, got = (
            np.concatenate([run(graph, feeds)[0] for feeds in unseen])
            for graph in (reference, quantized)
        )
        scores.append(sqnr_db(want, got))
    assert counts[0] == counts[1]
    assert scores[0] > scores[1] + 2.0
