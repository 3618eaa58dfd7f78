"""Property tests draw the same examples in every run; engines are timed for a moment only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

import qpass.api
import qpass.rounds

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write what the passes make now into tests/cases; review the diff",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session", autouse=True)
def _short_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (qpass.api, qpass.rounds):
            patch.setattr(module, "TIMING_SECONDS", 0.03)
        yield
