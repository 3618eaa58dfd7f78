"""Rows of a residual sum that a norm reads count by the size of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import qpass
from qpass.choose import QTable
from qpass.graph import Graph
from qpass.passes import compensate as compensation
from qpass.passes.compensate import compensate
from qpass.passes.live_rows import row_counts
from qpass.passes.round_weights import round_weights
from qpass.passes.rounding import layer as layers
from qpass.passes.row_weights import NormedSum, Weights, find_normed_sum
from qpass.plan import Plan
from tests.rounded import numbers_of, quantized_at
from tests.small_models import from_text, run_each

WIDTH, TOKENS = 16, 8
HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
SIGNATURE = f"(float[2,{TOKENS},{WIDTH}] x) => (float[2,{TOKENS},{WIDTH}] y)"
NORM = "y = LayerNormalization <epsilon = 0.5> (s, one)"


def graph_of(body: str) -> Graph:
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "b": random.standard_normal(WIDTH).astype(np.float32),
        "row": random.standard_normal((TOKENS, WIDTH)).astype(np.float32),
        "one": np.ones(WIDTH, np.float32),
        "two": np.float32(2),
        "last": np.array([-1]),
    }
    graph = Graph.from_text(
        f"{HEAD} g {SIGNATURE} {{ {body} }}",
        **{name: value for name, value in constants.items() if name in body.replace(")", " ")},
    )
    graph.infer_shapes()
    return graph


FOUND = {
    "layer norm": (f"[fc] h = MatMul (x, w)  a = Add (h, b)  s = Add (x, a)  {NORM}", True),
    "rms norm": (
        "[fc] h = MatMul (x, w)  a = Add (b, h)  s = Add (a, x)"
        "  y = RMSNormalization <epsilon = 0.5> (s, one)",
        False,
    ),
    "further sums": (
        "[fc] h = MatMul (x, w)  a = Add (h, b)  t = Add (x, a)  k = Gelu (x)"
        f"  s = Add (t, k)  {NORM}",
        True,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_weight_is_what_the_norm_divides_by(name: str) -> None:
    body, centered = FOUND[name]
    graph = graph_of(body)
    found = find_normed_sum(graph, graph.node("fc"))
    assert found is not None
    assert (found.skip, found.centered, found.epsilon) == ("x", centered, 0.5)
    x = np.random.default_rng(1).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    constants = graph.tensors()
    output = x @ constants["w"].values
    total = (x + output + constants["b"].values).astype(np.float64).reshape(-1, WIDTH)
    size = total.var(axis=1) if centered else np.square(total).mean(axis=1)
    # x + output is rounded to float32 once more in one of the two ways.
    np.testing.assert_allclose(found.weights(output, x), 1.0 / (size + 0.5), rtol=1e-5)


def test_a_norm_that_is_written_out_is_known() -> None:
    graph = graph_of(
        "[fc] h = MatMul (x, w)  s = Add (x, h)  q = Pow (s, two)"
        "  m = ReduceMean (q, last)  r = Sqrt (m)  y = Div (s, r)"
    )
    found = find_normed_sum(graph, graph.node("fc"))
    assert found is not None
    assert not found.centered


NOT_FOUND = {
    "no norm": "[fc] h = MatMul (x, w)  s = Add (x, h)  y = Relu (s)",
    "no sum": "[fc] s = MatMul (x, w)  y = LayerNormalization (s, one)",
    "an op between": f"[fc] h = MatMul (x, w)  g = Gelu (h)  s = Add (x, g)  {NORM}",
    "a bias by row": f"[fc] h = MatMul (x, w)  a = Add (h, row)  s = Add (x, a)  {NORM}",
    "two readers": f"[fc] h = MatMul (x, w)  s0 = Add (x, h)  s = Add (s0, h)  {NORM}",
    "an output of the model": "[fc] y = MatMul (x, w)  s = Add (x, y)  z = Relu (s)",
    "a norm over tokens and channels": (
        "[fc] h = MatMul (x, w)  s = Add (x, h)  y = LayerNormalization <axis = 1> (s, row)"
    ),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_all_rows_count_the_same_without_a_norm_over_channels(name: str) -> None:
    graph = graph_of(NOT_FOUND[name])
    assert find_normed_sum(graph, graph.node("fc")) is None


def test_weights_of_all_batches_have_one_unit() -> None:
    total = NormedSum(skip="x", bias=np.zeros(1), centered=False, epsilon=0.0)
    weights = Weights(total)
    first, second = (np.full((1, 3, WIDTH), size, np.float32) for size in (1.0, 2.0))
    np.testing.assert_array_equal(weights.of(first, first), np.ones((1, 3, 1)))
    np.testing.assert_array_equal(weights.of(second, second), np.full((1, 3, 1), 0.25))


def test_other_weights_of_the_rows_do_not_replace_those_of_the_norm() -> None:
    reference = massive()
    graph, table, plan = quantized_at(reference, "w4a8")
    found, _ = layers.find_layers(reference, graph, numbers_of(plan, table))
    layer, random = found["node_d"], np.random.default_rng(3)
    shape = (2, TOKENS)
    normed = random.uniform(0.1, 2.0, (*shape, 1))
    live = random.random(shape) < 0.5
    np.testing.assert_array_equal(layer.guided(0, normed), normed)
    layer.live = [live]
    np.testing.assert_array_equal(layer.guided(0, normed), row_counts(live)[..., None] * normed)
    roots = random.uniform(0.1, 2.0, shape)
    layer.guide = [roots]
    wanted = roots[..., None] * np.sqrt(normed)  # the geometric mean of both weights
    np.testing.assert_array_equal(layer.guided(0, normed), wanted)


# A block without a norm in front of it: where x is large, what it adds is large as well.
MASSIVE = f"""{HEAD} g (float[2,{TOKENS},{WIDTH}] x) => (float[2,{TOKENS},{WIDTH}] y) {{
    r = Relu (x)
    d = MatMul (r, down_w)  e = Add (d, down_b)  s = Add (x, e)
    n = LayerNormalization (s, one)  h = MatMul (n, head_w)  y = Add (h, head_b)
}}"""


def massive() -> Graph:
    random = np.random.default_rng(4)
    constants: dict[str, Any] = {"one": np.ones(WIDTH, np.float32)}
    for name in ("down", "head"):
        weight = random.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
        constants[f"{name}_w"] = weight.astype(np.float32)
        constants[f"{name}_b"] = random.normal(0, 0.1, WIDTH).astype(np.float32)
    return from_text(MASSIVE, **constants)


def massive_feeds(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """One token of each sample is 30 times as large and always nearly the same."""
    random = np.random.default_rng(seed)
    direction = np.random.default_rng(0).standard_normal(WIDTH)
    feeds = []
    for _ in range(count):
        x = random.standard_normal((2, TOKENS, WIDTH))
        x[:, 0] = 30.0 * direction + random.standard_normal((2, WIDTH))
        feeds.append({"x": x.astype(np.float32)})
    return feeds


def errors(reference: Graph, graph: Graph) -> float:
    """Mean squared error of the output on samples that nobody has seen."""
    unseen = massive_feeds(24, seed=9)
    pairs = zip(*(run_each(one.to_model(), unseen) for one in (reference, graph)), strict=True)
    return float(np.mean([np.square(wanted["y"] - got["y"]).mean() for wanted, got in pairs]))


def after_each(
    module: ModuleType, work: Callable[[Graph, Graph, QTable, Plan], object]
) -> tuple[float, float]:
    """Errors after `work` on the quantized graph, with all rows alike and with weights."""
    reference, found = massive(), []
    for weighted in (False, True):
        graph, table, plan = quantized_at(reference, "w3a16")
        with pytest.MonkeyPatch.context() as patch:
            if not weighted:
                patch.setattr(module, "find_normed_sum", lambda *_: None)
            work(reference, graph, table, plan)
        found.append(errors(reference, graph))
    return found[0], found[1]


@pytest.mark.parametrize("method", ["gptq", "erq", "unit"])
def test_massive_tokens_do_not_decide_alone(method: Any) -> None:
    def work(reference: Graph, graph: Graph, table: QTable, plan: Plan) -> None:
        numbers = numbers_of(plan, table)
        round_weights(reference, graph, massive_feeds(32, 1), numbers, method=method)

    alike, weighted = after_each(layers, work)
    assert weighted < 0.8 * alike


def test_compensation_counts_rows_likewise() -> None:
    alike, weighted = after_each(
        compensation,
        lambda reference, graph, *_: compensate(reference, graph, massive_feeds(32, 1)),
    )
    assert weighted < alike


def test_tokens_on_a_grid(tmp_path: Any) -> None:
    """Channels behind three other axes, as in window attention: MatMul takes them as they lie."""
    random = np.random.default_rng(2)
    text = f"""{HEAD} g (float[n,4,6,16] x) => (float[n,4,6,8] y) {{
        u = MatMul (x, w)  v = Add (u, b)  r = Relu (v)  d = MatMul (r, k)  s = Add (x, d)
        m = LayerNormalization (s, one)  h = MatMul (m, out)  y = Add (h, c)
    }}"""
    constants = {
        "w": random.standard_normal((16, 32)) / 4,
        "b": random.standard_normal(32),
        "k": random.standard_normal((32, 16)) / 6,
        "one": np.ones(16),
        "out": random.standard_normal((16, 8)) / 4,
        "c": random.standard_normal(8),
    }
    graph = Graph.from_text(text, **{n: v.astype(np.float32) for n, v in constants.items()})
    path = tmp_path / "grid.onnx"
    path.write_bytes(graph.to_model().SerializeToString())
    data = [{"x": random.standard_normal((1, 4, 6, 16)).astype(np.float32)} for _ in range(32)]
    for options in ({"compensate": "cwac"}, {"compensate": "qwt"}, {"round": "unit"}):
        found = qpass.optimize(
            path,
            data=data,
            output=tmp_path / "q.onnx",
            precision="w4a8",
            engines=("ort",),
            **{"round": "rtn", **options},
        )
        assert found.ok
