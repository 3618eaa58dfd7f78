"""Whole runs from Python: what is accepted, what comes out, what the report says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import qpass
from qpass.api import default_output
from qpass.modelfile import read_metadata
from qpass.passes.round_weights import round_weights
from qpass.targets import TARGETS
from tests.jobs import (
    CNN,
    DIGITS,
    LINEAR,
    TINY,
    VIT,
    changed,
    engine,
    listing,
    model_of,
    normal,
    op_types,
    optimize,
    precision_of,
    saved,
    small_model,
)

REPORT_KEYS = {
    "schema", "model", "target", "precision", "passes", "nodes", "engines", "layers", "cost",
    "gates", "ok",
}  # fmt: skip
BATCHES = np.load(DIGITS)["image"].astype(np.float32).reshape(-1, 8, 1, 8, 8)


class Loader:
    """What a DataLoader looks like: (batch, labels) pairs, with a new pass at each iteration."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in BATCHES[:4]:
            yield batch, np.zeros(len(batch), np.int64)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_from_python(target: str, tmp_path: Path) -> None:
    report = optimize(CNN, DIGITS, target=target, output=tmp_path / "q.onnx", calibrate="minmax")
    assert report.ok, report.gates
    assert [path.name for path in tmp_path.iterdir()] == ["q.onnx"]
    model = onnx.load(report.output)
    onnx.checker.check_model(model, full_check=True)
    source = onnx.load(CNN)
    for ours, theirs in ((model.graph.input, source.graph.input),
                         (model.graph.output, source.graph.output)):  # fmt: skip
        assert list(ours) == list(theirs)  # names, dtypes and the free batch
    assert engine(report).sqnr_db > 30.0  # measured: 33.1 for vitis-xint8, 40 and more else
    assert read_metadata(report.output)["qpass.target"] == target


@pytest.mark.parametrize("model", [CNN, VIT], ids=lambda path: path.stem)
@pytest.mark.parametrize(("target", "name"), [("ort-x86", "ort"), ("openvino", "openvino")])
def test_every_linear_op_runs_in_integers(
    model: Path, target: str, name: str, tmp_path: Path
) -> None:
    output = tmp_path / "q.onnx"
    report = optimize(
        model, DIGITS, target=target, output=output, engines=(name,), repair=False,
        calibrate="minmax", samples=24,
    )  # fmt: skip
    wanted = [node for node in report.graph_map if node.op in LINEAR]
    assert {node.precision for node in wanted} == {"integer"}
    census = engine(report, name)
    assert [op for op in census.float_ops if op.op in LINEAR] == []
    assert census.integer_ops >= len(wanted)


@pytest.mark.parametrize(
    "data",
    [str(DIGITS), DIGITS, [{"image": batch} for batch in BATCHES[:4]],
     ({"image": batch} for batch in BATCHES[:4]), Loader(), {"image": BATCHES[0]}],
    ids=["text", "path", "list", "generator", "loader", "arrays"],
)  # fmt: skip
def test_forms_of_samples(data: Any, tmp_path: Path) -> None:
    report = optimize(
        CNN, data, output=tmp_path / "q.onnx", samples=6, batch_size=4, calibrate="minmax"
    )
    assert report.ok
    assert report.cost.samples == 6  # of 8 and more, a quarter is held out


@pytest.mark.parametrize("name", sorted(TINY))
def test_both_exporters(name: str, tmp_path: Path) -> None:
    value = onnx.load(TINY[name]).graph.input[0]
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
    report = optimize(TINY[name], normal((16, *sizes), value.name), output=tmp_path / "q.onnx")
    assert report.ok, report.gates
    assert engine(report).integer_ops == engine(report).planned_integer_ops > 0


def test_report_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), normal())
    data = json.loads(report.to_json())
    assert data.keys() >= REPORT_KEYS
    assert data["schema"] == 1
    assert data["nodes"].keys() == {"float", "quantized", "added_at_runtime"}
    assert data["nodes"]["added_at_runtime"] == 0
    assert data["engines"][0].keys() >= {
        "name", "version", "integer_ops", "float_ops", "latency_ms", "speedup", "sqnr_db",
        "cosine", "optimizer_diff_db",
    }  # fmt: skip
    assert data["engines"][0]["latency_ms"].keys() == {"float", "quantized"}
    assert data["cost"].keys() >= {
        "seconds_total", "seconds_by_stage", "float_forward_seconds", "peak_rss_bytes", "samples",
    }  # fmt: skip
    assert data["cost"]["samples"] == 9
    assert [layer["name"] for layer in data["layers"]] == ["c0", "c1", "head"]
    assert all(
        layer.keys() >= {"op", "sqnr_db_before", "sqnr_db_after"} for layer in data["layers"]
    )
    assert all(gate.keys() == {"name", "wanted", "got", "passed"} for gate in data["gates"])
    assert "metric" not in data
    assert data["output"] == str(tmp_path / "m.int8.onnx")


