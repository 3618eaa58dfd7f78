"""The step of a run that migrates scales: whether it may, with which samples, what it reports."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Final

from qpass.calibrate import Samples
from qpass.equalization import Job, equalize
from qpass.evidence import taps_of
from qpass.planner import plan as make_plan
from qpass.quantize import timed
from qpass.run import Run

# Samples to take rows from, and further ones to judge the whole model by.
ROW_SAMPLES: Final = 32
JUDGE_SAMPLES: Final = 32
FEWEST: Final = 12  # below it neither the sites nor the model can be judged


def migrate_scales(run: Run, samples: Samples) -> None:
    """With `--equalize`: exchange the float graph of a run for one with migrated scales.

    The model has been calibrated; what a migration changes is calibrated again. All samples come
    from those to calibrate with; the held-out ones are never looked at. Nothing happens, and a note
    says so, when statistics come from a file (they belong to the graph as it was) or when there are
    too few samples.
    """
    assert run.graph is not None
    if not run.options.equalize or run.policy.precision.activation is None:
        return
    if run.options.activation_scales:
        run.notes.append("scales were not migrated: those of --activation-scales stay as they are")
        return
    if run.options.stats:
        run.notes.append("scales were not migrated: the statistics of --stats belong to the model")
        return
    found = samples.available(ROW_SAMPLES + JUDGE_SAMPLES)
    if found < FEWEST:
        run.notes.append(
            f"scales were not migrated: that takes {FEWEST} calibration samples, there are {found}"
        )
        return
    rows = ROW_SAMPLES if found == ROW_SAMPLES + JUDGE_SAMPLES else found * 2 // 3
    with run.stages.stage("equalize"):
        job = Job(
            target=run.target,
            policy=run.policy,
            taps=taps_of,
            samples=samples,
            rows=rows,
            stats=run.stats,
            held=list(islice(iter(samples.view(rows, found)), JUDGE_SAMPLES)),
            method=run.options.calibrate,
            round_method=run.options.round if run.options.round == "mse" else "rtn",
            weight_method=run.options.weight_range,
            batch_size=run.options.batch_size,
            memory_bytes=run.options.memory_bytes,
            threads=run.options.jobs,
            seed=run.options.seed,
        )
        result = equalize(run.graph, job)
    run.passes.append(timed(result.report, run.stages.seconds["equalize"]))
    run.notes += [*result.notes, *(f"added at run time: {text}" for text in result.muls)]
    if result.report.changed:
        if result.ranges:
            run.policy = replace(run.policy, ranges={**run.policy.ranges, **result.ranges})
        run.graph, run.scaled = result.graph, {"key": result.key, "layers": result.scaled}
        run.plan = make_plan(run.graph, run.target, run.policy)
        run.stats = dict(result.stats)
