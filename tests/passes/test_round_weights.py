"""Rounding whole models: closer to float on unseen samples, and nothing but integers and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qpass
from qpass.dtypes import INT8
from qpass.errors import RecipeError
from qpass.graph import Graph, array_of
from qpass.passes.model_gate import Verdict
from qpass.passes.round_weights import QUICK, Method, round_weights
from qpass.passes.rounding.refit import choose_refit
from qpass.passes.rounding.replay import replay, write_offsets
from qpass.passes.rounding.scales import SHARES
from qpass.qparams import QParams
from qpass.quantize import timed
from tests.folds import graph_of, normal, rounded
from tests.jobs import CNN, DIGITS
from tests.rounded import fidelity, numbers_of, quantized_at
from tests.small_models import feeds_of, residual_cnn, transformer

METHODS: tuple[Method, ...] = ("auto", "gptq", "erq", "unit")
EPSILON = 2.0**-22  # two roundings to float32, in a logarithm
MODELS: tuple[Callable[[], Graph], ...] = (residual_cnn, transformer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_closer_to_float_with_the_same_structure(
    model: Callable[[], Graph], method: Method
) -> None:
    reference = model()
    graph, table, plan = quantized_at(reference, "w4a8")
    numbers = numbers_of(plan, table)
    before, structure = fidelity(reference, graph), graph.to_text()
    scales = {
        name: array_of(t).copy() for name, t in graph.tensors().items() if name.endswith("_scale")
    }
    rounding = round_weights(reference, graph, feeds_of(reference, 32), numbers, method=method)
    assert fidelity(reference, graph) > before + 1.0
    assert graph.to_text() == structure
    for name, scale in scales.items():
        found = array_of(graph.tensors()[name])
        if found.ndim:  # of a weight, by channel: from 0.8 to 1.25 of what they were
            assert (np.abs(np.log(found / scale)) <= np.log(max(SHARES)) + EPSILON).all()
        else:
            np.testing.assert_array_equal(found, scale)
    assert rounding.report.changed == len(rounding.layers) > 0
    names = {*rounding.layers, *(refusal.where for refusal in rounding.report.refusals)}
    assert names == set(numbers)
    for name, layer in rounding.layers.items():
        integers = layer.integers.astype(np.int32)
        assert integers.min() >= numbers[name].qmin
        assert integers.max() <= numbers[name].qmax


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_and_a_replay_give_the_same_graph(method: Method) -> None:
    reference = residual_cnn()
    graphs, roundings = [], []
    for _ in range(2):
        graph, table, plan = quantized_at(reference, "w4a8")
        numbers = numbers_of(plan, table)
        batches = feeds_of(reference, 16)
        roundings.append(round_weights(reference, graph, batches, numbers, method=method, seed=3))
        graphs.append(graph)
    again, table, plan = quantized_at(reference, "w4a8")
    report = replay(roundings[0], reference, again, numbers_of(plan, table))
    assert report.changed == roundings[0].report.changed
    # What the user waited for is the rounding.
    assert timed(report, 0.0).seconds > roundings[0].report.seconds > 0.0
    assert graphs[0].fingerprint() == graphs[1].fingerprint() == again.fingerprint()


def test_offsets_can_be_left_to_others_and_written_later() -> None:
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, "w4a8")
    numbers = numbers_of(plan, table)
    rounding = round_weights(reference, graph, feeds_of(reference, 32), numbers, method="gptq")
    assert any(layer.offsets for layer in rounding.layers.values())
    bare, _, _ = quantized_at(reference, "w4a8")
    replay(rounding, reference, bare, numbers, offsets=False)
    assert bare.fingerprint() != graph.fingerprint()
    write_offsets(rounding, reference, bare, numbers)
    assert bare.fingerprint() == graph.fingerprint()


@pytest.mark.parametrize("worse", [
    Verdict(before_db=20.0, after_db=19.0, gain_db=-1.0, gain_error_db=0.1),
    Verdict(before_db=20.0, after_db=19.0, gain_db=2.0, gain_error_db=0.1),
    Verdict(before_db=20.0, after_db=20.5, gain_db=0.5, gain_error_db=0.6),
])  # fmt: skip
def test_the_model_is_the_judge(worse: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are better one by one stay as they were when the model's outputs are not."""
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, "w4a8")
    before = graph.fingerprint()
    monkeypatch.setattr("qpass.passes.model_verdict.judge", lambda *_: worse)
    rounding = round_weights(
        reference, graph, feeds_of(reference, 32), numbers_of(plan, table), method="gptq"
    )
    assert graph.fingerprint() == before
    assert rounding.report.changed == 0
    (refusal,) = [r for r in rounding.report.refusals if r.where == "model"]
    assert worse.sentence in refusal.reason


