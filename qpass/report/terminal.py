"""The report for the terminal: a page that fits 80 columns, with or without colours.

Everything that a file may have named travels as `rich.text.Text`, never as markup: a node called
`[red]` is printed, not obeyed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qpass.report import wording
from qpass.report.mixed import point_columns, point_rows, verdict
from qpass.report.model import Report

MAX_LEFTOVERS: Final = 12
MAX_NAMES: Final = 3
MAX_LAYERS: Final = 5
INDENT: Final = "  "
QUANTITY: Final = re.compile(r"-|exact|-?[\d.]+( (of|->) [\d.]+)?( ?(dB|ms|s|min|x))?")


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print `rows` under `columns`; long cells are folded, never cut; quantities go right."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(columns):
        quantities = bool(rows) and all(QUANTITY.fullmatch(row[index]) for row in rows)
        table.add_column(_text(column), overflow="fold", justify="right" if quantities else "left")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    if title:
        console.print(_text(title, "bold"))
    console.print(table, highlight=False)
    console.print()


def print_summary(report: Report, console: Console) -> None:
    """Print what a person wants to know after a run, the verdict first."""
    _print_headline(report, console)
    _print_engines(report, console)
    _print_lines(console, "Left in float", _leftover_lines(report))
    _print_passes(report, console)
    _print_runtime_costs(report, console)
    _print_mixed(report, console)
    _print_layers(report, console)
    _print_lines(console, "Rounds of repair", map(_text, report.rounds))
    _print_gates(report, console)
    _print_lines(console, "Notes", map(_note, report.notes))
    _print_cost(report, console)


def _text(text: str, style: str = "") -> Text:
    return Text(wording.visible(text), style=style)


def _note(note: str) -> Text:
    return _text(f"! {note}", "bold red") if wording.shouts(note) else _text(note)


def _print_lines(console: Console, title: str, lines: Iterator[Text]) -> None:
    found = list(lines)
    if not found:
        return
    console.print(_text(title, "bold"))
    for line in found:
        # Wrapped here and not by rich's Padding, which would fill each line with spaces.
        for row in line.wrap(console, max(console.width - len(INDENT), 1), overflow="fold"):
            row.rstrip()
            console.print(Text.assemble(INDENT, row), highlight=False)
    console.print()


def _print_headline(report: Report, console: Console) -> None:
    verdict = _text("OK", "bold green") if report.ok else _text("REJECTED", "bold red")
    # Paths are not wrapped: they are there to be copied.
    console.print(Text.assemble(verdict, " ", _text(report.output)), soft_wrap=True)
    sizes, nodes = report.sizes, report.nodes
    console.print(_text(f"from {report.model}"), soft_wrap=True)
    console.print(
        _text(
            f"{report.target}, {report.precision}; {wording.size(sizes.float_bytes)} -> "
            f"{wording.size(sizes.quantized_bytes)} ({sizes.ratio:.2f}x); "
            f"{nodes.float} -> {nodes.quantized} nodes, {nodes.added_at_runtime} added at run time"
        )
    )
    metric = report.metric
    if metric is not None:
        console.print(
            _text(
                f"{metric.name}: {metric.float:.4g} -> {metric.quantized:.4g} "
                f"(drop {metric.drop:.4g})"
            )
        )
    console.print()


def _print_engines(report: Report, console: Console) -> None:
    if not report.engines:
        return
    rows = [
        (
            engine.name,
            wording.integers(engine),
            wording.latency(engine.latency_ms),
            wording.factor(engine.speedup),
            wording.decibels(engine.sqnr_db),
            wording.number(engine.cosine, 6),
            wording.decibels(engine.optimizer_diff_db),
        )
        for engine in report.engines
    ]
    columns = ("engine", "integer ops", "latency", "speed-up", "SQNR", "cosine", "on/off")
    print_table(console, "Engines", columns, rows)
    weakest = [
        (engine.name, *min(engine.outputs, key=lambda output: wording.worst_first(output[1])))
        for engine in report.engines
        if len(engine.outputs) > 1
    ]
    lines = (_text(f"{engine}: {name} {wording.decibels(db)}") for engine, name, db in weakest)
    _print_lines(console, "Weakest output", lines)


def _leftover_lines(report: Report) -> Iterator[Text]:
    groups = wording.leftovers(report)
    for group in groups[:MAX_LEFTOVERS]:
        yield Text.assemble(
            _text(f"{group.engines}: {len(group.ops)} {group.op_types}"),
            _text(" PLANNED IN INTEGERS", "bold red") if group.planned else "",
            _text(f" ({group.rule}): {group.reason}"),
        )
        yield _text("  " + wording.names([op.node for op in group.ops], MAX_NAMES), "dim")
    if len(groups) > MAX_LEFTOVERS:
        yield _text(f"and {len(groups) - MAX_LEFTOVERS} more reasons: see report.json")


def _print_passes(report: Report, console: Console) -> None:
    if not report.passes:
        return
    rows = [
        (item.name, str(item.changed), str(len(item.refusals)), wording.seconds(item.seconds))
        for item in report.passes
    ]
    print_table(console, "Passes", ("pass", "changed", "refusals", "time"), rows)


def _print_runtime_costs(report: Report, console: Console) -> None:
    if not report.runtime_costs:
        return
    rows = [wording.cost_row(cost) for cost in report.runtime_costs]
    print_table(console, "Compensation at run time", wording.COST_COLUMNS, rows)


def _print_mixed(report: Report, console: Console) -> None:
    if report.mixed is None:
        return
    rows = [
        row
        for row, point in zip(point_rows(report.mixed), report.mixed.points, strict=True)
        if point.measured is not None
    ]
    columns = point_columns(report.mixed)
    print_table(console, "Mixed precision: plans that were measured", columns, rows)
    _print_lines(console, "Bits", iter([_text(verdict(report.mixed))]))


def _print_layers(report: Report, console: Console) -> None:
    if not report.layers:
        return
    rows = [
        (
            layer.name,
            layer.op,
            layer.precision,
            wording.decibels(layer.sqnr_db_before),
            wording.decibels(layer.sqnr_db_after),
        )
        for layer in wording.worst_layers(report, MAX_LAYERS)
    ]
    title = f"Worst layers by SQNR, {len(rows)} of {len(report.layers)}"
    print_table(console, title, ("layer", "op", "runs in", "before", "after"), rows)


def _print_gates(report: Report, console: Console) -> None:
    if not report.gates:
        return
    rows = [
        (
            gate.name,
            wording.value_of(gate.wanted),
            wording.value_of(gate.got),
            wording.verdict_of(gate),
        )
        for gate in report.gates
    ]
    print_table(console, "Gates", ("gate", "wanted", "got", "verdict"), rows)


def _print_cost(report: Report, console: Console) -> None:
    cost = report.cost
    stages = ", ".join(
        f"{name} {wording.seconds(value)}" for name, value in cost.seconds_by_stage.items()
    )
    console.print(
        _text(
            f"Cost: {wording.seconds(cost.seconds_total)} ({stages}); float forward "
            f"{wording.seconds(cost.float_forward_seconds)}; peak memory "
            f"{wording.size(cost.peak_rss_bytes)}; {cost.samples} samples"
        )
    )
