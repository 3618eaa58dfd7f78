"""Soft rounding: its start, its ends and its grid, and that learning beats rounding to nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qpass.torch.soft_rounding import (  # noqa: E402
    START,
    SoftRounding,
    beta_at,
    penalty,
)

pytestmark = pytest.mark.torch
Array = np.ndarray[Any, Any]
BOUNDS = (-7, 7)


def problem(seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """A weight that goes a little beyond the grid, its scales, zero points and nearest integers."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((6, 5))
    scale = np.abs(weight).max(axis=0) / 6.5
    return weight, scale, np.zeros(5), np.clip(np.rint(weight / scale), *BOUNDS)


def soft_of(weight: Array, scale: Array, zero_point: Array, integers: Array) -> SoftRounding:
    return SoftRounding(weight, integers, scale, zero_point, BOUNDS, dtype=torch.float64)


def test_starts_between_the_integers_and_the_weight() -> None:
    weight, scale, zero_point, integers = problem()
    soft = soft_of(weight, scale, zero_point, integers)
    rest = np.clip(weight / scale - integers, -1.0, 1.0)
    inside = np.abs(integers) < 7
    started = soft.weight(soft.up()).detach().numpy()
    np.testing.assert_allclose(
        started[inside], ((integers + START * rest) * scale)[inside], rtol=0, atol=1e-12
    )
    np.testing.assert_array_equal(soft.integers(), integers)
    np.testing.assert_allclose(soft.rounded().numpy(), integers * scale, rtol=0, atol=1e-12)


def test_integers_are_floor_or_the_next_one_and_on_the_grid() -> None:
    weight, scale, _, integers = problem()
    zero_point = np.array([0.0, 1.0, -2.0, 3.0, 0.0])
    integers = np.clip(integers + zero_point, *BOUNDS)
    soft = soft_of(weight, scale, zero_point, integers)
    for logit in (-50.0, 50.0):
        with torch.no_grad():
            soft.logits.fill_(logit)
        found = soft.integers()
        np.testing.assert_array_equal(found, soft.floor + (logit > 0))
        assert found.min() >= BOUNDS[0]
        assert found.max() <= BOUNDS[1]
        values = soft.weight(soft.up()).detach().numpy()
        np.testing.assert_allclose(values, (found - zero_point) * scale, rtol=0, atol=1e-12)


def test_penalty_is_zero_at_the_ends_and_its_exponent_falls() -> None:
    up = torch.tensor([0.0, 1.0, 0.5, 0.75], dtype=torch.float64)
    assert float(penalty(up[:2], 20.0)) == 0.0
    assert float(penalty(up[2:3], 2.0)) == 1.0
    assert float(penalty(up[3:], 2.0)) == 1.0 - 0.5**2
    assert beta_at(0.1) is None
    assert beta_at(0.2) == 20.0
    assert beta_at(1.0) == 2.0


def test_learning_beats_rounding_to_nearest() -> None:
    """One layer with inputs that go together, where errors of weights add up or cancel."""
    weight, scale, zero_point, nearest = problem(4)
    random = np.random.default_rng(1)
    inputs = random.standard_normal((64, 2)) @ random.standard_normal((2, 6))
    inputs += 0.1 * random.standard_normal((64, 6))
    x, wanted = torch.from_numpy(inputs), torch.from_numpy(inputs @ weight)
    soft = soft_of(weight, scale, zero_point, nearest)

    def error(values: torch.Tensor) -> torch.Tensor:
        return (x @ values - wanted).square().mean()

    plain = float(error(torch.from_numpy(nearest * scale)))
    optimizer = torch.optim.Adam([soft.logits], lr=0.02)
    for step in range(500):
        optimizer.zero_grad()
        up, beta = soft.up(), beta_at(step / 500)
        loss = error(soft.weight(up)) / plain
        if beta is not None:
            loss = loss + penalty(up, beta) / up.numel()
        loss.backward()
        optimizer.step()
    assert float(error(soft.rounded())) < 0.7 * plain
    assert (np.abs(soft.integers() - nearest) <= 1.0).all()
