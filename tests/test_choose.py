"""Numbers of a plan: ranges, weights, ties, pins, room for biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qpass.calibrate import Samples, TensorStats, collect, input_specs, open_samples
from qpass.calibrate.ranges import solve_range
from qpass.choose import (
    BIAS_LIMIT,
    KEPT,
    QTable,
    RangeCache,
    choose_qtable,
    importance,
    percentile_weight_range,
    solve_weight_range,
    weight_range,
)
from qpass.dtypes import storage_for
from qpass.errors import InternalError
from qpass.evidence import taps_of
from qpass.graph import Graph
from qpass.options import WeightRange
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.program import Policy, Precision
from qpass.qparams import TensorSpec, choose_qparams, dequantize, quantize
from qpass.targets import TARGETS

RangeOf = Callable[[np.ndarray, TensorSpec], tuple[np.ndarray, np.ndarray]]
RANDOM = np.random.default_rng(4)
W8A8 = Policy(precision=Precision(weight=8, activation=8))
S8_ROWS = TensorSpec(
    storage=storage_for(8, signed=True), symmetric=True, bits=8, granularity="per_channel", axis=0,
    narrow_range=True,
)  # fmt: skip


def linear(bias: float = 1.0, small: float = 1.0) -> Graph:
    """X -> Conv (two readers of x) -> Gemm head; channel 0 of the first weight is `small`."""
    w = RANDOM.standard_normal((16, 16, 1, 1)).astype(np.float32)
    w[0] *= small
    b = np.zeros(16, np.float32)
    b[0] = bias
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[1,16,4,4] x) => (float[1,16,4,4] y, float[1,16,4,4] z) {
      [one] y = Conv(x, w, b)
      [two] z = Conv(x, v)
    }"""
    graph = Graph.from_text(text, w=w, b=b, v=np.full((16, 16, 1, 1), 2, np.float32))
    graph.infer_shapes()
    return graph


def samples_of(graph: Graph, rows: list[np.ndarray]) -> Samples:
    return open_samples([{"x": row} for row in rows], input_specs(graph.to_model()))


def numbers(graph: Graph, policy: Policy = W8A8, method: str = "minmax") -> tuple[Plan, QTable]:
    plan = make_plan(graph, TARGETS["ort-x86"], policy)
    x = RANDOM.uniform(-2, 6, (4, 1, 16, 4, 4)).astype(np.float32)
    x[0, 0, 0, 0, 0], x[1, 0, 0, 0, 0] = -2.0, 6.0
    found = collect(graph.to_model(), taps_of(graph, plan), samples_of(graph, list(x)))
    return plan, choose_qtable(graph, plan, found.stats, method=method)


def test_minmax_is_the_range_of_the_samples() -> None:
    _, table = numbers(linear())
    assert (table.ranges["x"].low, table.ranges["x"].high) == (-2.0, 6.0)
    assert float(table.qparams["x"].scale) == np.float32(8 / 255)


def test_pinned_range_needs_no_statistics() -> None:
    graph = linear()
    policy = replace(W8A8, ranges=dict.fromkeys(("x", "y", "z"), (-1.0, 1.0)))
    plan = make_plan(graph, TARGETS["ort-x86"], policy)
    table = choose_qtable(graph, plan, {})
    assert {table.ranges[d.key].method for d in plan.activations()} == {"pinned"}
    assert float(table.qparams["x"].scale) == np.float32(2 / 255)


def test_missing_statistics_are_a_bug_of_ours() -> None:
    graph = linear()
    with pytest.raises(InternalError, match="no statistics"):
        choose_qtable(graph, make_plan(graph, TARGETS["ort-x86"], W8A8), {})


def test_tied_tensors_share_their_numbers() -> None:
    graph = linear()
    plan = make_plan(graph, TARGETS["ort-x86"], W8A8)
    tied = replace(plan, decisions=tuple(
        replace(d, group="g") if d.kind == "activation" else d for d in plan.decisions
    ))  # fmt: skip
    stats: dict[str, TensorStats] = {}
    samples = samples_of(graph, [RANDOM.standard_normal((1, 16, 4, 4)).astype(np.float32)])
    stats.update(collect(graph.to_model(), taps_of(graph, plan), samples).stats)
    table = choose_qtable(graph, tied, stats, method="minmax")
    found = [table.qparams[d.key] for d in tied.activations()]
    assert len({(float(q.scale), int(q.zero_point)) for q in found}) == 1
    low = min(table.ranges[d.key].low for d in tied.activations())
    high = max(table.ranges[d.key].high for d in tied.activations())
    assert float(found[0].scale) == np.float32((high - low) / 255)


