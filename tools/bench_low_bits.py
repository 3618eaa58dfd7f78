"""Bars of results with weights of fewer than 8 bits, judged from the rows of `bench.py`.

A result is held against peers of the same bits in the same engine, however they came by their
grids; numbers of calibration samples can differ, so the bar says both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from bench_accuracy import GRADIENT, PEER_KINDS, Judged, Row, float_metric, rounding_of
from bench_peers import EIGHT, Contestant, bits_of, parse_contestant

TWINS_DIFFER: Final = ("round", "jobs", "seed")
PEAK_BYTES: Final = 3e9
TIMED_MODEL: Final = "resnet18"
SECONDS, GRADIENT_SECONDS = 180.0, 1200.0
LOSS_MODEL, LOSS = "stories", 1.03
FAR_MODEL, FAR_DB = "kwt1", 6.0


def judge_low_bits(row: Row, rows: Sequence[Row]) -> Iterator[Judged]:
    """Yield the bars of a compensated qpass result with fewer than 8 bits."""
    contestant = parse_contestant(row["contestant"])
    bits = bits_of(contestant)
    if bits == EIGHT or contestant.options.get("compensate", "cwac") == "none":
        return
    peak = row["peak_rss_bytes"]
    yield f"memory, {bits}", f"< {PEAK_BYTES / 1e9} GB", f"{peak / 1e9:.2f} GB", peak < PEAK_BYTES
    if row["model"].startswith(TIMED_MODEL):
        most = GRADIENT_SECONDS if rounding_of(contestant) == GRADIENT else SECONDS
        seconds = row["quantize_seconds"]
        yield f"seconds, {bits}", f"<= {most:.0f} s", f"{seconds:.1f} s", seconds <= most
    yield from _against_float(row, rows, bits)
    yield from _against_nearest(row, rows, contestant)
    yield from _against_peers(row, rows, bits)


def _against_float(row: Row, rows: Sequence[Row], bits: str) -> Iterator[Judged]:
    plain = float_metric(row, rows)
    if bits != "w4" or not row["model"].startswith(LOSS_MODEL) or plain is None:
        return
    ratio = row["metric"] / plain  # both are likelihoods, so the ratio is that of losses
    yield f"loss / float, {bits}", f"<= {LOSS}", f"{ratio:.3f}", ratio <= LOSS


def _against_nearest(row: Row, rows: Sequence[Row], contestant: Contestant) -> Iterator[Judged]:
    if rounding_of(contestant) in ("rtn", GRADIENT):
        return
    nearest = [
        other["sqnr_db"]
        for other in _same_place(row, rows, lambda peer: _differs_in_rounding(peer, contestant))
        if other["calibration_samples"] == row["calibration_samples"]
    ]
    if not nearest:
        return
    bits, got = bits_of(contestant), row["sqnr_db"]
    least = max(nearest) + (FAR_DB if row["model"].startswith(FAR_MODEL) else 0.0)
    yield f"SQNR above nearest, {bits}", f">= {least:.2f} dB", f"{got:.2f} dB", got >= least


def _differs_in_rounding(other: Contestant, contestant: Contestant) -> bool:
    def rest(one: Contestant) -> dict[str, Any]:
        return {key: value for key, value in one.options.items() if key not in TWINS_DIFFER}

    return (
        (other.kind, other.argument) == ("qpass", contestant.argument)
        and rounding_of(other) == "rtn"
        and rest(other) == rest(contestant)
    )


def _against_peers(row: Row, rows: Sequence[Row], bits: str) -> Iterator[Judged]:
    peers = list(
        _same_place(row, rows, lambda peer: peer.kind in PEER_KINDS and bits_of(peer) == bits)
    )
    key = "metric" if row.get("metric") is not None else "sqnr_db"
    measured = [peer for peer in peers if peer.get(key) is not None]
    if not measured:
        return
    best = max(measured, key=lambda peer: peer[key])
    got = f"{row[key]:.2f} ({row['calibration_samples']} samples)"
    wanted = f">= {best[key]:.2f} ({_label(best)})"
    yield f"best peer, {bits}", wanted, got, row[key] >= best[key]
    most, seconds = best["quantize_seconds"], row["quantize_seconds"]
    wanted = f"< {most:.1f} s ({_label(best)})"
    yield f"time of the best peer, {bits}", wanted, f"{seconds:.1f} s", seconds < most


def _label(row: Row) -> str:
    return f"{row['contestant']}, {row['calibration_samples']} samples"


def _same_place(
    row: Row, rows: Sequence[Row], wanted: Callable[[Contestant], bool]
) -> Iterator[Row]:
    for other in rows:
        if (
            other["kind"] == "model"
            and (other["model"], other["engine"]) == (row["model"], row["engine"])
            and wanted(parse_contestant(other["contestant"]))
        ):
            yield other
