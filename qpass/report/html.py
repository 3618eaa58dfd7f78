"""The report as one HTML file that opens offline, in any browser, in years to come.

The file holds its style, its data and plotly.js, and forbids itself (by its content security
policy) to load anything else. The same report gives the same bytes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qpass.errors import UserError
from qpass.files import write_text
from qpass.report import charts, wording
from qpass.report.charts import Figure
from qpass.report.elements import Html, bullets, details, element, escape, join, section, table
from qpass.report.mixed import CHART, mixed_section
from qpass.report.model import MapNode, Report, TensorHistogram
from qpass.report.style import STYLE
from qpass.report.wording import Leftover

MANY_NODES: Final = 1500  # above, the cells of the map are drawn smaller
MAX_REASONS: Final = 20
MAX_LISTED: Final = 200  # names of one kind of float leftover; report.json holds all
POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
)
CELLS: Final = {"integer": "q", "float": "f", "passthrough": "p"}  # precision -> CSS class
BROKEN: Final = "x"
LEFT: Final = "Left in float"
LEGEND: Final = (
    ("q", "integer"),
    ("p", "passthrough: moves integers"),
    ("f", "float"),
    (BROKEN, "planned in integers, but an engine runs it in float"),
)
DRAW: Final = """
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures)) {
  Plotly.newPlot(id, figure.data, figure.layout, {responsive: true, displayModeBar: false});
}
"""


def write_html(report: Report, path: Path) -> None:
    """Write `report` to `path` as one self-contained HTML file.

    Raises:
        UserError: plotly, of the extra [report], is not installed.
    """
    write_text(path, page(report, plotly_js()))


def plotly_js() -> str:
    """Return the source of plotly.js, which the Python package plotly carries.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        offline = importlib.import_module("plotly.offline")
    except ModuleNotFoundError as error:
        raise UserError(
            "the HTML report needs plotly, which is not installed",
            fix="pip install qpass[report]",
        ) from error
    return str(offline.get_plotlyjs())


def page(report: Report, script: str) -> str:
    """Return the whole page, with `script` (plotly.js) inlined once."""
    figures: dict[str, Figure] = {}
    body = "\n".join(
        (
            _headline(report),
            _cards(report),
            _notes(report),
            _engines(report),
            _leftovers(report),
            _graph_map(report),
            _layers(report, figures),
            _histograms(report, figures),
            _runtime_costs(report),
            _mixed(report, figures),
            _gates_and_rounds(report),
            _cost(report, figures),
            _passes(report),
            _settings(report),
        )
    )
    # A "</script>" in a node's name must not end the element.
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>qpass: {escape(Path(report.model).name)}</title>",
            f"<style>{STYLE}</style></head><body>",
            body,
            f"<script>{script}</script>",
            f'<script type="application/json" id="figures">{data}</script>',
            f"<script>{DRAW}</script>",
            "</body></html>\n",
        )
    )


def _chart(name: str, figure: Figure, figures: dict[str, Figure]) -> Html:
    """Register `figure` under `name` and return the element that it is drawn into."""
    figures[name] = figure
    height = figure["layout"]["height"]
    return Html(f'<div class="chart" id="{name}" style="height:{height}px"></div>')


def _headline(report: Report) -> Html:
    verdict = element("span", "OK", "good") if report.ok else element("span", "REJECTED", "bad")
    return join(
        (
            element("h1", join((verdict, " ", Path(report.output).name))),
            element("p", f"{report.model} -> {report.output}", "paths"),
        )
    )


def _cards(report: Report) -> Html:
    own = report.engines[0] if report.engines else None
    sizes, cost, nodes = report.sizes, report.cost, report.nodes
    cards = [
        (f"{report.target}", f"target, {report.precision}"),
        (
            f"{sizes.ratio:.2f}x",
            f"size: {wording.size(sizes.float_bytes)} -> {wording.size(sizes.quantized_bytes)}",
        ),
    ]
    if own is not None:
        cards += [
            (wording.integers(own), f"planned ops in integers, in {own.name}"),
            (wording.factor(own.speedup), f"speed-up: {wording.latency(own.latency_ms)}"),
            (wording.decibels(own.sqnr_db), "SQNR of the worst output"),
        ]
    if report.metric is not None:
        metric = report.metric
        cards.append(
            (
                f"{metric.quantized:.4g}",
                f"{metric.name}: float {metric.float:.4g}, drop {metric.drop:.4g}",
            )
        )
    cards += [
        (
            str(nodes.added_at_runtime),
            f"nodes added at run time; {nodes.float} -> {nodes.quantized} in all",
        ),
        (wording.seconds(cost.seconds_total), f"to make, with {cost.samples} samples"),
    ]
    return element(
        "div",
        join(
            element("div", join((element("b", value), element("span", label))), "card")
            for value, label in cards
        ),
        "cards",
    )


