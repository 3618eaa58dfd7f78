"""Tuning of gains and offsets: better outputs, nothing added, and judged by samples not seen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qpass.errors import RecipeError  # noqa: E402
from qpass.graph import Graph, array_of  # noqa: E402
from qpass.passes.model_gate import Verdict, judge, outputs_of  # noqa: E402
from qpass.passes.tune import tune  # noqa: E402
from qpass.torch.executor_ops import OPS  # noqa: E402
from qpass.torch.tune import TunedLayer, tune_channels  # noqa: E402
from tests.folds import graph_of, normal  # noqa: E402
from tests.frozen_networks import on_the_grid  # noqa: E402
from tests.rounded import fidelity, quantized_at  # noqa: E402
from tests.small_models import feeds_of, mlp, residual_cnn, transformer  # noqa: E402

pytestmark = pytest.mark.torch
Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("model", [residual_cnn, transformer])
def test_closer_to_float_with_the_same_integers(model: Callable[[], Graph]) -> None:
    reference = model()
    graph, _, _ = quantized_at(reference, "w4a8")
    before, structure = fidelity(reference, graph), graph.to_text()
    integers = {
        name: array_of(t) for name, t in graph.tensors().items() if name.endswith("_quantized")
        and t.inputs == []
    }  # fmt: skip
    tuning = tune(reference, graph, feeds_of(reference, 24), steps=120, threads=1)
    assert tuning.report.changed > 0
    assert tuning.verdict is not None
    assert tuning.verdict.helps
    assert fidelity(reference, graph) > before + 0.5
    assert graph.to_text() == structure
    for name, values in integers.items():
        np.testing.assert_array_equal(array_of(graph.tensors()[name]), values)


def test_the_same_seed_gives_the_same_graph() -> None:
    found = []
    for seed in (1, 1, 2):
        reference = residual_cnn()
        graph, _, _ = quantized_at(reference, "w4a8")
        tune(reference, graph, feeds_of(reference, 12), steps=20, seed=seed, threads=1)
        found.append(graph.fingerprint())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_ops_that_share_a_bias_get_offsets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They learn what they learn with a bias each."""
    found: list[dict[str, tuple[Array, Array]]] = []

    def spy(*args: Any, **options: Any) -> dict[str, tuple[Array, Array]]:
        found.append(tune_channels(*args, **options))
        return found[-1]

    monkeypatch.setattr("qpass.torch.tune.tune_channels", spy)
    for shared in (True, False):
        reference = mlp(shared=shared)
        graph, _, _ = quantized_at(reference, "w4a8")
        tune(reference, graph, feeds_of(reference, 4), steps=4, threads=1)
    one, each = found
    for layer in each:
        assert each[layer][1].any()
        np.testing.assert_array_equal(one[layer], each[layer])


TEXT = ("float[N, 6] x", "float[N, 4] y", "[fc] m = MatMul (x, w)\ny = Add (m, b)")
WEIGHT, BIAS = normal((6, 4), seed=1), normal((4,), seed=2)
GAIN = np.array([0.95, 1.0, 1.02, 1.05], np.float32)
LAYER = TunedLayer(
    name="fc",
    weight="w",
    output="m",
    axis=-1,
    channels=4,
    gain=True,
    offset=True,
    shifted="y",
)


def tuned_line(
    wanted: Callable[[Array], Array], *, steps: int = 400, **options: Any
) -> tuple[Array, Array]:
    """Return gain and offset of a linear model after tuning to other outputs."""
    graph = graph_of(*TEXT, w=WEIGHT, b=BIAS)
    batches = [{"x": normal((16, 6), seed=i)} for i in range(20, 28)]
    outputs = [{"y": wanted(one["x"]).astype(np.float32)} for one in batches]
    found = tune_channels(
        list(graph.nodes), [LAYER], batches, outputs, steps=steps, threads=1, **options
    )
    return found["fc"]


def test_gain_and_offset_that_are_known_come_back() -> None:
    offset = np.array([0.1, 0.0, -0.1, 0.05])
    gain, shift = tuned_line(lambda x: (x @ WEIGHT) * GAIN + BIAS + offset)
    np.testing.assert_allclose(gain, GAIN, rtol=0, atol=2e-3)
    np.testing.assert_allclose(shift, offset, rtol=0, atol=5e-3)


@pytest.mark.parametrize("divisible", [False, True])
def test_it_asks_the_teacher(divisible: bool) -> None:
    """The batches say that all is well; what the teacher gives for their views says otherwise."""
    teacher = list(graph_of(*TEXT, w=WEIGHT * GAIN, b=BIAS).nodes)
    gain, shift = tuned_line(lambda x: x @ WEIGHT + BIAS, teacher=teacher, divisible=divisible)
    np.testing.assert_allclose(gain, GAIN, rtol=0, atol=2e-3)
    np.testing.assert_allclose(shift, 0.0, rtol=0, atol=5e-3)


