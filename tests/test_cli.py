"""The command line: exit codes, files, and what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from qpass.cli import main
from qpass.targets import TARGETS
from qpass.version import __version__
from tests.jobs import CONVOLUTIONS, DIGITS, ROOT, VIT, model_of, normal, saved, small_model

FAST = ("--engine", "ort", "--calibrate", "minmax")


def qpass(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is the current one, with m.onnx and x.npz."""
    monkeypatch.chdir(tmp_path)
    saved(small_model(), tmp_path)
    np.savez("x.npz", **normal())
    return tmp_path


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_optimize_for_every_target(target: str, job: Path) -> None:
    # Some targets keep layers of fewer than 16 channels in float.
    shapes = {"w0": (16, 3, 3, 3), "b0": (16,), "w1": (16, 16, 3, 3), "w2": (16, 16), "b2": (16,)}
    saved(model_of(CONVOLUTIONS.replace("N,4", "N,16"), **shapes), job)
    output = job / "out" / "q.onnx"
    output.parent.mkdir()
    result = qpass("optimize", "m.onnx", "--data", "x.npz", "--target", target, "-o", output, *FAST)
    assert result.exit_code == 0, result.output
    assert [path.name for path in output.parent.iterdir()] == ["q.onnx"]
    assert str(output) in result.stdout.replace("\n", "")


def test_as_a_program(job: Path) -> None:
    command = [sys.executable, "-m", "qpass", "optimize", "m.onnx", "--data", "x.npz", "--json",
               *FAST]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert json.loads(done.stdout)["ok"] is True
    assert done.stderr == ""


def test_report_folder(job: Path) -> None:
    result = qpass("optimize", "m.onnx", "--data", "x.npz", "--report", "out/r", *FAST)
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("out/r").iterdir()} == {"report.json", "report.html"}
    assert json.loads(Path("out/r/report.json").read_text())["output"] == "m.int8.onnx"


def test_recipe_counts_and_options_win(job: Path) -> None:
    Path("r.toml").write_text("data = 1\n")
    assert qpass("optimize", "m.onnx", "--data", "x.npz", "--recipe", "r.toml").exit_code == 2
    Path("r.toml").write_text('target = "qnn-htp"\nkeep = ["c0"]\nengines = ["ort"]\n')
    result = qpass(
        "optimize", "m.onnx", "--data", "x.npz", "--recipe", "r.toml", "--target", "ort-x86",
        "--json", "--calibrate", "minmax",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["target"] == "ort-x86"
    assert report["options"]["keep"] == ["c0"]


def test_failed_gate_gives_exit_code_1_and_rejected(job: Path) -> None:
    result = qpass("optimize", "m.onnx", "--data", "x.npz", "--min-sqnr", 200, *FAST)
    assert result.exit_code == 1, result.output
    assert sorted(path.name for path in job.glob("*.onnx")) == ["m.int8.rejected.onnx", "m.onnx"]
    onnx.checker.check_model(onnx.load("m.int8.rejected.onnx"), full_check=True)
    assert "min-sqnr" in result.stdout


def test_task_metric_is_a_gate(job: Path) -> None:
    Path("score_of_files.py").write_text(
        "def score(path):\n    return {'points': 10.0 if path.endswith('m.onnx') else 7.0}\n"
    )
    arguments = (
        "optimize",
        "m.onnx",
        "--data",
        "x.npz",
        "--eval",
        "score_of_files:score",
        "--json",
    )
    report = json.loads(qpass(*arguments, "--max-drop", 3, *FAST).stdout)
    assert report["metric"] == {"name": "points", "float": 10.0, "quantized": 7.0, "drop": 3.0}
    assert report["ok"] is True
    assert qpass(*arguments, "--max-drop", 2.9, *FAST).exit_code == 1


def test_verbose_names_refusals(job: Path) -> None:
    result = qpass("optimize", "m.onnx", "--data", "x.npz", "-v", *FAST)
    assert result.exit_code == 0
    assert "Refusals" in result.stdout


def test_plan_edit_and_give_back(job: Path) -> None:
    assert qpass("plan", "m.onnx", "-o", "plan.json").exit_code == 0
    plan = json.loads(Path("plan.json").read_text())
    for node in plan["nodes"]:
        if node["name"] == "c1":
            node["precision"] = "float"
    Path("plan.json").write_text(json.dumps(plan))
    result = qpass("optimize", "m.onnx", "--data", "x.npz", "--plan", "plan.json", "--json", *FAST)
    rows = {row["name"]: row["precision"] for row in json.loads(result.stdout)["graph_map"]}
    assert (rows["c0"], rows["c1"], rows["head"]) == ("integer", "float", "integer")


def test_plan_as_a_table(job: Path) -> None:
    result = qpass("plan", "m.onnx", "--keep", "c1", "--rotate", "none", "--rms-norm")
    assert result.exit_code == 0
    for text in ("c0", "integer", "--keep"):
        assert text in result.stdout
    assert {path.name for path in job.iterdir()} == {"m.onnx", "x.npz"}


def test_shards_merge_and_stand_for_the_samples(job: Path) -> None:
    for index in (0, 1):
        shard = ("--shard", f"{index}/2", "-o", f"{index}.npz")
        assert qpass("calibrate", "m.onnx", "--data", "x.npz", *shard).exit_code == 0
    assert qpass("merge", "0.npz", "1.npz", "-o", "all.npz").exit_code == 0
    alone = qpass("merge", "1.npz", "-o", "alone.npz")
    assert alone.exit_code == 0
    assert "still missing: 0/2" in alone.stderr
    result = qpass("optimize", "m.onnx", "--data", "x.npz", "--stats", "1.npz", "--json", *FAST)
    notes = json.loads(result.stdout)["notes"]
    assert any(note.startswith("STATISTICS OF A PART OF THE SAMPLES: 1.npz") for note in notes)
    assert qpass("merge", "0.npz", "0.npz", "-o", "twice.npz").exit_code == 2
    result = qpass("optimize", "m.onnx", "--data", "x.npz", "--stats", "all.npz", "--json", *FAST)
    assert json.loads(result.stdout)["cost"]["samples"] == 12
    assert not Path("twice.npz").exists()


def test_verify_compare_lint_inspect(job: Path) -> None:
    assert qpass("optimize", "m.onnx", "--data", "x.npz", *FAST).exit_code == 0
    data = ("--data", "x.npz", "--samples", 4, "--json")
    found = qpass("verify", "m.int8.onnx", "--reference", "m.onnx", "--engine", "ort", *data)
    (engine,) = json.loads(found.stdout)
    assert (engine["name"], engine["integer_ops"]) == ("ort", 3)
    layers = json.loads(qpass("compare", "m.onnx", "m.int8.onnx", *data).stdout)
    assert [layer["name"] for layer in layers] == ["c0", "c1", "head"]
    lint = qpass("lint", "m.int8.onnx", "--target", "ort-x86", "--json")
    assert lint.exit_code == 0
    assert [row for row in json.loads(lint.stdout) if row["severity"] == "error"] == []
    summary = json.loads(qpass("inspect", "m.int8.onnx", "--json").stdout)
    assert summary["op_counts"]["Conv"] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "m.onnx", "--engine", "ort"),
        ("compare", "m.onnx", "m.onnx", "--data", "x.npz", "--samples", "2"),
        ("lint", "m.onnx"),
        ("inspect", "m.onnx"),
        ("targets",),
        *(("targets", name) for name in sorted(TARGETS)),
    ],
    ids=" ".join,
)
def test_tables(arguments: tuple[str, ...], job: Path) -> None:
    result = qpass(*arguments)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) > 3


