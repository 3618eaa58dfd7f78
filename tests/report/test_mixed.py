"""The search for bits, as the terminal and the page show it."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from qpass.report.html import page
from qpass.report.mixed import front_chart, mixed_section, point_rows, verdict
from qpass.report.model import MixedChoice, MixedPoint, MixedReport, Report
from qpass.report.terminal import print_summary

MIXED = MixedReport(
    budget="SQNR in dB",
    wanted=20.0,
    met=True,
    points=(
        MixedPoint(weight_bytes=1000, share_of_float=0.125, predicted_db=11.0, measured=12.5),
        MixedPoint(
            weight_bytes=1500, share_of_float=0.1875, predicted_db=19.0, measured=21.0, chosen=True
        ),
        MixedPoint(weight_bytes=2000, share_of_float=0.25, predicted_db=30.0),
    ),
    layers=(MixedChoice(name="<fc>", bits="w4a8", error_db=(("w4a8", 21.0), ("w8a8", 45.0))),),
    plan="q.plan.json",
)


def test_rows_and_verdict() -> None:
    assert [row[0] for row in point_rows(MIXED)] == ["", "chosen", ""]
    assert [row[-1] for row in point_rows(MIXED)][:2] == ["12.5", "21"]
    text = verdict(MIXED)
    assert "2 of 3" in text
    assert "q.plan.json" in text
    assert "NOT MET" in verdict(replace(MIXED, met=False))


def test_the_chart_draws_what_was_measured() -> None:
    predicted, measured, chosen = front_chart(MIXED)["data"]
    assert predicted["y"] == [11.0, 19.0, 30.0]
    assert measured["y"] == [12.5, 21.0]
    assert (chosen["x"], chosen["y"]) == ([0.1875], [21.0])


def test_a_metric_in_another_unit_stands_at_the_prediction() -> None:
    _, built, chosen = front_chart(replace(MIXED, budget="top1"))["data"]
    assert built["y"] == [11.0, 19.0]
    assert chosen["y"] == [19.0]


def test_names_are_escaped() -> None:
    part, _ = mixed_section(MIXED)
    assert "&lt;fc&gt;" in part


def test_page_and_terminal_show_it(report: Report) -> None:
    with_it = replace(report, mixed=MIXED)
    assert 'id="mixed"' in page(with_it, "")
    assert 'id="mixed"' not in page(report, "")
    console = Console(file=io.StringIO(), width=120)
    print_summary(with_it, console)
    assert "2 of 3" in " ".join(console.file.getvalue().split())
    assert with_it.to_dict()["mixed"]["points"][1]["chosen"] is True
    assert "mixed" not in report.to_dict()
