"""The functions that `import qpass` offers; the command line calls the same ones."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import onnx

from qpass.calibrate import Samples, TapRequest, collect, input_specs, open_samples, save_stats
from qpass.calibrate import shard as take_shard
from qpass.callables import load_metric
from qpass.compare import LayerDifference, compare_layers
from qpass.errors import ModelError, RecipeError, SampleError
from qpass.evidence import aim_notes, few_held, held_out_samples, open_data, take_batches, taps_of
from qpass.evidence import calibrate as calibrate_run
from qpass.files import check_folder, check_new_folder, write_text
from qpass.graph import Graph
from qpass.lint import error_notes
from qpass.migration import migrate_scales, scale_for_weights
from qpass.mixed import plan_to_edit, search
from qpass.modelfile import load_model, model_bytes, read_metadata, save_model
from qpass.options import ROUND_WITH_DATA
from qpass.passes.normalize import normalize
from qpass.pipeline import LAYER_SAMPLES, make_norms_static, prepare, quantize
from qpass.plan import Plan
from qpass.plan_edits import take_found_bits
from qpass.planner import plan as make_plan
from qpass.precision_notes import precision_notes
from qpass.program import Policy, Progress
from qpass.range_stage import choose_method
from qpass.recipe import make_options
from qpass.report.html import plotly_js, write_html
from qpass.report.model import EngineReport, Report
from qpass.result import build_report, evaluate_metric, gates_of, layers_of, score_float
from qpass.rounds import TIMING_SECONDS, compare_engines, engines_for, verify_and_repair
from qpass.run import SCALED_KEY, Run, metadata_of, model_key, start
from qpass.runtime_cost import runtime_costs
from qpass.targets import TARGETS, load_target
from qpass.trial import TRIAL_SAMPLES
from qpass.verify.check import Reference, check_engine
from qpass.verify.host import config_of
from qpass.verify.session import loading_note

# A float graph this many times its file does not fit: weights, their packed copy, activations.
FLOAT_MEMORY_FACTOR: Final = 2.0
COMPARE_SAMPLES: Final = 8


def default_output(model: Path, precision: str) -> Path:
    """Return `m.int8.onnx` for w8a8 of `m.onnx`, otherwise `m.PRECISION.onnx`."""
    kind = "int8" if precision == "w8a8" else precision
    return model.with_name(f"{model.stem}.{kind}.onnx")


def optimize(
    model: str | Path,
    *,
    data: Any = None,
    target: str | None = None,
    output: str | Path | None = None,
    precision: str | None = None,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Compile a float ONNX model into one that the target runs in integers, and verify it.

    Args:
        model: the float model.
        data: calibration samples: anything `--data` takes (npz, folder, images, ONNX test data,
            `module:callable`, "random"), an iterable of dicts of arrays, or a DataLoader.
        target: name of a target, see `qpass targets`.
        output: where the result goes; beside the model by default. When a gate fails the file has
            `.rejected` in its name.
        precision: wNaM or wN.
        recipe: TOML file with options.
        progress: called with (stage, done, in all or None): samples of "calibrate", units of the
            model in the stages that walk through it.
        options: fields of `qpass.options.Options`.

    Returns:
        The report; `report.ok` says whether all gates passed, `report.output` is the file.

    Raises:
        UserError: bad input: nothing was written.
    """
    settings = make_options(recipe, target=target, precision=precision, **options)
    source = Path(model)
    final = Path(output) if output is not None else default_output(source, settings.precision)
    check_folder(final)
    if final.exists() and source.exists() and final.samefile(source):
        raise RecipeError("the result would overwrite the model", fix="choose another -o")
    if settings.eval is not None:
        load_metric(settings.eval)  # known now, not after the work
    if settings.report is not None:
        check_new_folder(Path(settings.report), "--report")
        plotly_js()
    if settings.cache is not None:
        check_new_folder(Path(settings.cache), "--cache")
    run = start(source, settings)
    run.progress = progress
    engines_for(run)
    prepare(run)
    held: list[Mapping[str, Any]] = []
    calibration: Samples | None = None
    note = ""
    if run.policy.precision.activation is not None or data is not None:
        with run.stages.stage("samples"):
            calibration, holdout = open_data(run, data)
            held, note = held_out_samples(calibration, holdout)
        run.notes += [note] if note else few_held(held)
    elif run.options.round in ROUND_WITH_DATA:
        raise RecipeError(f"--round {run.options.round} needs samples", fix="give --data")
    elif settings.static_norm is not None:
        raise RecipeError("--static-norm needs samples to fit norms on", fix="give --data")
    score_float(run)
    if calibration is not None:
        _learn(run, calibration, () if note else held)
    search(run, held)
    take_found_bits(run)
    run.notes = [*precision_notes(run), *run.notes]
    quantize(run)
    assert run.quantized is not None
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".qpass-") as folder:
        trial = Path(folder, final.name)
        with run.stages.stage("write"):
            save_model(run.quantized, trial, metadata=metadata_of(run))
        if _fits(run, source, note=True):
            verify_and_repair(run, trial, held)
            compare_engines(run)
            run.notes += aim_notes(run, held)
            run.runtime_costs = runtime_costs(run, trial, held, seconds=TIMING_SECONDS)
            with run.stages.stage("layers"):
                run.layers = layers_of(run, held[:LAYER_SAMPLES])
        if run.target.engine == "none":
            run.notes += error_notes(trial, run.target.name)
        metric = evaluate_metric(run, trial)
    gates = gates_of(run, metric)
    if run.plan is not None:
        run.notes += loading_note(run.plan, run.target.own_engine, settings.accuracy_level)
    if not all(gate.passed for gate in gates):
        final = final.with_name(f"{final.stem}.rejected{final.suffix}")
    with run.stages.stage("write"):
        save_model(run.quantized, final, metadata=metadata_of(run))
    if run.mixed is not None:
        chosen = final.with_suffix(".plan.json")
        write_text(chosen, plan_to_edit(run).to_json(searched=True))
        run.mixed = dataclasses.replace(run.mixed, plan=str(chosen))
    report = build_report(run, final, metric, gates)
    if settings.report is not None:
        reports = Path(settings.report)
        reports.mkdir(parents=True, exist_ok=True)
        write_text(reports / "report.json", report.to_json())
        write_html(report, reports / "report.html")
    return report


