"""The figures as data: what is drawn where."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from qpass.report.charts import (
    MAX_BARS,
    MAX_TICK_NAMES,
    bars_of,
    histogram_chart,
    layer_chart,
    memory_chart,
    time_chart,
)
from qpass.report.model import LayerReport, Report, TensorHistogram


def small_histogram() -> TensorHistogram:
    """Bins of width 1 around the centres 0.5 to 4.5; the first and the last are out of range."""
    return TensorHistogram(
        name="x",
        edges=(0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
        counts=(10, 20, 0, 40, 30),
        low=1.25,
        high=3.25,
        method="minmax",
        spec="int8",
    )


def test_bars_are_split_at_the_chosen_range() -> None:
    bars = bars_of(small_histogram())
    assert bars.centres == (0.5, 1.5, 2.5, 3.5, 4.5)
    assert bars.inside == (0, 20, 0, 40, 0)
    assert bars.clipped == (10, 0, 0, 0, 30)
    assert bars.clipped_share == 0.4


def test_coarser_bars_keep_every_value() -> None:
    count = 7 * MAX_BARS + 3
    fine = replace(
        small_histogram(),
        edges=tuple(index / count for index in range(count + 1)),
        counts=tuple(range(count)),
        low=0.25,
        high=0.75,
    )
    bars = bars_of(fine)
    assert len(bars.centres) == len(bars.inside) == len(bars.clipped) == MAX_BARS
    assert sum(bars.inside) + sum(bars.clipped) == sum(range(count))
    outside = [i for i in range(count) if (i + 1) / count < 0.25 or i / count > 0.75]
    assert sum(bars.clipped) == sum(outside)


@pytest.mark.parametrize("edges", [(3.0, 3.0), (3.0, 4.0)])
def test_a_histogram_of_one_bin_is_drawn(edges: tuple[float, float]) -> None:
    one = replace(small_histogram(), edges=edges, counts=(5,), low=0.0, high=5.0)
    assert bars_of(one).inside == (5,)
    assert bars_of(one).width == 1.0


def test_histogram_chart_shades_the_range_and_leaves_empty_bars_out() -> None:
    figure = histogram_chart(small_histogram())
    inside, clipped = figure["data"]
    assert (inside["x"], inside["y"]) == ([1.5, 3.5], [20, 40])
    assert (clipped["x"], clipped["y"]) == ([0.5, 4.5], [10, 30])
    assert inside["marker"]["color"] != clipped["marker"]["color"]
    (shade,) = figure["layout"]["shapes"]
    assert (shade["x0"], shade["x1"]) == (1.25, 3.25)
    assert figure["layout"]["yaxis"]["range"][1] > math.log10(40)


def test_a_range_without_end_is_not_shaded() -> None:
    figure = histogram_chart(replace(small_histogram(), high=math.inf))
    assert figure["layout"]["shapes"] == []


def test_layer_chart_has_both_curves_and_gaps_where_there_is_no_number(report: Report) -> None:
    figure = layer_chart(report.layers)
    before, after = figure["data"]
    assert before["y"] == [31.5, 30.25, 27.0, 24.5, 22.0, 21.0, None, 12.5]
    assert after["y"] == [36.0, 34.5, 33.0, 30.0, 29.5, 27.75, None, 18.5]
    assert before["name"] != after["name"]


def test_layers_that_are_still_float_do_not_squeeze_the_others() -> None:
    exact = LayerReport(name="a", op="Conv", sqnr_db_before=200.0, sqnr_db_after=200.0)
    rounded = LayerReport(name="b", op="Conv", sqnr_db_before=31.0, sqnr_db_after=34.0)
    both = layer_chart([exact, rounded])["layout"]["yaxis"]
    assert both["autorangeoptions"] == {"clipmax": 37.0}
    assert "autorangeoptions" not in layer_chart([exact])["layout"]["yaxis"]


def test_layer_names_stand_at_the_axis_while_they_fit() -> None:
    layer = LayerReport(name="conv", op="Conv", sqnr_db_before=1.0, sqnr_db_after=2.0)
    few = layer_chart([layer] * MAX_TICK_NAMES)["layout"]["xaxis"]
    many = layer_chart([layer] * (MAX_TICK_NAMES + 1))["layout"]["xaxis"]
    assert few["ticktext"] == ["conv"] * MAX_TICK_NAMES
    assert "ticktext" not in many


def test_names_are_escaped_because_plotly_reads_tags(report: Report) -> None:
    text = json.dumps(layer_chart(report.layers))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_long_names_keep_their_ends() -> None:
    layer = LayerReport(
        name="/model/" * 10 + "conv7", op="Conv", sqnr_db_before=1.0, sqnr_db_after=2.0
    )
    (label,) = layer_chart([layer])["layout"]["xaxis"]["ticktext"]
    assert label.startswith("..")
    assert label.endswith("conv7")


def test_time_and_memory_are_drawn_by_stage(report: Report) -> None:
    (time,) = time_chart(report.cost)["data"]
    assert time["x"] == [0.5, 4.0, 2.0, 6.0]
    assert time["y"] == ["load", "calibrate", "quantize", "verify"]
    (memory,) = memory_chart(report.cost)["data"]
    assert memory["x"] == [100.0, 400.0, 450.0, 512.0]
