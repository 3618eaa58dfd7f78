"""Compensation: errors fall, nothing ever gets worse, and output ranges follow."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Constant, Graph, array_of
from qpass.passes import compensate as module
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.compensate import compensate
from qpass.passes.model_gate import judge
from qpass.passes.output_range import output_range
from qpass.stream import Step
from qpass.verify.metrics import sqnr_db
from tests.truncated import (
    WIDTH,
    batches_of,
    first_outputs,
    header,
    mlp,
    quantized_weight,
    run_each,
)


def test_it_brings_a_model_closer_on_unseen_samples_without_touching_its_structure():
    reference, quantized = mlp(quantized=False), mlp(quantized=True)
    structure, integers = quantized.to_text(), array_of(quantized.tensors()["w0_int"]).copy()
    unseen = batches_of(4, seed=99)
    want = first_outputs(reference, unseen)
    before = sqnr_db(want, first_outputs(quantized, unseen))
    result = compensate(reference, quantized, batches_of(8))
    after = sqnr_db(want, first_outputs(quantized, unseen))
    assert result.method == "cwac"
    assert after > before + 6.0
    assert result.verdict.after_db > result.verdict.before_db
    assert [layer.name for layer in result.layers] == ["fc0", "fc1", "fc2"]
    for layer in result.layers:
        assert layer.sqnr_db_after > layer.sqnr_db_before
        assert layer.gain_and_offset + layer.offset_only + layer.unchanged == WIDTH
    assert quantized.to_text() == structure
    np.testing.assert_array_equal(array_of(quantized.tensors()["w0_int"]), integers)
    assert result.report.changed == 3


# What follows each linear op, and whether its bias lies inside.
SETTLED = {
    "bias behind": "h = MatMul (x, w) y = Add (h, b)",
    "bias inside": "h = Gemm (x, w, b) y = Relu (h)",
    "no bias": "h = Gemm (x, w) y = Relu (h)",
    "nothing takes an offset": "h = MatMul (x, w) y = Relu (h)",
    "read twice": "h = Gemm (x, w, b) r = Relu (h) y = Add (h, r)",
    "one scale": "h = Gemm (x, t, b) y = Relu (h)",
}


@pytest.mark.parametrize("body", SETTLED)
def test_what_a_fold_does_is_what_another_run_gives(body, monkeypatch):
    """The walk computes the corrected outputs; running the ops again ends at the same constants."""
    weight = np.random.default_rng(3).standard_normal((WIDTH, WIDTH)).astype(np.float32) / 2
    first = SETTLED[body].replace("h = ", "[fc0] h = ").replace(" t,", " w,")
    text = f"{first} [fc1] g = MatMul (y, v) z = Add (g, c)"
    biases = {"b": np.full(WIDTH, 0.5, np.float32), "c": np.zeros(WIDTH, np.float32)}
    shape = f"float[N, {WIDTH}] x", f"float[N, {WIDTH}] z"
    reference = Graph.from_text(header(*shape, text), w=weight, v=weight.T.copy(), **biases)
    reference.infer_shapes()
    axis = "" if body == "one scale" else "<axis = 1>"
    stored = quantized_weight("w", weight, 1, per_channel=body != "one scale")
    stored |= quantized_weight("v", weight.T.copy(), 1)
    dequantized = f"w = DequantizeLinear {axis} (w_int, w_scale) v = DequantizeLinear <axis = 1> "
    graphs, settled = [], []
    real = Step.settle
    for again in (False, True):
        quantized = Graph.from_text(
            header(*shape, f"{dequantized} (v_int, v_scale) {text}"), **stored, **biases
        )
        monkeypatch.setattr(
            Step,
            "settle",
            lambda *args, again=again, **given: (
                settled.append(again) or again or real(*args, **given)
            ),
        )
        assert compensate(reference, quantized, batches_of(8)).method == "cwac"
        graphs.append(quantized)
    assert settled == [False, False, True, True]
    one, other = (
        {name: array_of(t) for name, t in graph.tensors().items() if isinstance(t, Constant)}
        for graph in graphs
    )
    assert one.keys() == other.keys()
    for name, values in one.items():
        # Sums of float32 that differ in their last bits; gains and offsets are smooth in them.
        np.testing.assert_allclose(values, other[name], rtol=1e-4, atol=1e-5)


def test_bias_alone_leaves_the_scales():
    reference, quantized = mlp(quantized=False), mlp(quantized=True)
    scale = array_of(quantized.tensors()["w1_scale"]).copy()
    result = compensate(reference, quantized, batches_of(8), method="bias")
    assert result.method == "bias"
    np.testing.assert_array_equal(array_of(quantized.tensors()["w1_scale"]), scale)
    assert all(layer.gain_and_offset == 0 for layer in result.layers)


def test_the_local_target_corrects_each_op_for_itself():
    reference, quantized = mlp(quantized=False), mlp(quantized=True)
    assert compensate(reference, quantized, batches_of(8), target="local").method == "cwac"


@pytest.mark.parametrize("same", [True, False])
def test_a_change_that_does_not_surely_help_is_not_made(same, monkeypatch):
    """The trap: fits look good on their samples, the outputs of unseen ones say otherwise."""
    reference = mlp(quantized=False)
    quantized = mlp(quantized=not same)
    if not same:
        fitted = module.solve_gated

        def harmful(groups, **options):
            solved = fitted(groups, **options)
            affine = ChannelAffine(gain=solved.affine.gain, offset=solved.affine.offset + 5.0)
            return type(solved)(
                affine=affine, gain_and_offset=0, offset_only=WIDTH, unchanged=0, unusable=0
            )

        monkeypatch.setattr(module, "solve_gated", harmful)
    fingerprint = quantized.fingerprint()
    result = compensate(reference, quantized, batches_of(8))
    assert (result.method, result.report.changed) == ("none", 0)
    assert quantized.fingerprint() == fingerprint
    assert [r.rule for r in result.report.refusals] == ["compensate cwac", "compensate bias"]
    assert "no sure improvement" in result.report.refusals[0].reason


def test_it_has_to_beat_the_baseline():
    """The float model cannot be beaten; the graph itself can. Its offsets are not fitted twice."""
    reference, quantized = mlp(quantized=False), mlp(quantized=True)
    before = quantized.fingerprint()
    result = compensate(reference, quantized, batches_of(8), baseline=reference)
    assert result.method == "none"
    assert [r.rule for r in result.report.refusals] == ["compensate cwac"]
    assert quantized.fingerprint() == before
    assert compensate(reference, quantized, batches_of(8)).method == "cwac"


@pytest.mark.parametrize("apart", [False, True])
def test_the_verdict_is_that_of_the_judges(apart: bool):
    reference, quantized, plain = mlp(quantized=False), mlp(quantized=True), mlp(quantized=True)
    batches, judges = batches_of(8), batches_of(3, seed=7)
    verdict = compensate(reference, quantized, batches, judges=judges if apart else ()).verdict
    judged = judges if apart else batches[6:]
    want, before, after = (
        [dict(zip("y", found, strict=True)) for found in run_each(graph, judged)]
        for graph in (reference, plain, quantized)
    )
    expected = judge(want, before, after)
    assert verdict.before_db == pytest.approx(expected.before_db, abs=1e-3)
    assert verdict.after_db == pytest.approx(expected.after_db, abs=1e-3)


def test_one_batch_cannot_judge():
    result = compensate(mlp(quantized=False), mlp(quantized=True), batches_of(1))
    assert result.method == "none"
    assert "only one batch" in result.report.refusals[0].reason


# ------------------------------------------------------------------ residual branches

RESIDUAL = """
[skip] low = Max (x, floor)
[branch] f = MatMul (x, w)
[bias] g = Add (f, b)
[join] sum = Add (low, g)
"""


def residual(*, quantized: bool) -> Graph:
    """The skip of the quantized graph is off where Max cuts it; only the branch takes numbers."""
    weight = np.random.default_rng(5).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    floor = np.linspace(0.5, 1.5, WIDTH) if quantized else np.full(WIDTH, -9.0)
    constants = {"floor": floor.astype(np.float32), "b": np.zeros(WIDTH, np.float32)}
    body = RESIDUAL.strip()
    if quantized:
        constants |= quantized_weight("w", weight, 1, steps=127)
        body = "w = DequantizeLinear <axis = 1> (w_int, w_scale)\n" + body
    else:
        constants["w"] = weight
    text = header(f"float[N, {WIDTH}] x", f"float[N, {WIDTH}] sum", body)
    graph = Graph.from_text(text, **constants)
    graph.infer_shapes()
    return graph


def test_a_residual_branch_aims_at_the_sum(monkeypatch):
    unseen = batches_of(4, seed=98)
    scores = []
    for aim_at_sum in (True, False):
        if not aim_at_sum:
            monkeypatch.setattr(module, "skip_of", lambda *_: None)
        reference, quantized = residual(quantized=False), residual(quantized=True)
        result = compensate(reference, quantized, batches_of(16))
        assert [layer.residual for layer in result.layers] in ([aim_at_sum], [])
        want, got = (first_outputs(graph, unseen) for graph in (reference, quantized))
        scores.append(sqnr_db(want, got))
    assert scores[0] > scores[1] + 1.0


# ------------------------------------------------------------------ output ranges

CLIPPED = """
w = DequantizeLinear <axis = 1> (w_int, w_scale)
[fc0] h0 = Gemm (x, w, b)
r = Relu (h0)
q = QuantizeLinear (r, s, z)
y = DequantizeLinear (q, s, z)
"""


def test_the_output_range_follows_and_keeps_its_clipping():
    random = np.random.default_rng(9)
    weight = random.uniform(0.2, 1, (WIDTH, WIDTH)).astype(np.float32)
    place = f"float[N, {WIDTH}] x", f"float[N, {WIDTH}] y"
    bias = {"b": np.zeros(WIDTH, np.float32)}
    reference = Graph.from_text(
        header(*place, "[fc0] h0 = Gemm (x, w, b) y = Relu (h0)"), w=weight, **bias
    )
    batches = batches_of(8)
    top = float(first_outputs(reference, batches).max())
    quantized = Graph.from_text(
        header(*place, CLIPPED), s=np.float32(top / 255), z=np.uint8(0),
        **quantized_weight("w", weight, 1), **bias,
    )  # fmt: skip
    found = output_range(quantized, "h0")
    assert (found.quantizer.op, found.floor, found.ceiling) == ("QuantizeLinear", 0.0, np.inf)
    result = compensate(reference, quantized, batches)
    assert result.method == "cwac"
    scales = {float(array_of(node.inputs[1])) for node in (found.quantizer, *found.dequantizers)}
    assert len(scales) == 1  # Q and DQ agree
    (scale,) = scales
    corrected = float(first_outputs(quantized, batches).max())
    # The range ends within the tolerance (2 %) and one step of the largest corrected value.
    assert abs(255 * scale / corrected - 1.0) < 0.03
