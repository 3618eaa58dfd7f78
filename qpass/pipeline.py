"""The whole job: load, normalize, plan, calibrate, quantize, verify, repair, write, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import onnx

from qpass.calibrate import (
    CalibrationCache,
    Samples,
    TapRequest,
    TensorStats,
    batches,
    collect,
    input_specs,
    load_stats,
    open_samples,
    split,
)
from qpass.choose import QTable, choose_qtable, importance
from qpass.errors import RecipeError
from qpass.graph import Graph
from qpass.modelfile import load_model
from qpass.options import Options
from qpass.passes.compensate import Compensation, compensate
from qpass.passes.normalize import normalize
from qpass.plan import Plan, read_plan
from qpass.planner import plan as make_plan
from qpass.program import Policy, Precision, Progress
from qpass.quantize import build_quantized, timed
from qpass.report.model import EngineReport, LayerReport, PassReport
from qpass.stages import Stages
from qpass.targets import Target, load_target
from qpass.trial import TRIAL_SAMPLES, try_methods
from qpass.version import __version__

COMPENSATION_SAMPLES: Final = 64  # two unknowns a channel: more samples change little
VERIFY_SAMPLES: Final = 32  # at most so many held-out samples are compared
LAYER_SAMPLES: Final = 2


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that one run has found out so far; `qpass.result` makes the report of it."""

    source: Path
    options: Options
    target: Target
    policy: Policy
    stages: Stages = field(default_factory=Stages)
    graph: Graph | None = None  # normalized float graph, never changed after `prepare`
    passes: list[PassReport] = field(default_factory=list)
    plan: Plan | None = None
    stats: dict[str, TensorStats] = field(default_factory=dict)
    method: str = ""  # range method that won the trial
    qtable: QTable | None = None
    plain: Graph | None = None  # quantized, not compensated
    quantized: Graph | None = None
    batches: list[Mapping[str, Any]] = field(default_factory=list)  # to compensate with
    compensation: Compensation | None = None
    progress: Progress | None = None
    engines: list[EngineReport] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # engine -> its own message
    layers: list[LayerReport] = field(default_factory=list)
    rounds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forward_seconds: float = 0.0
    samples: int = 0
    fingerprint: str = ""


def start(source: Path, options: Options) -> Run:
    """Check the options and load the target."""
    policy = Policy(
        precision=Precision.parse(options.precision),
        activations=options.activations,
        keep=options.keep,
    )
    return Run(source=source, options=options, target=load_target(options.target), policy=policy)


def prepare(run: Run) -> Graph:
    """Load and normalize the model, and plan it."""
    with run.stages.stage("load"):
        run.graph = load_model(run.source, opset=run.target.opset)
    with run.stages.stage("normalize"):
        report = normalize(run.graph)
    run.passes.append(timed(report, run.stages.seconds["normalize"]))
    with run.stages.stage("plan"):
        if run.options.plan:
            run.policy = _edited_policy(run, Path(run.options.plan))
        run.plan = make_plan(run.graph, run.target, run.policy)
    return run.graph


def _edited_policy(run: Run, path: Path) -> Policy:
    edited = read_plan(path)
    assert run.graph is not None
    names = {node.name for node in run.graph.nodes}
    unknown = sorted(edited.node_names - names)
    if edited.target != run.target.name or unknown:
        what = f"target {edited.target}" if edited.target != run.target.name else unknown[0]
        raise RecipeError(
            f"the plan was made for something else: {what}",
            where=str(path),
            fix=f"make it again: qpass plan {run.source} --target {run.target.name} -o {path}",
        )
    return replace(run.policy, float_nodes=edited.float_nodes, ranges=edited.ranges)


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
    return split(samples, run.options.samples, run.options.holdout)


def calibrate(run: Run, samples: Samples, progress: Progress | None = None) -> None:
    """Fill `run.stats` in one pass over the samples, or from a file or the cache."""
    assert run.graph is not None
    assert run.plan is not None
    taps = taps_of(run.graph, run.plan)
    run.fingerprint = samples.fingerprint()
    if run.options.stats:
        run.stats = _stats_from_file(run, Path(run.options.stats), taps)
        return
    with run.stages.stage("calibrate"):
        model = run.graph.to_model(inline=True)
        cache = CalibrationCache(Path(run.options.cache)) if run.options.cache else None
        key = cache.key(sha256_of(run.source), run.fingerprint, taps) if cache else ""
        cached = cache.get(key) if cache else None
        if cached is not None:
            run.stats, run.samples = cached.stats, cached.samples
            run.notes.append("statistics came from the cache")
            return
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


