"""Keys are found by what happens to them, in the forms that exporters give attention."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.passes.attention import Shapes, key_channels, without_means
from qpass.passes.channel_affine import PairMoments
from qpass.passes.channel_gate import solve_gated
from qpass.passes.compensate import compensate
from tests.folds import graph_of, normal, rounded, run
from tests.small_models import transformer

WIDTH, HEADS, SIZE, TOKENS = 8, 2, 4, 5

PROJECTION = "[qkv] qkv0 = MatMul (x, w) qkv = Add (qkv0, b)"
TAIL = """
    scaled = Mul (scores, root)
    p = Softmax <axis = -1> (scaled)
    context = MatMul (p, v)
    turned = Transpose <perm = [0, 2, 1, 3]> (context)
    y = Reshape (turned, whole)
"""
# TorchScript exporter, timm's form: one reshape to [B, N, 3, H, D], a turn, and Gather.
GATHERED = """
    five = Reshape (qkv, to_five)
    first = Transpose <perm = [2, 0, 3, 1, 4]> (five)
    q = Gather <axis = 0> (first, i0)
    k0 = Gather <axis = 0> (first, i1)
    v = Gather <axis = 0> (first, i2)
    k = Transpose <perm = [0, 1, 3, 2]> (k0)
    scores = MatMul (q, k)
"""
# Dynamo exporter: Split of the projection or of the turned tensor, then Squeeze.
UNBOUND = """
    five = Reshape (qkv, to_five)
    first = Transpose <perm = [2, 0, 3, 1, 4]> (five)
    q0, k0, v0 = Split <axis = 0, num_outputs = 3> (first)
    q = Squeeze (q0, i0_list)
    k1 = Squeeze (k0, i0_list)
    v = Squeeze (v0, i0_list)
    qs = Mul (q, half)
    k2 = Transpose <perm = [0, 1, 3, 2]> (k1)
    k = Mul (k2, half)
    scores = MatMul (qs, k)
