"""What `bench.py run` and `bench.py determinism` do with one model, and how results are kept.

A result is a flat row: a dict of plain values with the same spelling everywhere. ``kind`` tells
what was measured (``model``, ``calibration``, ``determinism``, ``scale``), ``status`` whether it
could be (``ok``, ``failed``, ``skipped``); ``error`` says why not. Units are in the names.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from bench_jobs import Result, run_job
from bench_peers import HELD_SHARE, Contestant
from bench_samples import Case, StoredSamples, write_samples

Row = dict[str, Any]

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = ("qpass", "numpy", "onnx", "onnxruntime", "openvino")
WORST_DB: Final = -200.0  # stands for broken outputs, for JSON has no infinity
GROWTH_SAMPLES: Final = (16, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of a run."""

    contestants: tuple[Contestant, ...]
    engines: tuple[str, ...] = ("ort", "openvino")
    samples: int = 64
    holdout: int = 128
    limit: int | None = None  # samples of the task metric; None: all, 0: no metric
    seconds: float = 2.0  # of timing, per contestant
    repeat: int = 1
    timeout: float = 1800.0
    calibration: bool = True
    peer_pythons: Mapping[str, str] = field(default_factory=dict)


def machine_facts(date: str) -> Row:
    """Return what every row repeats: when, of which commit, where, with which versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = models[0] if models else cpu
    versions = {
        f"version_{name}": metadata.version(name)
        for name in PACKAGES
        if importlib.util.find_spec(name) is not None
    }
    return {
        "date": date,
        "commit": _commit(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "version_python": platform.python_version(),
        **versions,
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def file_bytes(model: Path) -> int:
    """Return the size of a model file with its external data."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    proto = onnx.load(model, load_external_data=False)
    tensors = filter(uses_external_data, proto.graph.initializer)
    external = {ExternalDataInfo(tensor).location for tensor in tensors}
    return model.stat().st_size + sum((model.parent / name).stat().st_size for name in external)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(list(rows), indent=1, sort_keys=True, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def quantize(
    case: Case, contestant: Contestant, stored: StoredSamples, folder: Path, settings: Settings
) -> Result:
    """Let a contestant quantize the case as often as wanted; medians of times, largest memory.

    It gets `settings.samples` of the stored samples; what is left is for its own verification.
    The answer has ``output``; or ``error``, and ``skipped`` when it was not even tried.
    """
    if contestant.kind == "float":
        return {"output": str(case.model)}
    if contestant.kind == "file":
        path = Path(contestant.argument.format(model=case.name))
        return {"output": str(path)} if path.is_file() else {"error": f"there is no file {path}"}
    python = settings.peer_pythons.get(contestant.kind, sys.executable)
    package = contestant.package
    if package and python == sys.executable and importlib.util.find_spec(package) is None:
        hint = f"give --peer-python {contestant.kind}=PYTHON"
        return {"error": f"{package} is not installed; {hint}", "skipped": True}
    results = []
    count = min(settings.samples, stored.count)
    for number in range(settings.repeat):
        output = Path(folder, _slug(contestant.text), str(number), f"{case.name}.onnx")
        output.parent.mkdir(parents=True, exist_ok=True)
        job = {
            "job": "quantize",
            "contestant": contestant.text,
            "model": str(case.model),
            "samples": str(stored.path),
            "count": count,
            "spare": stored.count - count,
            "batched": case.batched,
            "output": str(output),
        }
        results.append(run_job(job, folder=folder, python=python, timeout=settings.timeout))
        if "error" in results[-1]:
            return results[-1]
    merged = dict(results[0])
    for key, value in results[0].items():
        if key.endswith("_rss_bytes"):
            merged[key] = max(result[key] for result in results)
        elif isinstance(value, float):
            merged[key] = statistics.median(result.get(key, value) for result in results)
    merged["same_bytes"] = len({result["sha256"] for result in results}) == 1
    return merged


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)


def run_case(case: Case, settings: Settings, folder: Path) -> list[Row]:
    """Measure all contestants on one model; one row for each contestant and engine."""
    stored = _store_calibration(case, folder, settings)
    count = min(settings.samples, stored.count)
    held = settings.holdout
    holdout = write_samples(folder / "holdout.npz", case.holdout(held), held)
    made = {c.text: quantize(case, c, stored, folder, settings) for c in settings.contestants}
    float_bytes = file_bytes(case.model)
    rows = []
    for engine in settings.engines:
        part = []
        for contestant in settings.contestants:
            result = dict(made[contestant.text])
            row: Row = {
                "kind": "model",
                "model": case.name,
                "contestant": contestant.text,
                "engine": engine,
                "calibration_samples": count,
                "holdout_samples": holdout.count,
                "metric_limit": settings.limit,
                "float_bytes": float_bytes,
            }
            if "error" not in result:
                row["bytes"] = file_bytes(Path(result["output"]))
                row["size_ratio"] = row["bytes"] / float_bytes
                result |= _judge(case, engine, Path(result["output"]), holdout, folder, settings)
            part.append(row | result)
        _time_together(part, engine, holdout, folder, settings)
        rows += part
    for row in rows:
        row["status"] = _status(row)
        row.pop("output", None)
    if settings.calibration:
        rows += _calibration_rows(case, stored, count, folder, settings)
    return rows


