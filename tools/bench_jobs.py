"""The measurements of `bench.py`, each a job that runs in a process of its own.

A process of its own gives every contestant its own peak memory, its own Python where it needs one,
and keeps a crash from taking the others along. A job is a dict of plain values, passed as JSON and
answered as JSON; `run_job` starts it, `work` is what the started process calls.

    quantize   a plain float pass, then one contestant: seconds, peak memory, the file
    judge      SQNR, task metric and census of one file in one engine
    latency    all files of a model in one engine, interleaved
    calibrate  collecting statistics against a plain float pass, interleaved; peak memory
    command    a command line of qpass: seconds, peak memory
    rewrite    planning and rewriting of a large graph
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
from bench_peers import Task, parse_contestant, quantizer
from bench_samples import Feeds, Run, StoredSamples, load_case

Job = Mapping[str, Any]
Result = dict[str, Any]

FLOAT_PASSES: Final = 3
CALIBRATE_ROUNDS: Final = 3
ERROR_LENGTH: Final = 300


def run_job(job: Job, *, folder: Path, python: str = sys.executable, timeout: float) -> Result:
    """Run a job in a new process; whatever goes wrong comes back under the key ``error``.

    Args:
        job: ``job`` names the function, the rest are its values (paths as text).
        folder: where the files of the exchange go; the log stays for as long as the folder.
        python: the interpreter to run it in.
        timeout: seconds after which the process is ended.
    """
    handle, name = tempfile.mkstemp(suffix=".json", prefix=f"{job['job']}-", dir=folder)
    os.close(handle)
    question, answer, log = Path(name), Path(f"{name}.out"), Path(f"{name}.log")
    question.write_text(json.dumps(dict(job)), encoding="utf-8")
    command = [python, str(Path(__file__).with_name("bench.py")), "worker", str(question)]
    with log.open("wb") as stream:
        try:
            code = subprocess.run(
                [*command, str(answer)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout:.0f} s"}
        except OSError as error:
            return {"error": f"cannot start {python}: {error}"}
    if answer.exists():
        result: Result = json.loads(answer.read_text(encoding="utf-8"))
        return result
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"error": f"ended with code {code}: {' '.join(lines[-3:])}"[:ERROR_LENGTH]}


def work(question: Path, answer: Path) -> None:
    """Run the job in `question` and write its result, or its error, to `answer`."""
    job = json.loads(question.read_text(encoding="utf-8"))
    try:
        result = JOBS[job["job"]](job)
    except Exception as error:  # noqa: BLE001 - a contestant that fails is a result
        message = " ".join(f"{type(error).__name__}: {error}".split())
        result = {"error": message[:ERROR_LENGTH]}
    partial = answer.with_name(f".{answer.name}")
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.replace(answer)


# ------------------------------------------------------------------------------------- memory
def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, or since `reset_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Give freed memory back, start the peak anew, and return what is resident now."""
    gc.collect()
    with suppress(AttributeError, OSError):  # not Linux with glibc: the peak has the float pass too
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_rss_bytes()