def _notes(report: Report) -> Html:
    if not report.notes:
        return Html("")
    items = (element("li", note, "bad" if wording.shouts(note) else "") for note in report.notes)
    return section("Notes", element("ul", join(items)))


def _engines(report: Report) -> Html:
    columns = (
        "engine", "integer ops", "latency", "speed-up", "SQNR", "cosine", "optimizer on/off",
    )  # fmt: skip
    rows = [
        (
            f"{engine.name} {engine.version}",
            wording.integers(engine),
            wording.latency(engine.latency_ms),
            wording.factor(engine.speedup),
            wording.decibels(engine.sqnr_db),
            wording.number(engine.cosine, 6),
            wording.decibels(engine.optimizer_diff_db),
        )
        for engine in report.engines
    ]
    parts = (
        [table(columns, rows, len(columns) - 1)] if rows else [element("p", "No engine ran it.")]
    )
    for engine in report.engines:
        if engine.outputs:
            outputs = [(name, wording.decibels(db)) for name, db in engine.outputs]
            parts.append(
                details(f"{engine.name}: SQNR by output", table(("output", "SQNR"), outputs, 1))
            )
        if engine.op_counts:
            counts = [(name, str(count)) for name, count in engine.op_counts.items()]
            parts.append(
                details(
                    f"{engine.name}: ops of its own optimized graph",
                    table(("op", "count"), counts, 1),
                )
            )
    return section(
        "Engines",
        *parts,
        about="Read back from each engine's own optimized graph; latency is the median per call "
        "on one thread, float -> quantized.",
    )


def _leftovers(report: Report) -> Html:
    columns = ("engines", "ops", "planned as", "rule", "reason")
    rows = [_leftover_row(group) for group in wording.leftovers(report)]
    if not rows:
        return section(LEFT, element("p", "Nothing: every compute op runs in integers."))
    parts = [table(columns, rows[:MAX_REASONS])]
    if rows[MAX_REASONS:]:
        more = f"{len(rows) - MAX_REASONS} more reasons"
        parts.append(details(more, table(columns, rows[MAX_REASONS:])))
    return section(LEFT, *parts)


def _leftover_row(group: Leftover) -> tuple[str, ...]:
    nodes = [op.node for op in group.ops]
    listed = details(wording.names(nodes, 2), element("p", wording.names(nodes, MAX_LISTED)))
    plan = element("span", "integer", "bad") if group.planned else "float"
    ops = f"{len(nodes)} {group.op_types}"
    return group.engines, ops, plan, group.rule, join((group.reason, listed))


def _graph_map(report: Report) -> Html:
    if not report.graph_map:
        return Html("")
    broken = {op.node for engine in report.engines for op in engine.float_ops if op.planned}
    cells, counts = [], dict.fromkeys((kind for kind, _ in LEGEND), 0)
    for node in report.graph_map:
        kind = BROKEN if node.name in broken else CELLS[node.precision]
        counts[kind] += 1
        cells.append(Html(f'<i class={kind} title="{_tooltip(node)}"></i>'))
    legend = join(
        element("span", join((element("i", "", kind), f"{meaning}: {counts[kind]}")))
        for kind, meaning in LEGEND
    )
    many = len(report.graph_map) > MANY_NODES
    return section(
        "Map of the graph",
        element("div", legend, "legend"),
        element("div", join(cells), "map many" if many else "map"),
        about="One cell a node, in execution order; point at one to see its name and why.",
    )


def _tooltip(node: MapNode) -> str:
    return escape(f"{node.name}\n{node.op}, {node.precision}\n{node.because}")


