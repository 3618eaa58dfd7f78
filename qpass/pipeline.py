"""The whole job: load, normalize, plan, calibrate, quantize, verify, repair, write, report."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
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
    collect,
    input_specs,
    load_stats,
    open_samples,
    split,
)
from qpass.choose import QTable, choose_qtable, importance
from qpass.errors import ModelError, RecipeError
from qpass.graph import Graph
from qpass.modelfile import load_model, save_model
from qpass.options import Options
from qpass.passes.normalize import normalize
from qpass.plan import Plan, read_plan
from qpass.planner import plan as make_plan
from qpass.program import Policy, Precision, Progress
from qpass.quantize import build_quantized, timed
from qpass.report.model import EngineReport, LayerReport, PassReport
from qpass.stages import Stages
from qpass.targets import Target, load_target
from qpass.trial import TRIAL_SAMPLES, try_methods
from qpass.verify import available_engines, profile_ort, read_back
from qpass.verify.check import Reference, check_engine
from qpass.verify.engines import EngineError, EngineName
from qpass.verify.repair import MAX_ROUNDS, SLOWER, Repair, repair_leftovers, repair_slow
from qpass.verify.trace import trace
from qpass.version import __version__

DIALECT_LOSS_DB: Final = 3.0  # a file of another engine's dialect that loses more is warned of
VERIFY_SAMPLES: Final = 64  # at most so many held-out samples are compared
LAYER_SAMPLES: Final = 4
TIMING_SECONDS: Final = 0.6  # per engine
VERIFYING: Final[tuple[EngineName, ...]] = ("ort", "openvino")


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
    quantized: Graph | None = None
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
    """Choose the numbers and build the integer graph."""
    assert run.graph is not None
    assert run.plan is not None
    with run.stages.stage("quantize"):
        run.qtable, run.quantized, reports = _build(run, run.method or run.options.calibrate)
        names = {report.name for report in reports}
        run.passes = [*(p for p in run.passes if p.name not in names), *reports]


def _build(run: Run, method: str) -> tuple[QTable, Graph, tuple[PassReport, ...]]:
    assert run.graph is not None
    assert run.plan is not None
    table = choose_qtable(
        run.graph, run.plan, run.stats, method=method, round_method=run.options.round
    )
    graph, reports = build_quantized(run.graph, run.plan, table, run.target, run.policy)
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


def engines_for(run: Run) -> list[EngineName]:
    """Return the engines to verify in, the target's own first."""
    own: EngineName = "openvino" if run.target.engine == "openvino" else "ort"
    installed = available_engines()
    if not run.options.engines:
        others = [name for name in VERIFYING if name != own and name in installed]
        return [own, *others] if own in installed else others
    for name in run.options.engines:
        if name not in VERIFYING:
            raise RecipeError(f"there is no engine {name}", fix=f"known: {', '.join(VERIFYING)}")
        if name not in installed:
            raise RecipeError(f"engine {name} is not installed", fix=f"pip install qpass[{name}]")
    return [name for name in VERIFYING if name in run.options.engines]


def verify_and_repair(run: Run, path: Path, held_out: list[Mapping[str, Any]]) -> None:
    """Check the file in its engines; edit the plan and go round again while that helps."""
    engines = engines_for(run)
    threads = run.options.jobs
    with run.stages.stage("verify"):
        reference = Reference.run(run.source, held_out, threads=threads)
    for number in range(1, MAX_ROUNDS + 2):
        with run.stages.stage("verify"), tempfile.TemporaryDirectory() as folder:
            run.engines, run.failures = _check_all(run, engines, path, reference, Path(folder))
        if not run.engines or run.engines[0].name != engines[0]:
            return  # the target's own engine refuses the file: a gate says so
        own = run.engines[0]
        if not _may_repair(run) or number > MAX_ROUNDS:
            break
        repair = repair_leftovers(own)
        if repair is None and own.name == "ort" and reference.feeds:
            with run.stages.stage("verify"):
                repair = repair_slow(own, _slower_nodes(run, path, reference, own))
        if repair is None:
            break
        try:
            _apply(run, repair, path)
        except ModelError:  # nothing would be left in integers: the file stays as it is
            run.rounds.append(f"round {number}: {repair.sentence} Given up: nothing would be left.")
            break
        run.rounds.append(f"round {number}: {repair.sentence}")


