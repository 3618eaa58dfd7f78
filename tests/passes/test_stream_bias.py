"""Biases of a stream without norms move to its readers: one Add less, the same function."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.passes.stream_bias import move_stream_biases
from tests import oracle

# Offsets are multiplied by weights beforehand: sums of 16 products of size 1 in float32, relative
# to outputs of the size of their terms.
TOLERANCE = 2e-6
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
SHAPES = {
    "w": (16, 16), "w2": (16, 16), "b": (16,), "b2": (1, 16), "v": (16, 16), "c": (16,),
    "out": (16, 4), "d": (4,), "row": (5, 16), "g": (16,), "conv": (4, 16, 1), "e": (4,),
    "wide": (4, 16, 3),
}  # fmt: skip


def graph_of(body: str, signature: str) -> Graph:
    random = np.random.default_rng(1)
    made = {k: random.standard_normal(s).astype(np.float32) / 2 for k, s in SHAPES.items()}
    made |= {"first": np.array([0]), "places": np.array([1])}
    text = f"{HEAD} g {signature} {{ {body} }}"
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    graph = Graph.from_text(text, **{k: v for k, v in made.items() if k in words})
    graph.infer_shapes()
    return graph


TOKENS = "(float[2,5,16] x) => (float[2,5,4] y)"
BLOCK = (
    "h = MatMul (x, v)  hb = Add (h, c)  r = Relu (hb)  [fc] p = MatMul (r, w)  q = Add ({bias})"
    "  s = Add ({sum})  "
)
HEADED = "o = MatMul (s, out)  y = Add (o, d)"

# body, signature, how many Adds go
MOVED = {
    "one block": (BLOCK.format(bias="p, b", sum="x, q") + HEADED, TOKENS, 1),
    "the other way round": (BLOCK.format(bias="b2, p", sum="q, x") + HEADED, TOKENS, 1),
    "two blocks": (
        BLOCK.format(bias="p, b", sum="x, q")
        + "k = MatMul (s, v)  kb = Add (k, c)  t = Gelu (kb)  l = MatMul (t, w2)  m = Add (b2, l)"
        "  z = Add (s, m)  o = MatMul (z, out)  y = Add (o, d)",
        TOKENS,
        2,
    ),
    "a linear branch takes an offset and moves on": (
        BLOCK.format(bias="p, b", sum="x, q")
        + "l = MatMul (s, w2)  m = Add (b2, l)  z = Add (s, m)"
        "  o = MatMul (z, out)  y = Add (o, d)",
        TOKENS,
        2,
    ),
    "subtracted from": (
        BLOCK.format(bias="p, b", sum="x, q").replace("Add (x, q)", "Sub (q, x)") + HEADED,
        TOKENS,
        1,
    ),
    "averaged, and a Gemm without a bias": (
        BLOCK.format(bias="p, b", sum="x, q")
        + "a = ReduceMean <keepdims = 0> (s, places)  y = Gemm (a, out)",
        "(float[2,5,16] x) => (float[2,4] y)",
        1,
    ),
    "one token, behind a constant": (
        BLOCK.format(bias="p, b", sum="x, q")
        + "t = Add (s, row)  k = Gather <axis = 1> (t, first)  o = MatMul (k, out)  y = Add (o, d)",
        "(float[2,5,16] x) => (float[2,1,4] y)",
        1,
    ),
    "turned for a convolution": (
        BLOCK.format(bias="p, b", sum="x, q")
        + "t = Transpose <perm = [0,2,1]> (s)  y = Conv (t, conv, e)",
        "(float[2,5,16] x) => (float[2,4,5] y)",
        1,
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_the_add_goes_and_the_function_stays(name: str) -> None:
    body, signature, gone = MOVED[name]
    graph = graph_of(body, signature)
    after = graph.copy()
    report = move_stream_biases(after)
    assert (report.name, report.changed) == ("stream-bias", gone)
    ops = [Counter(node.op for node in g.nodes) for g in (graph, after)]
    assert ops[0] - ops[1] == Counter(Add=gone)
    assert not ops[1] - ops[0]
    x = np.random.default_rng(2).standard_normal((2, 5, 16)).astype(np.float32)
    wanted = oracle.reference(graph.to_model(), {"x": x})
    for engine in (oracle.reference, oracle.ort_plain, oracle.ort):
        got = engine(after.to_model(), {"x": x})
        assert oracle.relative_error(got, wanted) < TOLERANCE, engine.__name__


STAYS = {
    "it arrives twice": (
        BLOCK.format(bias="p, b", sum="x, q")
        + "z = Add (s, q)  o = MatMul (z, out)  y = Add (o, d)",
        "otherwise",
    ),
    "it is subtracted": (
        BLOCK.format(bias="p, b", sum="x, q").replace("Add (x, q)", "Sub (x, q)") + HEADED,
        "otherwise",
    ),
    "a reader without a bias": (
        BLOCK.format(bias="p, b", sum="x, q") + "y = MatMul (s, out)",
        "has no bias",
    ),
    "padding": (
        BLOCK.format(bias="p, b", sum="x, q")
        + "t = Transpose <perm = [0,2,1]> (s)  k = Conv <pads = [1,1]> (t, wide, e)"
        "  y = Transpose <perm = [0,2,1]> (k)",
        "padded",
    ),
    "one part of a concat": (
        BLOCK.format(bias="p, b", sum="x, q")
        + "z = Concat <axis = 1> (s, x)  o = MatMul (z, out)  l = Add (o, d)"
        "  y = Gather <axis = 1> (l, places)",
        "Concat is not linear",
    ),
    "an activation": (
        BLOCK.format(bias="p, b", sum="x, q") + "z = Relu (s)  o = MatMul (z, out)  y = Add (o, d)",
        "Relu is not linear",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_refuses_with_a_reason(name: str) -> None:
    body, reason = STAYS[name]
    graph = graph_of(body, "(float[2,5,16] x) => (float[2,a,4] y)")
    before = graph.fingerprint()
    report = move_stream_biases(graph)
    assert report.changed == 0
    assert graph.fingerprint() == before
    assert any(r.where == "fc" and reason in r.reason for r in report.refusals), report.refusals


def test_the_stream_may_not_be_an_output() -> None:
    graph = graph_of(
        BLOCK.format(bias="p, b", sum="x, q") + HEADED,
        "(float[2,5,16] x) => (float[2,5,4] y, float[2,5,16] s)",
    )
    (refusal,) = move_stream_biases(graph).refusals
    assert "s is an output of the model" in refusal.reason


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul (x, w)  k = Add (h, b)  r = Relu (k)  o = MatMul (r, out)  y = Add (o, d)",
        BLOCK.format(bias="p, b", sum="x, q")
        + "n = LayerNormalization (s, g)  y = MatMul (n, out)",
        "h = MatMul (x, w)  k = Add (h, row)  s = Add (x, k)  o = MatMul (s, out)  y = Add (o, d)",
    ],
)
def test_streams_with_norms_and_biases_outside_or_by_row_are_left_alone(body: str) -> None:
    report = move_stream_biases(graph_of(body, TOKENS))
    assert report.changed == 0
    assert not report.refusals