def _learn(run: Run, samples: Samples, held: Sequence[Mapping[str, Any]]) -> None:
    """Take from calibration samples what the plan needs: static norms, ranges, batches to fit to.

    Args:
        run: planned.
        samples: to calibrate with.
        held: those of the verification; none where they are calibration samples themselves.
    """
    make_norms_static(run, samples)
    fits = _fits(run, run.source)
    if fits:
        scale_for_weights(run, samples)
    if run.policy.precision.activation is not None:
        calibrate_run(run, samples, run.progress)
        if fits:
            migrate_scales(run, samples)
            choose_method(run, list(islice(iter(samples), TRIAL_SAMPLES)))
            take_batches(run, samples, held)
    elif run.options.round in ROUND_WITH_DATA and fits:
        take_batches(run, samples, held)


def _fits(run: Run, source: Path, *, note: bool = False) -> bool:
    needed = FLOAT_MEMORY_FACTOR * model_bytes(source)
    if needed <= run.options.memory_bytes:
        return True
    if note:
        run.notes.append(
            f"NOT VERIFIED: running the float model takes about {needed / 2**30:.1f} GiB and "
            f"--memory is {run.options.memory}. Raise it to have the result run and compared."
        )
    return False


def plan(
    model: str | Path, *, target: str | None = None, precision: str | None = None, **options: Any
) -> Plan:
    """Return what would become of each tensor and node of a model, and why.

    Args:
        model: the float model.
        target: as for `optimize`.
        precision: likewise; by default that of a plan file that is given, else w8a8.
        options: fields of `qpass.options.Options`.
    """
    run = start(Path(model), make_options(target=target, precision=precision, **options))
    prepare(run)
    take_found_bits(run)
    assert run.plan is not None
    return run.plan


