"""Where no constant takes a scale or an offset: the reason is given, a bought Mul is exact."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.passes.equalize.apply import buy_mul
from qpass.passes.equalize.solve import Scales
from tests.equalize_sites import IMAGE, LINEAR, assert_exact, graph_of, places

REFUSALS = {
    "non-linear in front": ("t = Gelu (x)  [fc] y = MatMul (t, w)", "Gelu in front"),
    "input of the model": ("[fc] y = MatMul (x, w)", "is an input of the model"),
    "a norm reads the stream": (
        "n = LayerNormalization (x, g, b)  a = MatMul (n, v)  r = Add (n, a)"
        "  [fc] h = MatMul (r, w)  m = LayerNormalization (r, g, b)  t = MatMul (m, w)"
        "  y = Add (h, t)",
        "LayerNormalization",
    ),
    "the stream is an input of the model": (
        "n = MatMul (x, v)  r = Add (n, x)  [fc] y = MatMul (r, w)",
        "is an input of the model",
    ),
    "one number expanded to all channels": (
        "n = MatMul (x, v)  m = ReduceMax <keepdims = 1> (x, last)  k = Expand (m, wide)"
        "  r = Add (n, k)  [fc] y = MatMul (r, w)",
        "Expand",
    ),
    "a sum broadcasts channels": (
        "n = MatMul (x, v)  m = ReduceMax <keepdims = 1> (x, last)  r = Add (n, m)"
        "  [fc] y = MatMul (r, w)",
        "broadcasts channels",
    ),
    "another reader": (
        "n = LayerNormalization (x, g, b)  [fc] h = MatMul (n, w)  s = Softmax (n)"
        "  t = MatMul (s, w)  y = Add (h, t)",
        "Softmax",
    ),
    "a clip in front that zero does not pass": (
        "a = MatMul (x, v)  r = Clip (a, one, high)  [fc] y = MatMul (r, w)",
        "Clip in front",
    ),
    "a clip in front whose end is not constant": (
        "a = MatMul (x, v)  m = ReduceMax <keepdims = 0> (x)  r = Clip (a, low, m)"
        "  [fc] y = MatMul (r, w)",
        "Clip in front",
    ),
    "norm over two axes": (
        "n = LayerNormalization <axis = 1> (x, g2)  [fc] y = MatMul (n, w)",
        "LayerNormalization",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_refuses_with_a_reason(name):
    body, reason = REFUSALS[name]
    graph = graph_of(
        body,
        LINEAR,
        **{
            key: value
            for key, value in {
                "w": (8, 4),
                "v": (8, 8),
                "g": (8,),
                "b": (8,),
                "g2": (5, 8),
                "low": np.array(0, np.float32),
                "high": np.array(6, np.float32),
                "one": np.array(1, np.float32),
                "last": np.array([2]),
                "wide": np.array([2, 5, 8]),
            }.items()
            if f"{key})" in body or f" {key}," in body
        },
    )
    sites, refused = places(graph)
    assert "fc" not in {site.name for site in sites}
    where = {r.tensor: r.reason for r in refused}
    assert reason in where[graph.node("fc").inputs[0].name]


def test_an_output_of_the_model_is_not_scaled():
    graph = graph_of(
        "n = LayerNormalization (x, g, b)  [fc] y = MatMul (n, w)",
        "(float[2,5,8] x) => (float[2,5,8] n, float[2,5,4] y)",
        g=(8,),
        b=(8,),
        w=(8, 4),
    )
    sites, refused = places(graph)
    assert not sites
    assert "output of the model" in refused[0].reason


SHIFTLESS = {
    "offset of one summand only": (
        "t = MatMul (x, v)  e = Add (t, p)  [fc] a = MatMul (t, w)  q = Add (a, c)"
        "  z = Add (t, e)  k = MatMul (z, w)  l = Add (k, c)  y = Add (q, l)"
    ),
    "offset of both summands": (
        "t = MatMul (x, v)  e = Add (t, p)  z = Add (e, e)  [fc] k = MatMul (z, w)  y = Add (k, c)"
    ),
    "an activation on the way": (
        "t = MatMul (x, v)  e = Add (t, p)  z = Relu (e)  [fc] k = MatMul (z, w)  y = Add (k, c)"
    ),
    "a reader without a bias": (
        "t = MatMul (x, v)  e = Add (t, p)  z = Add (t, e)  [fc] y = MatMul (z, w)"
    ),
}


@pytest.mark.parametrize("name", SHIFTLESS)
def test_no_offset_where_it_does_not_arrive_once_at_every_reader(name):
    constants = {"v": (8, 6), "p": (6,), "w": (6, 4)}
    if " c)" in SHIFTLESS[name]:
        constants["c"] = (4,)
    graph = graph_of(SHIFTLESS[name], LINEAR, **constants)
    (site,) = places(graph)[0]
    assert site.shift is None


def test_a_bought_mul_is_exact_and_serves_all_readers():
    graph = graph_of(
        "t = Gelu (x)  [a] p = MatMul (t, w)  [b] q = MatMul (t, v)  y = Add (p, q)",
        LINEAR,
        w=(8, 4),
        v=(8, 4),
    )
    after = graph.copy()
    sites, refused = places(after)
    assert not sites
    place = next(r for r in refused if r.tensor == "t")
    assert [r.linear.node.name for r in place.readers] == ["a", "b"]
    scales = Scales(
        method="random", scale=np.array([1.0, *np.linspace(0.3, 9, 8)]), shift=np.zeros(9)
    )
    assert buy_mul(after, "t", place.readers, scales) == ""
    after.sort()
    assert [node.op for node in after.nodes].count("Mul") == 1
    assert_exact(graph, after)


def test_a_mul_is_bought_where_the_rank_of_the_tensor_is_unknown():
    """As behind an If: the weight of the Conv knows it."""
    graph = graph_of("t = Gelu (x)  [c] y = Conv (t, w)", IMAGE, w=(4, 3, 2, 2))
    after = graph.copy()
    place = next(r for r in places(after)[1] if r.tensor == "t")
    place.readers[0].linear.node.inputs[0].shape = None
    scales = Scales(method="random", scale=np.array([1.0, 0.3, 2.0, 9.0]), shift=np.zeros(4))
    assert buy_mul(after, "t", place.readers, scales) == ""
    after.sort()
    assert_exact(graph, after)