def test_a_model_that_is_right_stays() -> None:
    reference = on_the_grid(residual_cnn(), "w8a8")
    graph, _, _ = quantized_at(reference, "w8")
    before = graph.fingerprint()
    report = tune(reference, graph, feeds_of(reference, 8), steps=5, threads=1).report
    assert report.changed == 0
    assert "no sure improvement" in report.refusals[0].reason
    assert graph.fingerprint() == before


def test_ops_that_stay_float_stay_as_they_are() -> None:
    reference = residual_cnn()
    graph = reference.copy()
    before = graph.fingerprint()
    report = tune(reference, graph, feeds_of(reference, 8), steps=5, threads=1).report
    assert report.changed == 0
    assert {refusal.reason for refusal in report.refusals[:-1]} == {"it stays float, and as it is"}
    assert graph.fingerprint() == before


def test_judges_leave_all_batches_to_learn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[int] = []

    def spy(_: Any, __: Any, batches: Any, *args: Any, **options: Any) -> Any:
        learned.append(len(batches))
        return tune_channels(_, __, batches, *args, **options)

    monkeypatch.setattr("qpass.torch.tune.tune_channels", spy)
    reference = residual_cnn()
    graph, _, _ = quantized_at(reference, "w4a8")
    batches, judges = feeds_of(reference, 8), feeds_of(reference, 2, seed=5)
    first = tune(reference, graph.copy(), batches, steps=2, threads=1).verdict
    second = tune(reference, graph.copy(), batches, steps=2, threads=1, judges=judges).verdict
    assert learned == [6, 8]
    assert first is not None
    assert second is not None
    names = [tensor.name for tensor in reference.outputs]
    wanted, got = (outputs_of(one, judges, names) for one in (reference, graph))
    assert second.before_db == pytest.approx(judge(wanted, got, got).before_db, abs=1e-3)
    assert first.before_db != pytest.approx(second.before_db, abs=1e-3)


@pytest.mark.parametrize("views", [False, True])
def test_without_views_it_has_to_be_surer(views: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    better = Verdict(before_db=20.0, after_db=21.0, gain_db=1.5, gain_error_db=1.0)
    monkeypatch.setattr("qpass.passes.tune.judge", lambda *_: better)
    monkeypatch.setattr("qpass.torch.views.has_views", lambda _: views)
    reference = residual_cnn()
    graph, _, _ = quantized_at(reference, "w4a8")
    report = tune(reference, graph, feeds_of(reference, 8), steps=2, threads=1).report
    assert (report.changed > 0) == views


def test_a_model_without_an_op_to_tune_is_refused() -> None:
    signature = ("float[2, 6, 8] a, float[2, 8, 4] b", "float[2, 6, 4] y")
    reference = graph_of(*signature, "y = MatMul (a, b)")
    graph, _, _ = quantized_at(reference, "w8a8")
    before = graph.fingerprint()
    report = tune(reference, graph, feeds_of(reference, 4), steps=2, threads=1).report
    assert [r.reason for r in report.refusals] == ["no linear op can take a gain or an offset"]
    assert report.changed == 0
    assert graph.fingerprint() == before


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = residual_cnn()
    graph, _, _ = quantized_at(reference, "w4a8")
    before = graph.fingerprint()
    report = tune(reference, graph, feeds_of(reference, 1), steps=5).report
    assert "held out" in report.refusals[0].reason
    without = {op: function for op, function in OPS.items() if op != "MaxPool"}
    monkeypatch.setattr("qpass.torch.executor.OPS", without)
    report = tune(reference, graph, feeds_of(reference, 4), steps=5).report
    assert "MaxPool has no gradient here (node_pooled)" in report.refusals[0].reason
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RecipeError, match="--tune needs torch"):
        tune(reference, graph, feeds_of(reference, 4), steps=5)
    assert graph.fingerprint() == before


def test_parts_of_a_view_add_up_to_the_view() -> None:
    """The gradient is the same; sums of float32 are taken in another order."""
    teacher = list(graph_of(*TEXT, w=WEIGHT * GAIN, b=BIAS).nodes)
    (gain, shift), (gain_in_parts, shift_in_parts) = (
        tuned_line(lambda x: x @ WEIGHT, teacher=teacher, divisible=divisible, steps=5)
        for divisible in (False, True)
    )
    np.testing.assert_allclose(gain_in_parts, gain, rtol=0, atol=1e-6)
    np.testing.assert_allclose(shift_in_parts, shift, rtol=0, atol=1e-6)
