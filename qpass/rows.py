"""Rows for the tables and the JSON of the command line."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

from qpass.compare import LayerDifference
from qpass.report.model import EngineReport
from qpass.targets.schema import OpRule

ENGINE_COLUMNS: Final = (
    "engine", "version", "integer ops", "speed-up", "SQNR dB", "cosine", "on/off dB",
)  # fmt: skip
RULE_COLUMNS: Final = ("ops", "role", "activation", "weight", "output", "absorbs", "source")


def number(value: float | None, digits: int = 2) -> str:
    """Format a number, `-` for none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as a dict with numbers that JSON can hold."""
    return {
        key: None if isinstance(item, float) and not math.isfinite(item) else item
        for key, item in dataclasses.asdict(value).items()
    }


def engine_row(report: EngineReport) -> tuple[str, ...]:
    """Row of `ENGINE_COLUMNS`."""
    return (
        report.name,
        report.version,
        str(report.integer_ops),
        number(report.speedup) + ("x" if report.speedup is not None else ""),
        number(report.sqnr_db),
        number(report.cosine, 6),
        number(report.optimizer_diff_db),
    )


def difference_row(row: LayerDifference) -> tuple[str, ...]:
    """Row of `qpass compare`."""
    return (
        row.name,
        row.op,
        number(row.sqnr_db),
        number(row.cosine, 6),
        f"{row.max_abs:.4g}",
        number(row.max_lsb),
    )


def rule_row(rule: OpRule) -> tuple[str, ...]:
    """Row of `RULE_COLUMNS`."""
    return (
        ", ".join(sorted(rule.ops)),
        rule.role,
        rule.activation.describe() if rule.activation else "-",
        rule.weight.describe() if rule.weight else "-",
        rule.output,
        ", ".join(rule.absorbs) or "-",
        rule.source,
    )


def short(value: Any) -> str:
    """Return a value on few lines for a table."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {short(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return "\n".join(short(item) for item in value) or "-"
    return "-" if value is None else str(value)