def _layers(report: Report, figures: dict[str, Figure]) -> Html:
    if not report.layers:
        return Html("")
    rows = [
        (
            layer.name,
            layer.op,
            layer.precision,
            wording.decibels(layer.sqnr_db_before),
            wording.decibels(layer.sqnr_db_after),
            wording.number(layer.cosine, 6),
            wording.channels(layer),
        )
        for layer in wording.worst_layers(report, len(report.layers))
    ]
    columns = ("layer", "op", "runs in", "SQNR before", "SQNR after", "cosine", "channels")
    return section(
        "SQNR layer by layer",
        _chart("chart-layers", charts.layer_chart(report.layers), figures),
        details(f"All {len(rows)} layers, the worst first", table(columns, rows, 3)),
        about="Output of each layer against the float model, before and after compensation; layers "
        "that compute what the float model computes lie above the chart.",
    )


def _histograms(report: Report, figures: dict[str, Figure]) -> Html:
    if not report.histograms:
        return Html("")
    parts = (
        element(
            "div",
            join(
                (
                    element("h3", histogram.name),
                    element("div", _range_facts(histogram), "soft"),
                    _chart(f"chart-range-{index}", charts.histogram_chart(histogram), figures),
                )
            ),
        )
        for index, histogram in enumerate(report.histograms)
    )
    return section(
        "Ranges of the tensors that lose most",
        element("div", join(parts), "pair"),
        about="Green: the chosen range. Red: values outside of it, which are clipped.",
    )


def _range_facts(histogram: TensorHistogram) -> str:
    share = charts.bars_of(histogram).clipped_share
    return (
        f"{histogram.spec}, {histogram.method}: {histogram.low:.4g} to {histogram.high:.4g}, "
        f"{share:.3%} clipped, SQNR {wording.decibels(histogram.sqnr_db)}"
    )


def _runtime_costs(report: Report) -> Html:
    if not report.runtime_costs:
        return Html("")
    rows = [wording.cost_row(cost) for cost in report.runtime_costs]
    return section(
        "Compensation at run time",
        table(wording.COST_COLUMNS, rows, 1),
        about="Ops that compute, numbers stored and multiplications of a sample that each method "
        "adds to the file; latency without and with it, interleaved, on one thread; SQNR of the "
        "outputs on samples that nothing was fitted to.",
    )


def _mixed(report: Report, figures: dict[str, Figure]) -> Html:
    if report.mixed is None:
        return Html("")
    part, figures[CHART] = mixed_section(report.mixed)
    return part


def _gates_and_rounds(report: Report) -> Html:
    rows = [
        (
            gate.name,
            wording.value_of(gate.wanted),
            wording.value_of(gate.got),
            element("span", wording.verdict_of(gate), wording.grade_of(gate)),
        )
        for gate in report.gates
    ]
    columns = ("gate", "wanted", "got", "verdict")
    parts = [table(columns, rows) if rows else element("p", "No gate was set.")]
    if report.rounds:
        parts += [element("h3", "Rounds of repair"), bullets(report.rounds)]
    return section("Gates", *parts)


def _cost(report: Report, figures: dict[str, Figure]) -> Html:
    cost = report.cost
    about = (
        f"{wording.seconds(cost.seconds_total)} in all; one float forward pass over "
        f"{cost.samples} samples took {wording.seconds(cost.float_forward_seconds)}; "
        f"peak memory {wording.size(cost.peak_rss_bytes)}."
    )
    drawn = []
    if cost.seconds_by_stage:
        drawn.append(_chart("chart-time", charts.time_chart(cost), figures))
    if cost.peak_rss_by_stage:
        drawn.append(_chart("chart-memory", charts.memory_chart(cost), figures))
    return section("Time and memory", element("div", join(drawn), "pair"), about=about)


def _passes(report: Report) -> Html:
    rows = [
        (item.name, str(item.changed), str(len(item.refusals)), wording.seconds(item.seconds))
        for item in report.passes
    ]
    parts = [table(("pass", "changed", "refusals", "time"), rows, 3)]
    for item in report.passes:
        if item.refusals:
            refusals = [(refusal.rule, refusal.where, refusal.reason) for refusal in item.refusals]
            title = f"{item.name}: {len(refusals)} refusals"
            parts.append(details(title, table(("rule", "where", "reason"), refusals)))
    return section("Passes", *parts)


def _settings(report: Report) -> Html:
    halves = (
        element("div", _pairs("option", report.options)),
        element("div", _pairs("version of", report.versions)),
    )
    return section("Options and versions", element("div", join(halves), "pair"))


def _pairs(title: str, values: Mapping[str, object]) -> Html:
    rows = [
        (key, value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in values.items()
    ]
    return table((title, "value"), rows)
