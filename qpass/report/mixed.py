"""The search for bits in the report: the plans that were worth having, and what each layer got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from qpass.report import wording
from qpass.report.charts import BLUE, GREEN, GREY, Figure, layout_of
from qpass.report.elements import Html, details, element, section, table
from qpass.report.model import MixedChoice, MixedPoint, MixedReport

LAYER_COLUMNS: Final[tuple[str, ...]] = ("layer", "bits", "its error at the outputs, by level")
CHART: Final = "mixed"
AXES: Final = {"size": "weights, share of float", "latency": "sum of the layers (ms)"}


def point_columns(mixed: MixedReport) -> tuple[str, ...]:
    """Name the columns of `point_rows`; the cost stands first."""
    cost = ("layers", "model") if mixed.cost == "latency" else ()
    return ("plan", *cost, "weights", "of float", "predicted", "measured")


def point_rows(mixed: MixedReport) -> list[tuple[str, ...]]:
    """Write every plan of the front, cheapest first."""
    return [
        (
            "chosen" if point.chosen else "",
            *(_times_of(point) if mixed.cost == "latency" else ()),
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
    best = "fastest" if mixed.cost == "latency" else "smallest"
    met = f"the {best} measured plan that meets it" if mixed.met else "NOT MET, the best of these"
    where = f" Edit {mixed.plan} and give it to --plan." if mixed.plan else ""
    cost = (
        "milliseconds of the layers, each timed alone in the target's engine"
        if mixed.cost == "latency"
        else "bytes of the weights"
    )
    return (
        f"Cost: {cost}. Budget: {mixed.budget} of at least {mixed.wanted:.4g}; "
        f"{tried} of {len(mixed.points)} plans were built and measured, chosen: {met}.{where}"
    )


def mixed_section(mixed: MixedReport) -> tuple[Html, Figure]:
    """Return the section of the page, and the figure that is drawn into its element `CHART`."""
    layers = [
        (
            layer.name,
            layer.bits,
            ", ".join(f"{level} {-value:.1f} dB" for level, value in layer.error_db),
            *((_times(layer),) if mixed.cost == "latency" else ()),
        )
        for layer in mixed.layers
    ]
    columns, better = LAYER_COLUMNS, "smaller"
    if mixed.cost == "latency":
        columns, better = (*columns, "its time alone, by level"), "faster"
    shown, figure = point_columns(mixed), front_chart(mixed)
    box = Html(
        f'<div class="chart" id="{CHART}" style="height:{figure["layout"]["height"]}px"></div>'
    )
    return (
        section(
            "Mixed precision",
            element("p", verdict(mixed)),
            box,
            details("Plans", table(shown, point_rows(mixed), len(shown) - 1)),
            details("Layers", table(columns, layers)),
            about=f"No other choice of bits is both {better} and, by the sum of the layers' "
            "errors, more accurate. The sum only says where to look: what was chosen was measured.",
        ),
        figure,
    )


def milliseconds(value: float) -> str:
    """Write a time, with three digits however short it is."""
    return f"{value:.3g} ms"


def _times_of(point: MixedPoint) -> tuple[str, str]:
    found = (point.layers_ms, point.model_ms)
    alone, whole = (wording.NONE if value is None else milliseconds(value) for value in found)
    return alone, whole


def _times(layer: MixedChoice) -> str:
    return ", ".join(f"{level} {milliseconds(value)}" for level, value in layer.level_ms)


def front_chart(mixed: MixedReport) -> Figure:
    """Cost of the plans against SQNR: predicted for all, measured where the unit is dB."""
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
        xaxis={"title": {"text": AXES[mixed.cost]}},
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
    unit = "of float" if all(point.layers_ms is None for point in points) else "ms"
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [_cost(point) for point in points],
        "y": [point.measured if measured else point.predicted_db for point in points],
        "marker": {"color": colour, "size": size},
        "line": {"color": colour, "width": 1},
        "hovertemplate": f"%{{x:.3f}} {unit}, %{{y:.1f}} dB",
    }


def _cost(point: MixedPoint) -> float:
    return point.share_of_float if point.layers_ms is None else point.layers_ms
