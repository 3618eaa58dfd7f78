"""Gates: each can pass and fail, and a failed one renames the file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qpass.api import make_options
from qpass.callables import load_callable, score_file
from qpass.errors import InternalError, RecipeError
from qpass.report.model import EngineReport, FloatOp, Metric
from qpass.report.wording import verdict_of
from qpass.result import build_report, gates_of, versions
from qpass.run import Run, start
from tests.jobs import normal, optimize, saved, small_model

GOOD = EngineReport(
    name="ort", version="1", integer_ops=3, speedup=2.0, sqnr_db=30.0, cosine=1.0,
    optimizer_diff_db=35.0, optimizer_loss_db=0.2,
)  # fmt: skip
LEFT = FloatOp(node="a", op="Conv", rule="r", reason="why", planned=True)


def run_of(*engines: EngineReport, **options: Any) -> Run:
    run = start(Path("m.onnx"), make_options(**options))
    run.engines = list(engines)
    return run


def failed(run: Run, metric: Metric | None = None) -> list[str]:
    return [gate.name for gate in gates_of(run, metric) if not gate.passed]


def test_what_ran_on_no_samples_was_not_checked() -> None:
    gate = next(g for g in gates_of(run_of(GOOD), None) if g.name == "ort: finite")
    assert (gate.checked, verdict_of(gate), gate.got) == (True, "passed", 30.0)
    gate = next(
        g for g in gates_of(run_of(replace(GOOD, sqnr_db=None)), None) if g.name == "ort: finite"
    )
    assert (gate.passed, gate.checked, verdict_of(gate)) == (True, False, "-")
    assert gate.got == "not checked: no samples"


def test_a_good_result_passes() -> None:
    run = run_of(GOOD, min_sqnr=30.0, min_speedup=2.0, max_drop=1.0, eval="a:b")
    assert failed(run, Metric(name="m", float=3.0, quantized=2.0, drop=1.0)) == []
    assert len(gates_of(run, None)) == 5  # without a metric there is nothing to judge


@pytest.mark.parametrize(
    ("engine", "options", "name"),
    [
        ({}, {"min_sqnr": 30.1}, "min-sqnr"),
        ({"sqnr_db": None}, {"min_sqnr": 1.0}, "min-sqnr"),
        ({}, {"min_speedup": 2.1}, "min-speedup"),
        ({"speedup": None}, {"min_speedup": 0.1}, "min-speedup"),
        ({"sqnr_db": -math.inf, "optimizer_loss_db": None}, {}, "ort: finite"),
        ({"float_ops": (LEFT,)}, {}, "ort: planned ops in integers"),
        # A fusion that miscomputes: the file is right without optimizations.
        ({"sqnr_db": -1.7, "optimizer_loss_db": 36.0}, {}, "ort: SQNR lost to optimizations (dB)"),
        ({"sqnr_db": 12.0, "optimizer_loss_db": 3.1}, {}, "ort: SQNR lost to optimizations (dB)"),
    ],
)  # fmt: skip
def test_one_gate_fails(engine: dict[str, Any], options: dict[str, Any], name: str) -> None:
    assert failed(run_of(replace(GOOD, **engine), **options)) == [name]


@pytest.mark.parametrize(
    ("sqnr", "loss", "apart"),
    [
        (33.0, 0.5, 30.0), (22.0, 2.9, 22.0), (5.0, -1.0, 5.0),
        (60.0, 9.0, None), (60.0, 9.0, 35.0),
        (36.7, 3.5, 44.3),  # a small network whose MatMulNBits round activations to 8 bits
    ],
)  # fmt: skip
def test_rounding_of_optimized_graphs_passes(sqnr: float, loss: float, apart: float | None) -> None:
    own = replace(GOOD, sqnr_db=sqnr, optimizer_loss_db=loss, optimizer_diff_db=apart)
    run = run_of(own)
    assert failed(run) == []
    gate = next(gate for gate in gates_of(run, None) if "optimizations" in gate.name)
    text = str(gate.wanted)  # a gate that passes says why
    assert ("40 dB" in text) == (loss > 3.0)


def test_largest_drop() -> None:
    run = run_of(GOOD, max_drop=1.0, eval="a:b")
    assert failed(run, Metric(name="m", float=3.0, quantized=1.5, drop=1.5)) == ["max-drop"]


@pytest.mark.parametrize("options", [{"target": "qnn-htp"}, {"precision": "w8a16"}])
def test_float_kernels_are_no_failure_where_nobody_promised_integers(options: Any) -> None:
    assert failed(run_of(replace(GOOD, float_ops=(LEFT,)), **options)) == []


def test_engine_that_refuses_the_file() -> None:
    run = run_of()
    run.failures = {"ort": "ort failed to load"}
    assert failed(run) == ["ort: loads and runs"]
    run = run_of(GOOD)
    run.failures = {"openvino": "of another engine"}  # the file is not for it
    assert failed(run) == []


def test_rejected_in_the_name_and_the_report(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    report = optimize(path, normal(), min_sqnr=500.0, output=tmp_path / "q.v1.onnx", repair=False)
    assert not report.ok
    assert report.output == str(tmp_path / "q.v1.rejected.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "q.v1.rejected.onnx"}
    assert [gate.name for gate in report.gates if not gate.passed] == ["min-sqnr"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return {}[path]", "KeyError"),
        ("return float('nan')", "returned nan"),
        ("sys.exit(1)", "SystemExit: 1"),
    ],
)
def test_a_metric_that_fails_for_the_result_is_a_gate(
    body: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float model has a score, so the work was begun: its result is not lost."""
    path = saved(small_model(), tmp_path)
    name = f"score_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(
        f"import sys\ndef score(path):\n    if path.endswith('m.onnx'): return 1.0\n    {body}\n"
    )
    monkeypatch.chdir(tmp_path)
    report = optimize(path, normal(), eval=f"{name}:score", output=tmp_path / "q.onnx")
    (gate,) = (gate for gate in report.gates if not gate.passed)
    assert gate.name == "eval"
    assert words in str(gate.got)
    assert report.metric is None
    assert report.output == str(tmp_path / "q.rejected.onnx")
    assert (tmp_path / "q.rejected.onnx").exists()


