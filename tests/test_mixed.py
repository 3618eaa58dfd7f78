"""Bits by layer for a budget: the search, what it says, and the plan that it leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qpass.api import make_options
from qpass.errors import RecipeError
from qpass.knapsack import Point
from qpass.mixed import MOST_POINTS, thinned
from qpass.plan import read_plan
from qpass.report.model import MixedReport, Report
from tests.jobs import model_of, optimize, saved

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
small (float[N,3,8,8] x) => (float[N,4] y) {
  [c0] a = Conv<pads = [1,1,1,1]>(x, w0)
  [r0] b = Relu(a)
  [c1] c = Conv<pads = [1,1,1,1]>(b, w1)
  [r1] d = Relu(c)
  [c2] e = Conv<pads = [1,1,1,1]>(d, w2)
  [r2] f = Relu(e)
  [c3] g = Conv(f, w3)
  [r3] h = Relu(g)
  [pool] i = GlobalAveragePool(h)
  [flat] j = Flatten(i)
  [head] y = Gemm<transB = 1>(j, w4)
}
"""
SHAPES = {
    "w0": (16, 3, 3, 3), "w1": (16, 16, 3, 3), "w2": (32, 16, 3, 3), "w3": (64, 32, 1, 1),
    "w4": (4, 64),
}  # fmt: skip
DATA = {"x": np.random.default_rng(5).standard_normal((24, 3, 8, 8)).astype(np.float32)}
QUICK: dict[str, Any] = {"compensate": "none", "equalize": False, "calibrate": "minmax"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(model_of(TEXT, **SHAPES), tmp_path)


def mixed(model: Path, **options: Any) -> tuple[Report, MixedReport]:
    values = {"precision": "w4a8", "mixed": True, **QUICK, **options}
    report = optimize(model, DATA, output=model.with_name("q.onnx"), **values)
    assert report.mixed is not None
    return report, report.mixed


def importable(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a module with a metric where `--eval` finds it."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def bits_of(path: str) -> dict[str, str]:
    return {n["name"]: n["bits"] for n in json.loads(Path(path).read_text())["nodes"] if n["bits"]}


def widths(path: str) -> dict[str, int]:
    """Bits of the stored weight of each layer, as the file has them."""
    graph = onnx.load(path).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    made = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    found = {}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            dq = made.get(node.input[1])
            kind = None if dq is None else kinds[dq.input[0]]
            found[node.name] = {None: 32, onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}[kind]
    return found


def stored_bytes(path: str) -> int:
    return sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)


def test_the_smallest_plan_that_was_measured_to_meet_the_budget(model: Path) -> None:
    low = optimize(model, DATA, precision="w4a8", output=model.with_name("a.onnx"), **QUICK)
    high = optimize(model, DATA, precision="w8a8", output=model.with_name("b.onnx"), **QUICK)
    before, after = low.engines[0].sqnr_db, high.engines[0].sqnr_db
    assert before is not None
    assert after is not None
    wanted = before + (after - before) / 4
    report, found = mixed(model, min_sqnr=wanted)
    assert report.ok
    assert found.met
    assert sum(report.cost.seconds_by_stage.values()) <= report.cost.seconds_total
    assert report.engines[0].sqnr_db >= wanted
    sizes = [stored_bytes(r.output) for r in (low, report, high)]
    assert sizes[0] < sizes[1] < sizes[2]
    (chosen,) = (p for p in found.points if p.chosen)
    assert chosen.measured == pytest.approx(report.engines[0].sqnr_db, abs=0.01)
    for point in found.points:  # nothing smaller that was measured meets it
        if point.measured is not None and point.weight_bytes < chosen.weight_bytes:
            assert point.measured < wanted
    # What the report says is in the file.
    said = {layer.name: layer.bits for layer in found.layers}
    stored = {"w4a8": 4, "w8a8": 8, "float": 32}
    assert widths(report.output) == {name: stored[bits] for name, bits in said.items()}
    assert {4, 8} <= set(widths(report.output).values())


def test_points_grow_in_size_and_in_predicted_accuracy(model: Path) -> None:
    _, found = mixed(model, min_sqnr=20.0)
    sizes = [p.weight_bytes for p in found.points]
    predicted = [p.predicted_db for p in found.points]
    assert sizes == sorted(set(sizes))
    assert predicted == sorted(set(predicted))
    assert found.points[-1].share_of_float < 1.0  # something is always in integers


def test_a_budget_that_nothing_meets(model: Path) -> None:
    report, found = mixed(model, min_sqnr=150.0)
    assert not report.ok
    assert not found.met
    assert report.output.endswith(".rejected.onnx")
    assert any("NO PLAN MEETS THE BUDGET" in note for note in report.notes)
    best = max(p.measured for p in found.points if p.measured is not None)
    assert next(p for p in found.points if p.chosen).measured == best


def test_a_budget_that_the_lowest_bits_meet(model: Path) -> None:
    report, found = mixed(model, min_sqnr=1.0)
    assert report.ok
    assert found.points[0].chosen
    assert {layer.bits for layer in found.layers} == {"w4a8", "w8a8"}  # stem and head keep 8
    assert any(note.startswith("SIMULATED") for note in report.notes)


@pytest.mark.parametrize("equalize", [False, True])
def test_the_plan_is_a_file_that_makes_the_result_again(model: Path, equalize: bool) -> None:
    """Scales of channels are chosen with the lowest bits, as in the search, before it is used."""
    options = {**QUICK, "equalize": equalize}
    report, found = mixed(model, min_sqnr=22.0, **options)
    assert equalize == any("suit the weights behind" in note for note in report.notes)
    path = Path(found.plan)
    assert path.name == "q.plan.json"
    edited = read_plan(path)
    assert {str(p) for p in edited.node_bits.values()} <= {"w4a8", "w8a8"}
    again = optimize(
        model,
        DATA,
        precision="w4a8",
        plan=str(path),
        output=model.with_name("again.onnx"),
        **options,
    )
    weights = [
        {t.name: numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer}
        for p in (report.output, again.output)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array.astype(np.float32), weights[1][name].astype(np.float32))


def test_bits_that_the_user_chose_are_kept(model: Path) -> None:
    _, found = mixed(model, min_sqnr=150.0, bits=("c1=w4a8",))
    assert {layer.name: layer.bits for layer in found.layers}["c1"] == "w4a8"


def test_weights_alone(model: Path) -> None:
    report, found = mixed(model, precision="w4", calibrate="auto", min_sqnr=25.0)
    assert report.ok
    assert {layer.bits for layer in found.layers} <= {"w4", "w8", "float"}


METRIC = """
import onnx
import numpy as np
import onnxruntime as ort

CALLS = []


def score(path):
    CALLS.append(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(5).standard_normal((24, 3, 8, 8)).astype(np.float32)
    return {"spread": -float(np.abs(session.run(None, {"x": x})[0] - REFERENCE).max())}
"""


def test_a_drop_of_the_users_metric(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importable("mixed_metric", METRIC, tmp_path, monkeypatch)
    import mixed_metric  # type: ignore[import-not-found]
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    mixed_metric.REFERENCE = session.run(None, DATA)[0]
    drop = 0.05 * float(np.abs(mixed_metric.REFERENCE).max())
    report, found = mixed(model, eval="mixed_metric:score", max_drop=drop)
    assert report.ok
    assert found.budget == "spread"
    assert found.wanted == pytest.approx(-drop)
    assert report.metric is not None
    assert report.metric.drop <= drop
    # the float model once, the result once, and once for each plan that was measured
    assert len(mixed_metric.CALLS) == 2 + sum(p.measured is not None for p in found.points)


def test_no_budget_no_search() -> None:
    with pytest.raises(RecipeError, match="needs a budget"):
        make_options(mixed=True)


def test_samples_are_needed(model: Path) -> None:
    with pytest.raises(RecipeError, match="needs samples"):
        optimize(model, None, precision="w4", mixed=True, min_sqnr=20.0)


def test_thinned_fronts_keep_their_ends() -> None:
    front = [Point(size=float(i), error=1.0 / (i + 1), levels=(i,)) for i in range(1000)]
    few = thinned(front)
    assert len(few) == MOST_POINTS
    assert (few[0], few[-1]) == (front[0], front[-1])
    assert thinned(front[:5]) == front[:5]


WORDS = """
<ir_version: 10, opset_import: ["": 21]>
words (int64[N,6] ids) => (float[N,6,48] y) {
  [embed] a = Gather(table, ids)
  [first] b = MatMul(a, w0)
  [act] c = Relu(b)
  [middle] d = MatMul(c, w1)
  [wave] e = Tanh(d)
  [head] y = MatMul(e, w2)
}
"""


def test_an_embedding_gets_the_bits_it_needs(tmp_path: Path) -> None:
    """Its rows reach everything behind: at 4 bits they alone miss this budget (20.1 dB)."""
    text = model_of(WORDS, table=(40, 64), w0=(64, 64), w1=(64, 64), w2=(64, 48))
    ids = {"ids": np.random.default_rng(3).integers(0, 40, (24, 6))}
    report = optimize(
        saved(text, tmp_path), ids, precision="w4", mixed=True, min_sqnr=21.0, compensate="none"
    )
    assert report.ok
    assert report.mixed is not None
    bits = {layer.name: layer.bits for layer in report.mixed.layers}
    assert bits["embed"] == "w8"
    assert "w4" in bits.values()
    weights = 40 * 64 + 64 * 64 * 2 + 64 * 48
    chosen = next(point for point in report.mixed.points if point.chosen)
    assert chosen.share_of_float == pytest.approx(chosen.weight_bytes / (4 * weights))
    assert chosen.share_of_float < 0.3


ATTENTION = """
<ir_version: 10, opset_import: ["": 21]>
attention (float[N,8,16] x) => (float[N,8,16] y) {
  [query] q = MatMul(x, wq)
  [key] k = MatMul(x, wk)
  [value] v = MatMul(x, wv)
  [turn] t = Transpose<perm = [0, 2, 1]>(k)
  [scores] s = MatMul(q, t)
  [shares] p = Softmax<axis = -1>(s)
  [context] c = MatMul(p, v)
  [out] y = MatMul(c, wo)
}
"""


def test_products_of_activations_get_8_bits_where_the_budget_asks(tmp_path: Path) -> None:
    """With them at 4 bits no bits of weights would do."""
    shapes = dict.fromkeys(("wq", "wk", "wv", "wo"), (16, 16))
    path = saved(model_of(ATTENTION, **shapes), tmp_path)
    samples = {"x": np.random.default_rng(3).standard_normal((24, 8, 16)).astype(np.float32)}
    narrow = optimize(
        path, samples, precision="w4a4", bits=("query=w8a8", "key=w8a8", "value=w8a8", "out=w8a8"),
        **QUICK,
    )  # fmt: skip
    least = narrow.engines[0].sqnr_db
    assert least is not None
    report = optimize(path, samples, precision="w4a4", mixed=True, min_sqnr=least + 3.0, **QUICK)
    assert report.ok
    assert report.mixed is not None
    bits = {layer.name: layer.bits for layer in report.mixed.layers}
    assert "w8a8" in (bits["scores"], bits["context"])
    planned = {node.name: node.precision for node in report.graph_map}
    assert planned["scores"] == planned["context"] == "integer"
    for point in report.mixed.points:  # they weigh nothing in the file
        assert point.weight_bytes <= 4 * 16 * 16 * 4 + 8


def test_a_plan_without_weights_has_nothing_to_choose(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[N,6,8] a, float[N,8,6] b) => (float[N,6,6] y) { [product] y = MatMul(a, b) }"""
    random = np.random.default_rng(3)
    samples = {
        "a": random.standard_normal((12, 6, 8)).astype(np.float32),
        "b": random.standard_normal((12, 8, 6)).astype(np.float32),
    }
    with pytest.raises(RecipeError, match="quantizes none"):
        optimize(saved(model_of(text), tmp_path), samples, mixed=True, min_sqnr=20.0, **QUICK)


FAILING = """
CALLS = []


def score(path):
    CALLS.append(path)
    if len(CALLS) == 2:  # the first of the plans; the float model comes before
        raise ValueError("a hiccup")
    return 1.0
"""


def test_a_plan_that_the_metric_fails_for_is_passed_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importable("failing_metric", FAILING, tmp_path, monkeypatch)
    report, found = mixed(model, eval="failing_metric:score", max_drop=0.5)
    assert report.ok
    assert found.met
    (note,) = [note for note in report.notes if "has no score" in note]
    assert "a hiccup" in note


UNSTEADY = """
import onnx


def score(path):
    kinds = {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) == 4}
    if onnx.TensorProto.INT8 not in kinds:  # the float model
        return 1.0
    wide = sum(t.data_type == onnx.TensorProto.INT8 for t in onnx.load(path).graph.initializer
               if len(t.dims) == 4)
    return 1.0 if wide == 1 else 0.0  # the stem alone has 8 bits
"""


def test_what_a_plain_run_would_give_competes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric need not grow with bits: bisection alone would go up and never come back."""
    importable("unsteady_metric", UNSTEADY, tmp_path, monkeypatch)
    report, found = mixed(model, eval="unsteady_metric:score", max_drop=0.5)
    assert report.ok
    assert found.points[0].chosen
    assert sum(p.measured is not None for p in found.points) > 2


def test_weights_of_3_bits_may_have_the_4_that_they_are_stored_in(model: Path) -> None:
    low = optimize(model, DATA, precision="w4a8", output=model.with_name("a.onnx"), **QUICK)
    wanted = low.engines[0].sqnr_db
    assert wanted is not None
    report, found = mixed(model, precision="w3a8", min_sqnr=wanted - 0.5)
    assert report.ok
    bits = {layer.name: layer.bits for layer in found.layers}
    assert "w4a8" in bits.values()
    assert stored_bytes(report.output) <= stored_bytes(low.output)  # w3 and w4 are one type


def test_bits_of_activations_come_before_those_of_weights(model: Path) -> None:
    """They weigh nothing in the file: from w4a4 the way leads over w4a8."""
    wide = optimize(model, DATA, precision="w4a8", output=model.with_name("w.onnx"), **QUICK)
    wanted = wide.engines[0].sqnr_db
    assert wanted is not None
    report, found = mixed(model, precision="w4a4", min_sqnr=wanted - 1.0)
    assert report.ok
    assert found.met
    assert "w4a8" in {layer.bits for layer in found.layers}
    assert stored_bytes(report.output) <= 1.1 * stored_bytes(wide.output)
