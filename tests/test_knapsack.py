"""The front of (size, error) against all choices there are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.knapsack import STATES, Point, solve_front

Array = np.ndarray
LEVELS = st.integers(0, 20)


def every_choice(sizes: list[Array], errors: list[Array]) -> list[tuple[float, float]]:
    choices = product(*(range(len(own)) for own in sizes))
    return [
        (
            sum(float(own[i]) for own, i in zip(sizes, choice, strict=True)),
            sum(float(own[i]) for own, i in zip(errors, choice, strict=True)),
        )
        for choice in choices
    ]


def best_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats, by brute force."""
    return sorted({
        p
        for p in points
        if not any((q[0] <= p[0] and q[1] <= p[1]) and q != p for q in points)
    })  # fmt: skip


def check_levels(front: list[Point], sizes: list[Array], errors: list[Array]) -> None:
    for point in front:
        assert point.size == sum(own[i] for own, i in zip(sizes, point.levels, strict=True))
        assert point.error == pytest.approx(
            sum(own[i] for own, i in zip(errors, point.levels, strict=True))
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(LEVELS, LEVELS), min_size=1, max_size=3), max_size=5))
def test_the_front_is_that_of_brute_force(units: list[list[tuple[int, int]]]) -> None:
    sizes = [np.array([s for s, _ in unit], np.float64) for unit in units]
    errors = [np.array([e for _, e in unit], np.float64) for unit in units]
    front = solve_front(sizes, errors)
    assert [(p.size, p.error) for p in front] == best_front(every_choice(sizes, errors))
    check_levels(front, sizes, errors)


def test_many_units_stay_within_a_step_of_the_best() -> None:
    random = np.random.default_rng(2)
    units = 60
    sizes = [np.sort(random.uniform(1, 1000, 3)) for _ in range(units)]
    errors = [np.sort(random.uniform(0, 1, 3))[::-1] for _ in range(units)]
    front = solve_front(sizes, errors)
    check_levels(front[::97], sizes, errors)
    assert [p.size for p in front] == sorted(p.size for p in front)
    assert [p.error for p in front] == sorted((p.error for p in front), reverse=True)
    assert front[-1].error == pytest.approx(sum(own[-1] for own in errors))
    # Where the Lagrangian has an answer it is the best one for its size; steps cost little.
    most = sum(own[-1] for own in sizes)
    for weight in (1e-4, 1e-3, 1e-2):
        choice = [int(np.argmin(e + weight * s)) for s, e in zip(sizes, errors, strict=True)]
        size = sum(own[i] for own, i in zip(sizes, choice, strict=True))
        error = sum(own[i] for own, i in zip(errors, choice, strict=True))
        room = size + units * most / STATES
        assert min(p.error for p in front if p.size <= room) <= error + 1e-9


def test_no_units() -> None:
    assert solve_front([], []) == [Point(size=0.0, error=0.0, levels=())]