def test_default_output() -> None:
    assert default_output(Path("a/m.onnx"), "w8a8") == Path("a/m.int8.onnx")
    assert default_output(Path("a/m.onnx"), "w4") == Path("a/m.w4.onnx")


def test_manifest_says_what_from_and_how(tmp_path: Path) -> None:
    path = saved(changed(small_model(), lambda m: m.metadata_props.add(key="mine", value="1")),
                 tmp_path)  # fmt: skip
    report = optimize(path, normal(), seed=3)
    found = read_metadata(report.output)
    assert found["mine"] == "1"
    assert found["qpass.target"] == "ort-x86"
    assert found["qpass.precision"] == "w8a8"
    assert len(found["qpass.source_sha256"]) == len(found["qpass.samples_sha256"]) == 64
    options = json.loads(found["qpass.options"])
    assert options["seed"] == 3
    assert not {"report", "cache", "jobs"} & options.keys()  # do not change the result


def test_weights_only_needs_no_samples(tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), None, precision="w8")
    assert report.output == str(tmp_path / "m.w8.onnx")
    assert report.cost.samples == 0
    ops = op_types(report.output)
    assert "QuantizeLinear" not in ops
    assert "DequantizeLinear" in ops


def test_weights_only_compares_when_there_are_samples(tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), normal(), precision="w8")
    assert engine(report).sqnr_db > 40.0  # 8-bit weights alone: 6 dB a bit
    assert report.cost.samples == 0


def test_sixteen_bit_activations_are_marked_as_simulated(tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), normal(), precision="w8a16")
    assert any(note.startswith("SIMULATED") for note in report.notes)
    assert report.ok, "float kernels of a simulated precision are no failure"
    types = {proto.data_type for proto in onnx.load(report.output).graph.initializer}
    assert onnx.TensorProto.UINT16 in types


@pytest.mark.parametrize(
    ("precision", "target"), [("w4a8", "ort-x86"), ("w5a8", "ort-x86"), ("w4a8", "openvino")]
)
def test_zero_points_of_weights_are_said(tmp_path: Path, precision: str, target: str) -> None:
    path = saved(small_model(), tmp_path)
    report = optimize(path, normal(), precision=precision, target=target, low_bit_edges=True)
    said = [note for note in report.notes if "have zero points" in note]
    assert len(said) == ((precision, target) == ("w4a8", "ort-x86"))


