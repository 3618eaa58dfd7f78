"""What the samples say: opening them, statistics in one pass, batches for later passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

from qpass.calibrate import (
    CalibrationCache,
    Samples,
    TapRequest,
    TensorStats,
    batches,
    collect,
    input_specs,
    load_stats,
    missing_shards,
    open_samples,
    split,
)
from qpass.choose import importance
from qpass.errors import ModelError, NotFiniteError, RecipeError
from qpass.graph import Graph
from qpass.matching import NOT_FINITE
from qpass.options import ROUND_WITH_DATA, THOROUGH
from qpass.passes.held_out import LEAST_SAMPLES
from qpass.plan import Plan
from qpass.program import Progress
from qpass.run import Run, model_key
from qpass.weights_float import closeness_db

COMPENSATION_SAMPLES: Final = 64  # two unknowns a channel: more samples change little
# Fewer say nothing of a model: then a quarter of the calibration samples judges, and is not fitted.
LEAST_JUDGES: Final = 8
FEW_HELD: Final = 2  # held-out samples; below, an SQNR is that of a single one
VERIFY_SAMPLES: Final = 32  # at most so many held-out samples are compared


def taps_of(graph: Graph, plan: Plan) -> list[TapRequest]:
    """Return what calibration has to look at for `plan`."""
    taps: dict[str, TapRequest] = {}
    tensors = graph.tensors()
    for decision in plan.activations():
        if decision.spec.fixed is not None or decision.pinned is not None:
            continue
        axis, shape = decision.channel_axis, tensors[decision.tensor].shape
        # Statistics by channel need channels: the length of a sequence is none.
        fixed = axis is not None and shape and isinstance(shape[axis], int)
        taps.setdefault(
            decision.tensor,
            TapRequest(
                tensor=decision.tensor,
                axis=axis if fixed else None,
                importance=importance(graph, decision) if fixed else None,
                mask_below=decision.mask_below,
            ),
        )
    return list(taps.values())


def open_data(run: Run, data: Any) -> tuple[Samples, Samples]:
    """Open the samples; return those to calibrate with and those held out."""
    assert run.graph is not None
    if data is None:
        raise RecipeError(
            "there are no samples to calibrate with",
            fix="give --data (npz, folder, images, module:callable); --data random for a trial",
        )
    inputs = input_specs(run.graph.to_model(stub_above=1024))
    preprocess = run.options.preprocess
    samples = open_samples(data, inputs, preprocess=preprocess, seed=run.options.seed)
    if samples.is_random:
        run.notes.append(
            "RANDOM DATA: ranges come from noise, not from your inputs. Accuracy means nothing; "
            "do not ship this file."
        )
    elif run.policy.precision.activation is None and run.options.round not in ROUND_WITH_DATA:
        run.notes.append(
            f"weights are rounded to nearest (--round {run.options.round}), which looks at no "
            "samples; --round gptq or unit rounds by what the layers make of them"
        )
    calibration, holdout = split(samples, run.options.samples, run.options.holdout)
    if run.options.stats and run.options.holdout:
        run.notes += _seen_notes(Path(run.options.stats), samples, calibration)
    return calibration, holdout


def _seen_notes(path: Path, samples: Samples, calibration: Samples) -> list[str]:
    """Say where the statistics of a file are also those of samples that are held out."""
    _, meta = load_stats(path)
    count = int(meta.get("samples", 0))
    if count <= calibration.count:
        return []
    if samples.view(0, count).fingerprint() != meta.get("samples_sha256"):
        return []
    return [
        f"the ranges of {path.name} have seen the samples of the verification: calibrate with "
        f"--samples {calibration.count}, or give other samples here"
    ]


def held_out_samples(calibration: Samples, holdout: Samples) -> tuple[list[Any], str]:
    """Return the samples to verify with, and a note when none were held out."""
    held = list(islice(iter(holdout), VERIFY_SAMPLES))
    if held:
        return held, ""
    return list(islice(iter(calibration), VERIFY_SAMPLES)), (
        "no sample was held out: the numbers below were measured on the calibration samples"
    )


def few_held(held: Sequence[Any]) -> list[str]:
    """Say where the numbers of the verification stand on next to nothing."""
    if len(held) >= FEW_HELD:
        return []
    return [
        f"only {len(held)} of the samples was left for the verification: its SQNR is of that one; "
        "give fewer --samples, or more data"
    ]


def aim_notes(run: Run, held: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how close the result is to the weights-float network, where there is one."""
    if run.aim is None or not held:
        return []
    assert run.quantized is not None
    quantizers = sum(node.op == "QuantizeLinear" for node in run.aim.nodes)
    close = closeness_db(run.aim, run.quantized, held, threads=run.options.jobs)
    options = run.options
    fitted = options.round in ROUND_WITH_DATA or options.compensate != "none" or options.tune_steps
    aims = "weights were fitted to" if fitted and run.batches else "compared with"
    return [
        f"{aims} the network with float weights and the activation quantizers ({quantizers}) of "
        f"--activation-scales: {close:.1f} dB against it on the samples of the verification"
    ]


def repeated_samples(samples: Samples) -> list[str]:
    """Return a note where most samples are copies of others."""
    if samples.is_random or 2 * samples.distinct > samples.count or samples.count == 1:
        return []
    return [
        f"REPEATED SAMPLES: only {samples.distinct} of {samples.count} calibration samples differ; "
        "ranges and corrections fit what they have seen"
    ]


