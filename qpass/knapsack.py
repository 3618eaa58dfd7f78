"""Choose one level for each unit so that no other choice is both smaller and more accurate.

A multiple-choice knapsack, solved by dynamic programming over the set of choices that are not
dominated: after each unit, every (size, error) that is worse in both than another is dropped. The
answer is exact as long as the sizes that occur fit into `STATES`; above that, sizes that fall into
one of `STATES` equal steps of the largest one compete with each other, so that a point may be
larger than the best by one step for each unit, at the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STATES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One choice: the level of each unit, their summed size and error."""

    size: float
    error: float
    levels: tuple[int, ...]


def solve_front(sizes: Sequence[Array], errors: Sequence[Array]) -> list[Point]:
    """Return the choices that are not dominated, smallest first.

    Args:
        sizes: for each unit the size of each of its levels, float64, not negative.
        errors: the same for the errors.
    """
    size, error = np.zeros(1), np.zeros(1)
    back: list[tuple[Array, Array]] = []  # for each unit: level and previous state of each state
    most = float(sum(np.max(own) for own in sizes)) if sizes else 0.0
    for own_sizes, own_errors in zip(sizes, errors, strict=True):
        levels = len(own_sizes)
        total = (size[:, None] + np.asarray(own_sizes, np.float64)[None, :]).ravel()
        worse = (error[:, None] + np.asarray(own_errors, np.float64)[None, :]).ravel()
        keep = _undominated(total, worse)
        if len(keep) > STATES:
            keep = keep[_last_in_step(total[keep], most / STATES)]
        size, error = total[keep], worse[keep]
        back.append((keep % levels, keep // levels))
    return [
        Point(size=float(size[i]), error=float(error[i]), levels=_trace(back, i))
        for i in range(len(size))
    ]


def _undominated(size: Array, error: Array) -> Array:
    """Return the indices of states that no other beats in both, by growing size."""
    order = np.lexsort((error, size))
    best = np.minimum.accumulate(error[order])
    better = np.concatenate(([True], error[order][1:] < best[:-1]))
    return order[better]


def _last_in_step(size: Array, step: float) -> Array:
    """Return, of the states in each step of size, the last: it has the smallest error."""
    number = np.floor(size / step)
    return np.flatnonzero(np.concatenate((number[1:] != number[:-1], [True])))


def _trace(back: list[tuple[Array, Array]], state: int) -> tuple[int, ...]:
    levels = []
    for own, previous in reversed(back):
        levels.append(int(own[state]))
        state = int(previous[state])
    return tuple(reversed(levels))
