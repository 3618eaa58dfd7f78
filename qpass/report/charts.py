"""The charts of the HTML report as plain plotly.js figures: dicts that become JSON.

Nothing here imports plotly: its Python objects would only cost import time, and what is drawn is
fixed. Colours of the text and of the grid come from the page's style sheet, which knows whether
the reader wants it light or dark; the data colours are readable on both.
"""

from __future__ import annotations

import html
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from qpass.report import wording
from qpass.report.model import Cost, LayerReport, TensorHistogram

Figure: TypeAlias = dict[str, Any]

BLUE: Final = "#3b82f6"
GREEN: Final = "#10a37f"
RED: Final = "#ef4444"
GREY: Final = "#8b93a1"
MAX_BARS: Final = 200  # more are narrower than a pixel
MAX_TICK_NAMES: Final = 40
TICK_CHARS: Final = 24
FLOAT_DB: Final = 140.0  # rounding to the 24 bits of float32 is about as near
MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A histogram coarse enough to draw: bin centres, and the counts on both sides of the cut."""

    centres: tuple[float, ...]
    width: float
    inside: tuple[int, ...]  # counts of the values that the chosen range holds
    clipped: tuple[int, ...]

    @property
    def clipped_share(self) -> float:
        """Fraction of all values that lie outside of the chosen range."""
        return sum(self.clipped) / max(sum(self.inside) + sum(self.clipped), 1)


def layer_chart(layers: Sequence[LayerReport]) -> Figure:
    """SQNR of each layer in execution order, before and after compensation."""
    labels = [f"{_label(layer.name)} ({_label(layer.op)})" for layer in layers]
    positions = list(range(len(layers)))
    before = [_finite(layer.sqnr_db_before) for layer in layers]
    after = [_finite(layer.sqnr_db_after) for layer in layers]
    axis: dict[str, Any] = {"title": {"text": "layer, in execution order"}, "zeroline": False}
    if len(layers) <= MAX_TICK_NAMES:
        axis |= {
            "tickvals": positions,
            "ticktext": [_label(_tail(layer.name)) for layer in layers],
            "tickangle": -45,
        }
    data = [
        _line("before compensation", positions, before, labels, GREY),
        _line("after compensation", positions, after, labels, BLUE),
    ]
    # Layers that are still float would squeeze the others into a line at the bottom.
    shown = [value for value in (*before, *after) if value is not None and value < FLOAT_DB]
    decibels: dict[str, Any] = {"title": {"text": "SQNR (dB)"}}
    if shown:
        decibels["autorangeoptions"] = {"clipmax": max(shown) + 3.0}
    layout = layout_of(height=420, xaxis=axis, yaxis=decibels)
    return {"data": data, "layout": layout | {"showlegend": True}}


def _line(
    name: str, x: list[int], y: list[float | None], labels: list[str], colour: str
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": x,
        "y": y,
        "text": labels,
        "hovertemplate": "%{text}<br>%{y:.1f} dB",
        "line": {"color": colour, "width": 1.5},
        "marker": {"color": colour, "size": 6},
    }


def bars_of(histogram: TensorHistogram) -> Bars:
    """Sum neighbouring bins until few enough are left to draw.

    Only bins that lie wholly outside of the chosen range count as clipped: at its ends, values
    are rounded to the last step rather than cut off.
    """
    edges, counts = histogram.edges, histogram.counts
    bars = min(len(counts), MAX_BARS)
    first, last = edges[0], edges[-1]
    width = (last - first) / bars or 1.0
    centres = tuple(first + (index + 0.5) * width for index in range(bars))
    borders = [first + index * width for index in range(1, bars)]
    inside, clipped = [0] * bars, [0] * bars
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        side = inside if high >= histogram.low and low <= histogram.high else clipped
        side[bisect_right(borders, (low + high) / 2)] += count
    return Bars(centres=centres, width=width, inside=tuple(inside), clipped=tuple(clipped))


def histogram_chart(histogram: TensorHistogram) -> Figure:
    """Values of one tensor on a logarithmic scale; the chosen range is shaded."""
    bars = bars_of(histogram)
    top = math.log10(max(*bars.inside, *bars.clipped, 1)) + 0.2
    # Zero has no logarithm: empty bars are left out.
    data = [
        _bars("in range", bars, bars.inside, BLUE),
        _bars("clipped", bars, bars.clipped, RED),
    ]
    layout = layout_of(
        height=240,
        margin={"l": 56, "r": 12, "t": 12, "b": 40},
        xaxis={"title": {"text": "value"}, "zeroline": False},
        yaxis={
            "title": {"text": "count"},
            "type": "log",
            "range": [-0.3, top],
            "dtick": max(1, math.ceil(top / 5)),
            "exponentformat": "power",
        },
    )
    return {"data": data, "layout": layout | {"barmode": "overlay", "shapes": _shade(histogram)}}


def _shade(histogram: TensorHistogram) -> list[dict[str, Any]]:
    if not (math.isfinite(histogram.low) and math.isfinite(histogram.high)):
        return []
    edge = {"width": 1.5, "color": GREEN}
    vertical = {"y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
    horizontal = {"x0": histogram.low, "x1": histogram.high}
    look = {"fillcolor": GREEN, "opacity": 0.16, "line": edge}
    return [{"type": "rect", **horizontal, **vertical, **look}]


def _bars(name: str, bars: Bars, counts: Sequence[int], colour: str) -> dict[str, Any]:
    drawn = [
        (centre, count) for centre, count in zip(bars.centres, counts, strict=True) if count > 0
    ]
    return {
        "type": "bar",
        "name": name,
        "x": [centre for centre, _ in drawn],
        "y": [count for _, count in drawn],
        "width": bars.width,
        "hovertemplate": "%{x:.4g}: %{y} values",
        "marker": {"color": colour, "line": {"width": 0}},
    }


def time_chart(cost: Cost) -> Figure:
    """Seconds of each stage."""
    return _by_stage(cost.seconds_by_stage, "time (s)", "%{y}: %{x:.2f} s", BLUE)


def memory_chart(cost: Cost) -> Figure:
    """Peak of resident memory, in MiB, up to the end of each stage."""
    mebibytes = {name: peak / MEBIBYTE for name, peak in cost.peak_rss_by_stage.items()}
    return _by_stage(
        mebibytes, "peak memory up to the end of the stage (MiB)", "%{y}: %{x:.0f} MiB", GREEN
    )


def _by_stage(values: Mapping[str, float], title: str, hover: str, colour: str) -> Figure:
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": title,
        "x": [_finite(value) for value in values.values()],
        "y": [_label(name) for name in values],
        "hovertemplate": hover + "<extra></extra>",
        "marker": {"color": colour},
    }
    layout = layout_of(
        height=90 + 30 * max(len(values), 1),
        margin={"l": 96, "r": 16, "t": 8, "b": 44},
        xaxis={"title": {"text": title}, "rangemode": "tozero"},
        yaxis={"type": "category", "autorange": "reversed", "ticksuffix": " "},
    )
    return {"data": [bars], "layout": layout}


def layout_of(*, height: int, **extra: Any) -> dict[str, Any]:
    """Return the layout that all charts share, with `extra` on top."""
    clear = "rgba(0,0,0,0)"
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "bgcolor": clear}
    return {
        "height": height,
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "showlegend": False,
        "legend": legend,
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 56, "r": 16, "t": 32, "b": 56},
        **{
            name: {"automargin": True, **value} if name.endswith("axis") else value
            for name, value in extra.items()
        },
    }


def _label(text: str) -> str:
    """Escape `text` for plotly.js, which reads tags in its labels, links among them."""
    return html.escape(wording.visible(text), quote=False)


def _tail(name: str) -> str:
    """Shorten a name at its front: the ends of exported names differ, their fronts agree."""
    return name if len(name) <= TICK_CHARS else ".." + name[-(TICK_CHARS - 2) :]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
