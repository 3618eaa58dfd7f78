"""`--compensate qwt` and `nbc` on the command line: kept or refused, and what it costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import qpass
from qpass import block_stage
from qpass.cli import main
from qpass.errors import RecipeError
from qpass.graph import Graph
from qpass.options import Options
from qpass.verify import open_engine
from qpass.verify.session import NARROW_IN_FLOAT
from tests.jobs import saved, small_model
from tests.small_models import transformer

QDQ = ("QuantizeLinear", "DequantizeLinear")
FAST = ("--engine", "ort", "--calibrate", "minmax", "--jobs", 1)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is the current one, with a transformer layer and samples for it."""
    monkeypatch.chdir(tmp_path)
    graph = transformer()
    model = graph.to_model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    for constant in model.graph.initializer:
        if constant.name in ("heads", "whole"):  # 0: as long as the input is
            shape = onnx.numpy_helper.to_array(constant).copy()
            shape[0] = 0
            constant.CopyFrom(onnx.numpy_helper.from_array(shape, constant.name))
    del model.graph.value_info[:]
    onnx.save(model, "m.onnx")
    random = np.random.default_rng(2)
    np.savez("x.npz", x=random.standard_normal((160, 6, 32)).astype(np.float32))
    return tmp_path


def optimize(method: str, precision: str, *more: object) -> dict[str, Any]:
    arguments = ("optimize", "m.onnx", "--data", "x.npz", "-o", "q.onnx", "--json",
                 "--compensate", method, "--precision", precision, *FAST, *more)  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.parametrize(("method", "nodes", "numbers"), [("qwt", 2, 0), ("nbc", 16, 2)])
def test_both_methods_from_the_command_line(
    job: Path, method: str, nodes: int, numbers: int
) -> None:
    """Two bits leave enough for both; what is free is folded first and costs nothing."""
    report = optimize(method, "w2a8")
    free, cost = report["runtime_costs"]
    assert (free["method"], free["nodes"], free["parameters"], free["macs"]) == ("cwac", 0, 0, 0)
    assert (cost["method"], cost["places"], cost["engine"]) == (method, 1, "ort")
    assert cost["nodes"] == report["nodes"]["added_at_runtime"] == nodes
    assert cost["parameters"] == 32 * 32 + numbers * 32  # offsets are in a bias that was there
    assert cost["macs"] == 6 * 32 * 32
    assert min(cost["latency_ms"]) > 0.0
    assert cost["latency_ratio"] > 0.0
    before, after = cost["sqnr_db"]
    # The walk computed what the fold would do to each output; the folded graph has run here.
    assert before == pytest.approx(free["sqnr_db"][1], rel=1e-6)
    assert after > before
    model = onnx.load("q.onnx")
    assert sum(method in node.name and node.op_type not in QDQ for node in model.graph.node) == (
        nodes - 1  # and the sum
    )
    assert list(job.glob("*.plain*")) == []


def test_both_files_are_timed_as_they_have_to_be_loaded(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations of 4 bits take session entries, without which a file may be refused."""
    asked: list[Any] = []

    def spy(*arguments: Any, session_config: Any, **others: Any) -> Any:
        asked.append(session_config)
        return open_engine(*arguments, session_config=session_config, **others)

    monkeypatch.setattr("qpass.runtime_cost.open_engine", spy)
    report = optimize("qwt", "w2a4", "--round", "rtn")
    assert [cost["method"] for cost in report["runtime_costs"]][-1] == "qwt"
    assert asked == [NARROW_IN_FLOAT, NARROW_IN_FLOAT]


def test_what_cannot_be_judged_is_left_out_and_said(job: Path) -> None:
    report = optimize("qwt", "w8a8", "--samples", 3)
    assert report["runtime_costs"] == []
    assert report["nodes"]["added_at_runtime"] == 0
    (note,) = [note for note in report["notes"] if note.startswith("--compensate qwt")]
    assert "added nothing: there is only one batch" in note


def test_an_unknown_method_is_refused(job: Path) -> None:
    with pytest.raises(RecipeError, match="there is no --compensate qwtv3"):
        Options(compensate="qwtv3")  # type: ignore[arg-type]


def test_a_model_without_blocks_says_so(tmp_path: Path) -> None:
    data = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    report = qpass.optimize(
        saved(small_model(), tmp_path), data=[{"x": one[None]} for one in data], compensate="nbc",
        engines=("ort",), calibrate="minmax", jobs=1,
    )  # fmt: skip
    assert "--compensate nbc added nothing: the model has no residual block" in report.notes


@pytest.mark.parametrize("better", [True, False])
def test_blocks_are_tried_alone_where_nothing_helps_on_top(
    job: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    """The first attempt finds nothing; the second one stays only if it beats what was folded."""
    real, calls = block_stage.compensate_blocks, []

    def stubborn(reference: Graph, graph: Graph, batches: Any, **options: Any) -> Any:
        calls.append(graph)
        few = batches[:1] if len(calls) == 1 else batches
        result = real(reference, graph, few, **options)
        if len(calls) == 1 or result.verdict is None:
            return result
        assert result.verdict.helps
        after = result.verdict.after_db + (100.0 if better else -100.0)
        return replace(result, verdict=replace(result.verdict, before_db=-200.0, after_db=after))

    monkeypatch.setattr(block_stage, "compensate_blocks", stubborn)
    report = optimize("qwt", "w2a8")
    assert len(calls) == 2
    methods = [cost["method"] for cost in report["runtime_costs"]]
    assert methods == (["qwt"] if better else ["cwac"])
    assert report["nodes"]["added_at_runtime"] == (2 if better else 0)
    assert any(note.startswith("qwt alone: ") for note in report["notes"]) == better
    assert any(note.startswith("--compensate qwt added nothing") for note in report["notes"]) != (
        better
    )
