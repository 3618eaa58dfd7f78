"""Ranges by what is left behind the readers: smaller errors there, none of tensors of 8 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qpass
from qpass.calibrate import TensorStats, collect, open_samples
from qpass.calibrate.inputs import input_specs
from qpass.choose import choose_qtable
from qpass.evidence import taps_of
from qpass.graph import Graph
from qpass.output_ranges import METHOD, SHARES, solve_output_ranges
from qpass.passes.equalize.linear_error import corrected_error
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.qparams import TensorSpec, choose_qparams, fake_quantize
from qpass.targets import load_target
from qpass.trial import Trial
from tests.small_models import feeds_of, policy_of, residual_cnn, transformer

TARGET = load_target("ort-x86")
ATTENTION = """
<ir_version: 10, opset_import: ["": 21]>
attention (float[1,2,24,64] scores, float[1,2,64,8] v) => (float[1,2,24,8] y)
{
    p = Softmax <axis = -1> (scores)
    [context] y = MatMul (p, v)
}
"""
TOKENS = """
<ir_version: 10, opset_import: ["": 21]>
tokens (float[1,40,16] x) => (float[1,40,12] y)
{
    [fc] y = MatMul (x, w)
}
"""


def planned(
    graph: Graph, samples: list[dict[str, np.ndarray]], precision: str = "w4a4"
) -> tuple[Plan, dict[str, TensorStats]]:
    plan = make_plan(graph, TARGET, policy_of(precision, low_bit_edges=True))
    taps = taps_of(graph, plan)
    source = open_samples(samples, input_specs(graph.to_model()))
    return plan, dict(collect(graph.to_model(), taps, source, batch_size=1).stats)


def attention() -> tuple[Graph, list[dict[str, np.ndarray]]]:
    """Every eighth query looks at one key, the others at all."""
    graph = Graph.from_text(ATTENTION)
    graph.infer_shapes()
    random = np.random.default_rng(2)
    samples = []
    for _ in range(8):
        scores = random.standard_normal((1, 2, 24, 64))
        scores[:, :, ::8] += 9.0 * np.eye(24, 64)[::8]
        values = random.standard_normal((1, 2, 64, 8)) + 0.5
        samples.append({"scores": scores.astype(np.float32), "v": values.astype(np.float32)})
    return graph, samples


def tokens() -> tuple[Graph, list[dict[str, np.ndarray]]]:
    """One token in forty is a hundred times as large, in two channels."""
    random = np.random.default_rng(3)
    graph = Graph.from_text(TOKENS, w=random.standard_normal((16, 12)).astype(np.float32))
    graph.infer_shapes()
    samples = []
    for _ in range(8):
        x = random.standard_normal((1, 40, 16))
        x[:, 0, :2] *= 100.0
        samples.append({"x": x.astype(np.float32)})
    return graph, samples


def attention_error(samples: list[dict[str, np.ndarray]], spec: TensorSpec, ends) -> float:
    """What gains and offsets by column leave of the error of softmax(scores) v, over all rows."""
    numbers = choose_qparams(spec, *ends)
    got, wanted = [], []
    for feeds in samples:
        power = np.exp(feeds["scores"] - feeds["scores"].max(axis=-1, keepdims=True))
        p = (power / power.sum(axis=-1, keepdims=True)).astype(np.float32)
        got.append(fake_quantize(p, numbers) @ feeds["v"])
        wanted.append(p @ feeds["v"])
    pair = np.concatenate(got, axis=-2), np.concatenate(wanted, axis=-2)
    return float(corrected_error(*pair).sum())


def test_a_softmax_gets_the_range_that_serves_its_product():
    graph, samples = attention()
    plan, stats = planned(graph, samples)
    found = solve_output_ranges(graph, plan, stats, samples)
    (spec,) = (d.spec for d in plan.activations() if d.tensor == "p")
    choice = found["p", spec]
    assert choice.method == METHOD
    mine = attention_error(samples, spec, (choice.low, choice.high))
    table = choose_qtable(graph, plan, stats, method="mse")
    (usual,) = (table.ranges[d.key] for d in plan.activations() if d.tensor == "p")
    assert mine < 0.95 * attention_error(samples, spec, (usual.low, usual.high))
    # All 24 queries are kept, so no share of the grid is better, but for float32 products.
    high = stats["p"].high
    best = min(attention_error(samples, spec, (0.0, share * high)) for share in SHARES)
    assert mine <= best * (1 + 1e-4)


def test_both_operands_and_scores_have_ranges_of_their_own():
    graph = transformer()
    samples = feeds_of(graph, 6)
    plan, stats = planned(graph, samples)
    found = solve_output_ranges(graph, plan, stats, samples)
    low = {(d.tensor, d.spec) for d in plan.activations() if d.spec.bits < 7}
    assert set(found) == low
    assert {"p", "q", "k", "v", "n1", "n2", "act", "merged"} <= {tensor for tensor, _ in found}
    for (tensor, _), choice in found.items():
        assert min(stats[tensor].low, 0.0) <= choice.low <= 0.0
        assert 0.0 <= choice.high <= stats[tensor].high
        assert choice.mse > 0.0


def test_a_few_massive_tokens_do_not_decide():
    graph, samples = tokens()
    plan, stats = planned(graph, samples)
    found = solve_output_ranges(graph, plan, stats, samples)
    ((_, spec), choice) = next(iter(found.items()))
    table = choose_qtable(graph, plan, stats, method="mse")
    (usual,) = (table.ranges[d.key] for d in plan.activations())

    def ordinary(ends: tuple[float, float]) -> float:
        rows = np.concatenate([feeds["x"][0, 1:] for feeds in samples])
        error = fake_quantize(rows, choose_qparams(spec, *ends)) - rows
        return float(np.square(error).sum())

    assert ordinary((choice.low, choice.high)) < 0.2 * ordinary((usual.low, usual.high))


def test_eight_bits_pinned_and_tied_tensors_are_left_to_others():
    graph = residual_cnn()
    samples = feeds_of(graph, 4)
    plan, stats = planned(graph, samples, "w4a8")
    assert not solve_output_ranges(graph, plan, stats, samples)
    plan, stats = planned(graph, samples)
    found = solve_output_ranges(graph, plan, stats, samples)
    (tensor, spec) = next(iter(found))
    decisions = [
        replace(d, pinned=(0.0, 1.0)) if (d.tensor, d.spec) == (tensor, spec) else d
        for d in plan.decisions
    ]
    pinned = replace(plan, decisions=tuple(decisions))
    assert set(found) - set(solve_output_ranges(graph, pinned, stats, samples)) == {(tensor, spec)}
    tied = [
        replace(d, group="g") if (d.tensor, d.spec) == (tensor, spec) else d for d in plan.decisions
    ]
    shared = replace(plan, decisions=tuple(tied))
    assert (tensor, spec) not in solve_output_ranges(graph, shared, stats, samples)


def test_two_runs_agree():
    graph, samples = tokens()
    plan, stats = planned(graph, samples)
    first, second = (solve_output_ranges(graph, plan, stats, samples, seed=5) for _ in range(2))
    assert first == second


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.booleans())
def test_the_corrected_error_is_that_of_least_squares(seed, counted):
    random = np.random.default_rng(seed)
    got, wanted = random.standard_normal((2, 9, 4)) + 1.0
    got[:, 0] = 2.0  # a column that says nothing
    counts = random.uniform(0.1, 3.0, 9) if counted else np.ones(9)
    total = 0.0
    for column in range(4):
        root = np.sqrt(counts)
        design = np.stack([got[:, column], np.ones(9)], axis=1) * root[:, None]
        aim = wanted[:, column] * root
        solution, *_ = np.linalg.lstsq(design, aim, rcond=None)
        total += float(np.square(design @ solution - aim).sum())
    found = corrected_error(got, wanted, counts if counted else None)
    # Sums of nine float64 terms of size one.
    np.testing.assert_allclose(found, total, rtol=1e-10)


@pytest.mark.parametrize(("precision", "said"), [("w4a4", True), ("w4a8", False)])
def test_they_compete_where_there_are_few_levels(tmp_path: Path, precision: str, said: bool):
    graph = transformer()
    path = tmp_path / "m.onnx"
    path.write_bytes(graph.to_model().SerializeToString())
    result = qpass.optimize(
        path,
        data=feeds_of(graph, 20),
        output=tmp_path / "o.onnx",
        precision=precision,
        samples=16,
        engines=("ort",),
    )
    (note,) = [text for text in result.notes if text.startswith("ranges by trial")]
    assert ("by outputs" in note) is said


def test_the_file_has_the_ranges_that_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    won = Trial(method=METHOD, sqnr_db={METHOD: 1.0})
    monkeypatch.setattr("qpass.range_stage.try_methods", lambda *_, **__: won)
    graph, samples = attention()
    path = tmp_path / "m.onnx"
    path.write_bytes(graph.to_model().SerializeToString())
    result = qpass.optimize(
        path,
        data=samples * 3,
        samples=16,
        holdout=0.0,
        output=tmp_path / "o.onnx",
        precision="w4a4",
        low_bit_edges=True,
        equalize=False,
    )
    assert "ranges by trial: by outputs 1.00 dB" in result.notes
    plan, stats = planned(graph, samples * 2)
    found = solve_output_ranges(graph, plan, stats, samples * 2)
    ((spec, choice),) = ((spec, one) for (name, spec), one in found.items() if name == "p")
    model = onnx.load(result.output)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    quantizers = {n.input[0]: n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    wanted = choose_qparams(spec, choice.low, choice.high).scale
    np.testing.assert_array_equal(constants[quantizers["p"]], wanted)


@pytest.mark.parametrize("weight", [(16, 12), (1, 16, 12)], ids=["matrix", "stack"])
def test_sequences_of_unlike_lengths_and_stacks_of_weights(weight: tuple[int, ...]):
    """Scores have as many columns as a sample has tokens; a stack of matrices has no rows here."""
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    dynamic (float[B,N,16] x) => (float[B,N,12] y)
    {
        t = Transpose <perm = [0, 2, 1]> (x)
        [scores] s = MatMul (x, t)
        p = Softmax <axis = -1> (s)
        [context] c = MatMul (p, x)
        [fc] y = MatMul (c, w)
    }
    """
    random = np.random.default_rng(6)
    graph = Graph.from_text(text, w=random.standard_normal(weight).astype(np.float32))
    graph.infer_shapes()
    samples = [
        {"x": random.standard_normal((1 + n % 2, n, 16)).astype(np.float32)} for n in range(3, 9)
    ]
    plan, stats = planned(graph, samples)
    found = {tensor for tensor, _ in solve_output_ranges(graph, plan, stats, samples)}
    assert {"p", "t", "x"} <= found
    assert ("c" in found) is (len(weight) == 2)
