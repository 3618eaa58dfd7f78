"""How the faces of the report write numbers, and what they group: shared by terminal and HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qpass.report.model import (
    EngineReport,
    FloatOp,
    Gate,
    Latency,
    LayerReport,
    Report,
    RuntimeCost,
)
from qpass.verify.metrics import CAP_DB

NONE: Final = "-"
KIBI: Final = 1024
DETAIL: Final = re.compile(r"\([^()]*\)|\d+(\.\d+)?")  # what a reason may say about one op only


def visible(text: str) -> str:
    """Return `text` with what cannot be printed spelled out; line ends stay.

    Node names come from files of unknown origin: an escape sequence in one must not reach the
    terminal, and half a surrogate pair cannot be written as UTF-8.
    """
    return "".join(
        char
        if char.isprintable() or char == "\n"
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def number(value: float | None, digits: int, unit: str = "") -> str:
    """Write `value` with its unit; `-` where there is none."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.{digits}f}{unit}"


def channels(layer: LayerReport) -> str:
    """Return what compensation did to the channels of a layer: those that it left, by reason."""
    if not layer.corrected_channels and not layer.refused_channels:
        return "-"
    refused = [f"{r.reason}: {r.count} ({r.channels})" for r in layer.refused_channels]
    return "; ".join([f"{layer.corrected_channels} corrected", *refused])


def decibels(value: float | None) -> str:
    """Write an SQNR: at the cap of the meter both outputs are the same, at -inf one is broken."""
    if value == -math.inf:
        return "broken"
    if value is not None and value >= CAP_DB:
        return "exact"
    return number(value, 1, " dB")


def factor(value: float | None) -> str:
    """Write a speed-up."""
    return number(value, 2, "x")


def milliseconds(value: float) -> str:
    """Write a latency in milliseconds with about three digits."""
    return number(value, 3 if value < 1 else 2 if value < 100 else 0, " ms")


def latency(value: Latency | None) -> str:
    """Write both latencies, float first."""
    if value is None:
        return NONE
    return f"{milliseconds(value.float).removesuffix(' ms')} -> {milliseconds(value.quantized)}"


def seconds(value: float) -> str:
    """Write a duration given in seconds, in minutes above 100 s."""
    return number(value / 60, 1, " min") if value > 100 else number(value, 2, " s")


def size(count: float) -> str:
    """Write a number of bytes with a binary unit."""
    if count < KIBI:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= KIBI
        if count < KIBI:
            return f"{count:.1f} {unit}"
    return f"{count / KIBI:.2f} GiB"


def integers(engine: EngineReport) -> str:
    """Write how many ops run in integers, of how many planned."""
    # A simulated precision plans ops that the engine folds or computes in float.
    if not engine.planned_integer_ops or engine.integer_ops > engine.planned_integer_ops:
        return str(engine.integer_ops)
    return f"{engine.integer_ops} of {engine.planned_integer_ops}"


def value_of(value: float | str | None) -> str:
    """Write the side of a gate: text as it is, numbers with two digits."""
    return value if isinstance(value, str) else number(value, 2)


def verdict_of(gate: Gate) -> str:
    """Write the verdict on a gate."""
    if not gate.checked:
        return "-"
    return "passed" if gate.passed else "FAILED"


def grade_of(gate: Gate) -> str:
    """Return how a page shows the verdict: good, bad, or not at all."""
    if not gate.checked:
        return ""
    return "good" if gate.passed else "bad"


def shouts(note: str) -> bool:
    """Tell whether a note starts in capitals, as those do that must not be overlooked."""
    head = note.partition(":")[0]
    return head.isupper() and len(head) > len("ORT")


def names(items: Sequence[str], limit: int) -> str:
    """Join the first `limit` names and count the others."""
    shown = ", ".join(visible(item) for item in items[:limit])
    more = len(items) - limit
    return f"{shown} and {more} more" if more > 0 else shown


def worst_first(sqnr_db: float) -> tuple[bool, float]:
    """Return the sort key of an SQNR: unknown ones (NaN) first, then the lowest."""
    unknown = math.isnan(sqnr_db)
    return not unknown, 0.0 if unknown else sqnr_db


def worst_layers(report: Report, limit: int) -> list[LayerReport]:
    """Return the layers with the lowest SQNR after compensation; unknown ones (NaN) first."""
    return sorted(report.layers, key=lambda layer: worst_first(layer.sqnr_db_after))[:limit]


COST_COLUMNS: Final = ("method", "nodes", "parameters", "MACs", "latency", "of it", "SQNR")


def cost_row(cost: RuntimeCost) -> tuple[str, ...]:
    """Write what one method of compensation costs, and what it gained on the held-out samples."""
    time = "not measured"
    if not cost.nodes:
        time = "the same: folded"
    elif cost.latency_ms is not None:
        without, with_it = cost.latency_ms
        time = f"{milliseconds(without).removesuffix(' ms')} -> {milliseconds(with_it)}"
    gain = NONE
    if cost.sqnr_db is not None:
        before, after = cost.sqnr_db
        gain = f"{decibels(before).removesuffix(' dB')} -> {decibels(after)}"
    return (
        cost.method,
        str(cost.nodes),
        str(cost.parameters),
        str(cost.macs),
        time,
        factor(cost.latency_ratio if cost.nodes else 1.0),
        gain,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Ops that the same engines run in float for one kind of reason."""

    engines: str  # names, joined
    rule: str
    reason: str  # of the first op; "and the like" where others name other tensors or numbers
    planned: bool
    ops: tuple[FloatOp, ...]

    @property
    def op_types(self) -> str:
        """The distinct op types in alphabetical order."""
        return ", ".join(sorted({op.op for op in self.ops}))


def leftovers(report: Report) -> list[Leftover]:
    """Group what runs in float by engines, rule and reason; broken promises first, then by count.

    What the plan left in float is in float everywhere: engines that agree share a row. Reasons
    that differ only in the tensor that they name, or in a measured number, share one as well:
    a deep network would otherwise fill pages with one sentence.
    """
    engines: dict[FloatOp, list[str]] = {}
    for engine in report.engines:
        for op in engine.float_ops:
            engines.setdefault(op, []).append(engine.name)
    groups: dict[tuple[bool, str, str, str], list[FloatOp]] = {}
    for op, found in engines.items():
        kind = DETAIL.sub("..", op.reason)
        groups.setdefault((op.planned, ", ".join(found), op.rule, kind), []).append(op)
    rows = [
        Leftover(engines=where, rule=rule, reason=_reason(ops), planned=planned, ops=tuple(ops))
        for (planned, where, rule, _), ops in groups.items()
    ]
    return sorted(rows, key=lambda row: (not row.planned, -len(row.ops), row.engines, row.rule))


def _reason(ops: Sequence[FloatOp]) -> str:
    first = ops[0].reason
    return first if all(op.reason == first for op in ops) else f"{first}; and the like"
