"""--allow-runtime-ops end to end: off by default, counted and listed when it is on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qpass.api import make_options, optimize
from qpass.cli import main
from qpass.errors import RecipeError
from tests.folds import graph_of, normal

WIDTH = 16
BODY = """
    [fc] h = MatMul (x, w)
    a = Gelu (h)
    [out] y = MatMul (a, v)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two products without biases, on inputs with a mean."""
    shape = f"float[N,4,{WIDTH}]"
    graph = graph_of(
        f"{shape} x", f"{shape} y", BODY,
        w=normal((WIDTH, WIDTH), seed=1) / 4, v=normal((WIDTH, WIDTH), seed=2) / 4,
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(graph.to_model(), path)
    samples = normal((64, 4, WIDTH), seed=3) + 2.0
    np.savez(tmp_path / "data.npz", x=samples)
    return path


def test_nodes_are_counted_and_listed_and_only_there_on_demand(model):
    reports = {
        allowed: optimize(
            model,
            data=str(model.parent / "data.npz"),
            output=model.parent / f"{allowed}.onnx",
            precision="w3a8",
            round="rtn",
            samples=48,
            allow_runtime_ops=allowed,
            calibrate="minmax",
        )
        for allowed in (False, True)
    }
    assert reports[False].nodes.added_at_runtime == 0
    notes = [text for text in reports[True].notes if text.startswith("added at run time: ")]
    assert notes
    assert all(f"({WIDTH} channels)" in text for text in notes)
    added = sum(1 + (" and " in text.split(" behind ")[0]) for text in notes)
    assert reports[True].nodes.added_at_runtime == added
    written = onnx.load(reports[True].output)
    ops = [node.op_type for node in written.graph.node]
    assert ops.count("Add") + ops.count("Mul") == added
    assert reports[True].engines[0].sqnr_db > reports[False].engines[0].sqnr_db


def test_it_is_a_flag_and_a_key_of_recipes(model, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("allow-runtime-ops = true\n")
    assert make_options(recipe).allow_runtime_ops is True
    assert make_options().allow_runtime_ops is False
    recipe.write_text('allow-runtime-ops = "often"\n')
    with pytest.raises(RecipeError, match="allow_runtime_ops"):
        make_options(recipe)
    result = CliRunner().invoke(
        main,
        [
            "optimize", str(model), "--data", str(model.parent / "data.npz"), "--samples", "48",
            "--allow-runtime-ops", "--json", "-o", str(tmp_path / "out.onnx"),
        ],
    )  # fmt: skip
    assert result.exit_code in (0, 1), result.output
    report = json.loads(result.stdout)
    assert report["options"]["allow_runtime_ops"] is True