"""
SLICED = """
    q0 = Slice (qkv, s0, s1, last)
    k0 = Slice (qkv, s1, s2, last)
    v0 = Slice (qkv, s2, s3, last)
    q1 = Reshape (q0, to_heads)
    k1 = Reshape (k0, to_heads)
    v1 = Reshape (v0, to_heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
    scores = MatMul (q, k)
"""
SPLIT = """
    q0, k0, v0 = Split <axis = -1> (qkv, parts)
    q1 = Reshape (q0, to_heads)
    k1 = Reshape (k0, to_heads)
    v1 = Reshape (v0, to_heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q1)
    k = Transpose <perm = [0, 2, 3, 1]> (k1)
    v = Transpose <perm = [0, 2, 1, 3]> (v1)
    scores = MatMul (q, k)
"""
# Shapes at run time, and a mask added to the scores.
DYNAMIC = """
    count = Shape <start = 0, end = 2> (x)
    rest = Concat <axis = 0> (count, three_heads)
    five = Reshape (qkv, rest)
    first = Transpose <perm = [2, 0, 3, 1, 4]> (five)
    q = Gather <axis = 0> (first, i0)
    k0 = Gather <axis = 0> (first, i1)
    v = Gather <axis = 0> (first, i2)
    k = Transpose <perm = [0, 1, 3, 2]> (k0)
    product = MatMul (q, k)
    scores = Add (product, mask)
"""
FORMS = {
    "gather": GATHERED, "unbind": UNBOUND, "slice": SLICED, "split": SPLIT, "dynamic": DYNAMIC,
}  # fmt: skip


def constants() -> dict[str, np.ndarray]:
    return {
        "b": normal((3 * WIDTH,), seed=2),
        "root": np.float32(0.5), "half": np.float32(0.7),
        "to_five": np.array([0, 0, 3, HEADS, SIZE]), "three_heads": np.array([3, HEADS, SIZE]),
        "to_heads": np.array([0, 0, HEADS, SIZE]), "whole": np.array([0, 0, WIDTH]),
        "i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "i0_list": np.array([0]),
        "s0": np.array([0]), "s1": np.array([WIDTH]), "s2": np.array([2 * WIDTH]),
        "s3": np.array([3 * WIDTH]), "last": np.array([-1]), "parts": np.array([WIDTH] * 3),
        "mask": np.triu(np.full((TOKENS, TOKENS), -1e9, np.float32), 1),
        "per_head": np.linspace(0.5, 2, SIZE).astype(np.float32),
        "turn": normal((1, 1, TOKENS, SIZE), seed=9),
    }  # fmt: skip


def attention(middle: str, *, tail: str = TAIL, integer: bool = False) -> Graph:
    weight = normal((WIDTH, 3 * WIDTH), seed=1) / 2
    body = PROJECTION + middle + tail
    weights = {"w": weight}
    if integer:
        body = f"w = DequantizeLinear <axis = 1> (w_int, w_scale, w_zero) {body}"
        weights = rounded("w", weight, 1, steps=7)
        # Rounded towards zero: a bias, where the inputs have a mean.
        weights["w_int"] = np.trunc(weight / weights["w_scale"]).astype(np.int8)
    used = {name: array for name, array in constants().items() if name in body.replace(",", " ")}
    place = f"float[B,{TOKENS},{WIDTH}] x", f"float[B,{TOKENS},{WIDTH}] y"
    return graph_of(*place, body, **weights, **used)


def sample(rows: int = 2, *, seed: int = 3) -> dict[str, np.ndarray]:
    return {"x": normal((rows, TOKENS, WIDTH), seed=seed)}


def keys_of(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return key_channels(graph, Shapes(graph=graph, sample=feeds))


@pytest.mark.parametrize("form", FORMS)
def test_the_key_third_of_a_fused_projection(form):
    (found,) = keys_of(attention(FORMS[form]), sample()).items()
    assert found[0] == "qkv"
    np.testing.assert_array_equal(np.flatnonzero(found[1]), np.arange(WIDTH, 2 * WIDTH))


@pytest.mark.parametrize("form", FORMS)
def test_an_offset_of_keys_changes_nothing_and_one_of_values_all(form):
    graph = attention(FORMS[form])
    (before,) = run(graph, sample())
    for channels, same in (
        (slice(WIDTH, 2 * WIDTH), True), (slice(0, WIDTH), False), (slice(2 * WIDTH, None), False),
    ):  # fmt: skip
        moved = graph.copy()
        bias = constants()["b"]
        bias[channels] += 1.0
        (add,) = [n for n in moved.nodes if n.op == "Add" and n.inputs[0].name == "qkv0"]
        moved.set_input(add, 1, moved.constant("moved", bias))
        (after,) = run(moved, sample())
        # Softmax in float32: the scores grow by up to ten, and so does their rounding.
        assert bool(np.abs(after - before).max() < 1e-5) is same


def test_separate_projections_and_two_blocks():
    """Three projections of their own, one of them for keys; the other products are no keys."""
    text = """
    [q] q0 = MatMul (x, wq) q1 = Add (q0, b8)
    [k] k0 = MatMul (x, wk) k1 = Add (b8, k0)
    [v] v0 = MatMul (x, wv)
    k2 = Transpose <perm = [0, 2, 1]> (k1)
    s = MatMul (q1, k2) d = Div (s, root) p = Softmax (d)
    c = MatMul (p, v0)
    [out] y = MatMul (c, wo)
    """
    weights = {name: normal((WIDTH, WIDTH)) for name in ("wq", "wk", "wv", "wo")}
    shape = f"float[B,{TOKENS},{WIDTH}]"
    graph = graph_of(
        f"{shape} x", f"{shape} y", text,
        **weights, b8=np.ones(WIDTH, np.float32), root=np.float32(2),
    )  # fmt: skip
    found = keys_of(graph, sample())
    assert list(found) == ["k"]
    assert found["k"].all()


def test_keys_from_a_convolution():
    """Channels on axis 1, windows turned into positions: the numbers of the channels tell."""
    text = """
    [kq] m = Conv (x, w)
    q0, k0 = Split <axis = 1, num_outputs = 2> (m)
    q1 = Reshape (q0, flat) k = Reshape (k0, flat)
    q = Transpose <perm = [0, 2, 1]> (q1)
    s = MatMul (q, k) y = Softmax <axis = 2> (s)
    """
    graph = graph_of(
        "float[1,4,3,3] x", "float[1,9,9] y", text,
        w=normal((6, 4, 1, 1)), flat=np.array([0, 3, 9]),
    )  # fmt: skip
    found = keys_of(graph, {"x": normal((1, 4, 3, 3))})
    np.testing.assert_array_equal(np.flatnonzero(found["kq"]), [3, 4, 5])


def replaced(form: str, old: str, new: str) -> str:
    assert old in form
    return form.replace(old, new)


TURNED = "k = Transpose <perm = [0, 2, 3, 1]> (k1)"
GATHERED_TURN = "k = Transpose <perm = [0, 1, 3, 2]> (k0)"
SOFTMAX = "Softmax <axis = -1> (scaled)"
LAST = "y = Reshape (turned, whole)"
NOT_KEYS = {
    "scaled by channel": (
        replaced(SPLIT, TURNED, f"k9 = Mul (k1, per_head) {TURNED.replace('k1', 'k9')}"),
        TAIL,
    ),
    "turned by position": (
        replaced(
            GATHERED, GATHERED_TURN, f"k9 = Mul (k0, turn) {GATHERED_TURN.replace('k0', 'k9')}"
        ),
        TAIL,
    ),
    "scores are capped": (
        SPLIT,
        replaced(TAIL, f"p = {SOFTMAX}", "capped = Tanh (scaled) p = Softmax <axis = -1> (capped)"),
    ),
    "softmax over the queries": (SPLIT, replaced(TAIL, SOFTMAX, "Softmax <axis = 2> (scaled)")),
    "no softmax": (SPLIT, replaced(TAIL, SOFTMAX, "Sigmoid (scaled)")),
    "scores are read twice": (
        SPLIT,
        replaced(
            TAIL,
            LAST,
            "y0 = Reshape (turned, whole) m = ReduceMean <keepdims = 0> (scores) y = Add (y0, m)",
        ),
    ),
    "keys are read elsewhere": (
        SPLIT,
        replaced(TAIL, LAST, "y0 = Reshape (turned, whole) y = Add (y0, k0)"),
    ),
}


@pytest.mark.parametrize("why", NOT_KEYS)
def test_what_an_offset_does_change_is_no_key(why):
    middle, tail = NOT_KEYS[why]
    assert keys_of(attention(middle, tail=tail), sample()) == {}


def test_the_block_of_the_other_tests():
    graph = transformer()
    (mask,) = keys_of(graph, {"x": normal((2, 6, 32))}).values()
    np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(32, 64))


def test_a_fit_without_means_gives_gains_and_no_offset():
    random = np.random.default_rng(0)
    a = random.standard_normal((64, 3))
    t = 1.25 * a + 7.0
    channels = np.array([True, False, True])
    groups = [
        PairMoments.of(x, y, axis=-1) for x, y in zip(np.split(a, 8), np.split(t, 8), strict=True)
    ]
    solved = solve_gated([without_means(m, channels) for m in groups], ridge=0.0)
    np.testing.assert_allclose(solved.affine.gain, 1.25, rtol=1e-9)
    np.testing.assert_allclose(solved.affine.offset, [0.0, 7.0, 0.0], atol=1e-9)


def test_compensation_leaves_the_keys_without_an_offset():
    reference, quantized = attention(GATHERED), attention(GATHERED, integer=True)
    before = constants()["b"]
    batches = [{"x": sample(8, seed=seed)["x"] + 1.0} for seed in range(8)]
    result = compensate(reference, quantized, batches, method="bias")
    assert result.method == "bias"
    (add,) = [n for n in quantized.nodes if n.op == "Add" and n.inputs[0].name == "qkv0"]
    changed = add.inputs[1].values != before
    assert not changed[WIDTH : 2 * WIDTH].any()
    assert changed[:WIDTH].any()
    assert changed[2 * WIDTH :].any()
