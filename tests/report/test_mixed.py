"""The search for bits, as the terminal and the page show it."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from qpass.report.html import page
from qpass.report.mixed import front_chart, mixed_section, point_columns, point_rows, verdict
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


TIMED = replace(
    MIXED,
    cost="latency",
    points=tuple(
        replace(point, layers_ms=ms, model_ms=whole)
        for point, ms, whole in zip(
            MIXED.points, (0.25, 0.5, 1.5), (0.625, 0.75, None), strict=True
        )
    ),
    layers=(replace(MIXED.layers[0], level_ms=(("w4a8", 0.25), ("float", 12.0))),),
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


def test_time_as_the_cost_has_its_unit() -> None:
    assert "bytes of the weights" in verdict(MIXED)
    text = verdict(TIMED)
    assert "milliseconds of the layers" in text
    assert "the fastest measured plan" in text
    assert point_columns(TIMED) == (
        "plan", "layers", "model", "weights", "of float", "predicted", "measured",
    )  # fmt: skip
    rows = point_rows(TIMED)
    assert [row[1:3] for row in rows] == [("0.25 ms", "0.625 ms"), ("0.5 ms", "0.75 ms"),
                                          ("1.5 ms", "-")]  # fmt: skip
    assert [len(row) for row in rows] == [7, 7, 7]
    assert [row[1:] for row in point_rows(MIXED)] == [row[3:] for row in rows]


def test_the_chart_of_times() -> None:
    figure = front_chart(TIMED)
    assert figure["layout"]["xaxis"]["title"]["text"] == "sum of the layers (ms)"
    predicted, _, chosen = figure["data"]
    assert predicted["x"] == [0.25, 0.5, 1.5]
    assert chosen["x"] == [0.5]
    assert "ms" in predicted["hovertemplate"]
    assert "of float" in front_chart(MIXED)["data"][0]["hovertemplate"]
    part, _ = mixed_section(TIMED)
    assert "w4a8 0.25 ms, float 12 ms" in part
    assert "both faster" in part
    assert "both smaller" in mixed_section(MIXED)[0]


def test_json_and_terminal_of_times(report: Report) -> None:
    with_it = replace(report, mixed=TIMED)
    data = with_it.to_dict()["mixed"]
    assert (data["cost"], data["points"][1]["layers_ms"]) == ("latency", 0.5)
    assert data["points"][1]["weight_bytes"] == 1500
    console = Console(file=io.StringIO(), width=120)
    print_summary(with_it, console)
    text = " ".join(console.file.getvalue().split())
    assert "milliseconds of the layers" in text
    assert "0.75 ms" in text


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
