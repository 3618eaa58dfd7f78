"""`tools/bench.py` on the project's own models: what it parses, measures, judges and writes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
sys.path.insert(0, str(ROOT / "tools"))  # the tools are scripts, not a package

import bench  # noqa: E402
from bench_bars import judge_bars  # noqa: E402
from bench_jobs import run_job  # noqa: E402
from bench_peers import parse_contestant  # noqa: E402
from bench_run import file_bytes  # noqa: E402
from bench_samples import StoredSamples, load_case, write_samples  # noqa: E402
from bench_scale import write_chain, write_transformer  # noqa: E402
from bench_table import markdown  # noqa: E402

DIGITS = {
    "model": str(MODELS / "digits_cnn.onnx"),
    "data": str(MODELS / "digits_calibration.npz"),
    "holdout": str(MODELS / "digits_test.npz"),
    "labels": "labels",
}
TIMEOUT = 60.0


# ---------------------------------------------------------------------------------- notation
def test_contestant_with_options() -> None:
    got = parse_contestant("qpass:openvino,activations=dynamic,samples=32,repair=false")
    assert (got.kind, got.argument) == ("qpass", "openvino")
    assert got.options == {"activations": "dynamic", "samples": 32, "repair": False}


@pytest.mark.parametrize(
    ("text", "batch"), [("qpass", 4), ("qpass:ort-x86,batch_size=8", 8), ("ort:minmax", 1)]
)
def test_contestant_batch(text: str, batch: int) -> None:
    assert parse_contestant(text).batch == batch


def test_file_may_hold_a_comma() -> None:
    assert parse_contestant("file:a,b.onnx").argument == "a,b.onnx"


@pytest.mark.parametrize("text", ["tensorrt", "ort:kl", "qpass:ort-x86,dynamic", "nncf:fast"])
def test_contestant_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"contestant '"):
        parse_contestant(text)


# ----------------------------------------------------------------------------------- samples
def numbered(count: int) -> list[dict[str, np.ndarray]]:
    return [{"a": np.full((1, 2), i, np.float32), "b/c": np.array([i])} for i in range(count)]


def test_stored_samples_start_again_and_repeat(tmp_path: Path) -> None:
    stored = write_samples(tmp_path / "s.npz", numbered(3), 5)
    assert stored.count == 3  # no more than there are
    longer = StoredSamples(path=stored.path, count=5)
    for _ in range(2):
        assert [int(feeds["b/c"][0]) for feeds in longer] == [0, 1, 2, 0, 1]


def test_batches_join_along_axis_0(tmp_path: Path) -> None:
    stored = write_samples(tmp_path / "s.npz", numbered(5), 5)
    assert [feeds["a"][:, 0].tolist() for feeds in stored.batches(2)] == [[0, 1], [2, 3], [4]]


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no samples for s\.npz"):
        write_samples(tmp_path / "s.npz", [], 5)


def test_case_of_files_scores_top1() -> None:
    case = load_case(DIGITS)
    with np.load(MODELS / "digits_test.npz") as file:
        labels = file["labels"]
    rows = iter(range(len(labels)))

    def right_on_even(_feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        row = next(rows)
        return [np.eye(10)[[labels[row] if row % 2 == 0 else (labels[row] + 1) % 10]]]

    assert case.score is not None
    assert case.score(right_on_even, 40) == 50.0
    assert [feeds["image"].shape for feeds in case.holdout(3)] == [(1, 1, 8, 8)] * 3


# --------------------------------------------------------------------------------------- jobs
def test_job_that_raises_is_an_error(tmp_path: Path) -> None:
    job = {"job": "quantize", "contestant": "ort:minmax", "samples": "gone.npz", "count": 1}
    result = run_job(job, folder=tmp_path, timeout=TIMEOUT)
    assert result == {"error": "KeyError: 'output'"}


@pytest.mark.parametrize(
    ("python", "timeout", "error"),
    [
        ("/bin/false", TIMEOUT, "ended with code 1"),
        ("/nonexistent/python", TIMEOUT, "cannot start"),
        (sys.executable, 0.001, "not done after"),
    ],
)
def test_process_that_fails_is_an_error(
    tmp_path: Path, python: str, timeout: float, error: str
) -> None:
    result = run_job({"job": "judge"}, folder=tmp_path, python=python, timeout=timeout)
    assert result["error"].startswith(error)


def test_old_opset_is_converted_for_per_channel_peers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.standard_normal((8, 4), dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    onnx.save(model, tmp_path / "old.onnx")
    feeds = [{"x": random.standard_normal((1, 8), dtype=np.float32)} for _ in range(4)]
    stored = write_samples(tmp_path / "s.npz", feeds, 4)
    job = {
        "job": "quantize",
        "contestant": "ort:minmax",
        "model": str(tmp_path / "old.onnx"),
        "samples": str(stored.path),
        "count": 4,
        "spare": 0,
        "batched": True,
        "output": str(tmp_path / "new.onnx"),
    }
    result = run_job(job, folder=tmp_path, timeout=TIMEOUT)
    assert "error" not in result
    quantized = onnx.load(result["output"])
    assert quantized.opset_import[0].version == 13
    scales = [t.dims[0] for t in quantized.graph.initializer if t.name == "w_scale"]
    assert scales == [4]  # one a column
    assert result["peak_rss_bytes"] >= result["base_rss_bytes"] > 0


# ---------------------------------------------------------------------------------------- run
@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Rows and page of a small run with contestants that work and that do not."""
    out = tmp_path_factory.mktemp("out")
    # Some tools leave tensors that they looked at among the outputs; here one comes first.
    model = onnx.load(MODELS / "digits_cnn.onnx")
    extra = helper.make_tensor_value_info(model.graph.node[0].output[0], TensorProto.FLOAT, None)
    model.graph.output.insert(0, extra)
    onnx.save(model, out / "digits_cnn.copy.onnx")
    contestants = [
        "float", "ort:minmax", "quark", f"file:{out}/{{model}}.copy.onnx", "file:gone.onnx",
    ]  # fmt: skip
    code = bench.main([
        "run", "digits_cnn", "--contestants", *contestants, "--engines", "ort", "--samples", "16",
        "--holdout", "16", "--limit", "100", "--seconds", "0.02", "--no-calibration",
        "--peer-python", "quark=/nonexistent/python", "--out", str(out), "--date", "2000-01-01",
    ])  # fmt: skip
    assert code == 0
    return json.loads((out / "bench.json").read_text()), (out / "bench.md").read_text()