def _store_calibration(case: Case, folder: Path, settings: Settings) -> StoredSamples:
    wanted = settings.samples + math.ceil(settings.samples * HELD_SHARE)
    if settings.calibration:
        wanted = max(wanted, *GROWTH_SAMPLES)
    return write_samples(folder / "calibration.npz", case.calibration(wanted), wanted)


def _status(row: Row) -> str:
    if row.pop("skipped", False):
        return "skipped"
    return "failed" if "error" in row else "ok"


def _judge(
    case: Case, engine: str, file: Path, holdout: StoredSamples, folder: Path, settings: Settings
) -> Result:
    job = {
        "job": "judge",
        "engine": engine,
        "file": str(file),
        "model": str(case.model),
        "samples": str(holdout.path),
        "count": holdout.count,
        "reference": str(folder / "reference.npz"),
        "case": case.source,
        "limit": settings.limit,
    }
    result = run_job(job, folder=folder, timeout=settings.timeout)
    if "sqnr_db" in result:
        result["sqnr_db"] = max(result["sqnr_db"], WORST_DB)
    return result


def _time_together(
    rows: list[Row], engine: str, holdout: StoredSamples, folder: Path, settings: Settings
) -> None:
    """Time everything that runs in one engine in turns; ratios are to the first row."""
    timed = [row for row in rows if "error" not in row]
    if len(timed) < 2 or settings.seconds <= 0 or timed[0]["contestant"] != "float":
        return
    job = {
        "job": "latency",
        "engine": engine,
        "files": [row["output"] for row in timed],
        "samples": str(holdout.path),
        "count": 1,
        "seconds": settings.seconds,
    }
    results = [
        run_job(job, folder=folder, timeout=settings.timeout) for _ in range(settings.repeat)
    ]
    failed = next((result["error"] for result in results if "error" in result), None)
    for position, row in enumerate(timed):
        if failed is not None:
            row["error"] = f"latency: {failed}"
            continue
        times = [result["times"][position] for result in results]
        ratios = [time["latency_ratio"] for time in times]
        row["latency_ms"] = statistics.median(time["latency_ms"] for time in times)
        row["latency_ratio"] = statistics.median(ratios)
        row["latency_rounds"] = sum(time["latency_rounds"] for time in times)
        single = len(times) == 1  # then the quartiles of the rounds, otherwise the repeats
        row["latency_ratio_low"] = times[0]["latency_ratio_low"] if single else min(ratios)
        row["latency_ratio_high"] = times[0]["latency_ratio_high"] if single else max(ratios)


def _calibration_rows(
    case: Case, stored: StoredSamples, count: int, folder: Path, settings: Settings
) -> list[Row]:
    """Measure the cost of calibration once for each qpass target with static ranges."""
    rows: dict[str, Row] = {}
    for contestant in settings.contestants:
        options = dict(contestant.options)
        options.pop("batch_size", None)
        if contestant.kind != "qpass" or options.get("activations", "static") != "static":
            continue
        if "a" not in str(options.get("precision", "w8a8")) or contestant.argument in rows:
            continue
        job = {
            "job": "calibrate",
            "model": str(case.model),
            "target": contestant.argument or "ort-x86",
            "options": options,
            "samples": str(stored.path),
            "batch": contestant.batch if case.batched else 1,
        }
        row: Row = {
            "kind": "calibration",
            "model": case.name,
            "contestant": contestant.text,
            "calibration_samples": count,
        }
        row |= _calibrate(job | {"count": count, "timed": True}, folder, settings)
        few, many = GROWTH_SAMPLES
        for samples in GROWTH_SAMPLES:
            result = _calibrate(job | {"count": samples, "timed": False}, folder, settings)
            if "error" in result:
                row.setdefault("error", result["error"])
            else:
                row[f"peak_rss_bytes_{samples}"] = result["peak_rss_bytes"]
        if "error" not in row:
            growth = row[f"peak_rss_bytes_{many}"] / row[f"peak_rss_bytes_{few}"] - 1
            row["memory_growth"] = growth
        row["status"] = _status(row)
        rows[contestant.argument] = row
    return list(rows.values())


def _calibrate(job: dict[str, Any], folder: Path, settings: Settings) -> Result:
    return run_job(job, folder=folder, timeout=settings.timeout)


def determinism_rows(case: Case, settings: Settings, folder: Path) -> list[Row]:
    """Let each qpass contestant quantize again, in a new process and folder; compare the bytes.

    Raises:
        ValueError: a single run has nothing to be compared with.
    """
    if settings.repeat < 2:
        raise ValueError("comparing takes at least two runs")
    stored = _store_calibration(case, folder, settings)
    rows = []
    for contestant in settings.contestants:
        if contestant.kind != "qpass":
            continue
        row: Row = {"kind": "determinism", "model": case.name, "contestant": contestant.text}
        result = quantize(case, contestant, stored, folder, settings)
        for key in ("error", "same_bytes", "sha256"):
            if key in result:
                row[key] = result[key]
        row["runs"] = settings.repeat
        row["status"] = _status(row)
        rows.append(row)
    return rows
