"""Channels of one op make up for one another where the outputs of the model see sums of them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qpass.graph import Graph, array_of
from qpass.passes import round_weights as module
from qpass.passes.live_rows import LiveRows
from qpass.passes.round_weights import round_weights
from qpass.passes.rounding import output_metric
from qpass.passes.rounding.gptq import factorize, solve_gptq
from qpass.passes.rounding.grid import Grid
from qpass.passes.rounding.layer import find_layers
from qpass.passes.rounding.output_metric import find_metric, metric_error, solve_together
from qpass.stream import Stream
from qpass.submodel import Submodel
from tests.rounded import numbers_of, quantized_at
from tests.small_models import feeds_of, from_text, run_each, weights

Array = NDArray[Any]
HEAD = '<ir_version: 10, opset_import: ["": 21]>'
WIDE, CLASSES = 48, 3


def classifier() -> Graph:
    """Three products, few classes."""
    random = np.random.default_rng(2)
    made = {
        "w0": weights(random, 24, WIDE, fan_in=24), "w1": weights(random, WIDE, WIDE, fan_in=WIDE),
        "w2": weights(random, WIDE, CLASSES, fan_in=WIDE), "b0": weights(random, WIDE, fan_in=9),
        "b1": weights(random, WIDE, fan_in=9), "b2": weights(random, CLASSES, fan_in=9),
    }  # fmt: skip
    return from_text(
        f"""{HEAD} g (float[16,24] x) => (float[16,{CLASSES}] y) {{
        u = Gemm(x, w0, b0) a = Relu(u) v = Gemm(a, w1, b1) b = Relu(v) y = Gemm(b, w2, b2) }}""",
        **made,
    )


def tokens(read: str) -> Graph:
    """A norm and two products of five tokens; `read` says which ones a head sees."""
    random = np.random.default_rng(2)
    made = {
        "w0": weights(random, 24, WIDE, fan_in=24), "w1": weights(random, WIDE, WIDE, fan_in=WIDE),
        "w2": weights(random, WIDE, CLASSES, fan_in=WIDE), "g": np.ones(WIDE, np.float32),
        "c": np.zeros(WIDE, np.float32), "first": np.array(0), "axis": np.array([1]),
    }  # fmt: skip
    body = f"""u = MatMul(x, w0) a = Relu(u) v = MatMul(a, w1)
        n = LayerNormalization(v, g, c) {read} y = MatMul(t, w2)"""
    used = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return from_text(
        f"{HEAD} g (float[16,5,24] x) => (float[16,{CLASSES}] y) {{ {body} }}",
        **{name: value for name, value in made.items() if name in used},
    )


FIRST = "t = Gather<axis = 1>(n, first)"
MEAN = "t = ReduceMean<keepdims = 0>(n, axis)"


# ---------------------------------------------------------------------------- solving


def problem(rank: int) -> tuple[Array, Array, Grid, Array]:
    """Return a weight [1, 32, 40], the Hessian of its inputs, a grid and a metric of some rank."""
    random = np.random.default_rng(7)
    weight = random.standard_normal((1, 32, 40))
    rows = random.standard_normal((200, 32)) @ random.standard_normal((32, 32))
    step = np.abs(weight).max(axis=1, keepdims=True) / 7
    seen = random.standard_normal((40, rank))
    grid = Grid(scale=step, zero_point=np.zeros_like(step), qmin=-8, qmax=7)
    return weight, (rows.T @ rows)[None], grid, seen @ seen.T


@pytest.mark.parametrize(("rank", "share"), [(3, 0.1), (10, 0.4), (40, 1.0)])
def test_errors_that_nobody_sees_make_up_for_the_others(rank: int, share: float) -> None:
    weight, hessian, grid, metric = problem(rank)
    factor = factorize(hessian)
    assert not isinstance(factor, str)
    apart = weight - grid.values(solve_gptq(weight, factor, grid, sweeps=0))
    together = weight - grid.values(solve_together(weight, factor, grid, metric))
    before, after = (metric_error(e, factor.hessian, metric) for e in (apart, together))
    assert 0.0 < after < share * before


@pytest.mark.parametrize("rank", [10, 30])
def test_what_the_samples_do_not_show_is_not_given_up(rank: int) -> None:
    """Other samples see other sums: errors in all directions alike stay within bounds."""
    weight, hessian, grid, metric = problem(rank)
    factor = factorize(hessian)
    assert not isinstance(factor, str)
    apart = weight - grid.values(solve_gptq(weight, factor, grid, sweeps=0))
    together = weight - grid.values(solve_together(weight, factor, grid, metric))
    before, after = (metric_error(e, factor.hessian, np.eye(40)) for e in (apart, together))
    assert after < 4.0 * before  # 2 to 2.6; ten times without a damping


def test_outputs_that_are_seen_alike_and_alone_are_rounded_alone() -> None:
    weight, hessian, grid, _ = problem(1)
    factor = factorize(hessian)
    assert not isinstance(factor, str)
    np.testing.assert_array_equal(
        solve_together(weight, factor, grid, 3.0 * np.eye(40)),
        solve_gptq(weight, factor, grid, sweeps=0),
    )


def test_the_error_is_that_of_the_outputs() -> None:
    random = np.random.default_rng(1)
    error, rows = random.standard_normal((1, 6, 4)), random.standard_normal((50, 6))
    seen = random.standard_normal((4, 2))
    wanted = np.square(rows @ error[0] @ seen).sum()
    found = metric_error(error, (rows.T @ rows)[None], seen @ seen.T)
    assert found == pytest.approx(wanted, rel=1e-12)


# ---------------------------------------------------------------------------- finding


def metrics(graph: Graph) -> dict[str, Array | None]:
    """Return what `find_metric` says of each product, by name of its weight."""
    quantized, table, plan = quantized_at(graph, "w4a8")
    feeds = feeds_of(graph, 4)
    found = {}
    live, nodes = LiveRows(graph), iter(graph.nodes)
    with Stream(graph, quantized, feeds) as stream:
        layers, _ = find_layers(graph, quantized, numbers_of(plan, table), stream.aims)
        for layer in layers.values():
            layer.live = [live.of(batch).get(layer.name) for batch in feeds]
        for step in stream:
            for node in islice(nodes, step.unit.nodes):
                if node.name in layers:
                    layer = layers[node.name]
                    found[layer.original.inputs[1].name] = find_metric(stream, layer, len(feeds))
    return found


def test_a_linear_tail_gives_the_weights_of_the_head() -> None:
    graph = classifier()
    found = metrics(graph)
    feeds = feeds_of(graph, 4)
    head = next(array_of(c) for c in graph.constants() if c.name == "w2")
    wanted = np.zeros((WIDE, WIDE))
    for taps in run_each(graph.to_model(taps=["v", "y"]), feeds):
        size = np.mean(np.square(taps["y"], dtype=float))
        for row in taps["v"] > 0:
            jacobian = row[:, None] * head.astype(float)
            wanted += jacobian @ jacobian.T / (size * 16 * 4)
    assert found["w2"] is None  # it makes the output itself
    got = found["w1"]
    assert got is not None
    # A step of 1 % passes the kink of a ReLU in a few elements of a thousand.
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()


def test_one_row_that_is_seen_is_enough_and_many_are_too_much() -> None:
    first, mean = metrics(tokens(FIRST)), metrics(tokens(MEAN))
    assert first["w0"] is not None
    assert first["w1"] is not None
    assert mean["w0"] is None
    assert mean["w1"] is None


def test_derivatives_that_memory_cannot_hold_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit, found in ((WIDE * 16 * CLASSES, True), (WIDE * 16 * CLASSES - 1, False)):
        monkeypatch.setattr(output_metric, "DERIVATIVES", limit)
        assert (metrics(classifier())["w1"] is not None) is found


def test_outputs_that_are_not_finite_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(model: Submodel, feeds: Any) -> dict[str, Array]:
        return {name: np.full((16, CLASSES), np.inf, np.float32) for name in model.outputs}

    monkeypatch.setattr(output_metric, "Submodel", type("Infinite", (Submodel,), {"run": infinite}))
    assert metrics(classifier())["w1"] is None


def test_an_input_without_axes_has_no_samples() -> None:
    graph = classifier()
    text = f"""{HEAD} g (float scale, float[16,24] x0) => (float[16,{CLASSES}] y) {{
        x = Mul(x0, scale) u = Gemm(x, w0, b0) a = Relu(u) v = Gemm(a, w1, b1) b = Relu(v)
        y = Gemm(b, w2, b2) }}"""
    scaled = from_text(text, **{c.name: array_of(c) for c in graph.constants()})
    assert metrics(scaled)["w1"] is not None


# ---------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("model", [classifier, lambda: tokens(FIRST)], ids=["gemm", "token"])
def test_a_model_with_few_outputs_rounds_better(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = model()
    feeds, others = feeds_of(graph, 24), feeds_of(graph, 16, seed=99)
    errors = []
    for metric in (True, False):
        if not metric:
            monkeypatch.setattr(module, "find_metric", lambda *_: None)
        quantized, table, plan = quantized_at(graph, "w3a8")
        round_weights(graph, quantized, feeds, numbers_of(plan, table), method="gptq")
        pairs = zip(*(run_each(one.to_model(), others) for one in (graph, quantized)), strict=True)
        errors.append(sum(float(np.square(a["y"] - b["y"]).sum()) for a, b in pairs))
    assert errors[0] < 0.8 * errors[1]


def test_layers_with_many_levels_are_rounded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("not asked at 8 bits")

    monkeypatch.setattr(module, "find_metric", never)
    graph = classifier()
    quantized, table, plan = quantized_at(graph, "w8a8")
    round_weights(graph, quantized, feeds_of(graph, 8), numbers_of(plan, table), method="gptq")