def row_of(results: tuple[list[dict[str, Any]], str], kind: str) -> dict[str, Any]:
    return next(row for row in results[0] if row["contestant"].startswith(kind))


def test_run_measures_the_float_model_as_equal(results: Any) -> None:
    row = row_of(results, "float")
    assert (row["status"], row["sqnr_db"], row["size_ratio"]) == ("ok", 200.0, 1.0)
    assert (row["integer_ops"], row["float_ops"]) == (0, 9)
    assert row["latency_ratio"] == 1.0
    assert row["metric"] >= 97.0  # 98.89 on all 449


def test_run_measures_a_peer(results: Any) -> None:
    row = row_of(results, "ort:minmax")
    assert row["status"] == "ok"
    assert 20.0 < row["sqnr_db"] < 40.0  # 8 bits, eight layers
    assert (row["integer_ops"], row["float_ops"]) == (9, 0)
    assert row["bytes"] < row["float_bytes"] / 2
    ratio = row["quantize_seconds"] / row["float_pass_seconds"]
    assert math.isclose(row["quantize_ratio"], ratio, rel_tol=1e-9)
    assert row["peak_rss_bytes"] > row["base_rss_bytes"] > 10e6
    assert row["latency_ratio_low"] <= row["latency_ratio"] <= row["latency_ratio_high"]


def test_run_measures_a_file_by_the_outputs_of_the_float_model(results: Any) -> None:
    row = row_of(results, "file:/")
    assert row["status"] == "ok"
    assert row["sqnr_db"] > 100.0  # float32 rounding; a fusion less is allowed to change it


