"""The stable topological order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpass.errors import InternalError
from qpass.order import stable_order


@st.composite
def orderable(draw: st.DrawFn) -> list[set[int]]:
    """Needs without a circle: item i needs only items that come earlier in a hidden order."""
    size = draw(st.integers(0, 12))
    hidden = draw(st.permutations(range(size)))
    needs: list[set[int]] = [set() for _ in range(size)]
    for place, item in enumerate(hidden):
        if place:
            needs[item] = draw(st.sets(st.sampled_from(hidden[:place]), max_size=3))
    return needs


@given(orderable())
def test_everything_comes_once_and_after_what_it_needs(needs: list[set[int]]) -> None:
    order = stable_order(needs)
    assert sorted(order) == list(range(len(needs)))
    place = {item: i for i, item in enumerate(order)}
    assert all(place[maker] < place[item] for item in place for maker in needs[item])


@given(orderable())
def test_a_second_run_changes_nothing(needs: list[set[int]]) -> None:
    order = stable_order(needs)
    place = {item: i for i, item in enumerate(order)}
    sorted_needs = [{place[maker] for maker in needs[item]} for item in order]
    assert stable_order(sorted_needs) == list(range(len(needs)))


def test_what_is_in_order_keeps_its_place() -> None:
    # Item 1 needs item 3 and waits for it; the others stay as they are.
    assert stable_order([set(), {3}, {0}, {0}, {2}]) == [0, 2, 3, 1, 4]


def test_a_long_chain_needs_no_recursion() -> None:
    count = 50_000
    assert stable_order([{i + 1} for i in range(count)] + [set()]) == list(range(count, -1, -1))


@pytest.mark.parametrize("needs", [[{0}], [{1}, {0}], [set(), {2}, {1}]])
def test_a_circle_is_an_error(needs: list[set[int]]) -> None:
    with pytest.raises(InternalError, match="cycle"):
        stable_order(needs)