def test_a_report_needs_a_finished_run() -> None:
    with pytest.raises(InternalError):
        build_report(run_of(GOOD), Path("q.onnx"), None, ())


@pytest.mark.parametrize(
    "text", ["math", "math:", ":sqrt", "nomodule:fn", "math:nothing", "math:pi"]
)
def test_callables_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        load_callable(text, "--eval")


def test_callable() -> None:
    assert load_callable("math:sqrt", "--eval")(9.0) == 3.0
    assert {"qpass", "onnx", "onnxruntime", "numpy"} <= versions().keys()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("np.ones(2)", "returned array"),
        ("10 ** 400", "OverflowError"),
        ("{}", "StopIteration"),
        ("list(range(10 ** 5))", "returned \\[0, 1, 2, 3, 4, 5, ...\\]"),
    ],
)
def test_a_metric_that_returns_no_number_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    name = f"metric_{abs(hash(value))}"
    (tmp_path / f"{name}.py").write_text(
        f"import numpy as np\n\n\ndef score(path):\n    return {value}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match=words) as caught:
        score_file(f"{name}:score", tmp_path / "m.onnx")
    assert "return one number" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_errors_of_a_metric_name_the_users_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metric_of_shapes.py").write_text(
        "import numpy as np\n\n\ndef score(path):\n    return np.ones((2, 3)).reshape(7)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError) as caught:
        score_file("metric_of_shapes:score", tmp_path / "m.onnx")
    assert caught.value.where.endswith("metric_of_shapes.py, line 5")
