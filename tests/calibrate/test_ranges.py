"""Ranges: the estimate is what fake quantization measures, and the search finds the smallest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.calibrate.observers import TensorObserver
from qpass.calibrate.ranges import (
    METHODS,
    TIE,
    estimated_sqnr_db,
    histogram_view,
    solve_range,
)
from qpass.dtypes import storage_for
from qpass.errors import RecipeError
from qpass.qparams import TensorSpec, choose_qparams, fake_quantize

ELEMENTS = 20_000


def spec_of(bits, *, signed, **options):
    return TensorSpec(
        storage=storage_for(bits, signed=signed), symmetric=signed, bits=bits, **options
    )


SPECS = {
    "u8": spec_of(8, signed=False),
    "s8": spec_of(8, signed=True),
    "u4": spec_of(4, signed=False),
    "s4": spec_of(4, signed=True, narrow_range=True),
    "u6": spec_of(6, signed=False),
    "u16": spec_of(16, signed=False),
    "s8pow2": spec_of(8, signed=True, power_of_two=True),
}
SHAPES = {
    "normal": lambda r: r.standard_normal(ELEMENTS),
    "relu": lambda r: np.maximum(r.standard_normal(ELEMENTS) - 0.5, 0),
    "laplace": lambda r: r.laplace(size=ELEMENTS),
    "heavy": lambda r: r.standard_t(3, ELEMENTS),
    "sigmoid": lambda r: 1 / (1 + np.exp(-3 * r.standard_normal(ELEMENTS))),
    "negative": lambda r: -r.exponential(size=ELEMENTS),
    "far": lambda r: 5 + r.random(ELEMENTS),
}


def stats_of(values, **options):
    observer = TensorObserver("t", limit=1 << 20, **options)
    observer.update(np.asarray(values, np.float32))
    return observer.result()


def measured_mse(values, spec, low, high):
    values = np.asarray(values, np.float32)
    error = fake_quantize(values, choose_qparams(spec, low, high)).astype(np.float64) - values
    return np.mean(error**2)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_estimate_is_what_fake_quantization_measures(shape, spec):
    values = shape(np.random.default_rng(0))
    stats = stats_of(values)
    # "Even within a cell" is coarse for the 15 cells of 4 bits, 6 of which a peak may fill, and
    # for float32 itself at 16 bits.
    tolerance_db = 0.9 if spec.bits == 4 else 0.35
    for low_share, high_share in ((1, 1), (0.8, 0.6), (0.5, 0.9)):
        low, high = stats.low * low_share, stats.high * high_share
        wanted = measured_mse(values, spec, low, high)
        got = estimated_sqnr_db(stats, low, high, spec)
        sqnr = 10 * np.log10(np.mean(values.astype(np.float32).astype(np.float64) ** 2) / wanted)
        assert abs(got - sqnr) < tolerance_db


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_mse_is_the_smallest_and_auto_takes_it_or_minmax(shape, spec):
    stats = stats_of(shape(np.random.default_rng(1)))
    choices = {method: solve_range(stats, spec, method) for method in METHODS}
    smallest = min(choice.mse for choice in choices.values())
    assert choices["mse"].mse == smallest
    auto = solve_range(stats, spec, "auto")
    assert auto.mse <= smallest * (1 + 2 * TIE)
    if choices["minmax"].mse <= smallest:
        assert auto == choices["minmax"]
    assert all(c.method == m and c.low <= 0.0 <= c.high for m, c in choices.items())


@pytest.mark.parametrize("name", ["u4", "s4", "u6"])
@pytest.mark.parametrize("shape", ["normal", "relu", "heavy"])
def test_search_comes_close_to_trying_all_ranges(shape, name):
    values = SHAPES[shape](np.random.default_rng(2))
    spec, stats = SPECS[name], stats_of(values)
    found = solve_range(stats, spec, "mse")
    shares = np.geomspace(0.05, 1, 24)
    two_sided = name[0] == "u" and stats.low < 0
    pairs = [(a, b) for a in shares for b in (shares if two_sided else [a])]
    best = min(measured_mse(values, spec, stats.low * a, stats.high * b) for a, b in pairs)
    # Estimates are off by a few percent (see the first test), and so is the choice at worst.
    assert measured_mse(values, spec, found.low, found.high) < best * 1.03


def test_zeros_have_no_rounding_error():
    values = np.random.default_rng(3).exponential(size=ELEMENTS)
    sparse = np.where(np.arange(ELEMENTS) % 10 < 7, 0.0, values)
    full, some = stats_of(values), stats_of(sparse)
    high = float(sparse.max())
    estimate = [10 ** (-estimated_sqnr_db(s, 0.0, high, SPECS["u8"]) / 10) for s in (full, some)]
    signal = [np.mean(values**2), np.mean(sparse**2)]
    noise = [e * s for e, s in zip(estimate, signal, strict=True)]
    # 30 % of the elements are not 0, so 30 % of the noise; sampling of the rest: 3 %.
    np.testing.assert_allclose(noise[1], 0.3 * (high / 255) ** 2 / 12, rtol=0.03)
    assert noise[1] < noise[0] / 2


def test_importance_moves_the_range_to_the_channel_that_matters():
    rng = np.random.default_rng(4)
    values = np.stack([rng.standard_normal(4000), 20 * rng.standard_normal(4000)])[None]
    spec = SPECS["s4"]
    choices = [
        solve_range(stats_of(values, axis=1, importance=np.array(weights)), spec, "mse")
        for weights in ([1.0, 1e-6], [1e-6, 1.0])
    ]
    assert choices[0].high < 5 < 20 < choices[1].high
    unweighted = solve_range(stats_of(values, axis=1), spec, "mse")
    dead = solve_range(stats_of(values, axis=1, importance=np.zeros(2)), spec, "mse")
    assert dead == unweighted


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=30),
    st.sampled_from(sorted(SPECS)),
    st.sampled_from([*METHODS, "auto"]),
)
def test_any_tensor_gets_a_usable_range(values, name, method):
    stats = stats_of(np.array(values))
    choice = solve_range(stats, SPECS[name], method)
    assert choice.low <= 0.0 <= choice.high
    assert np.isfinite([choice.low, choice.high, choice.mse]).all()
    assert choice.mse >= 0.0
    choose_qparams(SPECS[name], choice.low, choice.high)


def test_entropy_and_percentile_cut_off_a_lonely_outlier():
    values = np.append(np.random.default_rng(5).standard_normal(ELEMENTS), 400.0)
    stats = stats_of(values)
    assert solve_range(stats, SPECS["u8"], "entropy").high < 20
    assert solve_range(stats, SPECS["u8"], "percentile", percentile=99.99).high < 20
    assert solve_range(stats, SPECS["u8"], "minmax").high == 400.0


def test_entropy_does_not_take_two_spikes_for_alike():
    stats = stats_of(SHAPES["far"](np.random.default_rng(8)))
    assert solve_range(stats, SPECS["u8"], "entropy").high > 5.8


def test_percentile_is_the_quantile():
    values = np.random.default_rng(6).random(ELEMENTS)
    choice = solve_range(stats_of(values), SPECS["u8"], "percentile", percentile=90.0)
    # Exact up to the position within a bin of width 2**-11.
    np.testing.assert_allclose(
        choice.high, np.quantile(values.astype(np.float32), 0.9), rtol=0.0, atol=2**-11
    )


def test_fixed_ranges_and_constants_are_respected():
    spec = spec_of(8, signed=False, fixed=(0.0, 1.0))
    choice = solve_range(stats_of([0.2, 0.4, 0.7]), spec, "mse")
    assert (choice.low, choice.high, choice.method) == (0.0, 1.0, "fixed")
    mask = solve_range(stats_of([0.0, 3.7, 3.7, 0.0]), SPECS["u4"], "auto")
    assert (mask.low, mask.high, mask.method) == (0.0, np.float32(3.7), "minmax")
    zero = solve_range(stats_of([0.0, 0.0]), SPECS["u8"], "auto")
    assert (zero.low, zero.high, zero.mse) == (0.0, 0.0, 0.0)


def test_unknown_methods_are_refused():
    with pytest.raises(RecipeError, match="kl"):
        solve_range(stats_of([1.0]), SPECS["u8"], "kl")
    with pytest.raises(RecipeError, match="101"):
        solve_range(stats_of([1.0]), SPECS["u8"], "percentile", percentile=101)


@pytest.mark.parametrize("bins", [1, 16, 128, 10_000])
def test_view_has_all_elements_in_few_bins(bins):
    stats = stats_of(np.random.default_rng(7).standard_normal(5000))
    edges, counts = histogram_view(stats, bins)
    assert len(edges) == len(counts) + 1 <= max(bins, 2) + 1
    assert counts.sum() == 5000
    assert edges[0] <= stats.low < edges[1]
    assert edges[-2] <= stats.high < edges[-1]
