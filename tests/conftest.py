"""Property tests draw the same examples in every run; engines are timed for a moment only."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Each worker is a process. With a thread for each core in each of them, the small products here
# spend half of the time waiting for one another. numpy and torch read this when they are imported.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import qpass.api  # noqa: E402
import qpass.rounds  # noqa: E402

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
