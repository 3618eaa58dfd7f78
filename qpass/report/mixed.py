"""The search for bits in the report: the plans that were worth having, and what each layer got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from qpass.report import wording
from qpass.report.charts import BLUE, GREEN, GREY, Figure, layout_of
from qpass.report.elements import Html, details, element, section, table
from qpass.report.model import MixedPoint, MixedReport

POINT_COLUMNS: Final = ("plan", "weights", "of float", "predicted", "measured")
LAYER_COLUMNS: Final = ("layer", "bits", "its error at the outputs, by level")
CHART: Final = "mixed"


def point_rows(mixed: MixedReport) -> list[tuple[str, ...]]:
    """Write every plan of the front, smallest first."""
    return [
        (
            "chosen" if point.chosen else "",
            wording.size(point.weight_bytes),
            f"{point.share_of_float:.3f}",
            wording.decibels(point.predicted_db),
            wording.NONE if point.measured is None else f"{point.measured:.4g}",
        )
        for point in mixed.points
    ]


def verdict(mixed: MixedReport) -> str:
    """Say in a sentence what came out."""
    tried = sum(point.measured is not None for point in mixed.points)
    met = "the smallest measured plan that meets it" if mixed.met else "NOT MET, the best of these"
    where = f" Edit {mixed.plan} and give it to --plan." if mixed.plan else ""
    return (
        f"Budget: {mixed.budget} of at least {mixed.wanted:.4g}; {tried} of {len(mixed.points)} "
        f"plans were built and measured, chosen: {met}.{where}"
    )


def mixed_section(mixed: MixedReport) -> tuple[Html, Figure]:
    """Return the section of the page, and the figure that is drawn into its element `CHART`."""
    layers = [
        (
            layer.name,
            layer.bits,
            ", ".join(f"{level} {-value:.1f} dB" for level, value in layer.error_db),
        )
        for layer in mixed.layers
    ]
    figure = front_chart(mixed)
    box = Html(
        f'<div class="chart" id="{CHART}" style="height:{figure["layout"]["height"]}px"></div>'
    )
    return (
        section(
            "Mixed precision",
            element("p", verdict(mixed)),
            box,
            details("Plans", table(POINT_COLUMNS, point_rows(mixed), 4)),
            details("Layers", table(LAYER_COLUMNS, layers)),
            about="No other choice of bits is both smaller and, by the sum of the layers' errors, "
            "more accurate. The sum only says where to look: what was chosen was measured.",
        ),
        figure,
    )


def front_chart(mixed: MixedReport) -> Figure:
    """Size of the weights against SQNR: predicted for all plans, measured where the unit is dB."""
    chosen = [point for point in mixed.points if point.chosen]
    data = [_marks("predicted", mixed.points, GREY, "lines+markers")]
    measured = [point for point in mixed.points if point.measured is not None]
    if mixed.budget.endswith("dB"):
        data.append(_marks("measured", measured, BLUE, "markers", measured=True))
        data.append(_marks("chosen", chosen, GREEN, "markers", measured=True, size=13))
    else:
        data.append(_marks("built", measured, BLUE, "markers"))
        data.append(_marks("chosen", chosen, GREEN, "markers", size=13))
    layout = layout_of(
        height=360,
        xaxis={"title": {"text": "weights, share of float"}},
        yaxis={"title": {"text": "SQNR of the outputs (dB)"}},
    )
    return {"data": data, "layout": layout | {"showlegend": True}}


def _marks(
    name: str,
    points: Sequence[MixedPoint],
    colour: str,
    mode: str,
    *,
    measured: bool = False,
    size: int = 7,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [point.share_of_float for point in points],
        "y": [point.measured if measured else point.predicted_db for point in points],
        "marker": {"color": colour, "size": size},
        "line": {"color": colour, "width": 1},
        "hovertemplate": "%{x:.3f} of float, %{y:.1f} dB",
    }
