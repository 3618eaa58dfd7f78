"""Bars of accuracy and of what compensation costs, judged from the rows of `bench.py`.

Compensation is judged by pairs: a contestant and the same one with ``compensate=none``. The bars of
accuracy name models of the zoo; on other models they say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench_peers import EIGHT, Contestant, bits_of, parse_contestant

Row = dict[str, Any]
Judged = tuple[str, str, str, bool]  # name, wanted, got, met

RATIO_MARGIN: Final = 0.02
WITH_HESSIAN: Final = ("auto", "gptq", "erq", "unit")
GRADIENT: Final = "gradient"  # whatever takes one: adaround, row weights, tuning
GRADIENT_FREE: Final = ("rtn", "mse", *WITH_HESSIAN)
PEER_KINDS: Final = ("ort", "nncf", "quark", "aimet")
PEER_MARGIN_DB: Final = 2.0
SAME_LATENCY: Final = 1.05  # peers' files that are slower than this are another trade
PASSES: Final = 3.5  # what compensation may take, in float passes over its samples,
UNIT_SECONDS: Final = 0.1  # and besides for each linear op


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What a model has to keep: SQNR in dB, the metric itself, or points of it below float."""

    model: str  # begins with
    precision: str
    rounding: tuple[str, ...]
    sqnr_db: float | None = None
    metric: float | None = None
    drop: float | None = None

    def fits(self, row: Row, contestant: Contestant) -> bool:
        """True for a compensated result of this model and precision."""
        options = contestant.options
        return (
            row["model"].startswith(self.model)
            and bits_of(contestant) == self.precision
            and rounding_of(contestant) in self.rounding
            and options.get("activations", "static") == "static"
            and options.get("compensate", "cwac") != "none"
        )


def rounding_of(contestant: Contestant) -> str:
    """Return how a contestant rounds, or `GRADIENT`."""
    options = contestant.options
    rounding = str(options.get("round", "auto"))
    learns = rounding == "adaround" or options.get("row_weights") == "gradient"
    return GRADIENT if learns or options.get("tune") else rounding


ANY: Final = (*GRADIENT_FREE, GRADIENT)
BARS: Final = (
    Accuracy(model="mobilenet_v2", precision="w8a8", rounding=ANY, sqnr_db=21.0, drop=0.4),
    Accuracy(model="resnet18", precision="w8a8", rounding=ANY, sqnr_db=27.0, drop=0.4),
    Accuracy(model="vit_tiny", precision="w8a8", rounding=ANY, sqnr_db=22.0, drop=0.4),
    Accuracy(model="resnet18", precision="w4a8", rounding=("rtn", "mse"), metric=60.0),
    Accuracy(model="mobilenet_v2", precision="w4a8", rounding=("rtn", "mse"), metric=45.0),
    Accuracy(model="resnet18", precision="w4a8", rounding=WITH_HESSIAN, drop=1.5),
    Accuracy(model="mobilenet_v2", precision="w4a8", rounding=WITH_HESSIAN, drop=6.0),
    Accuracy(model="vit_tiny", precision="w4a8", rounding=WITH_HESSIAN, drop=2.0),
    Accuracy(model="resnet18", precision="w4a8", rounding=(GRADIENT,), drop=0.7),
    Accuracy(model="mobilenet_v2", precision="w4a8", rounding=(GRADIENT,), drop=2.0),
    Accuracy(model="vit_tiny", precision="w4a8", rounding=(GRADIENT,), drop=1.0),
    Accuracy(model="resnet18", precision="w4a4", rounding=GRADIENT_FREE, drop=8.0),
    Accuracy(model="mobilenet_v2", precision="w4a4", rounding=GRADIENT_FREE, drop=25.0),
    Accuracy(model="vit_tiny", precision="w4a4", rounding=GRADIENT_FREE, drop=12.0),
    Accuracy(model="resnet18", precision="w3a8", rounding=(GRADIENT,), drop=3.0),
    Accuracy(model="mobilenet_v2", precision="w3a8", rounding=(GRADIENT,), drop=8.0),
    Accuracy(model="vit_tiny", precision="w3a8", rounding=(GRADIENT,), drop=4.0),
)


