"""Bodies of If and Loop: nothing inside is corrected, and what they capture stays what it was."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes.compensate import compensate
from qpass.passes.fold_affine import Site, find_site, fold
from tests.folds import exact_affine, graph_of, normal, run

CHANNELS = 6


def site_of(graph: Graph, reference: Graph, name: str = "op") -> Site:
    site = find_site(graph, {node.name: node for node in graph.nodes}, reference.node(name))
    assert isinstance(site, Site), site
    return site


BRANCH = """
[dq] w = DequantizeLinear <axis = 0> (w_int, w_scale, w_zero)
[op] h = Conv (x, w, b)
y = If (flag) <
    then_branch = yes () => (float[N, C, H, W] left) {
        wide = Cast <to = 1> (w_int)
        left = Conv (h, wide, b)
    },
    else_branch = no () => (float[N, C, H, W] right) { right = Neg (h) }
>
"""
LOOP = """
[dq] w = DequantizeLinear <axis = 0> (w_int, w_scale, w_zero)
[op] h = Conv (x, w, b)
y = Loop (trips, flag, h) <
    body = again (int64 i, bool on, float[N, C, H, W] state)
        => (bool still, float[N, C, H, W] next) {
        still = Identity (on)
        made = Conv (state, w, b)
        next = Add (made, h)
    }
>
"""


@pytest.mark.parametrize(("form", "flag"), [("If", True), ("If", False), ("Loop", True)])
def test_bodies_keep_the_constants_that_they_share_with_the_corrected_op(form, flag):
    """Inside of bodies nothing is corrected; outside the op is, and what bodies capture stays."""
    random = np.random.default_rng(4)
    integers = random.integers(-3, 4, (4, 4, 1, 1)).astype(np.int8)
    scale = np.array([0.25, 0.5, 0.75, 1.25], np.float32)
    constants = {
        "w_int": integers, "w_scale": scale, "w_zero": np.zeros(4, np.int8),
        "b": (random.integers(-8, 9, 4) / 4).astype(np.float32),
    }  # fmt: skip
    body = BRANCH if form == "If" else LOOP
    if form == "Loop":
        constants["trips"] = np.array(2)
    place = "float[2,4,3,3] x, bool flag", "float[N,C,H,W] y"
    graph = graph_of(*place, body, **constants)
    plain = "\n".join(line for line in body.splitlines() if "[dq]" not in line)
    reference = graph_of(*place, plain, w=integers * scale.reshape(4, 1, 1, 1), **constants)
    affine = exact_affine(4)
    feeds = {"x": random.integers(-3, 4, (2, 4, 3, 3)).astype(np.float32), "flag": np.array(flag)}
    # The explicit graph: the op makes `inner`, Mul and Add make what everybody reads as `h`.
    text = body.replace(
        "[op] h = Conv (x, w, b)",
        "inner = Conv (x, w, b) scaled = Mul (inner, gain) h = Add (scaled, offset)",
    )
    shape = (4, 1, 1)
    wanted = graph_of(
        *place, text, **constants,
        gain=affine.gain.reshape(shape).astype(np.float32),
        offset=affine.offset.reshape(shape).astype(np.float32),
    )  # fmt: skip
    (want,) = run(wanted, feeds)
    site = site_of(graph, reference)
    assert (site.gain, site.offset) == ("channel", True)
    fold(graph, site, affine)
    graph.sort()
    (got,) = run(graph, feeds)
    np.testing.assert_array_equal(got, want)


def test_a_product_whose_output_a_body_reads_takes_no_offset_behind_it():
    """The Add behind it is not what the body reads."""
    body = """
    [op] h = MatMul (x, w)
    a = Add (h, b)
    c = If (flag) <
        then_branch = yes () => (float[N, 6] left) { left = Neg (h) },
        else_branch = no () => (float[N, 6] right) { right = Abs (h) }
    >
    y = Add (a, c)
    """
    constants = {"w": normal((4, CHANNELS)), "b": np.ones(CHANNELS, np.float32)}
    graph = graph_of("float[2,4] x, bool flag", "float[2,6] y", body, **constants)
    site = site_of(graph, graph.copy())
    assert not site.offset
    assert "a body of control flow reads it in front of its bias" in site.reasons


def test_a_walk_leaves_bodies_as_they_are():
    """The op inside of the body is float in both graphs; the one in front is corrected."""
    random = np.random.default_rng(12)
    body = """
    [op] h = MatMul (x, w)
    a = Add (h, b)
    y = If (flag) <
        then_branch = yes () => (float[N, 6] left) { left = MatMul (a, inner) },
        else_branch = no () => (float[N, 6] right) { right = Neg (a) }
    >
    """
    weight, inner = normal((6, 6), seed=1), normal((6, 6), seed=2)
    scale = (np.abs(weight).max(axis=0) / 7).astype(np.float32)
    numbers = {"q": np.trunc(weight / scale).astype(np.int8), "s": scale, "z": np.zeros(6, np.int8)}
    place = "float[N,6] x, bool flag", "float[N,6] y"
    bias = {"b": np.zeros(6, np.float32), "inner": inner}
    reference = graph_of(*place, body, w=weight, **bias)
    graph = graph_of(*place, f"w = DequantizeLinear <axis = 1> (q, s, z) {body}", **numbers, **bias)
    batches = [
        {"x": (random.standard_normal((8, 6)) + 1).astype(np.float32), "flag": np.array(True)}
        for _ in range(8)
    ]
    branch = next(node for node in graph.nodes if node.op == "If")
    before = branch.attrs["then_branch"].SerializeToString()
    result = compensate(reference, graph, batches)
    assert result.method == "cwac"
    assert [layer.name for layer in result.layers] == ["op"]
    assert branch.attrs["then_branch"].SerializeToString() == before
    np.testing.assert_array_equal(array_of(graph.tensors()["inner"]), inner)
