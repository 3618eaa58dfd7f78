"""Repair a plan by what the engines did with it: the next round keeps some nodes in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qpass.report.model import EngineReport
from qpass.verify.check import leftovers

MAX_ROUNDS: Final = 3
# Shared machines are noisy: less than this is not called slower.
SLOWER: Final = 1.03
# Below this a model is dominated by the call itself, and its timing by noise, which would make the
# result differ from run to run.
SMALLEST_MS: Final = 0.5
# An op is given up when it loses this share and this much; a smaller difference is noise as well.
OP_LOSS: Final = 1.1
OP_LOSS_US: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """Nodes that go back to float, by name with the reason, and a sentence for the report."""

    float_nodes: dict[str, str]
    sentence: str


def repair_leftovers(report: EngineReport) -> Repair | None:
    """Give up the integers of ops that the engine runs in float anyway: Q and DQ only cost."""
    rows = leftovers(report)
    if not rows:
        return None
    names = ", ".join(row.node for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
    return Repair(
        float_nodes={row.node: f"{report.name} ran it in float: {row.reason}" for row in rows},
        sentence=f"{report.name} kept {len(rows)} planned ops in float ({names}): "
        f"{rows[0].reason}. They are float in the plan now.",
    )


def worth_repairing(report: EngineReport) -> bool:
    """Return True when the result is surely slower than float, and not just by noise."""
    if report.latency_ms is None or report.speedup is None:
        return False
    return report.latency_ms.float >= SMALLEST_MS and report.speedup * SLOWER < 1.0


def repair_slow(report: EngineReport, slower: Sequence[tuple[str, float, float]]) -> Repair | None:
    """Give up integer ops that measured slower than their float form.

    Args:
        report: of the engine in which the result is slower than float.
        slower: (node, float microseconds, integer microseconds) from the engine's profiles.
    """
    slower = [row for row in slower if row[2] > OP_LOSS * row[1] + OP_LOSS_US]
    if report.speedup is None or not slower:
        return None
    lost = sum(integer - plain for _, plain, integer in slower)
    return Repair(
        float_nodes={
            name: f"{report.name} needs {integer:.0f} us in integers and {plain:.0f} us in float"
            for name, plain, integer in slower
        },
        sentence=f"{report.name} was slower than float ({report.speedup:.2f}x): {len(slower)} ops "
        f"that lose {lost:.0f} us in integers are float in the plan now.",
    )
