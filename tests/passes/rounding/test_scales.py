"""Scales of output channels that follow from the rounding: never a larger error, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.dtypes import INT8
from qpass.graph import Graph, array_of
from qpass.passes.fold_affine import Site, find_site
from qpass.passes.round_weights import round_weights
from qpass.passes.rounding.gptq import factorize, rounding_error
from qpass.passes.rounding.grid import Grid
from qpass.passes.rounding.scales import SHARES, can_rescale, solve_shares
from qpass.qparams import QParams
from tests.folds import graph_of, normal, powers_of_two, rounded

Array = np.ndarray[Any, Any]


def correlated(seed: int, inputs: int) -> Array:
    """The Hessian of inputs that depend on each other."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((1, 60, inputs)) @ random.standard_normal((1, inputs, inputs))
    return x.swapaxes(1, 2) @ x


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([3, 7]))
def test_the_error_never_grows(seed: int, steps: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((1, 12, 5))
    scale = np.abs(weight).max(axis=1, keepdims=True) / steps
    grid = Grid(scale=scale, zero_point=np.zeros_like(scale), qmin=-steps - 1, qmax=steps)
    factor = factorize(correlated(seed, 12))
    assert not isinstance(factor, str)
    shares = solve_shares(weight, factor, grid)
    assert shares.shape == (1, 1, 5)
    assert set(shares.ravel()) <= {1.0, *SHARES}
    before = rounding_error(weight, factor, grid)
    after = rounding_error(weight, factor, replace(grid, scale=scale * shares))
    assert (after <= before).all()
    assert ((after < before) == (shares[:, 0] != 1.0)).all()


@pytest.mark.parametrize("share", SHARES)
def test_a_scale_that_is_off_is_found(share: float) -> None:
    """Weights on a grid leave no error with its scale: there the scales have to go."""
    integers = np.random.default_rng(0).integers(-7, 8, (1, 12, 5)).astype(np.float64)
    true = np.array([0.25, 0.5, 1.0, 2.0, 4.0]).reshape(1, 1, 5)
    grid = Grid(scale=true / share, zero_point=np.zeros((1, 1, 5)), qmin=-8, qmax=7)
    factor = factorize(correlated(1, 12))
    assert not isinstance(factor, str)
    np.testing.assert_array_equal(solve_shares(integers * true, factor, grid), share)


def one_product(numbers: QParams, constants: dict[str, Array], weight: Array) -> tuple[Graph, Site]:
    attrs = "" if numbers.axis is None else f"<axis = {numbers.axis}>"
    if numbers.block_size is not None:
        attrs = f"<axis = {numbers.axis}, block_size = {numbers.block_size}>"
    body = f"w = DequantizeLinear {attrs} (w_int, w_scale, w_zero)\n[fc] y = MatMul (x, w)"
    signature = f"float[N, {len(weight)}] x", "float[N, 4] y"
    reference = graph_of(*signature, "[fc] y = MatMul (x, w)", w=weight)
    graph = graph_of(*signature, body, **constants)
    site = find_site(graph, {n.name: n for n in graph.nodes}, reference.nodes[0])
    assert isinstance(site, Site)
    return graph, site


def numbers_of(scale: Array, **options: Any) -> QParams:
    return QParams(
        scale=scale, zero_point=np.zeros(scale.shape, np.int8), storage=INT8, qmin=-7, qmax=7,
        **options,
    )  # fmt: skip


def test_only_a_scale_of_each_channel_may_change() -> None:
    weight = normal((8, 4), seed=1)
    channels = rounded("w", weight, 1, steps=7)
    numbers = numbers_of(channels["w_scale"], axis=1)
    assert can_rescale(one_product(numbers, channels, weight)[1], numbers)
    dyadic = {**channels, "w_scale": np.exp2(np.round(np.log2(channels["w_scale"])))}
    numbers = numbers_of(dyadic["w_scale"], axis=1)
    assert not can_rescale(one_product(numbers, dyadic, weight)[1], numbers)
    single = powers_of_two("w", weight, steps=7)
    numbers = numbers_of(single["w_scale"])
    assert not can_rescale(one_product(numbers, single, weight)[1], numbers)
    blocks = np.abs(weight).reshape(2, 4, 4).max(axis=1) / np.float32(7)
    integers = np.rint(weight / np.repeat(blocks, 4, axis=0)).astype(np.int8)
    zero = np.zeros(blocks.shape, np.int8)
    constants = {"w_int": integers, "w_scale": blocks, "w_zero": zero}
    numbers = numbers_of(blocks, axis=0, block_size=4)
    assert not can_rescale(one_product(numbers, constants, weight)[1], numbers)


@pytest.mark.parametrize(("steps", "changes"), [(7, True), (127, False)])
def test_scales_change_below_seven_bits(steps: int, changes: bool) -> None:
    """The largest weight, alone in its column, reads an input that is nearly always zero."""
    weight = normal((8, 4), seed=1)
    weight[0] = 6.0
    constants = rounded("w", weight, 1, steps=steps)
    numbers = replace(numbers_of(constants["w_scale"], axis=1), qmin=-steps, qmax=steps)
    graph, _ = one_product(numbers, constants, weight)
    reference = graph_of("float[N, 8] x", "float[N, 4] y", "[fc] y = MatMul (x, w)", w=weight)
    mixing = normal((8, 8), seed=2)  # so that errors can cancel, and nearest is not the best
    batches = [{"x": normal((64, 8), seed=i) @ mixing} for i in range(8)]
    for batch in batches:
        batch["x"][:, 0] *= np.float32(0.01)
    rounding = round_weights(reference, graph, batches, {"fc": numbers}, method="gptq")
    assert rounding.report.changed == 1
    found = array_of(graph.tensors()["w_scale"])
    assert (rounding.layers["fc"].scale is not None) is changes
    assert (found < constants["w_scale"]).any() == changes
    if changes:
        np.testing.assert_array_equal(found, rounding.layers["fc"].scale)