def compare_engines(run: Run) -> None:
    """Warn of a result slower than float, and of engines that compute the file much worse."""
    own = run.engines[0] if run.engines else None
    slow = own is not None and own.speedup is not None and own.speedup * SLOWER < 1.0
    if own is not None and slow and _may_repair(run):
        run.notes.append(
            f"SLOWER THAN FLOAT in {own.name}: {own.speedup:.2f}x. Repair found nothing more to "
            "give up; --min-speedup 1 makes it a gate."
        )
    for other in run.engines[1:]:
        if own is None or own.sqnr_db is None or other.sqnr_db is None:
            continue
        if other.sqnr_db < own.sqnr_db - DIALECT_LOSS_DB:
            run.notes.append(
                f"{other.name} computes this file with {other.sqnr_db:.1f} dB, {own.name} with "
                f"{own.sqnr_db:.1f} dB: it is for {own.name} only"
            )


def _may_repair(run: Run) -> bool:
    """Repair only what the engine was meant to run in integers."""
    precision = run.policy.precision
    if precision.simulated or run.target.engine == "none" or not run.options.repair:
        return False
    return precision.activation is not None


def _check_all(
    run: Run, engines: list[EngineName], path: Path, reference: Reference, folder: Path
) -> tuple[list[EngineReport], dict[str, str]]:
    reports: list[EngineReport] = []
    failures: dict[str, str] = {}
    for engine in engines:
        try:
            reports.append(
                check_engine(
                    engine,
                    float_model=run.source,
                    quantized=path,
                    plan=run.plan,
                    reference=reference,
                    workdir=folder,
                    seconds=TIMING_SECONDS,
                )
            )
        except EngineError as error:
            failures[engine] = str(error)
    return reports, failures


def _apply(run: Run, repair: Repair, path: Path) -> None:
    assert run.graph is not None
    policy = replace(run.policy, float_nodes={**run.policy.float_nodes, **repair.float_nodes})
    run.plan = make_plan(run.graph, run.target, policy)
    run.policy = policy
    quantize(run)
    assert run.quantized is not None
    with run.stages.stage("write"):
        save_model(run.quantized, path, metadata=metadata_of(run))


def _slower_nodes(
    run: Run, path: Path, reference: Reference, own: EngineReport
) -> list[tuple[str, float, float]]:
    """Return the planned linear nodes that cost more in integers than in float, worst first."""
    if own.speedup is None or own.speedup >= 1.0:
        return []
    times: list[dict[str, float]] = []
    for file in (run.source, path):
        model = onnx.load(file, load_external_data=False)
        profile = profile_ort(file, dict(reference.feeds[0]))
        with tempfile.TemporaryDirectory() as folder:
            found = trace(model, read_back("ort", file, Path(folder)))
        times.append({n: profile.get(op.name, 0.0) for n, op in found.items() if op is not None})
    plain, integer = times
    assert run.plan is not None
    rows = [
        (name, plain[name], integer[name])
        for name in run.plan.integer_nodes()
        if integer.get(name, 0.0) > plain.get(name, float("inf"))
    ]
    return sorted(rows, key=lambda row: row[1] - row[2])


def held_out_samples(calibration: Samples, holdout: Samples) -> tuple[list[Any], str]:
    """Return the samples to verify with, and a note when none were held out."""
    held = list(islice(iter(holdout), VERIFY_SAMPLES))
    if held:
        return held, ""
    return list(islice(iter(calibration), VERIFY_SAMPLES)), (
        "no sample was held out: the numbers below were measured on the calibration samples"
    )
