"""The steps of a run on their own: statistics and plans that runs start from, compare, verify."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import qpass
from qpass.errors import SampleError
from tests.jobs import (
    CNN,
    CONVOLUTIONS,
    DIGITS,
    SHAPES,
    engine,
    model_of,
    normal,
    optimize,
    precision_of,
    saved,
    small_model,
)


def test_statistics_of_one_pass_serve_every_target(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    stats = qpass.calibrate(path, data=normal(), output=tmp_path / "s.npz")
    for target in ("ort-x86", "openvino", "qnn-htp"):
        report = optimize(
            path, normal(), target=target, stats=str(stats), output=tmp_path / f"{target}.onnx"
        )
        assert report.cost.samples == 12  # of the file: nothing was held out there


def test_merged_shards_are_the_whole(tmp_path: Path) -> None:
    from qpass.calibrate import load_stats, merge_stats

    path = saved(small_model(), tmp_path)
    whole = qpass.calibrate(path, data=normal(), output=tmp_path / "whole.npz", target="ort-x86")
    parts = [
        qpass.calibrate(
            path, data=normal(), output=tmp_path / f"{i}.npz", target="ort-x86", shard=(i, 3)
        )
        for i in range(3)
    ]
    stats, meta = load_stats(whole)
    merged, merged_meta = merge_stats(parts)
    assert merged.keys() == stats.keys()
    assert merged_meta["samples"] == meta["samples"] == "12"
    for name in stats:
        one, other = stats[name].to_arrays(), merged[name].to_arrays()
        for key in ("integers", "counts"):  # numbers of values and samples, histogram
            np.testing.assert_array_equal(one[key], other[key])
        # Lowest and highest are exact; a sum of weights is rounded in another order.
        np.testing.assert_allclose(one["floats"], other["floats"], rtol=1e-12)


def test_edited_plan_makes_a_node_float_and_pins_a_range(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    data = json.loads(qpass.plan(path).to_json())
    for node in data["nodes"]:
        if node["name"] == "c1":
            node.update(precision="float", because="by hand")
    next(t for t in data["tensors"] if t["tensor"] == "x")["range"] = [-2.0, 2.0]
    edited = tmp_path / "plan.json"
    edited.write_text(json.dumps(data))
    report = optimize(path, normal(), plan=str(edited), repair=False)
    node = next(node for node in report.graph_map if node.name == "c1")
    assert (node.precision, node.because) == ("float", "by hand")
    constants = {
        p.name: onnx.numpy_helper.to_array(p) for p in onnx.load(report.output).graph.initializer
    }
    assert constants["x_scale"] == np.float32(4.0 / 255)


def test_cache_gives_the_same_file(tmp_path: Path) -> None:
    path, cache = saved(small_model(), tmp_path), tmp_path / "cache"
    first = optimize(path, normal(), cache=str(cache), output=tmp_path / "a.onnx", repair=False)
    again = optimize(path, normal(), cache=str(cache), output=tmp_path / "b.onnx", repair=False)
    assert "statistics came from the cache" in again.notes
    assert "statistics came from the cache" not in first.notes
    assert Path(first.output).read_bytes() == Path(again.output).read_bytes()


def test_compare_pairs_layers_by_name(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    report = optimize(path, normal(), repair=False)
    found = qpass.compare(path, report.output, data=normal(), samples=4)
    assert [row.name for row in found] == ["c0", "c1", "head"]
    assert all(20.0 < row.sqnr_db < 80.0 for row in found)
    same = qpass.compare(path, path, data=normal(), samples=4)
    assert all(row.max_abs == 0.0 for row in same)


def test_verify_reads_back_any_file(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    report = optimize(path, normal(), repair=False)
    (found,) = qpass.verify(
        report.output, reference=path, data=normal(), engines=("ort",), samples=4
    )
    assert found.integer_ops == 3
    assert found.latency_ms is not None
    (alone,) = qpass.verify(report.output, engines=("ort",))
    assert (alone.integer_ops, alone.sqnr_db, alone.speedup) == (3, None, None)


@pytest.mark.parametrize(("bits", "integers"), [("c1=w4a4", 0), ("c1=w4a8", 2)])
def test_one_layer_of_few_bits_costs_the_others_nothing(
    tmp_path: Path, bits: str, integers: int
) -> None:
    """No repair gives them back to float: a CPU that simulates the one may simulate all."""
    path = saved(small_model(), tmp_path)
    report = optimize(path, normal((24, 3, 8, 8)), bits=(bits,), round="rtn")
    assert report.ok, report.gates
    assert not report.rounds
    assert {precision_of(report)[name] for name in ("c0", "c1", "head")} == {"integer"}
    assert engine(report).integer_ops == integers
    stored = {t.data_type for t in onnx.load(report.output).graph.initializer}
    assert onnx.TensorProto.INT8 in stored  # weights of the other layers
    assert stored & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}


def test_a_result_that_is_far_from_float_says_so(tmp_path: Path) -> None:
    for precision, far in (("w8a8", False), ("w2a8", True)):
        report = optimize(
            CNN, DIGITS, precision=precision, low_bit_edges=far, round="rtn", compensate="none",
            samples=16, output=tmp_path / "q.onnx",
        )  # fmt: skip
        assert (engine(report).sqnr_db < 10.0) is far
        assert any(note.startswith("FAR FROM FLOAT") for note in report.notes) is far


@pytest.mark.parametrize(("batch", "said"), [("N", True), ("2", False)])
def test_what_an_absent_engine_refuses_is_said(tmp_path: Path, batch: str, said: bool) -> None:
    """QNN takes static shapes only; no engine here would mind."""
    model = model_of(CONVOLUTIONS.replace("N,", f"{batch},"), **SHAPES)
    samples = [{"x": normal((2, 3, 8, 8))["x"]} for _ in range(8)]
    report = optimize(saved(model, tmp_path), samples, target="qnn-htp", batch_size=1)
    notes = [note for note in report.notes if note.startswith("LINT ")]
    assert any(note.startswith("LINT QP403") for note in notes) is said
    assert len(notes) == int(said)


def test_verification_of_nothing_or_of_one_sample_is_said(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    with pytest.raises(SampleError, match="no samples"):
        qpass.verify(path, data={"x": np.zeros((0, 3, 8, 8), np.float32)})
    for count, said in ((13, True), (16, False)):
        report = optimize(path, normal((count, 3, 8, 8)), samples=12, output=tmp_path / "q.onnx")
        assert any("is of that one" in note for note in report.notes) is said