def test_importance_adds_the_power_of_all_readers() -> None:
    graph = linear()
    plan = make_plan(graph, TARGETS["ort-x86"], W8A8)
    decision = next(d for d in plan.activations() if d.tensor == "x")
    found = importance(graph, decision)
    weight = np.squeeze(graph.node("one").inputs[1].values).astype(np.float64)
    np.testing.assert_allclose(found, np.square(weight).sum(axis=0) + 16 * 4.0, rtol=1e-12)


@pytest.mark.parametrize("transposed", [0, 1])
def test_importance_of_gemm(transposed: int) -> None:
    w = RANDOM.standard_normal((16, 24)).astype(np.float32)
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g (float[1,16] x) => (float[1,24] y) {{ [fc] y = Gemm<transB = {transposed}>(x, w) }}"""
    graph = Graph.from_text(text, w=w.T.copy() if transposed else w)
    graph.infer_shapes()
    plan = make_plan(graph, TARGETS["ort-x86"], W8A8)
    found = importance(graph, next(plan.activations()))
    np.testing.assert_allclose(found, np.square(w.astype(np.float64)).sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_weight_scale_of_a_transposed_convolution_leaves_room_for_the_bias(groups: int) -> None:
    """Channel 2 of each group has tiny weights, that of the last group a large bias as well."""
    w = RANDOM.standard_normal((32, 32 // groups, 2, 2)).astype(np.float32)
    w[:, 2] *= 1e-9
    b = np.zeros(32, np.float32)
    b[32 - 32 // groups + 2] = 1e3
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g (float[1,32,4,4] x) => (float[1,32,5,5] y) {{
      [up] y = ConvTranspose<group = {groups}>(x, w, b)
    }}"""
    graph = Graph.from_text(text, w=w, b=b)
    graph.infer_shapes()
    policy = replace(W8A8, ranges=dict.fromkeys(("x", "y"), (-2.0, 6.0)))
    plan = make_plan(graph, TARGETS["tensorrt"], policy)
    table = choose_qtable(graph, plan, {})
    (weight,) = (table.qparams[d.key] for d in plan.weights() if d.kind == "weight")
    step = float(table.qparams["x"].scale) * np.atleast_1d(weight.scale.astype(np.float64))
    places = np.arange(32) % len(step)
    assert (np.abs(b) / step[places] <= BIAS_LIMIT).all()
    assert (np.abs(b) / step[places]).max() > 0.999 * BIAS_LIMIT


def test_weight_scale_leaves_room_for_the_bias() -> None:
    """Without it b / (x_scale * w_scale) is 1e3 / (8/255 * 1e-9/127) = 4e15, far beyond int32."""
    graph = linear(bias=1e3, small=1e-9)
    plan, table = numbers(graph)
    key = next(d.key for d in plan.weights() if d.edges and d.edges[0].node == "one")
    stored = 1e3 / (float(table.qparams["x"].scale) * table.qparams[key].scale.astype(np.float64))
    assert stored[0] <= BIAS_LIMIT
    assert stored[0] > 0.999 * BIAS_LIMIT
    magnitudes = np.abs(graph.node("one").inputs[1].values).reshape(16, -1).max(axis=1)
    # Scales are rounded to float32 once; the other channels have room enough.
    np.testing.assert_allclose(table.qparams[key].scale[1:], magnitudes[1:] / 127, rtol=1e-6)
    assert table.qparams[key].scale[0] > 1000 * magnitudes[0] / 127


def test_weight_range_per_channel_and_per_block() -> None:
    values = np.arange(-6, 6, dtype=np.float32).reshape(4, 3)
    low, high = weight_range(values, S8_ROWS)
    np.testing.assert_array_equal(low, values.min(axis=1))
    np.testing.assert_array_equal(high, values.max(axis=1))
    low, high = weight_range(
        values, replace(S8_ROWS, granularity="per_block", block_size=2, narrow_range=False)
    )
    np.testing.assert_array_equal(low, [values[:2].min(axis=0), values[2:].min(axis=0)])
    np.testing.assert_array_equal(high, [values[:2].max(axis=0), values[2:].max(axis=0)])