# ----------------------------------------------------------------------------------- quantize
def float_session(model: str | Path) -> Any:
    """Open a model in onnxruntime as anyone would: default options, all cores."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def float_pass_seconds(session: Any, samples: StoredSamples, batch: int) -> float:
    """Return the time to read all samples and run them; the session is loaded already."""
    start = time.perf_counter()
    for feeds in samples.batches(batch):
        session.run(None, feeds)
    return time.perf_counter() - start


def _samples(job: Job) -> StoredSamples:
    return StoredSamples(path=Path(job["samples"]), count=int(job["count"]))


def _quantize(job: Job) -> Result:
    contestant = parse_contestant(job["contestant"])
    samples, output = _samples(job), Path(job["output"])
    run = quantizer(contestant)
    batch = contestant.batch if job["batched"] else 1
    session = float_session(job["model"])
    session.run(None, next(samples.batches(batch)))
    passes = [float_pass_seconds(session, samples, batch) for _ in range(FLOAT_PASSES)]
    del session
    base = reset_peak()
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        task = Task(
            contestant=contestant,
            model=Path(job["model"]),
            samples=samples,
            spare=job["spare"],
            output=output,
            scratch=Path(scratch),
            batched=job["batched"],
        )
        start = time.perf_counter()
        facts = run(task)
        seconds = time.perf_counter() - start
    peak = peak_rss_bytes()
    file = Path(facts.get("output", output))
    return {
        "output": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "quantize_seconds": seconds,
        "float_pass_seconds": statistics.median(passes),
        "quantize_ratio": seconds / statistics.median(passes),
        "base_rss_bytes": base,
        "peak_rss_bytes": peak,
        "peer_version": _version(contestant.package),
        **{key: value for key, value in facts.items() if key != "output"},
    }


def _version(package: str | None) -> str:
    # Distributions that are not called like their package.
    names = {"quark": "amd-quark", "aimet_onnx": "aimet-onnx"}
    return metadata.version(names.get(package, package)) if package else ""


# -------------------------------------------------------------------------------------- judge
def _judge(job: Job) -> Result:
    from qpass.saturation import exact_entries
    from qpass.verify import ErrorMeter, open_engine, read_back

    file = Path(job["file"])
    config = _session_config(job["engine"], file)
    engine = open_engine(job["engine"], file, threads=0, session_config=config)
    run = _run_outputs(engine, Path(job["model"]))
    samples = _samples(job)
    reference = _reference(job, samples)
    meters = [ErrorMeter() for _ in reference[0]]
    for feeds, wanted in zip(samples, reference, strict=True):
        for meter, expected, got in zip(meters, wanted, run(feeds), strict=True):
            meter.update(expected, got)
    with tempfile.TemporaryDirectory() as folder:
        census = read_back(job["engine"], file, Path(folder), session_config=config)
    result: Result = {
        "engine_version": engine.version,
        "exact_products": exact_entries().items() <= config.items(),
        "sqnr_db": min(meter.sqnr_db for meter in meters),
        "cosine": min(meter.cosine for meter in meters),
        "integer_ops": len(census.integer_compute),
        "weight_only_ops": len(census.weight_only_compute),
        "float_ops": len(census.float_compute),
        "engine_ops": len(census.ops),
    }
    case = load_case(job["case"])
    if case.score is not None and job["limit"] != 0:
        result["metric_name"] = case.metric
        result["metric"] = case.score(run, job["limit"])
    return result


def _session_config(engine: str, file: Path) -> Mapping[str, str]:
    """Return the entries that a file asks for and exact ones, where onnxruntime loads it so."""
    from qpass.saturation import exact_entries
    from qpass.verify import EngineError, open_engine

    recorded = _recorded(engine, file)
    exact = {**recorded, **(exact_entries() if engine == "ort" else {})}
    with suppress(EngineError):
        if exact != recorded:
            open_engine("ort", file, session_config=exact)
        return exact
    return recorded


def _recorded(engine: str, file: Path) -> Mapping[str, str]:
    from qpass.modelfile import read_metadata
    from qpass.verify.session import recorded_entries

    return recorded_entries(read_metadata(file), engine)


def _run_outputs(engine: Any, model: Path) -> Run:
    """Return a function that runs a batch and gives the outputs of the float model, by name.

    Some peers leave tensors that they looked at among the outputs.
    """
    import onnx

    wanted = [value.name for value in onnx.load(model, load_external_data=False).graph.output]
    missing = sorted(set(wanted) - set(engine.output_names))
    if missing:
        raise ValueError(f"the outputs {missing} are gone")
    order = [engine.output_names.index(name) for name in wanted]

    def run(feeds: Feeds) -> list[Any]:
        outputs = engine.run(feeds)
        return [outputs[position] for position in order]

    return run


def _reference(job: Job, samples: StoredSamples) -> list[list[Any]]:
    """Return the float outputs in onnxruntime, from the file when an earlier job left it there."""
    path = Path(job["reference"])
    if not path.exists():
        session = float_session(job["model"])
        arrays = {
            f"{number}/{position}": value
            for number, feeds in enumerate(samples)
            for position, value in enumerate(session.run(None, feeds))
        }
        partial = path.with_name(f".{path.name}")
        np.savez(partial, **arrays)
        partial.replace(path)
    with np.load(path) as file:
        outputs = [key for key in file.files if key.startswith("0/")]
        return [
            [file[f"{number}/{position}"] for position in range(len(outputs))]
            for number in range(len(samples))
        ]


# ------------------------------------------------------------------------------------ latency
def _latency(job: Job) -> Result:
    from qpass.verify import measure_interleaved, open_engine

    files: list[str] = job["files"]
    opened = partial(open_engine, job["engine"], threads=1)
    engines = [opened(Path(f), session_config=_recorded(job["engine"], Path(f))) for f in files]
    feeds: Feeds = next(iter(_samples(job)))
    seconds = float(job["seconds"]) * len(files)
    times = measure_interleaved(engines, feeds, seconds=seconds)
    return {
        "times": [
            {
                "latency_ms": time_.median_ms,
                "latency_ratio": time_.ratio,
                "latency_ratio_low": time_.ratio_quartiles[0],
                "latency_ratio_high": time_.ratio_quartiles[1],
                "latency_rounds": time_.runs,
            }
            for time_ in times
        ]
    }


# ---------------------------------------------------------------------------------- calibrate
def _calibrate(job: Job) -> Result:
    from qpass import evidence, pipeline
    from qpass.api import make_options
    from qpass.calibrate import collect
    from qpass.run import start

    samples, batch = _samples(job), int(job["batch"])
    own = {"batch_size": batch, "holdout": 0.0, "samples": len(samples)}
    options = make_options(target=job["target"], **{**job["options"], **own})
    run = start(Path(job["model"]), options)
    graph = pipeline.prepare(run)
    assert run.plan is not None
    taps = evidence.taps_of(graph, run.plan)
    opened, _ = evidence.open_data(run, samples)
    model = graph.to_model()

    def statistics_seconds() -> float:
        start = time.perf_counter()
        collect(model, taps, opened, batch_size=batch, memory_bytes=options.memory_bytes, threads=0)
        return time.perf_counter() - start

    base = reset_peak()
    first = statistics_seconds()  # warms the machine up, and nothing else is in memory
    peak = peak_rss_bytes()
    result: Result = {
        "taps": len(taps),
        "first_calibrate_seconds": first,
        "base_rss_bytes": base,
        "peak_rss_bytes": peak,
    }
    if not job["timed"]:
        return result
    session = float_session(job["model"])
    float_pass_seconds(session, samples, batch)
    rounds = [
        (float_pass_seconds(session, samples, batch), statistics_seconds())
        for _ in range(CALIBRATE_ROUNDS)
    ]
    ratios = [collected / plain for plain, collected in rounds]
    return result | {
        "float_pass_seconds": statistics.median(plain for plain, _ in rounds),
        "calibrate_seconds": statistics.median(collected for _, collected in rounds),
        "calibrate_ratio": statistics.median(ratios),
        "calibrate_ratio_low": min(ratios),
        "calibrate_ratio_high": max(ratios),
    }


# ------------------------------------------------------------------------- command and rewrite
def _command(job: Job) -> Result:
    """Run a command of qpass inside this process, whose peak memory is then the command's."""
    code: Any = 0
    sys.argv = ["qpass", *job["arguments"]]
    start = time.perf_counter()
    try:
        runpy.run_module("qpass", run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    seconds = time.perf_counter() - start
    if code != 0:
        raise RuntimeError(f"qpass {job['arguments'][0]} ended with code {code}")
    return {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def _rewrite(job: Job) -> Result:
    from qpass import evidence, pipeline
    from qpass.api import make_options
    from qpass.run import start

    run = start(Path(job["model"]), make_options(samples=1, holdout=0.0, batch_size=1))
    start = time.perf_counter()
    graph = pipeline.prepare(run)
    planned = time.perf_counter() - start
    samples, _ = evidence.open_data(run, "random")
    start = time.perf_counter()
    evidence.calibrate(run, samples)
    calibrated = time.perf_counter() - start
    start = time.perf_counter()
    pipeline.quantize(run)
    rewritten = time.perf_counter() - start
    assert run.quantized is not None
    return {
        "nodes": len(graph.nodes),
        "nodes_after": len(run.quantized.nodes),
        "plan_seconds": planned,
        "calibrate_seconds": calibrated,
        "rewrite_seconds": rewritten,
        "seconds": planned + rewritten,
        "peak_rss_bytes": peak_rss_bytes(),
    }


JOBS: Final[dict[str, Callable[[Job], Result]]] = {
    "quantize": _quantize,
    "judge": _judge,
    "latency": _latency,
    "calibrate": _calibrate,
    "command": _command,
    "rewrite": _rewrite,
}
