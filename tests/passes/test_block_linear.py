"""The linear map of a block: closed form, ridge, grouping, and a gate that holds."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.errors import InternalError
from qpass.passes.block_linear import (
    RIDGES,
    CrossMoments,
    LinearMap,
    group_count,
    merge_all,
    solve_gated_linear,
    solve_linear,
    with_best_offset,
)

ROWS, INPUTS, OUTPUTS = 400, 6, 4


def rows(seed: int = 0, count: int = ROWS, channels: int = INPUTS) -> np.ndarray:
    """Dependent channels with means far from zero."""
    random = np.random.default_rng(seed)
    return random.standard_normal((count, channels)) @ random.standard_normal(
        (channels, channels)
    ) + random.uniform(-20, 20, channels)


def linear(groups: int = 1, seed: int = 7) -> LinearMap:
    random = np.random.default_rng(seed)
    shape = (groups, INPUTS // groups, OUTPUTS // groups)
    return LinearMap(weight=random.standard_normal(shape), offset=random.standard_normal(OUTPUTS))


def parts_of(x: np.ndarray, t: np.ndarray, groups: int = 1, count: int = 4) -> list[CrossMoments]:
    pairs = zip(np.array_split(x, count), np.array_split(t, count), strict=True)
    return [CrossMoments.of(left, right, groups=groups) for left, right in pairs]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_noise_free_linear_target_is_recovered(groups: int) -> None:
    x, wanted = rows(), linear(groups)
    found = solve_linear(CrossMoments.of(x, wanted(x), groups=groups), ridge=0.0)
    np.testing.assert_allclose(found.weight, wanted.weight, atol=1e-12)
    np.testing.assert_allclose(found.offset, wanted.offset, atol=1e-11)  # means of 20 enter it


def test_it_is_least_squares() -> None:
    x = rows()
    t = np.random.default_rng(3).standard_normal((ROWS, OUTPUTS)) + x[:, :OUTPUTS]
    found = solve_linear(CrossMoments.of(x, t), ridge=0.0)
    best, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(ROWS)]), t, rcond=None)
    np.testing.assert_allclose(found.weight[0], best[:-1], atol=1e-11)
    np.testing.assert_allclose(found.offset, best[-1], atol=1e-10)


def test_the_ridge_is_that_of_the_formula() -> None:
    x, ridge = rows(), 0.3
    t = linear()(x)
    found = solve_linear(CrossMoments.of(x, t), ridge=ridge)
    centred = x - x.mean(axis=0)
    gram = centred.T @ centred
    weight = np.linalg.solve(
        gram + ridge * np.trace(gram) / INPUTS * np.eye(INPUTS), centred.T @ (t - t.mean(axis=0))
    )
    np.testing.assert_allclose(found.weight[0], weight, atol=1e-12)
    np.testing.assert_allclose(found.offset, t.mean(axis=0) - x.mean(axis=0) @ weight, atol=1e-11)


def test_a_ridge_solves_what_has_no_single_solution() -> None:
    x = np.repeat(rows(channels=3), 2, axis=1)  # each channel twice
    t = x[:, :OUTPUTS]
    moments = CrossMoments.of(x, t)
    found = solve_linear(moments)
    assert np.abs(found.weight).max() < 1.0  # shared by the twins, not played against each other
    assert moments.error(found) < 1e-4 * moments.m_tt.sum()


def test_constant_inputs_leave_an_offset() -> None:
    x, t = np.ones((8, INPUTS)), np.full((8, OUTPUTS), 2.5)
    found = solve_linear(CrossMoments.of(x, t))
    assert not found.weight.any()
    np.testing.assert_array_equal(found.offset, np.full(OUTPUTS, 2.5))


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_merge_and_give_the_error_of_a_map(groups: int) -> None:
    x, t, one = rows(), rows(1, channels=OUTPUTS), linear(groups)
    merged = merge_all(parts_of(x, t, groups, 7))
    whole = CrossMoments.of(x, t, groups=groups)
    for name in ("mean_x", "mean_t", "m_xx", "m_xt", "m_tt"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-10)
    np.testing.assert_allclose(merged.error(one), np.square(one(x) - t).sum(), rtol=1e-10)


def test_many_rows_are_read_in_chunks() -> None:
    x = rows(count=9001)
    found = CrossMoments.of(x, x[:, :OUTPUTS])
    assert found.count == 9001
    np.testing.assert_allclose(found.m_xx[0], np.cov(x.T, bias=True) * 9001, rtol=1e-10)


def test_groups_see_their_own_channels_only() -> None:
    x = np.random.default_rng(2).standard_normal((ROWS, INPUTS))
    t = np.zeros((ROWS, OUTPUTS))
    t[:, 3] = x[:, 0]  # the other group's
    found = solve_linear(CrossMoments.of(x, t, groups=2), ridge=0.0)
    together = solve_linear(CrossMoments.of(x, t), ridge=0.0)
    assert np.abs(found.weight[1]).max() < 0.2  # chance correlation of 400 rows
    np.testing.assert_allclose(together.weight[0, 0, 3], 1.0, atol=1e-12)


def test_the_gate_keeps_what_helps_and_says_how_much() -> None:
    x = rows()
    t = linear()(x) + 0.5 * np.random.default_rng(4).standard_normal((ROWS, OUTPUTS))
    found = solve_gated_linear(parts_of(x, t))
    noise = ROWS * OUTPUTS * 0.25
    assert found.kind == "linear"
    assert found.r2 == pytest.approx(1.0 - noise / np.square(t - t.mean(axis=0)).sum(), abs=0.01)
    assert found.gain == pytest.approx(1.0 - noise / np.square(t).sum(), abs=0.01)


def test_the_gate_refuses_a_useless_fit() -> None:
    """Few rows, many channels, pure noise: on its own rows least squares looks excellent."""
    random = np.random.default_rng(5)
    x, t = random.standard_normal((80, 60)), random.standard_normal((80, OUTPUTS))
    moments = CrossMoments.of(x, t)
    blind = solve_linear(moments)
    assert 1.0 - moments.error(blind) / np.square(t).sum() > 0.6  # on the rows of the fit
    found = solve_gated_linear(parts_of(x, t), ridges=(1e-4,))
    assert found.kind == "none"
    assert found.r2 < 0.0
    assert not found.linear.weight.any()
    assert not found.linear.offset.any()


def test_where_only_the_mean_is_known_an_offset_is_kept() -> None:
    random = np.random.default_rng(6)
    x, t = random.standard_normal((80, 60)), random.standard_normal((80, OUTPUTS)) + 3.0
    found = solve_gated_linear(parts_of(x, t), ridges=(1e-4,))
    assert found.kind == "offset"
    np.testing.assert_allclose(found.linear.offset, t.mean(axis=0))
    assert found.r2_offset == pytest.approx(0.9, abs=0.03)


def test_noise_asks_for_a_larger_ridge() -> None:
    random = np.random.default_rng(8)
    x = random.standard_normal((80, 40))
    weight = np.zeros((40, OUTPUTS))
    weight[:4] = np.eye(OUTPUTS)
    t = x @ weight + random.standard_normal((80, OUTPUTS))
    found = solve_gated_linear(parts_of(x, t))
    assert found.kind == "linear"
    assert found.ridge > RIDGES[0]
    assert found.r2 > solve_gated_linear(parts_of(x, t), ridges=RIDGES[:1]).r2


def test_what_rounding_adds_counts_against_the_map() -> None:
    x = rows()
    t = 0.1 * linear()(x)
    t -= t.mean(axis=0)
    parts = parts_of(x, t)
    assert solve_gated_linear(parts).kind == "linear"
    mean = np.square(t).mean()
    assert solve_gated_linear(parts, extra=0.5 * mean).gain == pytest.approx(0.5, abs=0.01)
    assert solve_gated_linear(parts, extra=1.1 * mean).kind == "none"


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_values_and_single_parts_are_refused(broken: float) -> None:
    x, t = rows(), linear()(rows())
    assert solve_gated_linear([CrossMoments.of(x, t)]).kind == "none"
    t[3, 1] = broken
    with np.errstate(invalid="ignore"):
        assert solve_gated_linear(parts_of(x, t)).kind == "none"


def test_an_exact_block_needs_nothing() -> None:
    x = rows()
    found = solve_gated_linear(parts_of(x, np.zeros((ROWS, OUTPUTS))))
    assert (found.kind, found.r2, found.gain) == ("none", 0.0, 0.0)


def test_the_offset_that_goes_with_a_weight() -> None:
    x, t = rows(), rows(1, channels=OUTPUTS)
    moments = CrossMoments.of(x, t)
    found = with_best_offset(moments, linear().weight)
    np.testing.assert_allclose((found(x) - t).mean(axis=0), 0.0, atol=1e-10)


def test_rows_have_to_match() -> None:
    with pytest.raises(InternalError, match="pairs of shape"):
        CrossMoments.of(np.zeros((3, 2)), np.zeros((4, 2)))
    with pytest.raises(InternalError, match="3 groups"):
        CrossMoments.of(np.zeros((4, 6)), np.zeros((4, 4)), groups=3)


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"),
    [(64, 64, 1), (16, 16, 1), (256, 256, 4), (64, 128, 1), (512, 512, 8), (160, 160, 2),
     (96, 24, 1), (192, 100, 2), (2048, 512, 32)],
)  # fmt: skip
def test_groups_of_about_64_channels(inputs: int, outputs: int, groups: int) -> None:
    assert group_count(inputs, outputs) == groups