def test_one_standard_error_is_enough_for_layers_that_have_passed_gates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, "w4a8")
    better = Verdict(before_db=20.0, after_db=20.5, gain_db=0.5, gain_error_db=0.4)
    monkeypatch.setattr("qpass.passes.model_verdict.judge", lambda *_: better)
    rounding = round_weights(
        reference, graph, feeds_of(reference, 32), numbers_of(plan, table), method="gptq"
    )
    assert rounding.report.changed > 0


def test_activations_in_files_change_nothing() -> None:
    reference = residual_cnn()
    found = []
    for memory in (1 << 30, 1 << 12):
        graph, table, plan = quantized_at(reference, "w4a8")
        round_weights(
            reference,
            graph,
            feeds_of(reference, 8),
            numbers_of(plan, table),
            method="unit",
            memory_bytes=memory,
        )
        found.append(graph.fingerprint())
    assert found[0] == found[1]


def test_one_batch_is_not_enough() -> None:
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, "w4a8")
    before = graph.fingerprint()
    rounding = round_weights(
        reference, graph, feeds_of(reference, 1), numbers_of(plan, table), method="gptq"
    )
    assert rounding.report.changed == 0
    assert "held out" in rounding.report.refusals[0].reason
    assert graph.fingerprint() == before


def linear(weight: np.ndarray[Any, Any], body: str = "") -> tuple[Graph, Graph, QParams]:
    """One MatMul, float and with the nearest integers of 4 bits."""
    constants = rounded("w", weight, 1, steps=7)
    scale = constants["w_scale"]
    inputs, outputs = "float[N, 6] x", "float[N, 4] y"
    body = body or "[fc] y = MatMul (x, w)"
    dq = "w = DequantizeLinear <axis = 1> (w_int, w_scale, w_zero)\n"
    numbers = QParams(
        scale=scale, zero_point=np.zeros(4, np.int8), storage=INT8, qmin=-7, qmax=7,
        axis=1,
    )  # fmt: skip
    return (
        graph_of(inputs, outputs, body, w=weight),
        graph_of(inputs, outputs, dq + body, **constants),
        numbers,
    )


