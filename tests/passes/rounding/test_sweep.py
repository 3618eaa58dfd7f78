"""Sweeping back over a unit: its error never rises, and the promised error is the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.graph import Graph
from qpass.passes.round_weights import round_weights
from qpass.passes.rounding import measure
from qpass.passes.rounding import unit as module
from qpass.passes.rounding.grid import Grid
from qpass.passes.rounding.layer import find_layers
from qpass.passes.rounding.layout import Layout
from qpass.passes.rounding.probe import Probe
from qpass.passes.rounding.sweep import accept, is_elementwise_between, propose
from qpass.stream import Stream
from qpass.units import split_into_units
from tests.rounded import numbers_of, quantized_at
from tests.small_models import feeds_of, from_text, residual_cnn, run, transformer, weights

Array = np.ndarray[Any, Any]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3), kernel=st.integers(1, 3))
def test_accepting_never_raises_the_error(seed: int, groups: int, kernel: int) -> None:
    random = np.random.default_rng(seed)
    layout = Layout(
        op="Conv",
        shape=(groups * 2, 4, kernel),
        groups=groups,
        inputs=4 * kernel,
        outputs=2,
        strides=(1,),
        dilations=(1,),
        pads=(0, 0),
    )
    rest = random.standard_normal((groups, 15, 2))
    change = random.standard_normal((groups, 15, 4 * kernel)) * 0.3
    weight = random.standard_normal((groups, 4 * kernel, 2))
    accepted, left = accept(rest, change, weight, layout)
    assert np.square(left).sum() <= np.square(rest).sum()
    kept = np.repeat(accepted, kernel).reshape(groups, 1, -1)
    np.testing.assert_allclose(left, rest - (change * kept) @ weight, atol=1e-12)


def test_what_helps_is_accepted_and_what_harms_is_not() -> None:
    layout = Layout(op="MatMul", shape=(2, 2), groups=1, inputs=2, outputs=2)
    rest = np.array([[[1.0, 0.0], [0.0, -1.0]]])
    change = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    accepted, left = accept(rest, change, np.eye(2)[None], layout)
    assert accepted.tolist() == [True, False]
    np.testing.assert_array_equal(left, [[[0.0, 0.0], [0.0, -1.0]]])


def test_without_a_slope_nothing_is_proposed() -> None:
    random = np.random.default_rng(0)
    grid = Grid(scale=np.ones((1, 1, 3)), zero_point=np.zeros((1, 1, 3)), qmin=-7, qmax=7)
    integers = np.rint(random.uniform(-5, 5, (1, 4, 3)))
    x = random.standard_normal((20, 4))
    still = propose(integers, integers, (x.T @ x)[None], np.zeros((1, 4, 3)), np.ones((1, 3)), grid)
    np.testing.assert_array_equal(still, integers)
    slope = (x.T @ x)[None] @ np.full((1, 4, 3), 1.0)  # every weight is one too small
    moved = propose(integers, integers, (x.T @ x)[None], slope, np.ones((1, 3)), grid)
    assert (moved >= integers).all()
    assert (moved > integers).any()


def test_only_elements_may_lie_between() -> None:
    cnn, attention = residual_cnn(), transformer()
    node = {n.outputs[0].name: n for graph in (cnn, attention) for n in graph.nodes}
    assert is_elementwise_between(cnn, node["a"], node["b"])  # Relu
    assert not is_elementwise_between(cnn, node["stem"], node["b"])  # a convolution
    assert not is_elementwise_between(cnn, node["b"], node["c"])  # a sum with something else
    names = {n.name: n for n in attention.nodes if n.op == "MatMul"}
    products = [n for n in attention.nodes if n.op == "MatMul" and n.inputs[1].name.endswith("_w")]
    assert len(names) > len(products)
    by_weight = {n.inputs[1].name: n for n in products}
    assert is_elementwise_between(attention, by_weight["up_w"], by_weight["down_w"])
    assert not is_elementwise_between(attention, by_weight["qkv_w"], by_weight["proj_w"])


CHAIN = '<ir_version: 10, opset_import: ["": 21]> g '


def test_channels_of_both_lie_along_one_axis() -> None:
    text = CHAIN + "(float[2,6,9] x) => (float[2,5,9] y) { a = MatMul (x, w) y = Conv (a, v) }"
    random = np.random.default_rng(4)
    constants = {"w": weights(random, 9, 9, fan_in=9), "v": weights(random, 5, 6, 1, fan_in=6)}
    first, last = from_text(text, **constants).nodes
    assert not is_elementwise_between(from_text(text, **constants), first, last)


def test_a_constant_that_makes_the_output_larger_is_refused() -> None:
    text = f"""{CHAIN} (float[2,1,8] x) => (float[2,7,4] y) {{
        a = MatMul (x, w) b = Add (a, places) c = Relu (b) y = MatMul (c, v) }}"""
    random = np.random.default_rng(4)
    reference = from_text(
        text,
        w=weights(random, 8, 16, fan_in=8),
        v=weights(random, 16, 4, fan_in=16),
        places=weights(random, 1, 7, 16, fan_in=1),
    )
    graph, table, plan = quantized_at(reference, "w3a8", low_bit_edges=False)
    numbers = numbers_of(plan, table)
    rounding = round_weights(reference, graph, feeds_of(reference, 16), numbers, method="unit")
    assert any("broadcasts its output" in r.reason for r in rounding.report.refusals)


def test_the_slope_between_two_layers_is_that_of_what_lies_there() -> None:
    text = f"""{CHAIN} (float[2,9,8] x) => (float[2,9,4] y) {{
        a = MatMul (x, w) b = Mul (a, slope) c = Tanh (b) y = MatMul (c, v) }}"""
    random = np.random.default_rng(4)
    w, v = weights(random, 8, 16, fan_in=8), weights(random, 16, 4, fan_in=16)
    reference = from_text(text, w=w, v=v, slope=np.float32(-2))
    graph, table, plan = quantized_at(reference, "w4a8")
    layers, _ = find_layers(reference, graph, numbers_of(plan, table))
    first, last = (layers[name] for name in ("node_a", "node_y"))
    a = random.standard_normal((2, 9, 16)).astype(np.float32)
    found = module._Between(reference, first, last).derivative(a)
    # A step of 0.1 % of the largest element, and the last bits of tanh divided by it.
    np.testing.assert_allclose(found, -2.0 * (1.0 - np.tanh(-2.0 * a) ** 2), atol=1e-3)


@pytest.mark.parametrize("model", [residual_cnn, transformer])
def test_the_error_of_the_unit_never_rises(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around each sweep the unit is run again: what it gives, not what was promised, counts."""
    reference: Graph = model()
    graph, table, plan = quantized_at(reference, "w3a8")
    found: list[tuple[float, float]] = []
    real = module._sweep

    def error(stream: Any, layer: Any, last: Any, first_held: int) -> float:
        seen = module._look(stream, layer, last, range(first_held))
        mean = module._mean(seen, [one.rest for one in seen])
        return float(sum(np.square(one.weighted(one.rest - mean)).sum() for one in seen))

    def watched(*where: Any) -> str:
        before = error(*where)
        reason = real(*where)
        found.append((before, error(*where)))
        if reason:
            assert found[-1][0] == found[-1][1]
        return reason

    monkeypatch.setattr(module, "_sweep", watched)
    round_weights(reference, graph, feeds_of(reference, 16), numbers_of(plan, table), method="unit")
    assert found
    # Both are float32 runs of the unit.
    assert all(after <= before * (1.0 + 1e-6) for before, after in found)


