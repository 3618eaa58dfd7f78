"""Whole runs from Python: what is accepted, what comes out, what the report says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

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
BATCHES = np.split(normal((64, 3, 8, 8))["x"], 8)


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
    [str, Path, [{"x": batch} for batch in BATCHES[:4]],
     ({"x": batch} for batch in BATCHES[:4]), Loader(), {"x": BATCHES[0]}],
    ids=["text", "path", "list", "generator", "loader", "arrays"],
)  # fmt: skip
def test_forms_of_samples(data: Any, tmp_path: Path) -> None:
    if isinstance(data, type):  # of the path of a file
        np.savez(tmp_path / "x.npz", x=np.concatenate(BATCHES))
        data = data(tmp_path / "x.npz")
    path = saved(small_model(), tmp_path)
    report = optimize(path, data, samples=6, batch_size=4, calibrate="minmax")
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


def test_layers_run_in_what_the_engine_made_of_them(tmp_path: Path) -> None:
    options = {"samples": 16, "equalize": False, "calibrate": "minmax", "compensate": "none"}
    report = optimize(CNN, DIGITS, precision="w4a8", output=tmp_path / "q.onnx", **options)
    left = {op.node: op.reason for op in engine(report).float_ops}
    kinds = {layer.name: layer.precision for layer in report.layers}
    narrow = {name for name, kind in kinds.items() if kind == "float"}
    assert narrow
    assert narrow <= left.keys()
    assert all("no int4 kernel" in left[name] or "no uint4" in left[name] for name in narrow)
    assert "integer" in kinds.values()  # stem and head have 8 bits
    assert not {name for name, kind in kinds.items() if kind == "integer"} & left.keys()


def test_weights_that_are_rounded_with_samples_count_them(tmp_path: Path) -> None:
    options = {"precision": "w4", "low_bit_edges": True, "output": tmp_path / "q.onnx"}
    report = optimize(VIT, DIGITS, round="gptq", samples=16, **options)
    assert report.cost.samples == 16
    assert len(read_metadata(report.output)["qpass.samples_sha256"]) == 64
    assert "weights" in {layer.precision for layer in report.layers}
    # Scales of blocks are float16 behind a Cast, which engines fold at load.
    report = optimize(VIT, None, **options)
    assert "Cast" in op_types(report.output)
    assert report.nodes.added_at_runtime == 0
    assert report.cost.samples == 0


def test_an_engine_that_the_file_is_not_for_refuses_in_a_sentence(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    model = model_of(
        """
        <ir_version: 10, opset_import: ["": 21]>
        lm (int64[N,5] ids) => (float[N,5,40] y) {
          [e] a = Gather(table, ids)
          [m] b = MatMul(a, w)
          [h] y = MatMul(b, v)
        }
        """,
        table=random.standard_normal((40, 64)).astype(np.float32),
        w=(64, 64),
        v=(64, 40),
    )
    path = saved(model, tmp_path)
    report = optimize(path, None, precision="w4", engines=("ort", "openvino"), low_bit_edges=True)
    assert report.ok
    (note,) = (note for note in report.notes if note.startswith("not verified"))
    assert "openvino does not load m.w4.onnx, which is for ort-x86: GatherBlockQuantized" in note
    assert "src/" not in note


@pytest.mark.parametrize(
    ("target", "precision", "made"),
    [
        ("tensorrt", "w4a4", "w8a8"), ("vitis-xint8", "w4a8", "w8a8"), ("qnn-htp", "w3a8", "w4a8"),
        ("qnn-htp", "w4a8", "w4a8"),
    ],
)  # fmt: skip
def test_the_report_has_the_precision_of_the_file(
    tmp_path: Path, target: str, precision: str, made: str
) -> None:
    def widened(**options: Any) -> list[str]:
        report = optimize(
            CNN, DIGITS, target=target, output=tmp_path / "q.onnx", samples=16, equalize=False,
            calibrate="minmax", compensate="none", round="rtn", **options,
        )  # fmt: skip
        assert report.precision == read_metadata(report.output)["qpass.precision"]
        simulated = [note for note in report.notes if note.startswith("SIMULATED")]
        assert len(simulated) == (made == "w4a8")
        assert all(made in note for note in simulated)
        return [report.precision, *(n for n in report.notes if n.startswith("WIDER THAN ASKED"))]

    bits, *notes = widened(precision=precision)
    assert bits == made
    assert len(notes) == (precision != made)
    assert all(precision in note and made in note for note in notes)
    if made == "w8a8":
        bits, *notes = widened(bits=(f"*={precision}",))  # of one layer only
        assert (bits, len(notes)) == ("w8a8", 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "w3"}, "weights of 3 bits are stored as int4"),
        ({"precision": "w2"}, "weights of 2 bits are stored as int4"),
        ({"precision": "w6"}, "weights of 6 bits are stored as int8"),
        ({"precision": "w4"}, ""),
        ({"precision": "w8"}, ""),
        ({"precision": "w8", "target": "ort-x86-avx2"}, ""),  # 7 bits, which nobody asked for
        ({"precision": "w8", "block_size": 128, "target": "tensorrt"}, "--block-size 128 is used"),
        ({"precision": "w4", "block_size": 128}, ""),
        (
            {"precision": "w8", "accuracy_level": 0, "target": "openvino"},
            "--accuracy-level 0 is of",
        ),
        ({"precision": "w8", "accuracy_level": 0}, ""),
        ({"precision": "w4", "target": "tensorrt"}, "WIDER THAN ASKED: 6 of 6 layers"),
    ],
)
def test_weights_that_are_stored_in_another_way_are_said(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    output = tmp_path / "q.onnx"
    report = optimize(
        CNN, None, output=output, low_bit_edges="w8" not in options.values(), **options
    )
    signs = ("weights of", "--", "WIDER")
    notes = [note for note in report.notes if note.startswith(signs)]
    assert len(notes) == bool(text)
    assert all(note.startswith(text) for note in notes)


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


def test_samples_that_decide_no_rounding_are_said(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    for options, said in (({}, True), ({"round": "gptq"}, False), ({"precision": "w8a8"}, False)):
        report = optimize(path, normal(), **{"precision": "w4", "compensate": "none", **options})
        assert any("which looks at no samples" in note for note in report.notes) is said


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


def test_too_little_memory_is_said_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpass.api.FLOAT_MEMORY_FACTOR", 1e9)
    report = optimize(saved(small_model(), tmp_path), None, precision="w8")
    assert report.engines == ()
    assert any(note.startswith("NOT VERIFIED") for note in report.notes)


def test_repeated_samples_are_said(tmp_path: Path) -> None:
    path, data = saved(small_model(), tmp_path), normal()
    assert not any("REPEATED" in note for note in optimize(path, data).notes)
    data["x"][:] = data["x"][:1]
    (note,) = (note for note in optimize(path, data).notes if "REPEATED" in note)
    assert "only 1 of 9 calibration samples differ" in note


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


def test_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(small_model(), tmp_path)
    before = listing(tmp_path)
    monkeypatch.setattr("qpass.api.verify_and_repair", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimize(path, normal())
    assert listing(tmp_path) == before


def test_few_bits_that_no_layer_has_are_said(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[N,16] x) => (float[N,8] y) { a = MatMul(x, w) y = Relu(a) }"""
    path = saved(model_of(text, w=(16, 8)), tmp_path)
    for options, said in (({}, True), ({"low_bit_edges": True}, False)):
        report = optimize(path, normal((16, 16)), precision="w3a8", **options)
        assert any(note.startswith("NO LAYER HAS w3a8") for note in report.notes) is said
