"""What sessions leave in their arena goes back to the system, when there is too much of it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from qpass import arena
from qpass.arena import give_back, give_back_above, resident_bytes
from qpass.submodel import Submodel
from tests.folds import graph_of

MIB = 1 << 20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def used(mib: int) -> None:
    """Let a session compute something of this size, and drop it."""
    graph = graph_of("float[N] x", "float[N] y", "a = Add (x, x) y = Mul (a, x)")
    feeds = {"x": np.ones(mib * MIB // 4, np.float32)}
    Submodel(graph, feeds, ["y"], threads=1).run(feeds)


@linux
def test_it_falls_to_what_is_in_use() -> None:
    give_back()
    before = resident_bytes()
    used(96)
    left = resident_bytes()
    assert left > before + 90 * MIB  # the arena keeps the output
    give_back()
    assert resident_bytes() < before + 10 * MIB


@linux
def test_only_above_the_limit() -> None:
    used(96)
    left = resident_bytes()
    give_back_above(left + 10 * MIB)
    assert resident_bytes() > left - 10 * MIB
    give_back_above(left - 50 * MIB)
    assert resident_bytes() < left - 80 * MIB


def test_an_arena_of_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("nothing may be run in it")

    monkeypatch.setattr(arena, "share_arena", lambda: False)
    monkeypatch.setattr(arena, "_smallest_session", fail)
    give_back()
