"""Same input, same bytes; nothing of the time or the machine in the file."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qpass.modelfile import read_metadata
from qpass.verify.latency import measure_interleaved
from tests.jobs import CNN, DIGITS, ROOT, VIT, normal, optimize, saved, small_model

SCRIPT = """
import sys, numpy as np, qpass
data = {"x": np.random.default_rng(11).standard_normal((12, 3, 8, 8)).astype(np.float32)}
qpass.optimize(sys.argv[1], data=data, output=sys.argv[2], engines=("ort",), repair=False)
"""


def faster(*args: object, **options: object) -> list[object]:
    """Measure, and then say that the result is faster: times are no part of the input."""
    found = measure_interleaved(*args, **options)  # type: ignore[arg-type]
    return [replace(timing, ratio=0.5) for timing in found]


@pytest.mark.parametrize(("model", "precision"), [(CNN, "w8a8"), (VIT, "w4a8")])
def test_two_runs_with_repair_give_the_same_bytes(
    model: Path, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `qpass.verify` is the function, so the module goes by its full name.
    check = importlib.import_module("qpass.verify.check")
    monkeypatch.setattr(check, "measure_interleaved", faster)
    files = []
    for name in ("a", "b"):
        report = optimize(
            model, DIGITS, output=tmp_path / f"{name}.onnx", precision=precision, samples=24
        )
        assert next(p.changed for p in report.passes if p.name == "round_weights")
        files.append(Path(report.output).read_bytes())
    assert files[0] == files[1]


def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    optimize(path, normal(), output=tmp_path / "here.onnx", repair=False)
    for seed in ("1", "2"):  # of the hashes of strings: sets come in another order
        command = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / f"{seed}.onnx")]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PATH": ""}
        subprocess.run(command, check=True, env=environment)
        assert (tmp_path / f"{seed}.onnx").read_bytes() == (tmp_path / "here.onnx").read_bytes()


def test_threads_and_batch_size_do_not_show(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    reports = [
        optimize(path, normal(), output=tmp_path / f"{jobs}.onnx", jobs=jobs, repair=False)
        for jobs in (1, 2)
    ]
    one, two = (Path(report.output).read_bytes() for report in reports)
    assert one == two


def test_the_manifest_is_free_of_time_and_place(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    report = optimize(path, normal(), repair=False)
    found = read_metadata(report.output)
    assert found.keys() == {
        "qpass.version", "qpass.source_sha256", "qpass.target", "qpass.precision",
        "qpass.samples_sha256", "qpass.options", "qpass.onnx",
    }  # fmt: skip
    assert not [text for text in found.values() if str(tmp_path) in text]