def _stats_from_file(run: Run, path: Path, taps: list[TapRequest]) -> dict[str, TensorStats]:
    stats, meta = load_stats(path)
    if meta.get("model") != sha256_of(run.source):
        raise RecipeError("the statistics belong to another model", where=str(path))
    missing = [tap.tensor for tap in taps if tap.tensor not in stats]
    if missing:
        raise RecipeError(
            f"the statistics lack {len(missing)} tensors, first {missing[0]}",
            where=str(path),
            fix=f"run qpass calibrate again with --target {run.target.name}",
        )
    run.samples = int(meta.get("samples", 0))
    return stats


def quantize(run: Run) -> None:
    """Choose the numbers, build the integer graph and compensate it."""
    with run.stages.stage("quantize"):
        table, run.plain, reports = _build(run, run.method or run.options.calibrate)
    method = run.options.compensate
    if method in ("cwac", "bias") and run.batches:
        with run.stages.stage("compensate"):
            run.qtable, run.quantized, reports = _build(
                run, run.method or run.options.calibrate, lambda graph: _compensate(run, graph)
            )
    else:
        run.qtable, run.quantized = table, run.plain
    names = {report.name for report in reports}
    run.passes = [*(p for p in run.passes if p.name not in names), *reports]


def _compensate(run: Run, graph: Graph) -> PassReport:
    assert run.graph is not None
    method = run.options.compensate
    result = compensate(
        run.graph,
        graph,
        run.batches,
        method="bias" if method == "bias" else "cwac",
        memory_bytes=run.options.memory_bytes // 2,
        threads=run.options.jobs,
        progress=run.progress,
    )
    run.compensation = result
    return result.report


def _build(
    run: Run, method: str, compensation: Callable[[Graph], PassReport] | None = None
) -> tuple[QTable, Graph, tuple[PassReport, ...]]:
    assert run.graph is not None
    assert run.plan is not None
    table = choose_qtable(
        run.graph, run.plan, run.stats, method=method, round_method=run.options.round
    )
    graph, reports = build_quantized(
        run.graph, run.plan, table, run.target, run.policy, compensation=compensation
    )
    return table, graph, reports


def choose_method(run: Run, samples: Sequence[Mapping[str, Any]]) -> None:
    """With `--calibrate auto`: let the methods compete on a few calibration samples."""
    assert run.graph is not None
    if run.options.calibrate != "auto" or not samples or not run.stats:
        return
    with run.stages.stage("trial"):
        trial = try_methods(
            run.graph.to_model(inline=True),
            lambda method: _build(run, method)[1].to_model(inline=True),
            samples[:TRIAL_SAMPLES],
            threads=run.options.jobs,
        )
    run.method = trial.method
    run.notes.append(trial.sentence())


def take_batches(run: Run, samples: Samples) -> None:
    """Keep a few batches of calibration samples for compensation."""
    assert run.graph is not None
    if run.options.compensate in ("cwac", "bias"):
        inputs = input_specs(run.graph.to_model(stub_above=1024))
        some = islice(iter(samples), COMPENSATION_SAMPLES)
        run.batches = [feeds for _, feeds in batches(some, run.options.batch_size, inputs)]


def metadata_of(run: Run) -> dict[str, str]:
    """Return the manifest that goes into the model: what it was made from, and how."""
    options = {k: v for k, v in asdict(run.options).items() if k not in ("report", "cache", "jobs")}
    return {
        "qpass.version": __version__,
        "qpass.source_sha256": sha256_of(run.source),
        "qpass.target": run.target.name,
        "qpass.precision": run.options.precision,
        "qpass.samples_sha256": run.fingerprint,
        "qpass.options": json.dumps(options, sort_keys=True, default=list),
        "qpass.onnx": onnx.__version__,
    }


def held_out_samples(calibration: Samples, holdout: Samples) -> tuple[list[Any], str]:
    """Return the samples to verify with, and a note when none were held out."""
    held = list(islice(iter(holdout), VERIFY_SAMPLES))
    if held:
        return held, ""
    return list(islice(iter(calibration), VERIFY_SAMPLES)), (
        "no sample was held out: the numbers below were measured on the calibration samples"
    )
