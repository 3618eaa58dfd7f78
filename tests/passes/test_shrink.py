"""Shrinking: the prior is found again, what is sure stays, and errors fall."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.passes.shrink import shrink, solve_prior


def noisy(*, center: float, spread: float, seed: int, count: int = 2000):
    """Return true values, estimates of them, and the variances of the estimates."""
    random = np.random.default_rng(seed)
    truth = center + spread * random.standard_normal(count)
    variances = random.uniform(0.1, 2.0, count)
    return truth, truth + np.sqrt(variances) * random.standard_normal(count), variances


@pytest.mark.parametrize("known_center", [True, False])
def test_centre_and_spread_are_found_again(known_center):
    center = 0.0 if known_center else 3.0
    _, estimates, variances = noisy(center=center, spread=0.7, seed=1)
    middle, tau = solve_prior(estimates, variances, center=center if known_center else None)
    # Standard errors: about sqrt((0.49 + 0.6) / 2000) = 0.023 and (0.49 + 0.6) sqrt(2 / 2000).
    assert middle == pytest.approx(center, abs=0.08)
    assert tau == pytest.approx(0.49, abs=0.12)


def test_at_the_solution_the_weighted_squares_are_as_many_as_the_degrees_of_freedom():
    _, estimates, variances = noisy(center=1.0, spread=0.5, seed=2, count=40)
    middle, tau = solve_prior(estimates, variances)
    weights = 1.0 / (tau + variances)
    assert middle == pytest.approx((weights * estimates).sum() / weights.sum(), rel=1e-12)
    assert (weights * (estimates - middle) ** 2).sum() == pytest.approx(39.0, rel=1e-9)


def test_estimates_that_scatter_as_noise_does_have_no_spread():
    random = np.random.default_rng(3)
    estimates = 2.0 + 0.1 * random.standard_normal(50)
    assert solve_prior(estimates, np.full(50, 0.5)) == (pytest.approx(estimates.mean()), 0.0)
    np.testing.assert_allclose(shrink(estimates, np.full(50, 0.5)), estimates.mean())


def test_it_lowers_the_error_of_noisy_estimates_and_leaves_sure_ones():
    truth, estimates, variances = noisy(center=1.0, spread=0.3, seed=4)
    shrunk = shrink(estimates, variances)
    # The best possible is tau v / (tau + v), here 0.078 on average against 1.05.
    assert np.mean((shrunk - truth) ** 2) < 0.1 * np.mean((estimates - truth) ** 2)
    sure = shrink(truth, np.full(truth.size, 1e-12))
    np.testing.assert_allclose(sure, truth, rtol=1e-9)


def test_what_has_no_variance_stays_and_helps_nobody():
    estimates = np.array([5.0, 1.0, 1.2, 0.8, np.nan])
    variances = np.array([0.0, 9.0, 9.0, 9.0, np.nan])
    shrunk = shrink(estimates, variances)
    np.testing.assert_allclose(shrunk, [5.0, 1.0, 1.0, 1.0, np.nan])
    few = np.array([1.0, 2.0])
    np.testing.assert_array_equal(shrink(few, np.ones(2)), few)


def test_the_order_of_the_channels_does_not_matter():
    _, estimates, variances = noisy(center=0.0, spread=1.0, seed=5, count=100)
    order = np.random.default_rng(6).permutation(100)
    left = shrink(estimates, variances, center=0.0)[order]
    right = shrink(estimates[order], variances[order], center=0.0)
    np.testing.assert_allclose(left, right, rtol=1e-9)
