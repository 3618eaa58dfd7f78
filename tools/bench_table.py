"""The rows of `bench.py` as Markdown; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from bench_bars import Bar

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
Origin = tuple[str, str, str, str]  # date, commit, samples, machine with versions


def _number(key: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else format(value * factor, form)

    return cell


def _latency(row: Row) -> str:
    if "latency_ratio" not in row:
        return ""
    low, high = row["latency_ratio_low"], row["latency_ratio_high"]
    return f"{row['latency_ratio']:.3f} ({low:.3f} to {high:.3f})"


def _ops(row: Row) -> str:
    if "integer_ops" not in row:
        return ""
    return f"{row['integer_ops']} / {row['weight_only_ops']} / {row['float_ops']}"


def _metric(row: Row) -> str:
    return f"{row['metric']:.2f} {row['metric_name']}" if "metric" in row else ""


def _growth(row: Row) -> str:
    return f"{row['memory_growth']:+.1%}" if "memory_growth" in row else ""


MODEL_COLUMNS: tuple[Column, ...] = (
    ("SQNR dB", _number("sqnr_db", ".2f")),
    ("metric", _metric),
    ("latency / float", _latency),
    ("ms", _number("latency_ms", ".3f")),
    ("integer / weight-only / float ops", _ops),
    ("size", _number("size_ratio", ".3f")),
    ("seconds", _number("quantize_seconds", ".1f")),
    ("float passes", _number("quantize_ratio", ".1f")),
    ("peak MB", _number("peak_rss_bytes", ".0f", 1e-6)),
)
CALIBRATION_COLUMNS: tuple[Column, ...] = (
    ("samples", _number("calibration_samples", "d", 1)),
    ("float passes", _number("calibrate_ratio", ".2f")),
    ("least", _number("calibrate_ratio_low", ".2f")),
    ("most", _number("calibrate_ratio_high", ".2f")),
    ("peak MB, 16 samples", _number("peak_rss_bytes_16", ".0f", 1e-6)),
    ("256 samples", _number("peak_rss_bytes_256", ".0f", 1e-6)),
    ("growth", _growth),
)
DETERMINISM_COLUMNS: tuple[Column, ...] = (
    ("runs", _number("runs", "d", 1)),
    ("same bytes", lambda row: "yes" if row.get("same_bytes") else "no"),
    ("sha256", lambda row: str(row.get("sha256", ""))[:16]),
)
SCALE_COLUMNS: tuple[Column, ...] = (
    ("float GB", _number("float_bytes", ".3f", 1e-9)),
    ("nodes", _number("nodes", "d", 1)),
    ("seconds", _number("seconds", ".1f")),
    ("peak GB", _number("peak_rss_bytes", ".3f", 1e-9)),
    ("size", _number("size_ratio", ".3f")),
)


def markdown(rows: Sequence[Row], bars: Sequence[Bar] = ()) -> str:
    """Return a Markdown page: where and how it was measured, a table a model, the bars."""
    runs = _runs(rows)
    mark: tuple[Column, ...] = (("run", lambda row: runs[_origin(row)]),) if len(runs) > 1 else ()
    parts = ["# Results", *_facts(rows, runs)]
    for model in dict.fromkeys(row["model"] for row in rows if row["kind"] == "model"):
        for engine in dict.fromkeys(row["engine"] for row in rows if row["kind"] == "model"):
            part = [
                row
                for row in rows
                if row["kind"] == "model" and (row["model"], row["engine"]) == (model, engine)
            ]
            if part:
                table = _table(part, ("contestant",), (*MODEL_COLUMNS, *mark))
                parts += [f"## {model}, {engine}", table]
    for kind, title, columns in (
        ("calibration", "Cost of calibration", CALIBRATION_COLUMNS),
        ("determinism", "Determinism", DETERMINISM_COLUMNS),
        ("scale", "Large models", SCALE_COLUMNS),
    ):
        part = [row for row in rows if row["kind"] == kind]
        if part:
            parts += [f"## {title}", _table(part, ("model", "contestant"), (*columns, *mark))]
    if bars:
        parts += ["## Bars", bars_table(bars)]
    return "\n\n".join(parts) + "\n"


def _origin(row: Row) -> Origin:
    """Return what tells one run of the bench from another: when, what, how many samples, where."""
    samples = ""
    if row["kind"] == "model":
        samples = f"{row['calibration_samples']} + {row['holdout_samples']}"
    versions = ", ".join(
        f"{key.removeprefix('version_')} {row[key]}"
        for key in sorted(row)
        if key.startswith("version_")
    )
    machine = f"{row['cores']} cores of {row['cpu']}: {versions}"
    return row["date"], row["commit"], samples, machine


def _runs(rows: Iterable[Row]) -> dict[Origin, str]:
    """Number the runs that `rows` come from, the oldest first.

    Rows that are of no samples (determinism, scale) have the number of a run of their day, commit
    and machine where there is one.
    """
    origins = sorted({_origin(row) for row in rows}, reverse=True)
    known: dict[tuple[str, str, str], Origin] = {}
    for date, commit, samples, machine in origins:
        known.setdefault((date, commit, machine), (date, commit, samples, machine))
    own = {o: o if o[2] else known[o[0], o[1], o[3]] for o in origins}
    numbers = {o: str(number) for number, o in enumerate(sorted(set(own.values())), start=1)}
    return {origin: numbers[own[origin]] for origin in sorted(origins)}


def _facts(rows: Sequence[Row], runs: Mapping[Origin, str]) -> list[str]:
    """Say where the rows come from, in a table of the runs that each row gives the number of."""
    machines = list(dict.fromkeys(origin[-1] for origin in runs))
    letters = dict(zip(machines, ascii_uppercase, strict=False))
    facts = [f"Machine {letters[machine]}: {machine}." for machine in machines]
    if any(row["kind"] == "model" for row in rows):
        facts.append(
            "SQNR is that of the worst output on held-out samples, against the float model in "
            "onnxruntime. Latency is the median ratio to float of interleaved rounds, one thread, "
            "one sample a run, in brackets its quartiles (or least and most of several runs). "
            "Seconds and peak memory are those of a process of its own."
        )
    listed = {number: origin for origin, number in runs.items()}  # of equals, that with samples
    lines = [
        "| run | date | commit | samples: calibration + held out | machine |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {number} | {date} | `{commit}` | {samples} | {letters[machine]} |"
            for number, (date, commit, samples, machine) in listed.items()
        ),
    ]
    return [*facts, "\n".join(lines)]


def _table(rows: Iterable[Row], keys: Sequence[str], columns: Sequence[Column]) -> str:
    header = [*keys, *(title for title, _ in columns)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        labels = [f"`{row.get(key, '')}`" if key == "contestant" else row[key] for key in keys]
        if row["status"] == "ok":
            cells = [cell(row) for _, cell in columns]
        else:
            reason = f"{row['status']}: {row['error']}".replace("|", "\\|")
            cells = [reason, *[""] * (len(columns) - 1)]
        lines.append([*labels, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bars_table(bars: Sequence[Bar]) -> str:
    """Return the bars as a Markdown table, with a line that counts them."""
    if not bars:
        return "No bar can be judged with these rows."
    lines = ["| bar | what | wanted | measured | met |", "| --- | --- | --- | --- | --- |"]
    for bar in bars:
        met = "yes" if bar.met else "**no**"
        lines.append(f"| {bar.name} | {bar.subject} | {bar.wanted} | {bar.got} | {met} |")
    met_count = sum(bar.met for bar in bars)
    return "\n".join([f"{met_count} of {len(bars)} met.", "", *lines])
