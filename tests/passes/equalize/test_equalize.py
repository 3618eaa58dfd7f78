"""The whole step: a migrated model is closer to float, or it is the model that it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import qpass
from qpass.calibrate import input_specs, open_samples
from qpass.cli import main
from qpass.equalization import Job, equalize
from qpass.evidence import taps_of
from qpass.graph import Graph
from qpass.migration_trial import Trials
from qpass.passes.model_gate import Verdict
from qpass.targets import load_target
from tests.oracle import ort, ort_plain, reference, relative_error
from tests.small_models import policy_of

WIDTH = 16


def network(*, outlier: float = 60.0, seed: int = 0) -> Graph:
    """Norm, MatMul, Gelu, MatMul, where one channel of the norm and one behind Gelu stand out."""
    random = np.random.default_rng(seed)
    gain = np.ones(WIDTH)
    gain[3] = outlier
    up = random.standard_normal((WIDTH, 32)) / np.sqrt(WIDTH) / gain[:, None]
    up[:, 5] *= outlier
    down = random.standard_normal((32, 8)) / np.sqrt(32)
    down[5] /= outlier
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,6,{WIDTH}] x) => (float[N,6,8] y) {{'
        " n = LayerNormalization (x, g, b)  [up] h = MatMul (n, u)  a = Add (h, c)"
        "  t = Gelu (a)  [down] z = MatMul (t, d)  y = Add (z, e) }"
    )
    graph = Graph.from_text(
        text,
        g=gain.astype(np.float32),
        b=np.zeros(WIDTH, np.float32),
        u=up.astype(np.float32),
        c=np.zeros(32, np.float32),
        d=down.astype(np.float32),
        e=np.zeros(8, np.float32),
    )
    graph.infer_shapes()
    return graph


def feeds(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((1, 6, WIDTH)).astype(np.float32)} for _ in range(count)]


def job_of(graph: Graph, precision: str = "w8a8", target: str = "ort-x86") -> Job:
    return Job(
        target=load_target(target),
        policy=policy_of(precision),
        taps=taps_of,
        samples=open_samples(feeds(24), input_specs(graph.to_model())),
        held=feeds(12, seed=2),
        method="minmax",
        threads=1,
    )


def test_it_migrates_buys_one_mul_and_says_so():
    graph = network()
    before = graph.fingerprint()
    result = equalize(graph, job_of(graph))
    assert graph.fingerprint() == before
    assert result.report.changed == 2
    (mul,) = result.muls
    assert "down" in mul
    assert "Gelu in front takes no scale" in mul
    assert [node.op for node in result.graph.nodes].count("Mul") == 1
    assert "on held-out samples" in result.notes[0]
    inputs = feeds(1, seed=9)[0]
    wanted = reference(graph.to_model(), inputs)
    for engine in (reference, ort_plain, ort):
        assert relative_error(engine(result.graph.to_model(), inputs), wanted) < 1e-5


@pytest.mark.parametrize("precision", ["w4a8", "w3a8", "w2a8"])
def test_weights_of_few_bits_hide_no_purchase(precision: str):
    """To nearest, as they are then, their error alone is larger than what the Mul takes away."""
    graph = network()
    job = replace(job_of(graph), policy=policy_of(precision, low_bit_edges=True))
    (mul,) = equalize(graph, job).muls
    assert "down" in mul


@pytest.mark.parametrize(("precision", "few"), [("w8a8", False), ("w8a4", True)])
def test_with_few_levels_ranges_by_outputs_judge_as_well(precision: str, few: bool, monkeypatch):
    graph, seen = network(), []
    job = replace(job_of(graph), policy=policy_of(precision, low_bit_edges=True), method="auto")
    trials = Trials(job=job, make=lambda _: (graph, frozenset()), everything=frozenset())
    trials.prepare()
    run = Trials.outputs
    monkeypatch.setattr(
        Trials, "outputs", lambda self, chosen, how: (seen.append(how), run(self, chosen, how))[1]
    )
    trials.best_method(frozenset())
    assert ("output" in seen) is few


def test_with_few_levels_less_is_enough():
    many, few = (job_of(network(), precision) for precision in ("w8a8", "w8a4"))
    assert few.site_db < many.site_db
    assert few.model_db < many.model_db
    assert few.most_bought > many.most_bought
    assert few.confidence < many.confidence


def test_alike_channels_are_left_alone():
    graph = network(outlier=1.0)
    result = equalize(graph, job_of(graph))
    assert result.muls == ()
    assert all(refusal.reason for refusal in result.report.refusals)
    assert "down" not in "".join(result.notes)


def test_the_model_has_the_last_word(monkeypatch):
    worse = Verdict(before_db=30.0, after_db=20.0, gain_db=-10.0, gain_error_db=0.1)
    monkeypatch.setattr("qpass.equalization.judge", lambda *_: worse)
    graph = network()
    result = equalize(graph, job_of(graph))
    assert result.graph is graph
    assert result.report.changed == 0
    assert any("the model does not gain by it" in r.reason for r in result.report.refusals)


def test_a_graph_that_would_not_be_exact_is_not_taken(monkeypatch):
    monkeypatch.setattr("qpass.migration_trial.Trials.is_exact", lambda *_: False)
    graph = network()
    result = equalize(graph, job_of(graph))
    assert result.graph is graph
    assert "float outputs would change" in result.notes[0]


def test_known_ranges_tell_where_no_mul_is_worth_its_rows():
    graph = network(outlier=1.0)
    job = job_of(graph)
    stats = job.calibrate(graph, taps_of(graph, job.plan(graph)))
    result = equalize(graph, Job(**{**_fields(job), "stats": stats}))
    reasons = [refusal.reason for refusal in result.report.refusals]
    assert any("channels are alike, so no Mul is worth it" in reason for reason in reasons)
    assert "down" not in "".join(result.notes)


def test_the_statistics_are_those_of_the_migrated_graph():
    graph = network()
    job = job_of(graph)
    plain = job.calibrate(graph, taps_of(graph, job.plan(graph)))
    result = equalize(graph, Job(**{**_fields(job), "stats": plain}))
    assert result.report.changed
    fresh = job.calibrate(result.graph, taps_of(result.graph, job.plan(result.graph)))
    assert set(result.stats) == set(fresh)
    for name, stats in fresh.items():
        got = result.stats[name]
        assert (got.count, got.sampled) == (stats.count, stats.sampled)
        # Float32 sums of sixteen products: what is not calibrated again differs by their rounding,
        # 16 * 2**-24 of their size, or of 4 where terms cancel. Here they came out equal.
        np.testing.assert_allclose(got.channel_low, stats.channel_low, rtol=2.0**-20, atol=2.0**-18)
        np.testing.assert_allclose(
            got.channel_high, stats.channel_high, rtol=2.0**-20, atol=2.0**-18
        )
        weights, wanted = got.histogram.weights, stats.histogram.weights
        assert (weights is None) == (wanted is None)
        if weights is not None:
            assert weights.sum() == pytest.approx(wanted.sum(), rel=2.0**-20)


def test_it_is_deterministic():
    first, second = (equalize(network(), job_of(network())) for _ in range(2))
    assert first.graph.fingerprint() == second.graph.fingerprint()
    assert first.report == second.report


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "vitis-xint8"])
def test_other_targets_never_get_worse_by_it(target):
    graph = network()
    result = equalize(graph, job_of(graph, target=target))
    assert result.graph is graph or "->" in result.notes[0]


def test_a_fixed_range_keeps_its_tensor():
    graph = network()
    job = job_of(graph)
    policy = policy_of("w8a8", ranges={"n": (-1.0, 1.0)})
    result = equalize(graph, Job(**{**_fields(job), "policy": policy}))
    assert any("fixed by the plan" in refusal.reason for refusal in result.report.refusals)


def _fields(job: Job) -> dict[str, object]:
    return {name: getattr(job, name) for name in Job.__dataclass_fields__}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    model, data = tmp_path / "m.onnx", tmp_path / "x.npz"
    onnx.save(network().to_model(), model)
    np.savez(data, x=np.concatenate([f["x"] for f in feeds(64)]))
    return model, data


def test_on_by_default_and_off_when_asked(saved, tmp_path):
    model, data = saved
    options = {"engines": ("ort",), "repair": False, "jobs": 1, "compensate": "none"}
    on = qpass.optimize(model, data=data, output=tmp_path / "on.onnx", **options)
    off = qpass.optimize(model, data=data, output=tmp_path / "off.onnx", equalize=False, **options)
    assert any(note.startswith("added at run time: Mul") for note in on.notes)
    assert "equalize" in {p.name for p in on.passes}
    assert "equalize" not in {p.name for p in off.passes}
    assert on.engines[0].sqnr_db > off.engines[0].sqnr_db + 3.0


def test_the_plan_of_a_search_for_bits_is_that_of_the_model_as_it_was(saved, tmp_path):
    """A bought Mul is no node of the graph that a plan file meets."""
    model, data = saved
    options = {"engines": ("ort",), "repair": False, "jobs": 1, "compensate": "none"}
    found = qpass.optimize(
        model, data=data, output=tmp_path / "found.onnx", mixed=True, min_sqnr=20.0, **options
    )
    assert any(note.startswith("added at run time: Mul") for note in found.notes)
    again = qpass.optimize(
        model, data=data, output=tmp_path / "a.onnx", plan=found.mixed.plan, **options
    )
    assert any(note.startswith("added at run time: Mul") for note in again.notes)
    assert again.engines[0].sqnr_db == found.engines[0].sqnr_db


def test_statistics_of_a_file_belong_to_the_model_as_it_is(saved, tmp_path):
    model, data = saved
    stats = qpass.calibrate(model, data=data, output=tmp_path / "s.npz", target="ort-x86")
    report = qpass.optimize(
        model, data=data, output=tmp_path / "o.onnx", stats=str(stats), engines=("ort",), jobs=1
    )
    assert any("not migrated" in note for note in report.notes)
    assert "equalize" not in {p.name for p in report.passes}
    # The file is of all samples, also of those that are held out here.
    assert any("have seen the samples of the verification" in note for note in report.notes)
    fewer = qpass.calibrate(
        model, data=data, output=tmp_path / "f.npz", target="ort-x86", samples=40
    )
    report = qpass.optimize(
        model, data=data, output=tmp_path / "f.onnx", stats=str(fewer), engines=("ort",), jobs=1,
        samples=40,
    )  # fmt: skip
    assert not any("have seen" in note for note in report.notes)


def test_few_samples_are_said_to_be_too_few(saved, tmp_path):
    model, _ = saved
    report = qpass.optimize(
        model, data=feeds(10), output=tmp_path / "o.onnx", engines=("ort",), jobs=1
    )
    assert any("scales were not migrated" in note for note in report.notes)


@pytest.mark.parametrize(("flag", "taken"), [("--equalize", True), ("--no-equalize", False)])
def test_the_command_line_passes_the_flag_on(flag, taken, saved, tmp_path, monkeypatch):
    seen = {}

    def optimize(*_: object, **options: object) -> None:
        seen.update(options)
        raise qpass.UserError("stop here")

    monkeypatch.setattr("qpass.api.optimize", optimize)
    model, data = saved
    CliRunner().invoke(main, ["optimize", str(model), "--data", str(data), flag])
    assert seen["equalize"] is taken
