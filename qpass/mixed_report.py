"""What a search for bits found, as data of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.budgets import Budget
from qpass.knapsack import Point
from qpass.program import Precision
from qpass.report.model import MixedChoice, MixedPoint, MixedReport
from qpass.sensitivity import LayerError

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What plans cost.

    sizes
        Bytes of the weight of each layer at each level.
    times
        Milliseconds of the same; None where size is the cost.
    float_bytes
        Of all weights in float.
    model_ms
        Milliseconds of whole plans that were built and timed, by number of the point.
    """

    sizes: Sequence[Array]
    times: Sequence[Array] | None
    float_bytes: float
    model_ms: Mapping[int, float]

    def bytes_of(self, point: Point) -> int:
        """Return the bytes of all weights of a choice."""
        return int(sum(float(own[i]) for own, i in zip(self.sizes, point.levels, strict=True)))


def report_of(
    errors: list[LayerError],
    costs: Costs,
    front: list[Point],
    measured: Mapping[int, float],
    chosen: int,
    budget: Budget,
) -> MixedReport:
    """Return the report of a search: its points by growing cost, and what each layer got."""
    best = front[chosen]
    timed = costs.times is not None
    return MixedReport(
        cost="latency" if timed else "size",
        budget=budget.name,
        wanted=budget.wanted,
        met=measured[chosen] >= budget.wanted,
        points=tuple(
            MixedPoint(
                weight_bytes=costs.bytes_of(point),
                share_of_float=costs.bytes_of(point) / max(costs.float_bytes, 1.0),
                layers_ms=point.size if timed else None,
                model_ms=costs.model_ms.get(number),
                predicted_db=-10.0 * float(np.log10(max(point.error, 1e-20))),
                measured=measured.get(number),
                chosen=number == chosen,
            )
            for number, point in sorted(enumerate(front), key=lambda pair: pair[1].size)
        ),
        layers=tuple(
            MixedChoice(
                name=layer.name,
                bits=_text(layer.levels[number]),
                error_db=tuple(
                    (_text(level), -10.0 * float(np.log10(max(error, 1e-20))))
                    for level, error in zip(layer.levels, layer.errors, strict=True)
                    if level is not None
                ),
                level_ms=()
                if costs.times is None
                else tuple(
                    (_text(level), float(time))
                    for level, time in zip(layer.levels, costs.times[place], strict=True)
                ),
            )
            for place, (layer, number) in enumerate(zip(errors, best.levels, strict=True))
        ),
    )


def _text(level: Precision | None) -> str:
    return "float" if level is None else str(level)
