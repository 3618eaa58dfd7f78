"""Chains that exporters write: every spelling becomes the same op, near misses stay."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.passes.normalize import is_silu, normalize
from tests import oracle

SIGNATURE = "(float[2,3,8] x) => (float[2,3,8] y)"
# Constants of float32 and the reassociated products of a chain: a few units in the last place.
TOLERANCE = 3e-6

ERF = {
    "half_last": "d = Div(x, root2) e = Erf(d) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)",
    "half_at_x": "d = Mul(x, root) e = Erf(d) s = Add(one, e) h = Mul(half, x) y = Mul(s, h)",
    "half_at_sum": "d = Div(x, root2) e = Erf(d) s = Add(e, one) h = Mul(s, half) y = Mul(h, x)",
    "half_inside": "d = Mul(root, x) e = Erf(d) h = Mul(e, half) s = Add(h, half) y = Mul(x, s)",
    "divided_by_two": "d = Div(x, root2) e = Erf(d) s = Add(e, one) p = Mul(x, s) y = Div(p, two)",
    "x_divided": "d = Div(x, root2) e = Erf(d) s = Add(e, one) h = Div(x, two) y = Mul(h, s)",
    "two_quarters": "d = Div(x, root2) e = Erf(d) s = Add(e, one) p = Mul(s, quarter) "
    "r = Mul(x, p) y = Mul(r, two)",
}
TANH_END = "t = Tanh(i) s = Add(t, one) p = Mul(x, s) y = Mul(p, half)"
TANH = {
    "pow": f"c = Pow(x, three) k = Mul(cubic, c) a = Add(x, k) i = Mul(inner, a) {TANH_END}",
    "products": f"q = Mul(x, x) c = Mul(x, q) k = Mul(cubic, c) a = Add(k, x) i = Mul(a, inner) "
    f"{TANH_END}",
    "cubic_first": f"k = Mul(cubic, x) q = Mul(k, x) c = Mul(q, x) a = Add(x, c) "
    f"i = Mul(a, inner) {TANH_END}",
    "factored": f"q = Mul(x, x) k = Mul(q, cubic) a = Add(k, one) m = Mul(x, inner) i = Mul(m, a) "
    f"{TANH_END}",
    "factored_with_pow": f"q = Pow(x, two) k = Mul(cubic, q) a = Add(one, k) m = Mul(a, x) "
    f"i = Mul(inner, m) {TANH_END}",
}
NUMBERS = {
    "root2": math.sqrt(2),
    "root": math.sqrt(0.5),
    "one": 1,
    "half": 0.5,
    "two": 2,
    "three": 3,
    "quarter": 0.25,
    "cubic": 0.044715,
    "inner": math.sqrt(2 / math.pi),
}


def graph_of(body: str, opset: int = 21, **constants: object) -> Graph:
    arrays = {name: np.asarray(value, np.float32) for name, value in constants.items()}
    text = f'<ir_version: 10, opset_import: ["": {opset}]> g {SIGNATURE} {{ {body} }}'
    used = {name: value for name, value in arrays.items() if name in text}
    graph = Graph.from_text(text, **used)
    for node in graph.nodes:
        node.name = f"node_{node.outputs[0].name}"
    return graph


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {"x": (3 * random.standard_normal((2, 3, 8))).astype(np.float32)}


def outputs(graph: Graph) -> dict[str, np.ndarray]:
    return oracle.reference(graph.to_model(), feeds())


@pytest.mark.parametrize("body", ERF.values(), ids=ERF.keys())
def test_erf_gelu_in_every_spelling(body: str) -> None:
    graph = graph_of(body, **NUMBERS)
    wanted = outputs(graph)
    normalize(graph)
    assert ops(graph) == ["Gelu"]
    assert oracle.relative_error(outputs(graph), wanted) <= TOLERANCE


@pytest.mark.parametrize("body", TANH.values(), ids=TANH.keys())
def test_tanh_gelu_in_every_spelling(body: str) -> None:
    graph = graph_of(body, **NUMBERS)
    wanted = outputs(graph)
    normalize(graph)
    assert ops(graph) == ["Gelu"]
    assert graph.nodes[0].attrs == {"approximate": "tanh"}
    assert oracle.relative_error(outputs(graph), wanted) <= TOLERANCE


@pytest.mark.parametrize("constant", ["root2", "one", "half", "cubic", "inner"])
def test_gelu_with_another_number_stays(constant: str) -> None:
    for body in (ERF["half_last"], TANH["pow"]):
        if constant in body:
            graph = graph_of(body, **{**NUMBERS, constant: NUMBERS[constant] * 1.001})
            before = ops(graph)
            normalize(graph)
            assert ops(graph) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("p = Mul(x, s)", "z = Neg(x) p = Mul(z, s)"),  # another tensor than inside of Erf
        ("y = Mul(p, half)", "y = Div(two, p)"),  # a constant divided by it
        ("y = Mul(p, half)", "q = Mul(x, p) y = Mul(q, half)"),  # x twice
        ("s = Add(e, one)", "s = Sub(e, one)"),
    ],
)
def test_what_looks_like_gelu_stays(old: str, new: str) -> None:
    body = ERF["half_last"].replace(old, new)
    assert body != ERF["half_last"]
    graph = graph_of(body, **NUMBERS)
    before = ops(graph)
    normalize(graph)
    assert ops(graph) == before


def test_gelu_takes_four_digits() -> None:
    """0.7071 is 1e-5 off; where it counts most that is 0.73 * 0.4 * 1e-5 of x * x * density."""
    graph = graph_of(ERF["half_at_x"], **{**NUMBERS, "root": 0.7071})
    wanted = outputs(graph)
    normalize(graph)
    assert ops(graph) == ["Gelu"]
    assert oracle.relative_error(outputs(graph), wanted) <= 1e-5


def test_gelu_of_a_product_whose_factors_are_read_too() -> None:
    """The argument is a product itself: the search for factors must not look into it."""
    body = ERF["half_at_x"].replace("x", "v")
    graph = graph_of(f"u = Sigmoid(x) v = Mul(u, x) {body}", **NUMBERS)
    normalize(graph)
    assert ops(graph) == ["Sigmoid", "Mul", "Gelu"]


def test_the_new_node_keeps_name_metadata_and_output() -> None:
    graph = graph_of(ERF["half_last"], **NUMBERS)
    last = graph.nodes[-1]
    last.extra.metadata_props.add(key="namespace", value="block.0")
    normalize(graph)
    (node,) = graph.nodes
    assert (node.name, node.outputs[0].name) == ("node_y", "y")
    assert graph.to_model().graph.node[0].metadata_props[0].value == "block.0"


@pytest.mark.parametrize("square", ["q = Mul(c, c)", "q = Pow(c, two)"], ids=["product", "power"])
@pytest.mark.parametrize(
    "divide",
    [
        "r = Sqrt(e) n = Div(c, r)",
        "r = Pow(e, half) n = Div(c, r)",
        "r = Pow(e, minus) n = Mul(c, r)",
        "r = Sqrt(e) i = Reciprocal(r) n = Mul(i, c)",
        "r = Sqrt(e) i = Div(one, r) n = Mul(c, i)",
    ],
    ids=["sqrt", "pow", "inverse_pow", "reciprocal", "one_over"],
)
def test_layer_norm_in_every_spelling(square: str, divide: str) -> None:
    body = (
        f"m = ReduceMean<axes=[-1]>(x) c = Sub(x, m) {square} v = ReduceMean<axes=[-1]>(q) "
        f"e = Add(eps, v) {divide} g = Mul(n, gain) y = Add(g, bias)"
    )
    random = np.random.default_rng(4)
    numbers = {**NUMBERS, "eps": 1e-5, "minus": -0.5}
    vectors = {"gain": random.standard_normal(8), "bias": random.standard_normal(8)}
    graph = graph_of(body, 17, **numbers, **vectors)
    wanted = outputs(graph)
    normalize(graph)
    assert ops(graph) == ["LayerNormalization"]
    assert oracle.relative_error(outputs(graph), wanted) <= 1e-5


def test_layer_norm_with_the_centre_computed_twice() -> None:
    body = (
        "m = ReduceMean<axes=[-1]>(x) m2 = ReduceMean<axes=[-1]>(x) c = Sub(x, m) c2 = Sub(x, m2) "
        "q = Mul(c2, c2) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) r = Sqrt(e) y = Div(c, r)"
    )
    graph = graph_of(body, 17, eps=1e-5)
    normalize(graph)
    assert ops(graph) == ["LayerNormalization"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("c = Sub(x, m)", "c = Sub(m, x)"),
        ("q = Mul(c, c)", "q = Mul(c, x)"),
        ("m = ReduceMean<axes=[-1]>(x)", "m = ReduceMean<axes=[-1]>(z)"),
        ("e = Add(v, eps)", "e = Add(v, x)"),
    ],
)
def test_what_looks_like_layer_norm_stays(old: str, new: str) -> None:
    body = (
        "z = Relu(x) m = ReduceMean<axes=[-1]>(x) c = Sub(x, m) q = Mul(c, c) "
        "v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) r = Sqrt(e) n = Div(c, r) y = Add(n, z)"
    )
    recognized, near = graph_of(body, 17, eps=1e-5), graph_of(body.replace(old, new), 17, eps=1e-5)
    normalize(recognized)
    normalize(near)
    assert "LayerNormalization" in ops(recognized)
    assert "LayerNormalization" not in ops(near)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("s = Sigmoid(x) y = Mul(x, s)", True),
        ("s = Sigmoid(x) y = Mul(s, x)", True),
        ("r = Relu(x) s = Sigmoid(r) y = Mul(x, s)", False),
        ("s = Tanh(x) y = Mul(x, s)", False),
        ("s = Sigmoid(x) y = Add(x, s)", False),
    ],
)
def test_is_silu(body: str, expected: bool) -> None:
    graph = graph_of(body)
    assert is_silu(graph, graph.nodes[-1]) is expected


def test_is_silu_of_swish() -> None:
    graph = graph_of("a = Relu(x) b = Relu(a) y = Relu(b)", 24)
    graph.nodes[2].op = "Swish"
    assert is_silu(graph, graph.nodes[2])
    graph.nodes[2].attrs["alpha"] = 1.702
    assert not is_silu(graph, graph.nodes[2])
