"""GPTQ, ERQ, descent and refit against closed forms, exhaustive search and rounding to nearest."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.dtypes import INT4, UINT4
from qpass.passes.rounding.descend import descend
from qpass.passes.rounding.erq import solve_erq
from qpass.passes.rounding.gptq import Factor, damped, factorize, rounding_error, solve_gptq
from qpass.passes.rounding.grid import Grid, grid_of
from qpass.passes.rounding.hessian import InputSums
from qpass.passes.rounding.layout import Layout
from qpass.passes.rounding.refit import HeldRows, choose_refit, solve_refit
from qpass.qparams import QParams, dequantize, quantize

Array = np.ndarray[Any, Any]


def squared_error(weight: Array, hessian: Array, values: Array) -> Array:
    """Return ``e^T H e`` for each group and output, [groups, outputs]."""
    error = weight - values
    total: Array = np.einsum("gio,gio->go", error, hessian @ error)
    return total


def problem(
    seed: int, *, groups: int = 1, inputs: int = 6, outputs: int = 3, rows: int = 40
) -> tuple[Array, Array]:
    """Weights, and the Hessian of inputs that depend on each other."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((groups, inputs, inputs))
    x = random.standard_normal((groups, rows, inputs)) @ mixing
    return random.standard_normal((groups, inputs, outputs)), x.swapaxes(1, 2) @ x


def grid(weight: Array, *, qmin: int = -7, qmax: int = 7, zero: float = 0.0) -> Grid:
    scale = np.abs(weight).max(axis=1, keepdims=True) / (qmax - zero)
    return Grid(scale=scale, zero_point=np.full_like(scale, zero), qmin=qmin, qmax=qmax)


def factor(hessian: Array, **options: Any) -> Factor:
    found = factorize(hessian, **options)
    assert not isinstance(found, str)
    return found


def test_two_inputs_in_closed_form() -> None:
    """The first input is nearest; the second is nearest to its optimum given the first."""
    hessian = np.array([[[4.0, 3.0], [3.0, 3.0]]])
    weight = np.array([[[0.4], [0.4]]])
    one = Grid(scale=np.ones((1, 1, 1)), zero_point=np.zeros((1, 1, 1)), qmin=-7, qmax=7)
    got = solve_gptq(weight, factor(hessian, damping=0.0), one, sweeps=0)
    # 0.4 -> 0 leaves an error of 0.4, which moves the second to 0.4 + 3 / 3 * 0.4 = 0.8 -> 1.
    np.testing.assert_array_equal(got[0, :, 0], [0.0, 1.0])


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight, _ = problem(0)
    hessian = np.diag(np.arange(1.0, 7.0))[None]
    one = grid(weight)
    for solve in (solve_gptq, solve_erq):
        np.testing.assert_array_equal(solve(weight, factor(hessian), one), one.nearest(weight))


def test_gptq_is_the_published_algorithm() -> None:
    """Columns with the inverse Hessian, as in the authors' code, against the factor of H itself."""
    weight, hessian = problem(3, inputs=9, outputs=4)
    one = grid(weight)
    got = solve_gptq(weight, factor(hessian, act_order=False), one, sweeps=0)
    upper = np.linalg.cholesky(np.linalg.inv(damped(hessian, 0.01)[0])).T
    left, wanted = weight[0].copy(), np.empty_like(weight[0])
    for i in range(9):
        wanted[i] = one.nearest(left[None, i : i + 1])[0, 0]
        error = (left[i] - one.values(wanted[None, i : i + 1])[0, 0]) / upper[i, i]
        left[i:] -= upper[i, i:, None] * error
    plain = squared_error(weight, damped(hessian, 0.01), one.values(one.nearest(weight)))
    published = squared_error(weight, damped(hessian, 0.01), one.values(wanted[None]))
    kept = (published <= plain)[0]  # outputs where nearest is better take that
    assert kept.any()
    np.testing.assert_array_equal(got[0][:, kept], wanted[:, kept])


@pytest.mark.parametrize("act_order", [False, True])
def test_the_error_is_known_when_rounding_is_done(act_order: bool) -> None:
    weight, hessian = problem(7, inputs=9, outputs=400)
    hessian[:, 4] = hessian[:, :, 4] = 0.0  # an input that is always zero
    one, full = grid(weight), factor(hessian, act_order=act_order)
    rounded = solve_gptq(weight, full, one, sweeps=0)
    error, plain = (
        squared_error(weight, full.hessian, one.values(q)) for q in (rounded, one.nearest(weight))
    )
    got = rounding_error(weight, full, one)
    np.testing.assert_allclose(np.minimum(got, plain), error, rtol=1e-10)
    assert (got > plain).any()  # some outputs were better off with nearest