def judge_accuracy(row: Row, rows: Sequence[Row]) -> Iterator[Judged]:
    """Yield the bars of accuracy that one row of a qpass contestant can be judged by."""
    contestant = parse_contestant(row["contestant"])
    for bar in BARS:
        if not bar.fits(row, contestant):
            continue
        label = f"{bar.precision} {'/'.join(bar.rounding) if bar.rounding != ANY else ''}".strip()
        if bar.sqnr_db is not None:
            got = row["sqnr_db"]
            met = got >= bar.sqnr_db
            yield f"SQNR, {label}", f">= {bar.sqnr_db:.1f} dB", f"{got:.2f} dB", met
        metric = row.get("metric")
        if metric is None:
            continue
        if bar.metric is not None:
            met = metric >= bar.metric
            yield f"metric, {label}", f">= {bar.metric:.1f}", f"{metric:.2f}", met
        plain = float_metric(row, rows)
        if bar.drop is not None and plain is not None:
            drop = plain - metric
            got_text = f"{drop:+.2f} ({metric:.2f} of {plain:.2f})"
            yield f"points lost, {label}", f"<= {bar.drop:.1f}", got_text, drop <= bar.drop + 1e-9


def judge_compensation(row: Row, rows: Sequence[Row]) -> Iterator[Judged]:
    """Yield what compensation brought and cost against the same contestant without it."""
    contestant = parse_contestant(row["contestant"])
    if contestant.options.get("compensate", "cwac") not in ("cwac", "bias"):
        return
    plain = next((r for r in rows if _is_plain_twin(r, row, contestant)), None)
    if plain is None:
        return
    before, after = plain["sqnr_db"], row["sqnr_db"]
    wanted = f">= {before:.2f} dB"
    yield "compensation never worse", wanted, f"{after:.2f} dB", after >= before - 0.005
    spent = row.get("stage_compensate_seconds")
    if spent is not None:
        units = row["integer_ops"] + row["weight_only_ops"] + row["float_ops"]
        allowed = PASSES * row["float_pass_seconds"] + UNIT_SECONDS * units
        got = f"{spent:.1f} s of {row['quantize_seconds']:.1f} s"
        yield "time of compensation", f"<= {allowed:.1f} s", got, spent <= allowed
    if contestant.options.get("allow_runtime_ops"):
        return
    counts = [(r["engine_ops"], r["integer_ops"], r["float_ops"]) for r in (plain, row)]
    same = "{} ops, {} in integers, {} linear in float"
    yield (
        "compensation adds no op",
        same.format(*counts[0]),
        same.format(*counts[1]),
        (counts[0] == counts[1]),
    )
    if "latency_ratio" in row and "latency_ratio" in plain:
        ratio = row["latency_ratio"] / plain["latency_ratio"]
        met = abs(ratio - 1.0) <= RATIO_MARGIN
        yield "compensation costs no time", f"1 +- {RATIO_MARGIN}", f"{ratio:.3f}", met


def judge_against_peers(row: Row, rows: Sequence[Row]) -> Iterator[Judged]:
    """Yield how far an 8-bit result is above the best peer's file that is about as fast."""
    contestant = parse_contestant(row["contestant"])
    options = contestant.options
    if bits_of(contestant) != EIGHT or options.get("compensate", "cwac") == "none":
        return
    place = (row["model"], row["engine"])
    peers = {
        r["contestant"]: r["sqnr_db"]
        for r in rows
        if r["kind"] == "model"
        and (r["model"], r["engine"]) == place
        and (other := parse_contestant(r["contestant"])).kind in PEER_KINDS
        and bits_of(other) == EIGHT
        and r.get("latency_ratio", math.inf) <= SAME_LATENCY * row.get("latency_ratio", -math.inf)
    }
    if not peers:
        return
    best = max(peers, key=lambda name: peers[name])
    wanted = f">= {peers[best] + PEER_MARGIN_DB:.2f} dB ({best} {peers[best]:.2f})"
    met = row["sqnr_db"] >= peers[best] + PEER_MARGIN_DB
    yield "2 dB above the best peer", wanted, f"{row['sqnr_db']:.2f} dB", met


def _is_plain_twin(other: Row, row: Row, contestant: Contestant) -> bool:
    if (other["kind"], other["model"], other.get("engine")) != (
        "model",
        row["model"],
        row["engine"],
    ):
        return False
    twin = parse_contestant(other["contestant"])
    wanted: Mapping[str, Any] = {**contestant.options, "compensate": "none"}
    return (twin.kind, twin.argument, twin.options) == ("qpass", contestant.argument, wanted)


def float_metric(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the metric of the float model in the engine of a row, if it was measured."""
    for other in rows:
        same = other["kind"] == "model" and other["model"] == row["model"]
        if same and other["contestant"] == "float" and other["engine"] == row["engine"]:
            value: float | None = other.get("metric")
            return value
    return None
