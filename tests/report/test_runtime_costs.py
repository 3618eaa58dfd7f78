"""What compensation costs at run time stands in the terminal and in the HTML report."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from qpass.report.html import page
from qpass.report.model import Report, RuntimeCost
from qpass.report.terminal import print_summary

COSTS = (
    RuntimeCost(
        method="cwac", nodes=0, parameters=0, macs=0, places=9, latency_ratio=None,
        sqnr_db=(14.4, 18.25),
    ),
    RuntimeCost(
        method="qwt", nodes=24, parameters=49_920, macs=4_866_048, places=12, engine="ort",
        latency_ms=(1.25, 1.5), latency_ratio=1.2, sqnr_db=(18.25, 20.5),
    ),
    RuntimeCost(method="nbc", nodes=16, parameters=1_088, macs=6_144, places=1),
)  # fmt: skip
ROWS = (
    ("cwac", "0", "0", "0", "the same: folded", "1.00x", "14.4 -> 18.2 dB"),
    ("qwt", "24", "49920", "4866048", "1.25 -> 1.50 ms", "1.20x", "18.2 -> 20.5 dB"),
    ("nbc", "16", "1088", "6144", "not measured", "-", "-"),
)


@pytest.fixture
def costly(report: Report) -> Report:
    return replace(report, runtime_costs=COSTS)


def printed(report: Report) -> list[str]:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    print_summary(report, console)
    return console.file.getvalue().splitlines()


def test_the_terminal_prints_it(costly: Report) -> None:
    lines = printed(costly)
    start = lines.index("Compensation at run time")
    for row, line in zip(ROWS, lines[start + 3 :], strict=False):
        assert tuple(re.split(r" {2,}", line.strip())) == row


def test_the_page_shows_it(costly: Report) -> None:
    text = page(costly, "")
    assert "Compensation at run time" in text
    for row in ROWS:
        cells = [f">{cell.replace('>', '&gt;')}</td>" for cell in row]
        assert re.search(".*?".join(map(re.escape, cells)), text, re.DOTALL)


def test_without_compensation_nothing_is_said(report: Report) -> None:
    assert "Compensation at run time" not in "\n".join([*printed(report), page(report, "")])


def test_json_has_the_numbers(costly: Report) -> None:
    rows = costly.to_dict()["runtime_costs"]
    assert [row["method"] for row in rows] == ["cwac", "qwt", "nbc"]
    assert rows[1]["latency_ms"] == [1.25, 1.5]
    assert rows[2]["latency_ms"] is None
