"""The bars that qpass has set itself, judged from the rows of `bench.py`.

Only `qpass` contestants are judged, and each in the engine of its target. A bar without the rows
that it needs (no peer was measured, say) is left out rather than called met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench_accuracy import judge_accuracy, judge_against_peers, judge_compensation
from bench_low_bits import judge_low_bits
from bench_peers import EIGHT, bits_of, parse_contestant

Row = dict[str, Any]

OWN_ENGINE: Final = {
    "qpass": "ort",
    "qpass:": "ort",
    "qpass:ort-x86": "ort",
    "qpass:ort-x86-avx2": "ort",
    "qpass:openvino": "openvino",
    "qpass:openvino-avx2": "openvino",
}
SQNR_PEERS: Final = ("ort:minmax", "ort:entropy", "ort:percentile")
PEERS: Final = ("ort:", "nncf", "quark", "aimet")
LATENCY_MARGIN: Final = 1.02
SIZE: Final = 0.27
HARD_MODEL: Final = "vit_tiny"
HARD_SQNR_DB, HARD_LATENCY = 10.9, 0.60
CALIBRATE: Final = 2.0
GROWTH: Final = 0.10
PASSES, SECONDS = 6.0, 5.0
SCALE_PEAK_BYTES: Final = 1.5e9
REWRITE_SECONDS: Final = 30.0
JUDGES: Final = (judge_accuracy, judge_compensation, judge_against_peers, judge_low_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar for one contestant on one model: what was wanted, what was measured, and both."""

    name: str
    subject: str
    wanted: str
    got: str
    met: bool


def judge_bars(rows: Sequence[Row]) -> list[Bar]:
    """Return every bar that can be judged with these rows, in the order of the rows."""
    done = [row for row in rows if row["status"] == "ok"]
    bars: list[Bar] = []
    for row in done:
        if row["kind"] == "model":
            head = row["contestant"].split(",")[0]
            if OWN_ENGINE.get(head) == row["engine"]:
                bars += _model_bars(row, done)
                for judge in JUDGES:
                    for name, wanted, got, met in judge(row, done):
                        bars.append(_bar(name, row, wanted, got, met=met))
        elif row["kind"] == "calibration":
            bars += _calibration_bars(row)
        elif row["kind"] == "determinism":
            got = "equal" if row["same_bytes"] else "different"
            bars.append(_bar("same bytes twice", row, "equal", got, met=row["same_bytes"]))
        elif row["kind"] == "scale":
            bars += _scale_bars(row)
    return bars


def _bar(name: str, row: Row, wanted: str, got: str, *, met: bool) -> Bar:
    parts = (row.get("model"), row.get("engine"), row.get("contestant"))
    return Bar(
        name=name, subject=" ".join(p for p in parts if p), wanted=wanted, got=got, met=bool(met)
    )


def _model_bars(row: Row, rows: Iterable[Row]) -> Iterator[Bar]:
    size = row["size_ratio"]
    yield _bar("size", row, f"<= {SIZE}", f"{size:.3f}", met=size <= SIZE)
    if bits_of(parse_contestant(row["contestant"])) != EIGHT:
        return  # what follows is asked of 8 bits, which engines run in integers
    same = [
        other
        for other in rows
        if other["kind"] == "model"
        and _place(other) == _place(row)
        and bits_of(parse_contestant(other["contestant"])) == EIGHT
    ]
    sqnr = {r["contestant"]: r["sqnr_db"] for r in same if r["contestant"] in SQNR_PEERS}
    if sqnr:
        best = max(sqnr, key=lambda name: sqnr[name])
        wanted, got = f">= {sqnr[best]:.2f} dB ({best})", f"{row['sqnr_db']:.2f} dB"
        yield _bar("SQNR of the best peer", row, wanted, got, met=row["sqnr_db"] >= sqnr[best])
    ratio = row.get("latency_ratio")
    if ratio is not None:
        yield _bar("faster than float", row, "< 1.000", f"{ratio:.3f}", met=ratio < 1.0)
        times = {
            r["contestant"]: r["latency_ratio"]
            for r in same
            if r["contestant"].startswith(PEERS) and "latency_ratio" in r
        }
        if times:
            best = min(times, key=lambda name: times[name])
            most = LATENCY_MARGIN * times[best]
            wanted, got = f"<= {most:.3f} ({best})", f"{ratio:.3f}"
            yield _bar("latency of the fastest peer", row, wanted, got, met=ratio <= most)
    if row["model"].startswith(HARD_MODEL) and ratio is not None:
        yield _bar(
            "hard vision transformer",
            row,
            f">= {HARD_SQNR_DB} dB at <= {HARD_LATENCY}",
            f"{row['sqnr_db']:.2f} dB at {ratio:.3f}",
            met=row["sqnr_db"] >= HARD_SQNR_DB and ratio <= HARD_LATENCY,
        )
    most = PASSES * row["float_pass_seconds"] + SECONDS
    seconds = row["quantize_seconds"]
    yield _bar("time to optimize", row, f"<= {most:.1f} s", f"{seconds:.1f} s", met=seconds <= most)


def _place(row: Row) -> tuple[str, str]:
    return row["model"], row["engine"]


def _calibration_bars(row: Row) -> Iterator[Bar]:
    ratio, growth = row["calibrate_ratio"], row["memory_growth"]
    wanted = f"<= {CALIBRATE} float passes"
    yield _bar("cost of calibration", row, wanted, f"{ratio:.2f}", met=ratio <= CALIBRATE)
    yield _bar(
        "memory from 16 to 256 samples",
        row,
        f"< {GROWTH:.0%} more",
        f"{growth:+.1%}",
        met=growth < GROWTH,
    )


def _scale_bars(row: Row) -> Iterator[Bar]:
    if "nodes" in row:
        yield _bar(
            "plan and rewrite 20,000 nodes",
            row,
            f"< {REWRITE_SECONDS:.0f} s",
            f"{row['seconds']:.1f} s, {row['nodes']} nodes",
            met=row["seconds"] < REWRITE_SECONDS,
        )
    else:
        peak = row["peak_rss_bytes"]
        yield _bar(
            "memory for a large model",
            row,
            f"< {SCALE_PEAK_BYTES / 1e9} GB",
            f"{peak / 1e9:.2f} GB for {row['float_bytes'] / 1e9:.2f} GB",
            met=peak < SCALE_PEAK_BYTES,
        )