def calibrate(
    model: str | Path,
    *,
    data: Any,
    output: str | Path,
    target: str | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Gather the statistics that all targets (or one) need, in one pass, into a file.

    Args:
        model: the float model.
        data: samples, as for `optimize`; nothing is held out.
        output: the statistics file (.npz).
        target: only what this target needs; None: all targets, so that one file serves them all.
        shard: (index, count): only every count-th sample, for `merge`.
        progress: as for `optimize`.
        options: fields of `qpass.options.Options`.
    """
    check_folder(Path(output))
    settings = make_options(target=target, holdout=0.0, **options)
    run = start(Path(model), settings)
    graph = prepare(run, for_target=False)
    taps: dict[str, TapRequest] = {}
    for name in [target] if target is not None else sorted(TARGETS):
        try:
            wanted = taps_of(graph, plan_for(graph, name, run.policy))
        except (ModelError, RecipeError):  # it quantizes nothing here, or has no such precision
            if target is not None:
                raise
            continue
        for tap in wanted:
            taps.setdefault(tap.tensor, tap)
    samples, _ = open_data(run, data)
    result = collect(
        graph.to_model(inline=True),
        list(taps.values()),
        take_shard(samples, *shard) if shard[1] > 1 else samples,
        batch_size=settings.batch_size,
        memory_bytes=settings.memory_bytes,
        threads=settings.jobs,
        progress=(lambda done, of: progress("calibrate", done, of)) if progress else None,
    )
    meta = {
        "model": model_key(run),
        "samples_sha256": samples.fingerprint(),
        "samples": str(result.samples),
        "targets": target or "all",
    }
    if shard[1] > 1:
        meta["shard"] = f"{shard[0]}/{shard[1]}"
    save_stats(Path(output), result.stats, meta)
    return Path(output)


def plan_for(graph: Graph, target: str, policy: Policy) -> Plan:
    """Plan an already normalized graph for a target."""
    return make_plan(graph, load_target(target), policy)


def verify(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    data: Any = None,
    engines: tuple[str, ...] = (),
    samples: int | None = None,
    preprocess: str | None = None,
    **options: Any,
) -> list[EngineReport]:
    """Run a model, whoever made it, in its engines and read back what they made of it.

    Args:
        model: the quantized file.
        reference: the float model; without it nothing is compared or timed.
        data: samples as for `optimize`.
        engines: engines by name; (): those installed.
        samples: how many samples to compare.
        preprocess: as for `optimize`.
        options: fields of `qpass.options.Options`.
    """
    settings = make_options(samples=samples, preprocess=preprocess, engines=engines, **options)
    path = Path(model)
    graph = load_model(path, allow_quantized=True)
    if reference is not None and data is None:
        raise RecipeError("a comparison needs samples", fix="give --data")
    feeds: list[Mapping[str, Any]] = []
    if data is not None:
        inputs = input_specs(graph.to_model(stub_above=1024))
        source = open_samples(data, inputs, preprocess=preprocess, seed=settings.seed)
        feeds = list(islice(iter(source), settings.samples))
        if not feeds:
            raise SampleError("there are no samples to verify with", where=source.source)
    run = start(path, settings)
    base = Path(reference) if reference is not None else path
    if reference is not None:
        load_model(base)  # a clear error when it is not a float model
    config = config_of(path, "ort") if reference is None else None
    compared = Reference.run(base, feeds, threads=settings.jobs, session_config=config)
    reports = []
    for engine in engines_for(run):
        with tempfile.TemporaryDirectory() as folder:
            reports.append(
                check_engine(
                    engine,
                    float_model=base,
                    quantized=path,
                    plan=None,
                    reference=compared,
                    workdir=Path(folder),
                    seconds=TIMING_SECONDS if reference is not None else 0.0,
                    session_config=config_of(path, engine),
                )
            )
    return reports


def scaled_layers(a: str | Path, b: str | Path) -> frozenset[str]:
    """Return the linear ops whose outputs were scaled in one of two models and not in the other."""
    found = [json.loads(read_metadata(path).get(SCALED_KEY, "{}")) for path in (a, b)]
    if found[0].get("key") == found[1].get("key"):
        return frozenset()
    return frozenset(name for one in found for name in one.get("layers", ()))


def _comparable(path: Path) -> onnx.ModelProto:
    """Load a model; a float one in the normalized form that quantization starts from."""
    graph = load_model(
        path, opset=max(target.opset for target in TARGETS.values()), allow_quantized=True
    )
    if not any(node.op in ("QuantizeLinear", "DequantizeLinear") for node in graph.nodes):
        normalize(graph)
    return graph.to_model(inline=True)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    data: Any,
    samples: int | None = None,
    preprocess: str | None = None,
    **options: Any,
) -> list[LayerDifference]:
    """Compare two models layer by layer; `a` is the reference.

    Layers whose channels qpass has scaled in `b` (`--equalize`) mean something else there than in
    the model that was exported: they are left out, `scaled_layers` names them.

    Args:
        a: reference model.
        b: model to be judged; layers are paired by node name.
        data: samples as for `optimize`.
        samples: how many samples to run, 8 by default.
        preprocess: as for `optimize`.
        options: fields of `qpass.options.Options`.
    """
    if data is None:
        raise RecipeError("a comparison needs samples", fix="give --data")
    settings = make_options(samples=samples or COMPARE_SAMPLES, preprocess=preprocess, **options)
    models = [_comparable(Path(path)) for path in (a, b)]
    source = open_samples(data, input_specs(models[0]), preprocess=preprocess, seed=settings.seed)
    some = islice(iter(source), settings.samples)
    rows = compare_layers(models[0], models[1], some, without=scaled_layers(a, b))
    if not rows:
        raise RecipeError(
            "the two models share no linear op", fix="compare models by the same names"
        )
    return rows