def test_searched_weight_range_is_never_worse_and_clips_outliers() -> None:
    spec = replace(S8_ROWS, bits=4)
    rows = RANDOM.standard_normal((8, 200)).astype(np.float32)
    rows[0, 0] = 9.0

    def errors(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        q = choose_qparams(spec, low, high)
        return np.square(dequantize(quantize(rows, q), q) - rows).sum(axis=1)

    plain, searched = weight_range(rows, spec), solve_weight_range(rows, spec)
    assert (errors(*searched) <= errors(*plain) * (1 + 1e-6)).all()
    assert errors(*searched)[0] < errors(*plain)[0]
    assert searched[1][0] < 9.0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [3, 5])  # with 3 zero points are searched, with 5 shares alone
def test_every_block_gets_the_range_of_its_own_search(bits: int, axis: int) -> None:
    """Blocks of five along an axis of twelve: the last one is short; each is searched alone."""
    spec = TensorSpec(
        storage=storage_for(bits, signed=False), bits=bits, symmetric=False,
        granularity="per_block", axis=axis, block_size=5,
    )  # fmt: skip
    values = np.random.default_rng(0).standard_normal((12, 12)) ** 3
    low, high = solve_weight_range(values, spec)
    plain_low, plain_high = weight_range(values, spec)
    assert low.shape == high.shape == plain_low.shape
    assert (high < plain_high).any()
    lines, lows, highs = (values, low, high) if axis else (values.T, low.T, high.T)
    alone = replace(spec, granularity="per_tensor", axis=None, block_size=None)
    for line, line_lows, line_highs in zip(lines, lows, highs, strict=True):
        for number, start in enumerate(range(0, 12, 5)):
            one_low, one_high = solve_weight_range(line[start : start + 5], alone)
            np.testing.assert_allclose((line_lows[number], line_highs[number]), (one_low, one_high))


def percentiles(row: np.ndarray, symmetric: bool) -> tuple[float, float]:
    """The definition, row by row: what `numpy.quantile` says of one scale's weights."""
    row = row.astype(np.float64).ravel()
    if symmetric:
        high = float(np.quantile(np.abs(row), KEPT))
        return -high, high
    tail = (1.0 - KEPT) / 2.0
    return float(np.quantile(row, tail)), float(np.quantile(row, 1.0 - tail))


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_of_a_tensor_and_of_channels(symmetric: bool) -> None:
    spec = replace(S8_ROWS, symmetric=symmetric, axis=1)
    values = (np.random.default_rng(1).standard_normal((40, 12, 30)) ** 3).astype(np.float32)
    low, high = percentile_weight_range(values, spec)
    rows = [percentiles(values[:, c], symmetric) for c in range(12)]
    np.testing.assert_array_equal(np.stack([low, high], axis=1), rows)
    whole = replace(spec, granularity="per_tensor", axis=None)
    low, high = percentile_weight_range(values, whole)
    assert (float(low), float(high)) == percentiles(values, symmetric)
    # 14,400 weights: one in 10,000 is cut off.
    assert np.abs(values).max() > high


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [5, 4, 16])
def test_percentile_of_every_block(axis: int, symmetric: bool, size: int) -> None:
    """Of an axis of twelve: with a short last block, without one, and a block that is all of it."""
    spec = TensorSpec(
        storage=storage_for(4, signed=symmetric), bits=4, symmetric=symmetric,
        granularity="per_block", axis=axis, block_size=size,
    )  # fmt: skip
    values = np.random.default_rng(0).standard_normal((12, 12)) ** 3
    low, high = percentile_weight_range(values, spec)
    assert low.shape == high.shape == weight_range(values, spec)[0].shape
    lines, lows, highs = (values, low, high) if axis else (values.T, low.T, high.T)
    for line, line_lows, line_highs in zip(lines, lows, highs, strict=True):
        rows = [percentiles(line[start : start + size], symmetric) for start in range(0, 12, size)]
        np.testing.assert_array_equal(np.stack([line_lows, line_highs], axis=1), rows)


def test_percentile_of_few_weights_stays_between_the_two_largest() -> None:
    """Nine weights: 8 * 0.0001 of the gap from 1 to 9 is lost, as the docstring says."""
    row = np.array([[0.0, 1, 1, 1, 1, 1, 1, 1, -9]])
    low, high = percentile_weight_range(row, S8_ROWS)
    # KEPT is rounded to float64 and then multiplied by 8: an ulp of 8.
    np.testing.assert_allclose(high, 9.0 - 8 * 0.0001 * 8.0, rtol=1e-15)
    np.testing.assert_array_equal(low, -high)