def calibrate(run: Run, samples: Samples, progress: Progress | None = None) -> None:
    """Fill `run.stats` in one pass over the samples, or from a file or the cache."""
    assert run.graph is not None
    assert run.plan is not None
    taps = taps_of(run.graph, run.plan)
    run.fingerprint = samples.fingerprint()
    run.notes += repeated_samples(samples)
    if run.options.stats:
        run.stats = _stats_from_file(run, Path(run.options.stats), taps)
        return
    with run.stages.stage("calibrate"):
        model = run.graph.to_model(inline=True)
        cache = CalibrationCache(Path(run.options.cache)) if run.options.cache else None
        key = cache.key(model_key(run), run.fingerprint, taps) if cache else ""
        cached = cache.get(key) if cache else None
        if cached is not None:
            run.stats, run.samples = cached.stats, cached.samples
            run.notes.append("statistics came from the cache")
            return
        with broken_weights_named(run):
            result = collect(
                model,
                taps,
                samples,
                batch_size=run.options.batch_size,
                memory_bytes=run.options.memory_bytes,
                threads=run.options.jobs,
                progress=(lambda done, of: progress("calibrate", done, of)) if progress else None,
                checkpoint=cache.checkpoint(key) if cache else None,
            )
        run.stats, run.samples = result.stats, result.samples
        run.forward_seconds = result.forward_seconds
        if cache:
            cache.put(key, result)


@contextmanager
def broken_weights_named(run: Run) -> Iterator[None]:
    """Blame weights that are not finite, and not the samples, for tensors that are not."""
    assert run.plan is not None
    try:
        yield
    except NotFiniteError as error:
        broken = broken_layers(run.plan)
        if not broken:
            raise
        raise ModelError(
            f"the weight of {broken[0]} holds NaN or infinity, and {error.what}",
            where=str(run.source),
            fix="check the checkpoint and its export: the samples are not to blame",
        ) from error


def broken_layers(plan: Plan) -> list[str]:
    """Return the linear ops of `plan` whose weights hold NaN or infinity."""
    return [node.name for node in plan.nodes if node.because.endswith(NOT_FINITE)]


def broken_notes(plan: Plan) -> list[str]:
    """Say which weights no integers can hold, and most likely nobody wanted."""
    return [
        f"THE WEIGHT OF {name} HOLDS NaN OR INFINITY: it stays as it is; check the checkpoint and "
        "its export"
        for name in broken_layers(plan)
    ]


def _stats_from_file(run: Run, path: Path, taps: list[TapRequest]) -> dict[str, TensorStats]:
    assert run.graph is not None
    stats, meta = load_stats(path)
    if meta.get("model") != model_key(run):
        raise RecipeError(
            "the statistics belong to another model, or to other rewrites of it",
            where=str(path),
            fix="run qpass calibrate with the same options",
        )
    stats |= _moved_stats(run.graph, stats, taps)
    missing = [tap.tensor for tap in taps if tap.tensor not in stats]
    if missing:
        raise RecipeError(
            f"the statistics lack {len(missing)} tensors, first {missing[0]}",
            where=str(path),
            fix=f"run qpass calibrate again with --target {run.target.name}",
        )
    run.samples = int(meta.get("samples", 0))
    if lacking := missing_shards(meta):
        run.notes.append(
            f"STATISTICS OF A PART OF THE SAMPLES: {path.name} lacks {len(lacking)} of the shards "
            f"({', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''}); `qpass merge` joins "
            "them"
        )
    return stats


def _moved_stats(
    graph: Graph, stats: Mapping[str, TensorStats], taps: list[TapRequest]
) -> dict[str, TensorStats]:
    """Return statistics of tensors that a rewrite for the target has made by moving others.

    Nothing but the range of a tensor is asked of statistics from a file, and moving values leaves
    that as it is.
    """
    tensors, found = graph.tensors(), {}
    for tap in taps:
        tensor = tensors[tap.tensor]
        while tensor.name not in stats:
            producer = graph.producer(tensor)
            if producer is None or producer.op not in ("Reshape", "Transpose"):
                break
            tensor = producer.inputs[0]
        else:
            if tensor.name != tap.tensor:
                found[tap.tensor] = stats[tensor.name]
    return found


def take_batches(run: Run, samples: Samples, held: Sequence[Any]) -> None:
    """Keep a few batches of calibration samples for rounding and compensation.

    Args:
        run: gets them, and batches of held-out samples that say yes or no to whole models.
        samples: to calibrate with.
        held: those of the verification; none where they are calibration samples themselves.
    """
    assert run.graph is not None
    needed = run.options.compensate != "none" or run.options.round in ROUND_WITH_DATA
    if needed or run.options.tune_steps:
        inputs = input_specs(run.graph.to_model(stub_above=1024))
        # Many unknowns: the more samples the better, where time is not what counts.
        learns = run.options.round in THOROUGH or run.options.tune_steps > 0
        limit = run.options.samples if learns else COMPENSATION_SAMPLES
        size = run.options.batch_size
        counted = list(batches(islice(iter(samples), limit), size, inputs))
        total = sum(count for count, _ in counted)
        if len(counted) <= 2 and total >= 2 * LEAST_SAMPLES:  # one half judges the other
            half = math.ceil(total / 2)
            counted = list(batches(islice(iter(samples), limit), half, inputs))
        if len(counted) < 2:
            run.notes.append(
                f"TOO FEW SAMPLES: {total}, and what is fitted to samples is judged by others: "
                "rounding by outputs and compensation were left out; give at least 8, better 64"
            )
        run.batches = [feeds for _, feeds in counted]
        # Weights alone are rounded with samples that no statistics were taken of.
        run.samples = max(run.samples, sum(count for count, _ in counted))
        if not run.fingerprint:
            run.fingerprint = samples.fingerprint()
            run.notes += repeated_samples(samples)
        if len(held) >= LEAST_JUDGES:
            run.judges = [feeds for _, feeds in batches(held, size, inputs)]
