"""Sites: every kind of producer takes the scale exactly, and an offset where all can follow."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.passes.equalize.apply import apply_scales
from qpass.passes.equalize.solve import Scales
from tests.equalize_sites import (
    IMAGE,
    LINEAR,
    assert_exact,
    feeds_of,
    graph_of,
    places,
    random_scales,
)
from tests.oracle import reference

QKV = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 4)}
HEADS = {"split": np.array([2, 5, 2, 4]), "join": np.array([2, 5, 8])}

# body, signature, constants, kind, ops whose constants took the scale
EXACT_CASES = {
    "layer norm": (
        "n = LayerNormalization (x, g, b)  [fc] y = MatMul (n, w)",
        LINEAR,
        {"g": (8,), "b": (8,), "w": (8, 4)},
        "norm",
        {"LayerNormalization"},
    ),
    "layer norm with a shift": (
        "n = LayerNormalization (x, g, b)  [fc] h = MatMul (n, w)  y = Add (h, c)",
        LINEAR,
        {"g": (8,), "b": (8,), "w": (8, 4), "c": (4,)},
        "norm",
        {"LayerNormalization"},
    ),
    "rms norm": (
        "n = RMSNormalization (x, g)  [fc] y = MatMul (n, w)",
        LINEAR,
        {"g": (8,), "w": (8, 4)},
        "norm",
        {"RMSNormalization"},
    ),
    "linear, bias, leaky relu": (
        "a = MatMul (x, v)  h = Add (a, b)  r = LeakyRelu <alpha = 0.1> (h)"
        "  [fc] y = MatMul (r, w)",
        LINEAR,
        {"v": (8, 6), "b": (6,), "w": (6, 4)},
        "linear",
        {"MatMul", "Add"},
    ),
    "gemm": (
        "a = Gemm <transB = 1> (x, v, b)  r = Relu (a)  [fc] y = Gemm (r, w)",
        "(float[5,8] x) => (float[5,4] y)",
        {"v": (6, 8), "b": (6,), "w": (6, 4)},
        "linear",
        {"Gemm"},
    ),
    "conv, relu, max pool": (
        "a = Conv <pads = [1,1,1,1]> (x, v, b)  r = Relu (a)"
        "  m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)"
        "  [fc] y = Conv <pads = [1,1,1,1]> (m, w)",
        IMAGE,
        {"v": (6, 3, 3, 3), "b": (6,), "w": (4, 6, 3, 3)},
        "linear",
        {"Conv"},
    ),
    "depthwise": (
        "a = Conv (x, v)  r = Relu (a)  [fc] d = Conv <group = 6, pads = [1,1,1,1]> (r, k)"
        "  y = Conv (d, w)",
        IMAGE,
        {"v": (6, 3, 3, 3), "k": (6, 1, 3, 3), "w": (4, 6, 1, 1)},
        "linear",
        {"Conv"},
    ),
    "average pool and flatten": (
        "a = Conv (x, v)  m = GlobalAveragePool (a)  f = Flatten (m)  [fc] y = Gemm (f, w)",
        "(float[2,3,9,9] x) => (float[2,4] y)",
        {"v": (6, 3, 3, 3), "w": (6, 4)},
        "linear",
        {"Conv"},
    ),
    "concat of two convolutions": (
        "a = Conv (x, v)  b = Conv (x, u)  r = Relu (a)  q = Relu (b)"
        "  c = Concat <axis = 1> (r, q)  [fc] y = Conv (c, w)",
        IMAGE,
        {"v": (6, 3, 3, 3), "u": (2, 3, 3, 3), "w": (4, 8, 1, 1)},
        "linear",
        {"Conv"},
    ),
    "batch norm behind an activation": (
        "a = Conv (x, v)  s = Sigmoid (a)  n = BatchNormalization (s, g, b, m, d)"
        "  [fc] y = Conv (n, w)",
        IMAGE,
        {
            "v": (6, 3, 3, 3),
            "g": (6,),
            "b": (6,),
            "m": (6,),
            "d": np.linspace(0.5, 2, 6).astype(np.float32),
            "w": (4, 6, 1, 1),
        },
        "norm",
        {"BatchNormalization"},
    ),
    "constant factor": (
        "t = Tanh (x)  n = Mul (t, g)  [fc] y = MatMul (n, w)",
        LINEAR,
        {"g": (8,), "w": (8, 4)},
        "constant",
        {"Mul"},
    ),
    "gated by an activation": (
        "a = MatMul (x, v)  g = Sigmoid (a)  u = MatMul (x, t)  m = Mul (g, u)"
        "  [fc] y = MatMul (m, w)",
        LINEAR,
        {"v": (8, 6), "t": (8, 6), "w": (6, 4)},
        "linear",
        {"MatMul"},
    ),
    "class token": (
        "n = LayerNormalization (x, g, b)  t = Gather <axis = 1> (n, first)"
        "  [fc] y = MatMul (t, w)",
        "(float[2,5,8] x) => (float[2,4] y)",
        {"g": (8,), "b": (8,), "first": np.array(0), "w": (8, 4)},
        "norm",
        {"LayerNormalization"},
    ),
    "three readers share": (
        "n = LayerNormalization (x, g, b)  [q] q = MatMul (n, w)  [k] k = MatMul (n, v)"
        "  s = Sigmoid (k)  y = Mul (q, s)",
        LINEAR,
        {"g": (8,), "b": (8,), "w": (8, 4), "v": (8, 4)},
        "norm",
        {"LayerNormalization"},
    ),
    "residual stream": (
        "t = MatMul (x, v)  e = Add (t, p)  [fc] a = MatMul (e, w1)  ab = Add (a, b1)"
        "  r = Relu (ab)  d = MatMul (r, w2)  e2 = Add (e, d)  f = MatMul (e2, w3)"
        "  fb = Add (f, b3)  g = Gelu (fb)  h = MatMul (g, w4)  e3 = Sub (e2, h)"
        "  k = MatMul (e3, w)  y = Add (k, c)",
        LINEAR,
        {
            "v": (8, 6),
            "p": (1, 5, 6),
            "w1": (6, 7),
            "b1": (7,),
            "w2": (7, 6),
            "w3": (6, 9),
            "b3": (9,),
            "w4": (9, 6),
            "w": (6, 4),
            "c": (4,),
        },
        "stream",
        {"MatMul", "Add"},
    ),
    "residual stream, averaged": (
        "m0 = MatMul (x, v)  size = Shape <end = 1> (x)  to = Concat <axis = 0> (size, one)"
        "  first = Expand (token, to)  t = Concat <axis = 1> (first, m0)"
        "  e = Add (t, p)  [fc] a = MatMul (e, w1)  ab = Add (a, b1)"
        "  r = Relu (ab)  d = MatMul (r, w2)  e2 = Add (e, d)"
        "  m = ReduceMean <keepdims = 0> (e2, places)  y = Gemm (m, w, c)",
        "(float[2,5,8] x) => (float[2,4] y)",
        {
            "v": (8, 6),
            "token": (1, 1, 6),
            "one": np.array([1, 6]),
            "p": (6, 6),
            "w1": (6, 7),
            "b1": (7,),
            "w2": (7, 6),
            "places": np.array([1]),
            "w": (6, 4),
            "c": (4,),
        },
        "stream",
        {"MatMul", "Expand", "Add"},
    ),
    "residual stream of images": (
        "a = Conv (x, v, b)  r = Relu (a)  [fc] d = Conv <pads = [1,1,1,1]> (r, w1)"
        "  e = Add (r, d)  s = Relu (e)  y = Conv (s, w)",
        IMAGE,
        {"v": (6, 3, 3, 3), "b": (6,), "w1": (6, 6, 3, 3), "w": (4, 6, 1, 1)},
        "stream",
        {"Conv"},
    ),
    "a slice of the channels": (
        "n = LayerNormalization (x, g, b)  p, q = Split <axis = 2, num_outputs = 2> (n)"
        "  t = Tanh (q)  [fc] a = MatMul (p, w)  y = Add (a, t)",
        LINEAR,
        {"g": (8,), "b": (8,), "w": (4, 4)},
        "norm",
        {"LayerNormalization"},
    ),
}
# Cases with a constant that an offset can go to; in all others something does not pass it on, or
# a MatMul behind has no bias to make up for it.
SHIFTED = {
    "layer norm with a shift",
    "batch norm behind an activation",
    "residual stream",
    "residual stream, averaged",
}
ATTENTION = (
    "q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)"
    "  q4 = Reshape (q, split)  k4 = Reshape (k, split)  v4 = Reshape (v, split)"
    "  qt = Transpose <perm = [0,2,1,3]> (q4)  kt = Transpose <perm = [0,2,3,1]> (k4)"
    "  vt = Transpose <perm = [0,2,1,3]> (v4)"
    "  [qk] l = MatMul (qt, kt)  a = Softmax (l)  [av] o4 = MatMul (a, vt)"
    "  ot = Transpose <perm = [0,2,1,3]> (o4)  o = Reshape (ot, join)  [fc] y = MatMul (o, wo)"
)


@pytest.mark.parametrize("name", EXACT_CASES)
def test_the_float_function_stays(name):
    body, signature, constants, kind, takers = EXACT_CASES[name]
    graph = graph_of(body, signature, **constants)
    after = graph.copy()
    found = {site.name: site for site in places(after)[0]}
    site = found.get("fc") or found["q"]
    assert site.kind == kind
    assert {slot.node.op for slot in site.slots} == takers
    assert (site.shift is not None) == (name in SHIFTED)
    nodes = len(after.nodes)
    assert apply_scales(after, site, random_scales(site)) == ""
    assert len(after.nodes) == nodes
    assert_exact(graph, after)


def test_attention_has_a_site_in_v_and_one_between_q_and_k():
    graph = graph_of(ATTENTION, LINEAR, **QKV, **HEADS)
    after = graph.copy()
    found = {site.kind: site for site in places(after)[0]}
    assert set(found) == {"value", "logits"}
    assert found["value"].groups == found["logits"].groups == 8
    for site in found.values():
        assert apply_scales(after, site, random_scales(site)) == ""
    assert_exact(graph, after)


def test_attention_with_biases_takes_an_offset_of_v():
    body = ATTENTION.replace("v = MatMul (x, wv)", "v0 = MatMul (x, wv)  v = Add (v0, bv)")
    body = body.replace("[fc] y = MatMul (o, wo)", "[fc] y0 = MatMul (o, wo)  y = Add (y0, bo)")
    graph = graph_of(body, LINEAR, **QKV, **HEADS, bv=(8,), bo=(4,))
    after = graph.copy()
    site = next(site for site in places(after)[0] if site.kind == "value")
    assert site.shift is not None
    assert apply_scales(after, site, random_scales(site)) == ""
    assert_exact(graph, after)


@pytest.mark.parametrize(
    "body",
    [
        "n = LayerNormalization (x, g, b)  s = Sigmoid (x)  m = Mul (n, s)"
        "  [fc] h = MatMul (m, w)  y = Add (h, c)",
        "n = LayerNormalization (x, g, b)  r = Relu (n)  [fc] h = MatMul (r, w)  y = Add (h, c)",
        "n = LayerNormalization (x, g, b)  m = Concat <axis = 1> (n, k)"
        "  [fc] h = MatMul (m, w)  z = Add (h, c)  y = Slice (z, from, to, axis)",
    ],
    ids=["gate", "relu", "joined with a constant"],
)
def test_a_scale_passes_where_an_offset_does_not(body):
    graph = graph_of(
        body,
        LINEAR,
        g=(8,),
        b=(8,),
        w=(8, 4),
        c=(4,),
        k=(2, 1, 8),
        **{"from": np.array([0]), "to": np.array([5]), "axis": np.array([1])},
    )
    after = graph.copy()
    site = next(site for site in places(after)[0] if site.name == "fc")
    assert site.shift is None
    assert apply_scales(after, site, random_scales(site)) == ""
    assert_exact(graph, after)


def test_the_scaled_tensor_is_what_it_is_said_to_be():
    body, signature, constants, _, _ = EXACT_CASES["layer norm with a shift"]
    graph = graph_of(body, signature, **constants)
    after = graph.copy()
    (site,) = places(after)[0]
    scales = random_scales(site)
    apply_scales(after, site, scales)
    feeds = feeds_of(graph)
    before, scaled = (
        reference(g.to_model(taps=[site.tensor]), feeds)[site.tensor] for g in (graph, after)
    )
    wanted = (before - scales.shift[1:]) / scales.scale[1:]
    np.testing.assert_allclose(scaled, wanted, rtol=1e-5, atol=1e-5)


def test_numbers_that_overflow_are_refused_and_nothing_changes():
    body, signature, constants, _, _ = EXACT_CASES["layer norm"]
    graph = graph_of(body, signature, **constants)
    (site,) = places(graph)[0]
    before = graph.fingerprint()
    scales = Scales(method="x", scale=np.full(site.groups + 1, 1e39), shift=np.zeros(9))
    assert "not finite" in apply_scales(graph, site, scales)
    assert graph.fingerprint() == before


def test_a_residual_stream_is_one_site():
    """All its readers share one set of scales, whichever of them is looked at first."""
    body, signature, constants, *_ = EXACT_CASES["residual stream"]
    sites, _ = places(graph_of(body, signature, **constants))
    streams = [site for site in sites if site.kind == "stream"]
    assert [len(site.readers) for site in streams] == [3]
