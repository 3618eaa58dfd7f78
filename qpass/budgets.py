"""What a plan has to reach: an SQNR, or a drop of the user's own metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qpass.callables import score_file
from qpass.run import Run
from qpass.verify.check import Reference
from qpass.verify.engines import open_engine
from qpass.verify.host import config_for
from qpass.verify.metrics import ErrorMeter

Feeds = Mapping[str, NDArray[Any]]
Score = Callable[[Path], float]  # larger is better


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a plan has to reach: `score` of the built file, at least `wanted`.

    error: the share of error power at the outputs that should just meet it, None when unknown.
    """

    name: str
    wanted: float
    score: Score
    error: float | None = None


def sqnr_budget(run: Run, wanted: float, held: Sequence[Feeds]) -> Budget:
    """Return the budget of `--min-sqnr`: the worst output on held-out samples, in dB."""
    reference = Reference.run(run.source, held, threads=run.options.jobs)
    engine = run.target.own_engine

    def score(path: Path) -> float:
        assert run.plan is not None
        config = config_for(run.plan, run.target, engine, run.options.accuracy_level)
        runner = open_engine(engine, path, session_config=config, threads=run.options.jobs)
        meters = [ErrorMeter() for _ in runner.output_names]
        for feeds, expected in zip(reference.feeds, reference.outputs, strict=True):
            for meter, a, b in zip(meters, expected, runner.run(dict(feeds)), strict=True):
                meter.update(a, b)
        return min(meter.sqnr_db for meter in meters)

    return Budget(name="SQNR in dB", wanted=wanted, score=score, error=10.0 ** (-wanted / 10.0))


def metric_budget(function: str, wanted_drop: float, float_score: tuple[str, float]) -> Budget:
    """Return the budget of `--max-drop`: the user's metric `function`, larger is better.

    `float_score` is the metric of the float model: name and value.
    """
    name, value = float_score
    return Budget(
        name=name,
        wanted=value - wanted_drop,
        score=lambda path: score_file(function, path)[1],
    )