def test_run_keeps_failures_as_rows(results: Any) -> None:
    assert row_of(results, "quark")["error"].startswith("cannot start /nonexistent/python")
    assert row_of(results, "file:gone")["error"] == "there is no file gone.onnx"
    assert {row["status"] for row in results[0]} == {"ok", "failed"}


def test_rows_are_flat_and_say_where_they_come_from(results: Any) -> None:
    for row in results[0]:
        assert all(isinstance(value, str | int | float | None) for value in row.values())
        assert (row["date"], row["model"]) == ("2000-01-01", "digits_cnn")
        assert row["version_onnxruntime"]
        assert (row["calibration_samples"], row["holdout_samples"]) == (16, 16)


def test_page_has_a_line_for_each_contestant(results: Any) -> None:
    rows, page = results
    assert page == markdown(rows)
    assert "## digits_cnn, ort" in page
    assert sum(line.startswith("| `") for line in page.splitlines()) == len(rows)
    assert "| `file:gone.onnx` | failed: there is no file gone.onnx |" in page


def test_rows_of_two_runs_say_which_one_they_are_of(results: Any) -> None:
    row = results[0][0]
    page = markdown([row, {**row, "commit": "later", "date": "2000-01-02"}])
    runs = [line for line in page.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert [line.split(" | ")[1] for line in runs] == ["2000-01-01", "2000-01-02"]
    assert [
        line.rstrip(" |").rsplit("| ", 1)[1] for line in page.splitlines() if line[:3] == "| `"
    ] == ["1", "2"]


def test_missing_peer_is_skipped(tmp_path: Path) -> None:
    code = bench.main([
        "run", "digits_cnn", "--contestants", "quark", "--engines", "ort", "--samples", "1",
        "--holdout", "1", "--no-calibration", "--out", str(tmp_path),
    ])  # fmt: skip
    row = json.loads((tmp_path / "bench.json").read_text())[0]
    assert code == 0
    assert (row["status"], row["error"]) == (
        "skipped",
        "quark is not installed; give --peer-python quark=PYTHON",
    )


def test_wrong_usage_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["run", "--model", "m.onnx"]) == 2
    assert "--model needs --data and --holdout-data" in capsys.readouterr().err


def test_qpass_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    # Repairing decides by measured times, which this test must not depend on.
    contestant = 'qpass:ort-x86,repair=false,engines=["ort"]'
    code = bench.main([
        "determinism", "digits_cnn", "--contestants", contestant, "float", "--samples", "8",
        "--out", str(tmp_path),
    ])  # fmt: skip
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert code == 0
    assert [(row["contestant"], row["status"]) for row in rows] == [(contestant, "ok")]
    assert (rows[0]["same_bytes"], rows[0]["runs"], len(rows[0]["sha256"])) == (True, 2, 64)


def test_determinism_of_one_run_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["determinism", "digits_cnn", "--repeat", "1"]) == 2
    assert "at least two runs" in capsys.readouterr().err


def test_cost_of_calibration_is_a_ratio_of_the_same_samples(tmp_path: Path) -> None:
    stored = write_samples(tmp_path / "s.npz", load_case(DIGITS).calibration(16), 16)
    job = {
        "job": "calibrate",
        "model": DIGITS["model"],
        "target": "ort-x86",
        "options": {"repair": False},
        "samples": str(stored.path),
        "count": 16,
        "batch": 8,
        "timed": True,
    }
    result = run_job(job, folder=tmp_path, timeout=TIMEOUT)
    assert "error" not in result
    assert result["taps"] > 9
    assert 0 < result["calibrate_ratio_low"] <= result["calibrate_ratio"]
    assert result["calibrate_ratio"] <= result["calibrate_ratio_high"]
    assert result["peak_rss_bytes"] >= result["base_rss_bytes"]


# --------------------------------------------------------------------------------------- bars
def made_row(contestant: str, **values: Any) -> dict[str, Any]:
    row = {"kind": "model", "status": "ok", "model": "m", "engine": "ort"}
    return row | {"contestant": contestant, **values}


