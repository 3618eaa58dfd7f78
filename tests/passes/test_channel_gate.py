"""The gate by channel: who is refused what, and why; and the fit that keeps sizes."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.passes import channel_gate as gate
from qpass.passes.channel_affine import PairMoments, solve_shrunk
from qpass.passes.channel_gate import solve_gated
from qpass.passes.compensate import compensate
from qpass.passes.compensation import as_ranges
from qpass.passes.scale_matters import scale_matters
from tests.passes.test_channel_affine import groups_of
from tests.truncated import batches_of, mlp, run


def test_every_channel_that_got_less_is_named_with_the_reason():
    random = np.random.default_rng(1)
    a = random.standard_normal((240, 6))
    a[:, 1] *= 1e-7
    t = a * [1.2, 1.0, 9.0, 1.2, 1.0, 1.0] + 0.5
    t[:, 3] = np.inf
    sign = np.repeat([1.0, -1.0] * 6, 20)
    t[:, 4] = a[:, 4] + sign  # each group is off in its own direction
    t[:, 5] = (1.0 + 0.6 * sign) * a[:, 5] + 0.5  # its gain is another in each group
    solved = solve_gated(groups_of(a, t), ridge=0.0)
    assert solved.refusals[gate.NOT_FINITE] == (3,)
    assert solved.refusals[gate.CONSTANT] == (1,)
    assert solved.refusals[gate.CLIPPED] == (2,)
    assert solved.refusals[gate.ALL_WORSE] == (4,)
    assert 5 in solved.refusals[gate.GAIN_WORSE]
    assert solved.affine.gain[2] == 2.0
    assert solved.affine.gain[[1, 3, 4, 5]].tolist() == [1.0] * 4
    assert solved.affine.offset[5] == pytest.approx(0.5, abs=0.2)


def test_one_group_is_refused_as_a_whole():
    a = np.random.default_rng(2).standard_normal((20, 2))
    solved = solve_gated([PairMoments.of(a, a + 1, axis=1)])
    assert dict(solved.refusals) == {gate.ONE_GROUP: (0, 1)}


def test_a_noisy_gain_leans_on_the_others():
    """Sixty channels share a gain; the fit of the one with much noise is drawn to it."""
    random = np.random.default_rng(3)
    a = random.standard_normal((240, 60))
    noise = np.full(60, 0.01)
    noise[7] = 3.0
    t = 0.8 * a + noise * random.standard_normal(a.shape)
    whole = PairMoments.of(a, t, axis=1)
    alone = solve_shrunk([whole], ridge=0.0).gain
    together = solve_shrunk(groups_of(a, t), ridge=0.0).gain
    assert abs(alone[7] - 0.8) > 0.05
    assert abs(together[7] - 0.8) < 0.2 * abs(alone[7] - 0.8)
    np.testing.assert_allclose(np.delete(together, 7), 0.8, atol=0.005)


def test_moment_matching_keeps_the_deviation_that_least_squares_shrink():
    random = np.random.default_rng(4)
    t = random.standard_normal((4000, 5))
    a = t + 0.5 * random.standard_normal(t.shape)
    groups = groups_of(a, t)
    squares, moments = (solve_shrunk(groups, ridge=0.0, fit=fit) for fit in ("ls", "mm"))
    # Gain of least squares: 1 / 1.25; that of equal deviations: 1 / sqrt(1.25).
    np.testing.assert_allclose(squares.gain, 0.8, atol=0.03)
    np.testing.assert_allclose(moments.gain, 0.8**0.5, atol=0.03)
    whole = PairMoments.of(a, t, axis=1)
    ratio = (moments.gain * a + moments.offset).std(axis=0) / t.std(axis=0)
    np.testing.assert_allclose(ratio, 1.0, atol=0.03)
    assert (whole.error(moments) > whole.error(squares)).all()


ATTENTION = """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 4, 8] x) => (float[1, 4, 8] y)
{
    [q] a = MatMul (x, wq)
    [k] b = MatMul (x, wk)
    [v] c = MatMul (x, wv)
    bt = Transpose <perm = [0, 2, 1]> (b)
    s = MatMul (a, bt)
    p = Softmax (s)
    o = MatMul (p, c)
    [proj] h = MatMul (o, wo)
    r = Relu (h)
    [head] y = MatMul (r, wh)
}"""


def test_logits_and_outputs_are_where_size_matters():
    weights = {name: np.eye(8, dtype=np.float32) for name in ("wq", "wk", "wv", "wo", "wh")}
    graph = Graph.from_text(ATTENTION, **weights)
    found = {name: scale_matters(graph, graph.node(name)) for name in ("q", "k", "v", "proj")}
    assert found == {"q": True, "k": True, "v": False, "proj": False}
    assert scale_matters(graph, graph.node("head"))


def test_moment_matching_reaches_the_last_layer_only():
    # The outputs of this model come through Relu: the size of no layer matters.
    scales = []
    for fit in ("ls", "mm"):
        reference, quantized = mlp(quantized=False), mlp(quantized=True)
        assert compensate(reference, quantized, batches_of(8), fit=fit).method == "cwac"
        scales.append(run(quantized, batches_of(1)[0])[0])
    np.testing.assert_array_equal(*scales)


def test_a_budget_that_spills_everything_changes_no_number():
    outputs = []
    for memory in (1 << 30, 0):
        reference, quantized = mlp(quantized=False), mlp(quantized=True)
        compensate(reference, quantized, batches_of(8), memory_bytes=memory)
        outputs.append(run(quantized, batches_of(1, seed=5)[0])[0])
    np.testing.assert_array_equal(*outputs)


def test_channels_are_written_as_ranges():
    assert as_ranges([]) == ""
    assert as_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
