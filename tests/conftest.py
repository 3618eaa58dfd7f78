"""Property tests draw the same examples in every run; engines are timed for a moment only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

import qpass.api
import qpass.rounds

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (qpass.api, qpass.rounds):
            patch.setattr(module, "TIMING_SECONDS", 0.03)
        yield