def own_row(**values: Any) -> dict[str, Any]:
    good = {
        "sqnr_db": 25.0,
        "latency_ratio": 0.5,
        "size_ratio": 0.27,
        "quantize_seconds": 11.0,
        "float_pass_seconds": 1.0,
    }
    return made_row("qpass:ort-x86", **{**good, **values})


PEERS = [
    made_row("ort:minmax", sqnr_db=23.0, latency_ratio=0.5),
    made_row("ort:percentile", sqnr_db=25.0, latency_ratio=0.6),
    made_row("ort:dynamic", sqnr_db=50.0, latency_ratio=0.9),
]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    return {bar.name: bar.met for bar in judge_bars(rows)}


def test_bars_are_met_on_their_edges() -> None:
    assert verdicts([own_row(latency_ratio=0.51), *PEERS]) == {
        "SQNR of the best peer": True,
        "faster than float": True,
        "latency of the fastest peer": True,
        "size": True,
        "time to optimize": True,
        "2 dB above the best peer": True,
    }


def test_any_peer_can_be_the_fastest() -> None:
    aimet = made_row("aimet:enhanced", sqnr_db=1.0, latency_ratio=0.4)
    assert verdicts([own_row(), *PEERS])["latency of the fastest peer"]
    assert not verdicts([own_row(), *PEERS, aimet])["latency of the fastest peer"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("SQNR of the best peer", {"sqnr_db": 24.99}),
        ("latency of the fastest peer", {"latency_ratio": 0.511}),
        ("faster than float", {"latency_ratio": 1.0}),
        ("size", {"size_ratio": 0.271}),
        ("time to optimize", {"quantize_seconds": 11.1}),
        ("2 dB above the best peer", {"sqnr_db": 24.99}),
    ],
)
def test_bars_are_missed_beyond(name: str, values: dict[str, float]) -> None:
    assert not verdicts([own_row(**values), *PEERS])[name]


def test_bars_are_judged_in_the_targets_engine_only() -> None:
    assert judge_bars([own_row(engine="openvino"), *PEERS]) == []
    assert judge_bars([own_row(status="failed"), *PEERS]) == []


@pytest.mark.parametrize(("sqnr", "ratio", "met"), [(10.9, 0.6, True), (10.8, 0.6, False),
                                                    (10.9, 0.61, False)])  # fmt: skip
def test_bar_of_the_hard_model(sqnr: float, ratio: float, met: bool) -> None:
    row = own_row(model="vit_tiny_x", sqnr_db=sqnr, latency_ratio=ratio)
    assert verdicts([row])["hard vision transformer"] == met


def test_bars_of_calibration_and_scale() -> None:
    calibration = {"kind": "calibration", "status": "ok", "model": "m", "contestant": "qpass"}
    scale = {"kind": "scale", "status": "ok", "model": "m", "contestant": "c", "float_bytes": 2e9}
    rows: list[dict[str, Any]] = [
        calibration | {"calibrate_ratio": 2.0, "memory_growth": 0.1},
        scale | {"peak_rss_bytes": 1.49e9},
        scale | {"nodes": 20_000, "seconds": 30.0, "peak_rss_bytes": 5e9},
    ]
    assert verdicts(rows) == {
        "cost of calibration": True,
        "memory from 16 to 256 samples": False,
        "memory for a large model": True,
        "plan and rewrite 20,000 nodes": False,
    }


# --------------------------------------------------------------------------------------- scale
def test_transformer_is_valid_seeded_and_of_its_size(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write_transformer(tmp_path / folder / "t.onnx", size_gb=0.0125))
    onnx.checker.check_model(paths[0], full_check=True)
    weights = 12 * 512 * 512 * 4  # bytes of one block
    assert paths[0].with_suffix(".data").stat().st_size == weights
    assert file_bytes(paths[0]) == weights + paths[0].stat().st_size
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].with_suffix(".data").read_bytes() == paths[1].with_suffix(".data").read_bytes()


def test_chain_has_its_nodes(tmp_path: Path) -> None:
    path = write_chain(tmp_path / "c.onnx", nodes=40)
    onnx.checker.check_model(path, full_check=True)
    assert len(onnx.load(path).graph.node) == 40