def rows(count: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    return [{"x": normal((16, 6), seed=i)} for i in range(count)]


def test_integers_that_are_exact_stay() -> None:
    """The gate: another rounding cannot be better, so none is written."""
    scale = np.float32(0.25)
    integers = np.random.default_rng(0).integers(-6, 7, (6, 4))
    integers[0] = 7
    reference, graph, numbers = linear((integers * scale).astype(np.float32))
    rounding = round_weights(reference, graph, rows(8), {"fc": numbers}, method="gptq")
    assert rounding.report.changed == 0
    assert "the nearest integers stay" in rounding.report.refusals[0].reason
    np.testing.assert_array_equal(array_of(graph.tensors()["w_int"]), integers)


def test_a_layer_without_signal_is_named() -> None:
    reference, graph, numbers = linear(normal((6, 4), seed=1))
    nothing = [{"x": np.zeros((4, 6), np.float32)} for _ in range(4)]
    rounding = round_weights(reference, graph, nothing, {"fc": numbers}, method="unit")
    (refusal,) = rounding.report.refusals
    assert refusal.where == "fc"
    assert "always the same" in refusal.reason


def wide(steps: int, inputs: int) -> tuple[Graph, Graph, QParams]:
    """One MatMul with so many levels and inputs."""
    weight = normal((inputs, 4), seed=1)
    constants = rounded("w", weight, 1, steps=steps)
    shapes = f"float[N, {inputs}] x", "float[N, 4] y"
    body = "[fc] y = MatMul (x, w)"
    dq = "w = DequantizeLinear <axis = 1> (w_int, w_scale, w_zero)\n"
    numbers = QParams(
        scale=constants["w_scale"], zero_point=np.zeros(4, np.int8), storage=INT8, qmin=-steps,
        qmax=steps, axis=1,
    )  # fmt: skip
    return graph_of(*shapes, body, w=weight), graph_of(*shapes, dq + body, **constants), numbers


@pytest.mark.parametrize(
    ("steps", "inputs", "changed"),
    [(127, 24, True), (127, QUICK.inputs + 1, False), (7, QUICK.inputs + 1, True)],
)
def test_auto_leaves_wide_layers_with_many_levels(steps: int, inputs: int, changed: bool) -> None:
    reference, graph, numbers = wide(steps, inputs)
    mixing = normal((inputs, inputs), seed=2) * np.float32(inputs**-0.5)
    batches = [{"x": normal((256, inputs), seed=i) @ mixing} for i in range(8)]
    rounding = round_weights(reference, graph, batches, {"fc": numbers}, method="auto")
    assert rounding.report.changed == changed
    if not changed:
        (refusal,) = rounding.report.refusals
        assert f"{inputs} inputs" in refusal.reason


def test_shared_integers_are_refused() -> None:
    body = "[fc] a = MatMul (x, w)\n[other] b = MatMul (x, w)\ny = Add (a, b)"
    reference, graph, numbers = linear(normal((6, 4), seed=1), body)
    rounding = round_weights(reference, graph, rows(8), {"fc": numbers}, method="gptq")
    (refusal,) = rounding.report.refusals
    assert "another op reads the same integers" in refusal.reason


def test_digits_at_four_bits(tmp_path: Any) -> None:
    """The whole way: options, calibration, rounding, verification."""
    found = {}
    for method in ("rtn", "unit"):
        report = qpass.optimize(
            CNN,
            data=DIGITS,
            precision="w4a8",
            round=method,
            compensate="none",
            calibrate="minmax",
            samples=48,
            engines=("ort",),
            output=tmp_path / f"{method}.onnx",
        )
        found[method] = report.engines[0].sqnr_db
        passes = [p.name for p in report.passes]
        assert ("round_weights" in passes) == (method == "unit")
    assert found["unit"] is not None
    assert found["rtn"] is not None
    assert found["unit"] > found["rtn"] + 6.0


def test_auto_needs_no_samples_where_only_weights_change(tmp_path: Any) -> None:
    report = qpass.optimize(CNN, precision="w8", engines=(), output=tmp_path / "m.onnx")
    assert report.ok
    assert all(p.name != "round_weights" for p in report.passes)


def test_rounding_with_data_needs_data(tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match="--round gptq needs samples"):
        qpass.optimize(CNN, precision="w4", round="gptq", output=tmp_path / "m.onnx")


@pytest.mark.parametrize("model", MODELS)
def test_auto_refits_behind_inputs_of_few_levels(model: Callable[[], Graph]) -> None:
    """There the noise of the input is worth more than that of the weight."""
    reference = model()
    found: dict[bool, float] = {}
    for refit in (False, True):
        graph, table, plan = quantized_at(reference, "w4a4")
        numbers = numbers_of(plan, table)
        coarse = numbers if refit else ()
        batches = feeds_of(reference, 32)
        round_weights(reference, graph, batches, numbers, method="auto", coarse=coarse)
        found[refit] = fidelity(reference, graph)
    assert found[True] > found[False]


@pytest.mark.parametrize(
    ("method", "batches", "coarse", "refitted"),
    [
        ("auto", 12, False, False),
        ("auto", 12, True, True),
        ("auto", 48, False, False),
        ("unit", 12, False, False),
        ("unit", 12, True, True),
        ("unit", 48, False, True),
        ("erq", 12, False, True),
    ],
)
def test_refits_where_the_rows_can_carry_it(
    method: Any, batches: int, coarse: bool, refitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows an input, two in units, or an input of few levels, where there is more to gain."""
    reference = residual_cnn()
    seen: dict[int, int] = {}

    def spy(weight: Any, sums: Any, held: Any) -> Any:
        seen[weight.shape[1]] = sums.count
        return choose_refit(weight, sums, held)

    monkeypatch.setattr("qpass.passes.rounding.way.choose_refit", spy)
    graph, table, plan = quantized_at(reference, "w4a8")
    numbers = numbers_of(plan, table)
    samples, names = feeds_of(reference, batches), numbers if coarse else ()
    # Batches hold 2 samples, a quarter is held out: 12 give the head (24 inputs) 18 rows, 48 give
    # it 72; the stem has 2,592 or more.
    round_weights(reference, graph, samples, numbers, method=method, coarse=names)
    assert 27 in seen
    assert (24 in seen) is refitted


@pytest.mark.parametrize(
    ("precision", "refitted"), [("w8a8", set()), ("w4a8", {27}), ("w4a4", {24, 27})]
)
def test_edges_with_many_levels_make_up_for_few_elsewhere(
    precision: str, refitted: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stem (27 inputs) has enough rows for it, the head (24) only where inputs are coarse."""
    reference = residual_cnn()
    seen: set[int] = set()

    def spy(weight: Any, sums: Any, held: Any) -> Any:
        seen.add(weight.shape[1])
        return choose_refit(weight, sums, held)

    monkeypatch.setattr("qpass.passes.rounding.way.choose_refit", spy)
    graph, table, plan = quantized_at(reference, precision, low_bit_edges=False)
    numbers = numbers_of(plan, table)
    narrow = {name for name, one in numbers.items() if one.qmax < 100}
    edges = set(numbers) - narrow
    assert precision == "w8a8" or len(edges) == 2
    coarse = narrow if precision == "w4a4" else ()
    round_weights(reference, graph, feeds_of(reference, 12), numbers, method="auto", coarse=coarse)
    assert seen & {24, 27} == refitted