def test_a_bad_rounding_is_improved() -> None:
    """Rounded down everywhere: a bias that shows at the end of the unit."""
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, "w3a8")
    layers, _ = find_layers(reference, graph, numbers_of(plan, table))
    nodes = {n.outputs[0].name: n.name for n in reference.nodes}
    first, last = layers[nodes["a"]], layers[nodes["b"]]
    grid = first.grid()
    floor = np.clip(np.floor(first.weight() / grid.scale), grid.qmin, grid.qmax)
    first.write(graph, floor)
    units = split_into_units(reference, [nodes["stem"], nodes["b"], nodes["logits"]])
    with Stream(reference, graph, feeds_of(reference, 16), units=units) as stream:
        for step in stream:
            if step.unit.tap == "b":
                seen = module._look(stream, first, last, range(12))
                reasons = list(module.sweep_back(stream, [first, last], 12))
                again = module._look(stream, first, last, range(12))
    assert reasons == []
    assert _error(again) < 0.95 * _error(seen)
    assert (first.integers() != floor).any()
    # The offset of the last layer takes what has moved on average, to the last bits of float32.
    assert np.abs(last.offsets[-1]).max() > 1e-2
    means = [module._mean(part, [one.rest for one in part]) for part in (seen, again)]
    np.testing.assert_allclose(*means, atol=1e-5)


def test_a_layer_aims_at_the_sum_that_is_right_with_the_quantized_skip() -> None:
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, "w3a8")
    layers, _ = find_layers(reference, graph, numbers_of(plan, table))
    layer, feeds = layers["node_b"], feeds_of(reference, 1)
    assert layer.skip is not None
    with Stream(reference, graph, feeds) as stream:
        for step in stream:
            if step.unit.linear == layer.name:
                ((_, aim, _, _),) = measure._pairs(step, layer, with_skips=True)
                skip = Probe(stream, "quantized", graph, [layer.skip.quantized_name]).run(0)
    bias = layer.layout.along_channels(layer.bias())
    total = aim + bias + skip[layer.skip.quantized_name]
    wanted = run(reference.to_model(taps=["sum"]), feeds[0])["sum"]
    np.testing.assert_allclose(total, wanted, atol=1e-5)  # sums of 144 terms in two orders


def _error(seen: list[Any]) -> float:
    rest = np.concatenate([one.rest for one in seen], axis=1)
    return float(np.square(rest - rest.mean(axis=1, keepdims=True)).sum())
