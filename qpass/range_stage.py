"""The step that chooses how ranges of activations are found, and the numbers that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qpass.choose import QTable, choose_qtable
from qpass.graph import Graph
from qpass.output_ranges import METHOD as OUTPUT
from qpass.output_ranges import solve_output_ranges
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.quantize import build_quantized
from qpass.run import Run
from qpass.trial import CANDIDATES, TRIAL_SAMPLES, try_methods


def choose_method(run: Run, samples: Sequence[Mapping[str, Any]]) -> None:
    """With `--calibrate auto`: let the methods compete on a few calibration samples."""
    assert run.graph is not None
    assert run.plan is not None
    if run.options.calibrate != "auto" or not samples or not run.stats:
        return
    some, threads = samples[:TRIAL_SAMPLES], run.options.jobs
    with run.stages.stage("trial"):
        run.output_ranges = solve_output_ranges(
            run.graph, run.plan, run.stats, some, threads=threads, seed=run.options.seed
        )
        trial = try_methods(
            run.graph.to_model(inline=True),
            lambda method: _draft(run, method).to_model(inline=True),
            some,
            run.target,
            methods=(*CANDIDATES, OUTPUT) if run.output_ranges else CANDIDATES,
            threads=threads,
        )
    run.method = trial.method
    run.notes.append(trial.sentence())


def qtable_of(run: Run, plan: Plan, *, method: str = "", round_method: str = "rtn") -> QTable:
    """Return the numbers of a plan of the run's graph.

    Args:
        run: has been calibrated.
        plan: may give other bits than that of the run.
        method: of the ranges; "": the one that the run has chosen.
        round_method: see `choose_qtable`.
    """
    assert run.graph is not None
    method = method or run.method or run.options.calibrate
    return choose_qtable(
        run.graph,
        plan,
        run.stats,
        method="auto" if method == OUTPUT else method,
        given=run.output_ranges if method == OUTPUT else None,
        round_method=round_method,
        weight_method=run.options.weight_range,
    )


def _draft(run: Run, method: str) -> Graph:
    """Build the integer graph with the ranges of a method, its weights at 8 bits if they have less.

    With fewer bits to nearest, as weights are before they have been rounded by their outputs, their
    errors drown what the ranges of activations do.
    """
    assert run.graph is not None
    policy = run.policy.with_wide_weights()
    plan = make_plan(run.graph, run.target, policy)
    table = qtable_of(run, plan, method=method)
    return build_quantized(run.graph, plan, table, run.target, policy)[0]
