"""Which layers form a basic unit, from the graph alone."""

from __future__ import annotations

import numpy as np

from qpass.graph import Graph
from qpass.passes.rounding.basic_units import find_basic_units

HEAD = '<ir_version: 10, opset_import: ["": 21]> g '


def graph_of(body: str, signature: str, **weights: tuple[int, ...]) -> Graph:
    constants = {name: np.ones(shape, np.float32) for name, shape in weights.items()}
    return Graph.from_text(f"{HEAD}{signature} {{ {body} }}", **constants)


def test_chains_of_residual_blocks_end_before_the_sum_and_behind_a_skip() -> None:
    body = """
        [stem] x0 = Conv (x, w)
        [a1] h = Conv (x0, w)
        r = Relu (h)
        [a2] b = Conv (r, w)
        x1 = Add (b, x0)
        [c1] h1 = Conv (x1, w)
        [c2] h2 = Conv (h1, w)
        [down] d = Conv (x1, w)
        y = Add (h2, d)
    """
    graph = graph_of(body, "(float[1, 4, 5, 5] x) => (float[1, 4, 5, 5] y)", w=(4, 4, 1, 1))
    assert find_basic_units(graph) == (("stem",), ("a1", "a2"), ("c1", "c2"), ("down",))


def test_expand_depthwise_project_and_no_longer_chain() -> None:
    lines, x = [], "x"
    for i in range(7):
        lines += [f"[c{i}] h{i} = Conv (x{i}, w)", f"x{i + 1} = Relu (h{i})"]
        x = f"x{i + 1}"
    body = "x0 = Identity (x)\n" + "\n".join(lines)
    graph = graph_of(body, f"(float[1, 4, 5, 5] x) => (float[1, 4, 5, 5] {x})", w=(4, 4, 1, 1))
    units = find_basic_units(graph)
    assert units == (("c0", "c1", "c2"), ("c3", "c4", "c5"), ("c6",))


def test_attention_projections_and_the_pair_of_an_mlp() -> None:
    body = """
        [q] q0 = MatMul (x, w)
        [k] k0 = MatMul (x, w)
        [v] v0 = MatMul (x, w)
        kt = Transpose <perm = [1, 0]> (k0)
        s = MatMul (q0, kt)
        p = Softmax (s)
        a = MatMul (p, v0)
        [o] o0 = MatMul (a, w)
        x1 = Add (o0, x)
        [up] u = MatMul (x1, w)
        g = Relu (u)
        [down] d = MatMul (g, w)
        y = Add (d, x1)
    """
    graph = graph_of(body, "(float[4, 4] x) => (float[4, 4] y)", w=(4, 4))
    assert find_basic_units(graph) == (("q", "k", "v", "o"), ("up", "down"))


def test_an_output_of_the_graph_ends_a_unit() -> None:
    body = "[a] h = MatMul (x, w)\n[b] y = MatMul (h, w)"
    graph = graph_of(body, "(float[4, 4] x) => (float[4, 4] h, float[4, 4] y)", w=(4, 4))
    assert find_basic_units(graph) == (("a",), ("b",))


def test_every_linear_op_is_in_one_unit_in_order() -> None:
    body = "[a] h = MatMul (x, w)\n[b] i = MatMul (x, w)\nz = Add (h, i)\n[c] y = MatMul (z, w)"
    graph = graph_of(body, "(float[4, 4] x) => (float[4, 4] y)", w=(4, 4))
    assert find_basic_units(graph) == (("a", "b", "c"),)
