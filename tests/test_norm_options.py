"""Options about norms reach their passes, and what statistics belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qpass import api
from qpass.api import make_options
from qpass.cli import main
from qpass.errors import RecipeError
from qpass.evidence import calibrate, open_data
from qpass.modelfile import save_model
from qpass.pipeline import make_norms_static, prepare
from qpass.run import model_key, start
from tests import small_models


def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    save_model(small_models.transformer(), path)
    return path


def samples(count: int) -> list[dict[str, np.ndarray]]:
    return small_models.feeds_of(small_models.transformer(), count)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["normalize", "unified-norm", "affine", "stream-bias", "balance", "patch-matmul"]),
        ({"unified_norm": "off"}, ["normalize", "balance", "patch-matmul"]),
        ({"unified_norm": "off", "rotate": "none"}, ["normalize", "patch-matmul"]),
        (
            {"unified_norm": "off", "rotate": "heads"},
            ["normalize", "rotate-heads", "balance", "patch-matmul"],
        ),
        (
            {"rotate": "all", "rms_norm": True},
            ["normalize", "unified-norm", "affine", "stream-bias", "norm-gain",
             "rotate-stream", "rms-norm", "rotate-heads", "balance", "patch-matmul"],
        ),
    ],
    ids=["default", "off", "none", "heads", "everything"],
)  # fmt: skip
def test_options_choose_the_passes(
    options: dict[str, object], names: list[str], tmp_path: Path
) -> None:
    run = start(model(tmp_path), make_options(**options))
    prepare(run)
    assert [report.name for report in run.passes] == names


def test_statistics_of_a_rotated_graph_are_not_those_of_the_file(tmp_path: Path) -> None:
    path, stats = model(tmp_path), tmp_path / "stats.npz"
    keys = {}
    for rotate in ("none", "heads"):
        run = start(path, make_options(rotate=rotate))
        prepare(run)
        keys[rotate] = model_key(run)
    assert keys["none"] != keys["heads"]
    api.calibrate(path, data=samples(4), output=stats, target="ort-x86")
    run = start(path, make_options(stats=str(stats), rotate="heads"))
    prepare(run)
    calibration, _ = open_data(run, samples(4))
    with pytest.raises(RecipeError, match="other rewrites of it"):
        calibrate(run, calibration)


def test_static_norms_report_why_there_are_none(tmp_path: Path) -> None:
    run = start(model(tmp_path), make_options(static_norm=0.98, jobs=1, holdout=0.0))
    prepare(run)
    calibration, _ = open_data(run, samples(8))
    make_norms_static(run, calibration)
    assert run.passes[-1].name == "static-norm"
    assert {r.where for r in run.passes[-1].refusals} == {"node_n1", "node_n2"}


def test_static_norms_need_a_few_samples(tmp_path: Path) -> None:
    run = start(model(tmp_path), make_options(static_norm=0.98, holdout=0.0))
    prepare(run)
    calibration, _ = open_data(run, samples(3))
    with pytest.raises(RecipeError, match="at least 4 calibration samples, there are 3"):
        make_norms_static(run, calibration)


def test_static_norms_need_samples_at_all(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--static-norm needs samples"):
        api.optimize(model(tmp_path), static_norm=0.98, precision="w8")


@pytest.mark.parametrize("value", [0.0, 1.5, -1.0])
def test_r2_out_of_range(value: float) -> None:
    with pytest.raises(RecipeError, match="--static-norm"):
        make_options(static_norm=value)


@pytest.mark.parametrize(
    "arguments", [["--rotate", "stream"], ["--rms-norm"], ["--unified-norm", "auto"]]
)
def test_the_command_line_takes_them(arguments: list[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "none.onnx")
    result = CliRunner().invoke(main, ["optimize", missing, "--data", "random", *arguments])
    assert result.exit_code == 2
    assert "there is no file" in result.stderr