@pytest.mark.parametrize(
    ("count", "holdout", "apart"), [(40, 0.25, 10), (40, 0.0, 0), (40, 0.15, 0), (12, 0.25, 0)]
)
def test_samples_of_the_verification_judge_models(
    count: int, holdout: float, apart: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where eight or more are held out; otherwise some of the calibration samples judge."""
    seen: dict[str, list[float]] = {"batches": [], "judges": []}

    def spy(_: Any, __: Any, batches: Any, *args: Any, judges: Any, **options: Any) -> Any:
        for name, some in (("batches", batches), ("judges", judges)):
            seen[name] += [float(x.sum()) for feeds in some for x in feeds["x"]]
        return round_weights(_, __, batches, *args, judges=judges, **options)

    monkeypatch.setattr("qpass.pipeline.round_weights", spy)
    data = normal((count, 3, 8, 8))
    optimize(saved(small_model(), tmp_path), data, precision="w4a8", holdout=holdout)
    assert len(seen["judges"]) == apart
    assert len(seen["batches"]) == count - np.ceil(count * holdout)
    assert not set(seen["judges"]) & set(seen["batches"])


def test_random_data_is_marked(tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), "random", samples=8)
    assert any(note.startswith("RANDOM DATA") for note in report.notes)


def test_nothing_held_out_is_said(tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), normal(), holdout=0.0)
    assert any("no sample was held out" in note for note in report.notes)
    assert report.cost.samples == 12


def test_keep_leaves_nodes_in_float(tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), normal(), keep=["c*"], repair=False)
    kinds = precision_of(report)
    assert (kinds["c0"], kinds["c1"], kinds["head"]) == ("float", "float", "integer")


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_a_range_method_can_be_forced(method: str, tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), normal(), calibrate=method)
    assert engine(report).sqnr_db > 20.0  # measured: 33 to 38
    assert not any("ranges by trial" in note for note in report.notes)


def test_too_little_memory_is_said_and_nothing_is_run(tmp_path: Path) -> None:
    report = optimize(saved(small_model(), tmp_path), None, precision="w8", memory="1kB")
    assert report.engines == ()
    assert any(note.startswith("NOT VERIFIED") for note in report.notes)


def test_progress_counts_the_samples_and_the_units(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    optimize(
        saved(small_model(), tmp_path),
        normal(),
        precision="w4a8",
        round="gptq",
        progress=lambda *call: calls.append(call),
    )
    last = {stage: (done, total) for stage, done, total in calls}
    assert last["calibrate"][0] == 9
    walks = {stage: ends for stage, ends in last.items() if stage != "calibrate"}
    assert "round (gptq)" in walks
    assert any(stage.startswith("compensate") for stage in walks)
    assert all(done == total and done > 1 for done, total in walks.values())


# ------------------------------------------------------------------------ unusual models


def test_body_of_if_is_kept(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,3,8,8] x, bool[1] c) => (float[N,8,8,8] y) {
      [conv] a = Conv<pads = [1,1,1,1]>(x, w)
      [if] b = If(c) <
        then_branch = t () => (float[N,8,8,8] p) { p = Relu(a) },
        else_branch = e () => (float[N,8,8,8] q) { q = Neg(a) }
      >
      [last] y = Conv<pads = [1,1,1,1]>(b, v)
    }
    """
    path = saved(model_of(text, w=(8, 3, 3, 3), v=(8, 8, 3, 3)), tmp_path)
    samples = [{**row, "c": np.array([True])} for row in rows(normal((8, 3, 8, 8)))]
    report = optimize(path, samples, calibrate="minmax", repair=False)
    assert "If" in op_types(report.output)
    assert precision_of(report)["last"] == "integer"
    assert engine(report).sqnr_db > 25.0  # measured: 37


def test_half_precision_model(tmp_path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(small_model())
    report = optimize(saved(half, tmp_path), {"x": normal()["x"].astype(np.float16)})
    graph = onnx.load(report.output).graph
    half_type = onnx.TensorProto.FLOAT16
    assert [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)] == [half_type] * 2
    assert engine(report).integer_ops == 3
    assert engine(report).sqnr_db > 25.0


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    onnx.save(
        small_model(), path, save_as_external_data=True, size_threshold=64, location="big.data"
    )
    report = optimize(path, normal())
    assert report.ok
    assert engine(report).sqnr_db > 25.0
    assert report.sizes.float_bytes == path.stat().st_size + (tmp_path / "big.data").stat().st_size


def test_two_inputs_one_of_them_integer(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (int64[N,5] ids, float[N,5,16] x) => (float[N,5,16] y) {
      [embed] a = Gather(table, ids)
      [add] b = Add(a, x)
      [fc] c = MatMul(b, w)
      [act] y = Tanh(c)
    }
    """
    path = saved(model_of(text, table=(7, 16), w=(16, 16)), tmp_path)
    ids = np.random.default_rng(0).integers(0, 7, (12, 5))
    report = optimize(path, {"ids": ids, **normal((12, 5, 16))}, repair=False)
    assert precision_of(report)["fc"] == "integer"
    assert engine(report).sqnr_db > 25.0
    assert [v.name for v in onnx.load(report.output).graph.input] == ["ids", "x"]


def test_dynamic_activations(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,5,16] x) => (float[N,5,16] y) {
      [fc] a = MatMul(x, w)
      [act] b = Tanh(a)
      [out] y = MatMul(b, v)
    }
    """
    path = saved(model_of(text, w=(16, 16), v=(16, 16)), tmp_path)
    report = optimize(path, normal((12, 5, 16)), activations="dynamic", repair=False)
    counts = engine(report).op_counts
    assert counts["DynamicQuantizeMatMul"] == 2
    assert engine(report).sqnr_db > 30.0
    session = ort.InferenceSession(report.output, providers=["CPUExecutionProvider"])
    for batch in (1, 3):  # the batch stays free
        assert session.run(None, normal((batch, 5, 16)))[0].shape == (batch, 5, 16)


def rows(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """One dict per entry of axis 0, which stays as a batch of one."""
    count = len(next(iter(arrays.values())))
    return [{name: a[i : i + 1] for name, a in arrays.items()} for i in range(count)]


# ------------------------------------------------------------- statistics, plan, compare, verify


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


def test_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(small_model(), tmp_path)
    before = listing(tmp_path)
    monkeypatch.setattr("qpass.api.verify_and_repair", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimize(path, normal())
    assert listing(tmp_path) == before