def test_percentile_of_pruned_weights_is_not_zero() -> None:
    values = np.zeros((2, 20_001), np.float32)
    values[0, 7] = -3.0
    low, high = percentile_weight_range(values, S8_ROWS)
    np.testing.assert_array_equal((low, high), [[-3.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("bits", "round_method", "weight_method", "same_as"),
    [(8, "auto", "auto", weight_range), (4, "auto", "auto", solve_weight_range),
     (4, "rtn", "auto", weight_range), (8, "mse", "auto", solve_weight_range),
     (8, "gptq", "auto", solve_weight_range), (8, "rtn", "mse", solve_weight_range),
     (4, "auto", "minmax", weight_range), (4, "gptq", "minmax", weight_range),
     (8, "rtn", "percentile", percentile_weight_range),
     (4, "gptq", "percentile", percentile_weight_range)],
)  # fmt: skip
def test_ranges_of_weights_by_rounding_and_by_choice(
    bits: int, round_method: str, weight_method: WeightRange, same_as: RangeOf
) -> None:
    graph = linear(bias=0.0)
    policy = Policy(precision=Precision(weight=bits, activation=8), low_bit_edges=True)
    plan = make_plan(graph, TARGETS["ort-x86"], policy)
    pinned = replace(plan, decisions=tuple(
        replace(d, pinned=(-1.0, 1.0)) if d.kind == "activation" else d for d in plan.decisions
    ))  # fmt: skip
    table = choose_qtable(graph, pinned, {}, round_method=round_method, weight_method=weight_method)
    weights = [d for d in pinned.weights() if d.kind == "weight"]
    assert {d.tensor for d in weights} == {"w", "v"}
    for decision in weights:
        values = graph.tensors()[decision.tensor].values
        wanted = choose_qparams(decision.spec, *same_as(values, decision.spec))
        np.testing.assert_array_equal(table.qparams[decision.key].scale, wanted.scale)


def fire(low: float, high: float) -> Graph:
    """Two Convs with ranges set by `low` and `high` joined by Concat and read by a third."""
    eye = np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1)
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N, 16, 4, 4] x) => (float[N, 16, 4, 4] y) {
       [a] a = Conv (x, wa, b)
       [b] c = Conv (x, wb, b)
       [r] ra = Relu (a)
       [s] rb = Relu (c)
       [j] j = Concat <axis = 1> (ra, rb)
       [k] y = Conv (j, wk, b)
    }"""
    graph = Graph.from_text(
        text, wa=low * eye, wb=high * eye, wk=np.concatenate([eye, eye], 1), b=np.zeros(16, "f")
    )
    graph.infer_shapes()
    return graph


@pytest.mark.parametrize(("low", "high", "widest"), [(1.0, 3.0, "rb"), (3.0, 1.0, "ra")])
def test_concat_takes_the_numbers_of_its_widest_input(low: float, high: float, widest: str) -> None:
    graph = fire(low, high)
    plan = make_plan(graph, TARGETS["ort-x86"], W8A8)
    taps = taps_of(graph, plan)
    model = graph.to_model()
    data = [{"x": RANDOM.standard_normal((1, 16, 4, 4)).astype(np.float32)} for _ in range(8)]
    stats = collect(model, taps, open_samples(data, input_specs(model))).stats
    # Its own range would be another one: percentile clips the union elsewhere than its part.
    wide = replace(stats["j"], high=2.0 * stats["j"].high)
    table = choose_qtable(graph, plan, {**stats, "j": wide}, method="minmax").qparams
    other = "ra" if widest == "rb" else "rb"
    assert table["j"].scale == table[widest].scale
    assert table["j"].zero_point == table[widest].zero_point
    assert table["j"].scale != table[other].scale


def test_a_cache_gives_the_same_numbers_and_solves_each_range_once(monkeypatch):
    graph = linear()
    plan = make_plan(graph, TARGETS["ort-x86"], W8A8)
    x = RANDOM.standard_normal((4, 1, 16, 4, 4)).astype(np.float32)
    stats = collect(graph.to_model(), taps_of(graph, plan), samples_of(graph, list(x))).stats
    wanted = choose_qtable(graph, plan, stats, method="percentile")
    solved = []

    def counted(*arguments: object) -> object:
        solved.append(arguments)
        return solve_range(*arguments)

    monkeypatch.setattr("qpass.choose.solve_range", counted)
    cache = RangeCache()
    for _ in range(2):
        table = choose_qtable(graph, plan, stats, method="percentile", cache=cache)
        assert table.ranges == wanted.ranges
    assert len(solved) == len(stats)
    choose_qtable(graph, plan, stats, method="minmax", cache=cache)
    assert len(solved) == 2 * len(stats)
