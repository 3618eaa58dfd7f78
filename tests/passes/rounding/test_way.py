"""The way is chosen on held-out rows; then some of them join the sums, and judges never do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qpass.passes.round_weights import Method, round_weights
from qpass.passes.rounding.grid import Grid
from qpass.passes.rounding.hessian import InputSums
from qpass.passes.rounding.layout import Layout
from qpass.passes.rounding.refit import HeldRows
from qpass.passes.rounding.way import FULL, Rounded, Solver, choose_way, solve_again
from tests.rounded import numbers_of, quantized_at
from tests.small_models import feeds_of, residual_cnn

Array = NDArray[Any]
INPUTS, OUTPUTS = 12, 5
LAYOUT = Layout(op="MatMul", shape=(INPUTS, OUTPUTS), groups=1, inputs=INPUTS, outputs=OUTPUTS)
SOLVER = Solver(effort=FULL, halves=False, refits=True, rescales=True)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cut", [0, 13, 40])
def test_merged_sums_are_those_of_all_rows(centered: bool, weighted: bool, cut: int) -> None:
    random = np.random.default_rng(5)
    x, t = random.standard_normal((40, INPUTS)) + 2.0, random.standard_normal((40, OUTPUTS)) - 1.0
    counts = random.uniform(0.5, 2.0, 40) if weighted else None
    whole, first, second = (InputSums(layout=LAYOUT, centered=centered) for _ in range(3))
    whole.update(x, t, np.arange(40), counts)
    first.update(x, t, np.arange(cut), counts)
    second.update(x, t, np.arange(cut, 40), counts)
    first.merge(second)
    assert first.count == 40
    for name in ("mean_x", "mean_t", "xx", "xt", "tt", "total"):
        # Sums of forty float64 products, in another order.
        np.testing.assert_allclose(
            getattr(first, name), getattr(whole, name), rtol=1e-12, atol=1e-12
        )


class Problem:
    """A product whose input was quantized: wanted is what the float input gave."""

    def __init__(self, seed: int, noise: float = 0.3) -> None:
        self.random = np.random.default_rng(seed)
        self.noise = noise
        self.mixing = self.random.standard_normal((INPUTS, INPUTS))
        self.weight = self.random.standard_normal((1, INPUTS, OUTPUTS))
        step = np.abs(self.weight).max(axis=1, keepdims=True) / 3.5
        self.grid = Grid(scale=step, zero_point=np.zeros_like(step), qmin=-4, qmax=3)

    def rows(self, count: int) -> tuple[Array, Array]:
        floating = self.random.standard_normal((count, INPUTS)) @ self.mixing
        disturbed = floating + self.noise * self.random.standard_normal(floating.shape)
        return disturbed, floating @ self.weight[0]

    def sums(self, count: int) -> InputSums:
        sums = InputSums(layout=LAYOUT, centered=True)
        sums.update(*self.rows(count), np.arange(count))
        return sums

    def held(self, count: int) -> HeldRows:
        x, t = self.rows(count)
        return HeldRows(inputs=x[None], wanted=t[None], weights=np.ones(count))


def chosen(problem: Problem, sums: InputSums, solver: Solver = SOLVER) -> Rounded:
    found = choose_way(problem.weight, problem.grid, sums, problem.held(200), solver)
    assert isinstance(found, Rounded)
    return found


@pytest.mark.parametrize("halves", [False, True])
def test_solving_again_with_the_same_sums_changes_nothing(halves: bool) -> None:
    problem = Problem(0)
    sums, solver = problem.sums(400), replace(SOLVER, halves=halves)
    found = chosen(problem, sums, solver)
    again = solve_again(problem.weight, found, sums, solver)
    np.testing.assert_array_equal(again.integers, found.integers)
    np.testing.assert_array_equal(again.wanted, found.wanted)
    assert (again.ridge, again.damping, again.sweeps) == (found.ridge, found.damping, found.sweeps)


def test_more_rows_come_closer_on_others() -> None:
    """Twenty rows for twelve inputs, and sixty more: mean over fifty problems."""
    gains = []
    for seed in range(50):
        problem = Problem(seed, noise=1.0)
        sums, judges = problem.sums(20), problem.held(2000)
        found = choose_way(problem.weight, problem.grid, sums, problem.held(20), SOLVER)
        if isinstance(found, str):
            continue
        before = float(judges.error(found.grid.values(found.integers), sums).sum())
        sums.merge(problem.sums(60))
        again = solve_again(problem.weight, found, sums, SOLVER)
        after = float(judges.error(again.grid.values(again.integers), sums).sum())
        gains.append(10.0 * np.log10(before / after))
    assert len(gains) > 40
    assert np.mean(gains) > 3.0 * np.std(gains, ddof=1) / np.sqrt(len(gains))


def test_no_way_beats_nearest_on_rows_that_say_something_else() -> None:
    problem = Problem(1)
    grid = replace(problem.grid, scale=problem.grid.scale / 64.0, qmin=-256, qmax=255)
    held = problem.held(200)
    x = problem.random.standard_normal((30, INPUTS))
    sums = InputSums(layout=LAYOUT, centered=True)
    sums.update(x, problem.random.standard_normal((30, OUTPUTS)), np.arange(30))
    exact = HeldRows(
        inputs=held.inputs, wanted=held.inputs @ grid.values(grid.nearest(problem.weight)),
        weights=held.weights,
    )  # fmt: skip
    found = choose_way(problem.weight, grid, sums, exact, replace(SOLVER, rescales=False))
    assert isinstance(found, str)
    assert "on held-out rows" in found


def test_inputs_that_are_not_finite_are_named() -> None:
    problem = Problem(2)
    sums = problem.sums(40)
    found = chosen(problem, sums)
    sums.xx[0, 0, 0] = np.nan
    solver = replace(SOLVER, refits=False)
    reason = choose_way(problem.weight, problem.grid, sums, problem.held(20), solver)
    assert isinstance(reason, str)
    assert "NaN" in reason
    assert solve_again(problem.weight, found, sums, solver) is found


# ------------------------------------------------------------------ whole models


def sums_seen(
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    changed: range = range(0),
    *,
    precision: str = "w4a8",
    judged: bool = True,
) -> tuple[Array, Array | None]:
    """Round with other samples in the batches `changed` of 32, eight of which are held out.

    Returns the sums of the first layer, by which the way is chosen and with which it is solved.
    """
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, precision)
    batches, others = feeds_of(reference, 32), feeds_of(reference, 32, seed=5)
    for number in changed:
        batches[number] = others[number]
    seen: dict[str, list[Array]] = {"choose_way": [], "solve_again": []}

    def spy(name: str, place: int) -> None:
        def noted(*args: Any) -> Any:
            seen[name].append(args[place].xx.copy())
            return whole(*args)

        whole = {"choose_way": choose_way, "solve_again": solve_again}[name]
        monkeypatch.setattr(f"qpass.passes.round_weights.{name}", noted)

    spy("choose_way", 2)
    spy("solve_again", 2)
    round_weights(
        reference,
        graph,
        batches,
        numbers_of(plan, table),
        method=method,
        judges=feeds_of(reference, 4, seed=6) if judged else (),
    )
    return seen["choose_way"][0], seen["solve_again"][0] if seen["solve_again"] else None


@pytest.mark.parametrize("method", ["gptq", "auto", "erq", "unit"])
def test_held_out_batches_join_the_sums(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    choice, final = sums_seen(monkeypatch, method)
    assert final is not None
    for changed, chosen_alike in ((range(23, 24), False), (range(24, 32), True)):
        others = sums_seen(monkeypatch, method, changed)
        assert others[1] is not None
        assert np.array_equal(choice, others[0]) == chosen_alike
        assert not np.array_equal(final, others[1])


@pytest.mark.parametrize("options", [{"precision": "w8a8"}, {"judged": False}])
def test_they_stay_out_where_rows_are_plenty_or_nobody_else_judges(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sums_seen(monkeypatch, "auto", **options)[1] is None


def test_others_judge_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges whose float outputs nothing comes close to refuse what held-out batches would take."""
    reference = residual_cnn()
    batches, judges = feeds_of(reference, 16), feeds_of(reference, 4, seed=6)
    for feeds in judges:
        for array in feeds.values():
            array *= np.float32(1e-3)  # below the step of every range: both graphs give nothing
    for judged, changes in ((batches[-4:], True), (judges, False)):
        graph, table, plan = quantized_at(reference, "w4a8")
        before = graph.fingerprint()
        numbers = numbers_of(plan, table)
        found = round_weights(reference, graph, batches, numbers, method="gptq", judges=judged)
        assert (graph.fingerprint() != before) == changes
        assert any(r.where == "model" for r in found.report.refusals) != changes
