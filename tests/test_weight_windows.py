"""Zero points of weights with few levels: the best window of integers, and who may have one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from qpass.choose import solve_weight_range
from qpass.dtypes import storage_for
from qpass.graph import Constant, Graph, array_of
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.qparams import TensorSpec, choose_qparams, fake_quantize
from qpass.targets import TARGETS
from qpass.verify.metrics import sqnr_db
from qpass.weight_windows import SHARES, has_windows, solve_windows
from tests.oracle import ENGINES, reference
from tests.small_models import feeds_of, policy_of, quantize, residual_cnn, transformer

RANDOM = np.random.default_rng(5)
SPEC = TensorSpec(
    storage=storage_for(3, signed=True), symmetric=False, bits=3, granularity="per_channel", axis=0
)
SYMMETRIC = replace(SPEC, symmetric=True)
# A sum that ends on the other side of a tie moves one of hundreds of values by a step of 8 bits.
SAME_DB = 50.0


def loss(values: np.ndarray, spec: TensorSpec, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    rest = values - fake_quantize(values, choose_qparams(spec, low, high))
    return np.square(rest, dtype=np.float64).reshape(len(values), -1).sum(axis=1)


def rows_of_all_kinds(values: int = 9) -> np.ndarray:
    shape = (40, values)
    around = RANDOM.standard_normal(shape)
    beside = np.abs(RANDOM.standard_normal(shape)) * np.where(np.arange(40) % 2, 1, -1)[:, None]
    skewed = RANDOM.gamma(1.0, size=shape) - 0.3
    return np.concatenate([around, beside, skewed]).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3])
def test_no_channel_is_worse_than_with_a_symmetric_range_by_more_than_the_grid(bits: int) -> None:
    rows = rows_of_all_kinds()
    spec = replace(SPEC, bits=bits)
    mine = loss(rows, spec, *solve_weight_range(rows, spec))
    other = replace(spec, symmetric=True)
    theirs = loss(rows, other, *solve_weight_range(rows, other))
    assert np.mean(mine <= theirs) > 0.9  # shares of the scale are not the same ones
    assert mine[:40].sum() < theirs[:40].sum()
    assert mine[40:80].sum() < 0.5 * theirs[40:80].sum()  # one side only: twice the levels


@pytest.mark.parametrize(("bits", "values"), [(3, 9), (4, 9), (3, 200), (4, 200)])
def test_it_is_the_best_of_all_zero_points_and_shares(bits: int, values: int) -> None:
    """Long rows of 16 levels are searched in two steps, and still find it."""
    spec = replace(SPEC, bits=bits)
    rows = rows_of_all_kinds(values)[::10].astype(np.float64)
    low, high = solve_windows(rows, spec)
    numbers = choose_qparams(spec, low, high)
    found = loss(rows.astype(np.float32), spec, low, high)
    for row, got in zip(rows, found, strict=True):
        best = np.inf
        top = np.abs(row).max()
        for zero, share in product(range(spec.qmin, spec.qmax + 1), SHARES):
            first, last = spec.qmin - zero, spec.qmax - zero
            below = min(row.min(), 0) / first if first else 0
            above = max(row.max(), 0) / last if last else 0
            limit = top / (spec.qmax - spec.qmin >> 1)
            scale = np.clip(max(below, above), 1e-12, limit) * share
            levels = np.clip(np.rint(row / scale), first, last) * scale
            best = min(best, float(np.square(levels - row).sum()))
        np.testing.assert_allclose(got, best, rtol=1e-5)  # scales are rounded to float32
    assert numbers.zero_point.astype(int).min() >= spec.qmin
    assert numbers.zero_point.astype(int).max() <= spec.qmax


def test_many_rows_are_what_each_is_alone() -> None:
    """They are searched in blocks that fit a cache."""
    spec = replace(SPEC, bits=4)
    rows = rows_of_all_kinds(400).astype(np.float64)
    low, high = solve_windows(rows, spec)
    for number in (0, 80, 81, 82, 119):
        alone = solve_windows(rows[number : number + 1], spec)
        np.testing.assert_array_equal((low[number], high[number]), np.ravel(alone))


def test_ranges_come_back_as_the_zero_points_that_were_chosen() -> None:
    low, high = solve_windows(rows_of_all_kinds().astype(np.float64), SPEC)
    steps = (high - low) / 7
    np.testing.assert_allclose(low / steps, np.rint(low / steps), atol=1e-9)
    numbers = choose_qparams(SPEC, low, high)
    np.testing.assert_array_equal(numbers.zero_point.astype(int), -4 - np.rint(low / steps))


def test_a_channel_of_zeros_stays_zero() -> None:
    rows = np.zeros((2, 9))
    rows[1, 0] = -1e-3
    numbers = choose_qparams(SPEC, *solve_windows(rows, SPEC))
    np.testing.assert_allclose(fake_quantize(rows, numbers), rows, rtol=1e-6)


def test_wider_or_symmetric_weights_have_none() -> None:
    assert has_windows(SPEC)
    assert not has_windows(SYMMETRIC)
    assert has_windows(replace(SPEC, bits=4))
    assert not has_windows(replace(SPEC, bits=5))
    blocks = replace(SPEC, granularity="per_block", block_size=32)
    assert has_windows(blocks)
    assert not has_windows(replace(blocks, bits=4))


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("precision", ["w2a8", "w3a8", "w4a8", "w5a8"])
def test_only_where_no_kernel_reads_them(name: str, precision: str) -> None:
    target = TARGETS[name]
    decisions = made_plan(residual_cnn(), name, precision).weights()
    specs = [d.spec for d in decisions]
    inner = [s for s in specs if s.bits < 5 and s.granularity == "per_channel"]
    assert all(spec.symmetric for spec in specs if spec not in inner)
    assert all(spec.symmetric == (target.zero_points_below != 5) for spec in inner)
    assert all(("no kernel" in d.because) != d.spec.symmetric for d in decisions)
    if name.startswith("ort"):
        assert bool(inner) == (precision != "w5a8")


def test_not_behind_scales_that_are_found_at_run_time_nor_float_activations() -> None:
    for precision, options in (("w3a8", {"activations": "dynamic"}), ("w3", {})):
        found = made_plan(transformer(), "ort-x86", precision, **options).weights()
        assert min(d.spec.bits for d in found) == 3
        assert all(d.spec.symmetric for d in found)
    found = made_plan(transformer(), "ort-x86", "w3", asymmetric_weights=True).weights()
    assert not any(d.spec.symmetric or "no kernel" in d.because for d in found)


def made_plan(graph: Graph, target: str, precision: str, **options: Any) -> Plan:
    return make_plan(graph, TARGETS[target], policy_of(precision, **options))


@pytest.mark.parametrize("build", [residual_cnn, transformer])
def test_all_engines_compute_the_same_with_them(build: Callable[[], Graph]) -> None:
    graph = build()
    feeds = feeds_of(graph)
    made = quantize(graph, TARGETS["ort-x86"], feeds, "w3a8", low_bit_edges=True)
    zeros = [
        array_of(node.inputs[2]).astype(int)
        for node in made.graph.nodes
        if node.op == "DequantizeLinear"
        and isinstance(node.inputs[0], Constant)
        and array_of(node.inputs[0]).ndim > 1
    ]
    assert any(np.unique(zero).size > 1 for zero in zeros)
    model = made.graph.to_model()
    (wanted,) = reference(model, feeds[0]).values()
    for engine in ENGINES[1:]:
        (got,) = engine(model, feeds[0]).values()
        assert sqnr_db(wanted, got) > SAME_DB
