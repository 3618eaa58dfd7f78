"""Residual blocks are found in the graph, whoever exported it, and nothing else is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.modelfile import load_model
from qpass.passes.blocks import Block, find_blocks
from qpass.passes.normalize import normalize
from tests.jobs import CNN, TINY, VIT
from tests.small_models import from_text, residual_cnn, transformer, weights

HEADER = '<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({outputs}) {{ {body} }}'


def graph_of(body: str, inputs: str = "float[2,6,32] x", outputs: str = "float[2,6,32] y") -> Graph:
    """Make a graph whose constants w* are 32 x 32 and b* are vectors."""
    random = np.random.default_rng(0)
    words = {word.strip("(),") for word in body.split()}
    constants = {
        w: weights(random, 32, 32, fan_in=32) for w in words if w[:1] == "w" and len(w) == 2
    }
    constants |= {b: np.ones(32, np.float32) for b in words if b[:1] == "b" and len(b) == 2}
    return from_text(HEADER.format(inputs=inputs, outputs=outputs, body=body), **constants)


def only(graph: Graph) -> Block:
    found = find_blocks(graph)
    assert len(found.blocks) == 1, found
    return found.blocks[0]


def reasons(graph: Graph) -> list[str]:
    found = find_blocks(graph)
    assert not found.blocks
    return [refusal.reason for refusal in found.refusals]


def test_a_transformer_layer_is_one_block() -> None:
    assert only(transformer()) == Block(
        add="node_y", entry="x", output="y", first="n1", last="node_down0", axis=-1, mixes=True
    )


def test_a_residual_block_of_a_cnn() -> None:
    assert only(residual_cnn()) == Block(
        add="node_sum", entry="x0", output="sum", first="x0", last="node_b", axis=1, mixes=False
    )


@pytest.mark.parametrize(
    ("path", "axis", "count"),
    [(VIT, -1, 4), (CNN, 1, 2), (TINY["legacy"], -1, 1), (TINY["dynamo"], -1, 1)],
)
def test_both_exporters(path: Path, axis: int, count: int) -> None:
    graph = load_model(path)
    normalize(graph)
    found = find_blocks(graph)
    assert [block.axis for block in found.blocks] == [axis] * count
    assert not found.refusals
    for before, after in zip(found.blocks, found.blocks[1:], strict=False):
        between = graph.tensors()[after.entry]
        while between.name != before.output:  # only what has one input lies between blocks
            (between,) = [t for t in graph.producer(between).inputs if t.name in graph.tensors()][
                :1
            ]


def test_a_projected_skip_starts_where_the_two_ways_part() -> None:
    body = """
    s0 = MatMul (x, w1)  s = Add (s0, b1)
    h = MatMul (x, w2)  r = Relu (h)  f0 = MatMul (r, w3)  f = Add (f0, b3)
    y = Add (f, s)
    """
    block = only(graph_of(body))
    assert (block.entry, block.first, block.last) == ("x", "x", "node_f0")


def test_post_norm_halves_are_one_layer() -> None:
    body = """
    q = MatMul (x, w1)  k0 = MatMul (x, w2)  k = Transpose <perm = [0, 2, 1]> (k0)
    a = MatMul (q, k)  p = Softmax (a)  v = MatMul (x, w3)  c = MatMul (p, v)
    o = MatMul (c, w4)  m = Add (x, o)  n = LayerNormalization (m, b1, b2)
    u = MatMul (n, w5)  g = Gelu (u)  d = MatMul (g, w6)  y = Add (n, d)
    """
    block = only(graph_of(body))
    assert (block.entry, block.output, block.last, block.mixes) == ("x", "y", "node_d", True)


def test_two_mlps_are_two_blocks() -> None:
    body = """
    h = MatMul (x, w1)  r = Relu (h)  f = MatMul (r, w2)  m = Add (x, f)
    i = MatMul (m, w3)  s = Relu (i)  g = MatMul (s, w4)  y = Add (g, m)
    """
    found = find_blocks(graph_of(body))
    assert [(block.entry, block.output) for block in found.blocks] == [("x", "m"), ("m", "y")]


def test_channels_are_followed_through_a_transpose() -> None:
    """The branch of ConvNeXt works on channels that lie last, the sum on channels behind N."""
    body = """
    t = Transpose <perm = [0, 2, 3, 1]> (x)  h = MatMul (t, w1)  r = Gelu (h)
    f0 = MatMul (r, w2)  f = Transpose <perm = [0, 3, 1, 2]> (f0)  y = Add (x, f)
    """
    block = only(graph_of(body, "float[2,32,4,4] x", "float[2,32,4,4] y"))
    assert (block.axis, block.first) == (1, None)


def test_a_gated_end_is_followed_where_no_op_moves_channels() -> None:
    """The branch of YOLOX ends in SiLU: two ways from the last convolution to the sum."""
    random = np.random.default_rng(0)
    body = """
    c = Conv (x, w1)  s = Sigmoid (c)  f = Mul (c, s)  y = Add (x, f)
    """
    graph = from_text(
        HEADER.format(inputs="float[2,8,4,4] x", outputs="float[2,8,4,4] y", body=body),
        w1=weights(random, 8, 8, 1, 1, fan_in=8),
    )
    block = only(graph)
    assert (block.axis, block.last) == (1, None)


def test_a_rotation_or_a_sum_of_inputs_is_no_block() -> None:
    rotary = "a = Mul (x, b1)  n = Neg (x)  r = Mul (n, b2)  y = Add (a, r)"
    assert reasons(graph_of(rotary)) == []
    two = "p = MatMul (x, w1)  q = MatMul (z, w2)  y = Add (p, q)"
    assert reasons(graph_of(two, "float[2,6,32] x, float[2,6,32] z")) == []
    double = "h = MatMul (x, w1)  y = Add (h, h)"
    assert reasons(graph_of(double)) == []


def test_an_add_that_broadcasts_is_no_block() -> None:
    body = (
        "m = ReduceMean <keepdims = 1> (x, axes)  h = MatMul (x, w1)  g = Add (h, m) y = Relu (g)"
    )
    graph = graph_of(body.replace("(x, axes)", "(x)"))
    assert reasons(graph) == []


def test_a_long_skip_goes_around_blocks() -> None:
    body = """
    h = MatMul (x, w1)  f = MatMul (h, w2)  m = Add (x, f)
    i = MatMul (m, w3)  g = MatMul (i, w4)  n = Add (m, g)
    y = Add (x, n)
    """
    found = find_blocks(graph_of(body))
    assert [block.output for block in found.blocks] == ["m", "n"]
    assert [(r.where, r.reason) for r in found.refusals] == [
        ("node_y", "it goes around other blocks, which are compensated")
    ]


def test_channels_that_cannot_be_followed_are_refused() -> None:
    body = """
    h = MatMul (x, w1)  r = Reshape (h, shape)  t = Transpose <perm = [0, 2, 1]> (r)
    y = Add (x, t)
    """
    graph = from_text(
        HEADER.format(inputs="float[2,6,32] x", outputs="float[2,6,32] y", body=body),
        w1=weights(np.random.default_rng(0), 32, 32, fan_in=32),
        shape=np.array([2, 32, 6]),
    )
    assert reasons(graph) == ["the channels of its last linear op cannot be followed to the sum"]


def test_a_branch_that_ends_in_a_join_is_refused() -> None:
    body = """
    q = MatMul (x, w1)  k0 = MatMul (x, w2)  k = Transpose <perm = [0, 2, 1]> (k0)
    a = MatMul (q, k)  p = Softmax (a)  v = MatMul (x, w3)  c = MatMul (p, v)  y = Add (x, c)
    """
    assert reasons(graph_of(body)) == ["its branch does not end in a linear op"]