def test_a_file_that_its_engine_refuses(job: Path) -> None:
    model = small_model()
    model.graph.node[4].op_type = "GlobalLpPool"  # of floats only
    del model.graph.node[5:]
    model.graph.node[4].output[0] = "y"
    model.graph.node[4].attribute.append(onnx.helper.make_attribute("p", -1.5))
    onnx.save(model, "bad.onnx")
    result = qpass("verify", "bad.onnx", "--engine", "ort")
    assert result.exit_code == 2
    assert "error: ort failed to load bad.onnx" in result.stderr.replace("\n", " ")


def test_version_and_help() -> None:
    assert __version__ in qpass("--version").stdout
    assert qpass("-h").exit_code == qpass("optimize", "-h").exit_code == 0


@pytest.mark.parametrize("text", ["", "optimize", "optimise m", "optimize m --activations x"])
def test_usage_errors_are_exit_code_2(text: str) -> None:
    assert qpass(*text.split()).exit_code == 2


@pytest.mark.parametrize("command", ["optimize", "verify"])
def test_an_engine_without_a_name(command: str, job: Path) -> None:
    result = qpass(command, "m.onnx", "--data", "x.npz", "--engine", "ort,")
    assert result.exit_code == 2
    assert "--engine 'ort,' has an empty name" in result.stderr


def test_options_of_low_bits(tmp_path: Path) -> None:
    """What the command line says reaches the plan."""
    path = tmp_path / "plan.json"
    common = ("plan", VIT, "--precision", "w4")
    blocks = ("--block-size", 64, "--asymmetric-weights", "--bits", "node_MatMul_4?=w8")
    assert qpass(*common, *blocks, "-o", path).exit_code == 0
    plan = json.loads(path.read_text())
    bits = {n["name"]: n["bits"] for n in plan["nodes"] if n["bits"]}
    assert bits["node_MatMul_44"] == "w8"
    assert bits["node_MatMul_50"] == "w4"
    assert "u4 asymmetric per_block(0,64)" in {t["spec"] for t in plan["tensors"]}
    result = qpass(*common, "--bits", "none*=w8")
    assert result.exit_code == 2
    assert "matches no Conv" in result.stderr
    assert qpass("optimize", VIT, "--mixed").exit_code == 2
    assert qpass("optimize", VIT, "--block-size", 20).exit_code == 2


def test_activation_scales_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = qpass(
        "optimize", VIT, "--data", DIGITS, "--activation-scales", "no.json",
        "-o", tmp_path / "q.onnx", *FAST,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "cannot read the scales" in result.stderr
    assert list(tmp_path.iterdir()) == []