@pytest.mark.parametrize("solve", [solve_gptq, solve_erq])
def test_near_the_best_of_all_integers(solve: Any) -> None:
    """Five inputs and integers in -2..2: all 3125 combinations are tried."""
    every = np.array(list(itertools.product(range(-2, 3), repeat=5)), np.float64).T[None]
    lost, lost_by_nearest = [], []
    for seed in range(20):
        weight, hessian = problem(seed, inputs=5, outputs=1)
        one = grid(weight, qmin=-2, qmax=2)
        full = factor(hessian)
        errors = squared_error(
            np.broadcast_to(weight, every.shape), full.hessian, one.values(every)
        )
        best = errors.min()
        found, plain = (
            float(squared_error(weight, full.hessian, one.values(q))[0, 0])
            for q in (solve(weight, full, one), one.nearest(weight))
        )
        assert found >= best * (1.0 - 1e-9)
        lost.append(found / best - 1.0)
        lost_by_nearest.append(plain / best - 1.0)
    # Both end in local optima: what they lose against the best of all is a fraction of what
    # rounding to nearest loses.
    share = 0.25 if solve is solve_gptq else 0.5  # ERQ decides for half of the inputs at once
    assert np.mean(lost) < share * np.mean(lost_by_nearest)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 12),
    rows=st.integers(1, 20),
    bits=st.integers(2, 4),
    zero=st.sampled_from([0, 1]),
    solve=st.sampled_from([solve_gptq, solve_erq]),
)
def test_never_worse_than_nearest(
    seed: int, groups: int, inputs: int, rows: int, bits: int, zero: int, solve: Any
) -> None:
    """Also with fewer rows than inputs, where the Hessian is singular."""
    weight, hessian = problem(seed, groups=groups, inputs=inputs, rows=rows)
    top = 2 ** (bits - 1) - 1
    one = grid(weight, qmin=-top - 1, qmax=top, zero=float(zero - 1))
    full = factor(hessian)
    got = solve(weight, full, one)
    assert got.min() >= one.qmin
    assert got.max() <= one.qmax
    assert (got == np.rint(got)).all()
    found, plain = (
        squared_error(weight, full.hessian, one.values(q)) for q in (got, one.nearest(weight))
    )
    assert (found <= plain * (1.0 + 1e-12)).all()
    np.testing.assert_array_equal(got, solve(weight, full, one))


@pytest.mark.parametrize("solve", [solve_gptq, solve_erq])
def test_dead_inputs_are_rounded_to_nearest(solve: Any) -> None:
    weight, hessian = problem(5)
    hessian[:, 2, :] = hessian[:, :, 2] = 0.0
    one = grid(weight)
    full = factor(hessian)
    assert full.dead[0].tolist() == [False, False, True, False, False, False]
    got = solve(weight, full, one)
    np.testing.assert_array_equal(got[:, 2], one.nearest(weight)[:, 2])
    others = [0, 1, 3, 4, 5]
    alone = solve(weight[:, others], factor(hessian[:, others][:, :, others]), grid(weight))
    np.testing.assert_array_equal(got[:, others], alone)


def test_a_singular_hessian_gets_more_damping() -> None:
    """Two equal inputs and a rounding error that makes the matrix indefinite."""
    hessian = np.full((1, 2, 2), 1.0)
    hessian[0, 0, 1] = hessian[0, 1, 0] = 1.05
    found = factor(hessian, damping=1e-3)
    assert found.damping == pytest.approx(0.1)
    assert np.isfinite(found.lower).all()


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (np.zeros((1, 3, 3)), "always the same"),
        (np.full((1, 2, 2), np.nan), "NaN"),
        (np.array([[[1.0, 1e15], [1e15, 1.0]]]), "singular"),
    ],
)
def test_a_hessian_that_cannot_be_used_is_refused(hessian: Array, reason: str) -> None:
    found = factorize(hessian)
    assert isinstance(found, str)
    assert reason in found


def test_a_group_without_signal_does_not_stop_the_others() -> None:
    weight, hessian = problem(1, groups=3)
    hessian[1] = 0.0
    one = grid(weight)
    got = solve_gptq(weight, factor(hessian), one)
    np.testing.assert_array_equal(got[1], one.nearest(weight)[1])
    np.testing.assert_array_equal(
        got[2], solve_gptq(weight[2:], factor(hessian[2:]), grid(weight[2:]))[0]
    )


