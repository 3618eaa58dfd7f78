"""Compensation costs nothing when the file runs: same graph, same integers, same engine graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qpass
from qpass.verify import read_back
from qpass.verify.engines import openvino_module
from tests.jobs import CNN, DIGITS, op_types, optimize

# Five bits of weight in eight: integer kernels as usual, and errors that are worth correcting.
PLAIN = {
    "round": "rtn",  # leaves compensation something to do
    "equalize": False,
    "unified_norm": "off",
    "repair": False,
    "samples": 48,
    "precision": "w5a8",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("zero-cost")
    found = {}
    for method in ("none", "cwac"):
        path = folder / f"{method}.onnx"
        report = optimize(CNN, str(DIGITS), output=path, compensate=method, **PLAIN)
        changed = {p.name: p.changed for p in report.passes}.get("compensate", 0)
        assert bool(changed) == (method == "cwac")
        assert report.nodes.added_at_runtime == 0
        found[method] = Path(report.output)
    return found


def integers(path: Path) -> dict[str, np.ndarray]:
    """Stored weights by name; int32 biases are numbers of the correction."""
    model = onnx.load(path)
    arrays = {p.name: numpy_helper.to_array(p) for p in model.graph.initializer}
    return {name: a for name, a in arrays.items() if a.dtype == np.int8 and a.ndim > 1}


def test_the_file_has_the_same_nodes_and_weights(files):
    assert op_types(files["none"]) == op_types(files["cwac"])
    left, right = integers(files["none"]), integers(files["cwac"])
    assert left.keys() == right.keys()
    assert len(left) >= 3
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name])
    assert files["none"].read_bytes() != files["cwac"].read_bytes()


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_the_engine_runs_the_same_ops(files, engine, tmp_path):
    if engine == "openvino" and openvino_module() is None:
        pytest.skip("openvino is not installed")
    left, right = (read_back(engine, files[name], tmp_path) for name in ("none", "cwac"))
    assert Counter(op.op for op in left.ops) == Counter(op.op for op in right.ops)
    assert len(left.integer_compute) == len(right.integer_compute)
    assert left.integer_compute


def test_int32_biases_have_the_scale_of_their_products(files):
    model = onnx.load(files["cwac"])
    arrays = {p.name: numpy_helper.to_array(p) for p in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    checked = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        x, w, b = (makers[name] for name in node.input)
        wanted = arrays[x.input[1]].astype(np.float64) * arrays[w.input[1]]
        np.testing.assert_allclose(arrays[b.input[1]], wanted, rtol=1e-6)
        assert arrays[b.input[0]].dtype == np.int32
        checked += 1
    assert checked >= 3


def test_the_report_and_compare_say_the_same_of_each_layer(tmp_path):
    with np.load(DIGITS) as found:
        images = {key: found[key] for key in found.files if key != "labels"}
    ((name, rows),) = images.items()
    held = {name: rows[40:42]}
    report = optimize(
        CNN, {name: rows[:42]}, output=tmp_path / "q.onnx",
        **{**PLAIN, "samples": 40},
    )  # fmt: skip
    layers = {layer.name: layer for layer in report.layers}
    compared = qpass.compare(CNN, report.output, data=held, samples=2)
    assert {row.name for row in compared} == layers.keys()
    for row in compared:
        # The file holds float32 numbers, as the graph in memory does: the runs are the same.
        assert layers[row.name].sqnr_db_after == pytest.approx(row.sqnr_db, abs=1e-9)
    for layer in layers.values():
        assert layer.corrected_channels > 0
