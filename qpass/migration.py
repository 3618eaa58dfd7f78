"""The steps of a run that migrate scales: whether they may, with which samples, what they say."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import islice
from typing import Final

from qpass.calibrate import Samples, collect
from qpass.choose import WIDE_BITS
from qpass.equalization import Job, equalize, scaled_ops
from qpass.evidence import broken_weights_named, taps_of
from qpass.options import ROUND_WITH_DATA
from qpass.passes.equalize.measure import Specs
from qpass.passes.equalize.suit_weights import NAME, find_suited, suit_weights
from qpass.planner import plan as make_plan
from qpass.quantize import timed
from qpass.report.model import PassReport, Refusal
from qpass.run import Run
from qpass.same_function import EXACT_SAMPLES, outputs_of, same_outputs

# Samples to take rows from, and further ones to judge the whole model by.
ROW_SAMPLES: Final = 32
JUDGE_SAMPLES: Final = 32
FEWEST: Final = 12  # below it neither the sites nor the model can be judged
# Energies of channels need fewer samples than ranges: each sample has many rows.
WEIGHT_SAMPLES: Final = 48


def scale_for_weights(run: Run, samples: Samples) -> None:
    """With `--equalize`, in front of the calibration: scales of channels that suit few bits.

    Weights of fewer than 7 bits that are rounded by their outputs, behind activations that are
    float or have static ranges of 7 bits at least: with few levels ranges clip, by how much is not
    known yet. One float pass over at most 48 of the samples to calibrate with. The statistics of
    `--stats` and frozen scales belong to the model as it was, so nothing happens beside them.
    """
    assert run.graph is not None
    assert run.plan is not None
    options, bits = run.options, run.policy.precision.activation
    if not options.equalize or options.round not in ROUND_WITH_DATA:
        return
    if options.activation_scales or options.stats:
        return
    if bits is not None and (bits < WIDE_BITS or run.policy.activations != "static"):
        return
    graph = run.graph.copy()
    specs = Specs.of(run.plan, graph.nodes)
    found = find_suited(graph, specs, run.policy.ranges)
    if not found.sites:
        return
    count = samples.available(WEIGHT_SAMPLES)
    if count < FEWEST:
        run.notes.append(
            f"scales were not chosen for weights: that takes {FEWEST} calibration samples, there "
            f"are {count}"
        )
        return
    with run.stages.stage("suit weights"), broken_weights_named(run):
        model = run.graph.to_model(inline=True)
        first, second = (
            collect(
                model,
                found.taps(),
                samples.view(start, count, 2),
                batch_size=options.batch_size,
                memory_bytes=options.memory_bytes,
                threads=options.jobs,
            ).stats
            for start in (0, 1)
        )
        done, refusals = suit_weights(graph, found.sites, specs, (first, second))
        some = list(islice(iter(samples), EXACT_SAMPLES)) if done else []
        wanted, got = (
            outputs_of(one, some, run.target, threads=options.jobs) if some else []
            for one in (run.graph, graph)
        )
        if done and not same_outputs(wanted, got):
            where = f"{len(done)} sites"
            reason = "the float outputs would change by their rounding"
            done, refusals = [], [*refusals, Refusal(rule=NAME, where=where, reason=reason)]
    report = PassReport(name=NAME, changed=len(done), refusals=(*found.refusals, *refusals))
    run.passes.append(timed(report, run.stages.seconds["suit weights"]))
    if not done:
        return
    gain = sum(one.gain_db for one in done) / len(done)
    run.notes.append(
        f"scales of channels suit the weights behind at {len(done)} of {len(found.sites)} sites: "
        f"rounding should lose {gain:.1f} dB less there"
    )
    graph.infer_shapes()
    digest = hashlib.sha256()
    for one in done:
        digest.update(one.site.tensor.encode() + one.scales.scale.tobytes())
    tensors = frozenset().union(*(one.site.tensors for one in done))
    run.graph, run.known = graph, ""
    run.scaled = {"key": digest.hexdigest(), "layers": scaled_ops(graph, tensors)}
    run.plan = make_plan(graph, run.target, run.policy)


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
        run.graph = result.graph
        run.scaled = {
            "key": run.scaled.get("key", "") + result.key,
            "layers": sorted({*run.scaled.get("layers", ()), *result.scaled}),
        }
        run.plan = make_plan(run.graph, run.target, run.policy)
        run.stats = dict(result.stats)