def test_blocks_of_columns_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(2, inputs=20, rows=60)
    one, full = grid(weight), factor(hessian)
    whole = solve_gptq(weight, full, one)
    for module in ("gptq", "descend"):
        monkeypatch.setattr(f"qpass.passes.rounding.{module}.BLOCK", 3)
    np.testing.assert_array_equal(solve_gptq(weight, full, one), whole)


def test_descent_goes_down_to_a_point_that_no_single_move_improves() -> None:
    weight, hessian = problem(4)
    one = grid(weight)
    integers = one.nearest(weight)
    error = squared_error(weight, hessian, one.values(integers))
    while descend(weight, hessian, integers, one):
        lower = squared_error(weight, hessian, one.values(integers))
        assert (lower <= error * (1.0 + 1e-12)).all()
        error = lower
    for i in range(weight.shape[1]):
        for move in (-1.0, 1.0):
            other = integers.copy()
            other[:, i] = np.clip(other[:, i] + move, one.qmin, one.qmax)
            moved = squared_error(weight, hessian, one.values(other))
            assert (moved >= error * (1.0 - 1e-12)).all()


@pytest.mark.parametrize("sweeps", [2, 4, 40])
def test_sweeps_at_once_are_sweeps_one_by_one(sweeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes are carried from sweep to sweep for the outputs that moved alone."""
    monkeypatch.setattr("qpass.passes.rounding.descend.BLOCK", 3)
    weight, hessian = problem(6, groups=2, inputs=40, outputs=12, rows=60)
    one = grid(weight)
    together, apart = one.nearest(weight), one.nearest(weight)
    moved = descend(weight, hessian, together, one, sweeps=sweeps)
    counts = []
    for _ in range(sweeps):
        counts.append(descend(weight, hessian, apart, one))
        if not counts[-1]:
            break
    np.testing.assert_array_equal(together, apart)
    assert moved == sum(counts)
    assert sum(count > 0 for count in counts) >= 2


@pytest.mark.parametrize("act_order", [True, False])
def test_cholesky_by_panels(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpass.passes.rounding.gptq.PANEL", 4)
    _, hessian = problem(7, groups=2, inputs=11, rows=60)
    full = factor(hessian, act_order=act_order)
    for matrix, order, lower in zip(full.hessian, full.order, full.lower, strict=True):
        whole = np.linalg.cholesky(matrix[order[:, None], order])
        # Eleven float64 sums; the damping bounds the condition number by about 1e4.
        np.testing.assert_allclose(lower, whole, atol=1e-11 * np.abs(whole).max())


LINEAR = Layout(op="MatMul", shape=(4, 6), groups=1, inputs=4, outputs=6)


@pytest.mark.parametrize(
    "numbers",
    [
        QParams(scale=np.array(0.1, np.float32), zero_point=np.array(0, INT4.numpy), storage=INT4,
                qmin=-7, qmax=7),
        QParams(scale=np.linspace(0.1, 0.2, 6, dtype=np.float32),
                zero_point=np.arange(6).astype(UINT4.numpy), storage=UINT4, qmin=0, qmax=15,
                axis=1),
        QParams(scale=np.linspace(0.1, 0.2, 12, dtype=np.float32).reshape(2, 6),
                zero_point=np.arange(12).reshape(2, 6).astype(UINT4.numpy), storage=UINT4, qmin=0,
                qmax=15, axis=0, block_size=2),
    ],
    ids=["per tensor", "per channel, asymmetric", "per block, asymmetric"],
)  # fmt: skip
def test_the_grid_is_that_of_the_numbers(numbers: QParams) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) / 2
    one = grid_of(numbers, LINEAR)
    integers = one.nearest(LINEAR.matrix(weight.astype(np.float64)))
    stored = quantize(weight, numbers)
    # Division in float64 here and in float32 there: no element of this weight lies on a tie.
    np.testing.assert_array_equal(LINEAR.restore(integers), stored.astype(np.float64))
    np.testing.assert_allclose(
        LINEAR.restore(one.values(integers)), dequantize(stored, numbers), rtol=1e-6
    )
    hessian = problem(0, inputs=4)[1]
    got = solve_gptq(LINEAR.matrix(weight.astype(np.float64)), factor(hessian), one)
    assert got.min() >= numbers.qmin
    assert got.max() <= numbers.qmax


def sums_of(x: Array, t: Array, *, centered: bool) -> InputSums:
    layout = Layout(op="MatMul", shape=(x.shape[1], t.shape[1]), groups=1, inputs=x.shape[1],
                    outputs=t.shape[1])  # fmt: skip
    sums = InputSums(layout=layout, centered=centered)
    sums.update(x, t, np.arange(len(x)))
    return sums


def test_sums_give_the_error_and_the_offset_of_any_weight() -> None:
    random = np.random.default_rng(0)
    x, t = random.standard_normal((50, 4)) + 3.0, random.standard_normal((50, 2)) - 1.0
    weight = random.standard_normal((1, 4, 2))
    rest = t - x @ weight[0]
    plain, centered = (sums_of(x, t, centered=c) for c in (False, True))
    np.testing.assert_allclose(plain.error(weight)[0], np.square(rest).mean(axis=0))
    np.testing.assert_allclose(centered.error(weight)[0], rest.var(axis=0))
    np.testing.assert_allclose(centered.offset(weight)[0], rest.mean(axis=0))
    np.testing.assert_array_equal(plain.offset(weight), 0.0)


def test_refit_finds_the_weights_that_made_the_output() -> None:
    random = np.random.default_rng(1)
    x, right = random.standard_normal((60, 5)), random.standard_normal((5, 3))
    sums = sums_of(x, x @ right + 7.0, centered=True)
    wrong = (right + 0.3 * random.standard_normal((5, 3)))[None]
    np.testing.assert_allclose(solve_refit(wrong, sums, 1e-12)[0], right, atol=1e-9)
    strong = solve_refit(wrong, sums, 1e6)
    np.testing.assert_allclose(strong, wrong, atol=1e-4)


def test_a_refit_that_does_not_hold_on_other_rows_is_not_taken() -> None:
    random = np.random.default_rng(2)
    x, t = random.standard_normal((8, 6)), random.standard_normal((8, 2))  # nothing but noise
    weight = np.zeros((1, 6, 2))
    held = HeldRows(
        inputs=random.standard_normal((1, 500, 6)),
        wanted=random.standard_normal((1, 500, 2)),
        weights=np.ones(500),
    )
    sums = sums_of(x, t, centered=False)
    got, ridge = choose_refit(weight, sums, held)
    assert ridge is None
    np.testing.assert_array_equal(got, weight)
    assert (held.error(solve_refit(weight, sums, 0.01), sums) > held.error(weight, sums)).all()


@pytest.mark.parametrize("centered", [False, True])
def test_a_weight_counts_as_so_many_rows(centered: bool) -> None:
    random = np.random.default_rng(3)
    x, t = random.standard_normal((40, 4)) + 2.0, random.standard_normal((40, 3)) - 1.0
    counts = random.integers(1, 4, 40)
    want = sums_of(*(np.repeat(a, counts, axis=0) for a in (x, t)), centered=centered)
    got = InputSums(layout=want.layout, centered=centered)
    for picked in np.array_split(np.arange(40), 3):
        got.update(x, t, picked, counts.astype(np.float64))
    assert (got.count, got.total) == (40, counts.sum())
    for name in ("mean_x", "mean_t", "xx", "xt", "tt"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-12, atol=1e-12)
    weight = random.standard_normal((1, 4, 3))
    np.testing.assert_allclose(got.error(weight), want.error(weight))
    np.testing.assert_allclose(got.offset(weight), want.offset(weight))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_many_batches_are_put_together(
    centered: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of seven rows, cut across batches of five, are the same sums."""
    random = np.random.default_rng(5)
    x, t = random.standard_normal((40, 4)) + 2.0, random.standard_normal((40, 3)) - 1.0
    counts = random.uniform(0.5, 2.0, 40) if weighted else None
    layout = Layout(op="MatMul", shape=(4, 3), groups=1, inputs=4, outputs=3)
    whole = InputSums(layout=layout, centered=centered)
    whole.update(x, t, np.arange(40), counts)
    monkeypatch.setattr("qpass.passes.rounding.layout.CHUNK_BYTES", 7 * 8 * 4)
    assert layout.chunk_rows == 7
    rows: list[int] = []
    monkeypatch.setattr(
        InputSums,
        "_add",
        lambda self, *piece: (rows.append(piece[0].shape[1]), add(self, *piece))[1],
    )
    got = InputSums(layout=layout, centered=centered)
    got.update_all((x, t, picked, counts) for picked in np.array_split(np.arange(40), 8))
    assert rows == [7, 7, 7, 7, 7, 5]
    assert got.count == 40
    for name in ("mean_x", "mean_t", "xx", "xt", "tt", "total"):
        np.testing.assert_allclose(getattr(got, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


add = InputSums._add
