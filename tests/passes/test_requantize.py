"""Weights that are rounded again: on the same kind of grid, and only where that helps."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes.channel_affine import ChannelAffine, PairMoments
from qpass.passes.compensate import compensate
from qpass.passes.fold_affine import Site, find_site
from qpass.passes.refit import refit
from qpass.passes.requantize import Rounding, find_rounding, scaled_weight, solve_rounding
from qpass.planner import plan as make_plan
from qpass.quantize import build_quantized
from qpass.report.model import PassReport
from qpass.targets import TARGETS
from qpass.verify.metrics import sqnr_db
from tests.folds import graph_of, normal, powers_of_two, rounded, run
from tests.small_models import minmax, policy_of, transformer

ROWS, COLUMNS = 6, 8


def rounding_of(
    weight: np.ndarray, constants: dict[str, np.ndarray], axis: int = 0
) -> Rounding | str:
    body = f"w = DequantizeLinear <axis = {axis}> (w_int, w_scale, w_zero) y = MatMul (x, w)"
    graph = graph_of(f"float[2,{len(weight)}] x", "float[2,N] y", body, **constants)
    (dq,) = [node for node in graph.nodes if node.op == "DequantizeLinear"]
    reference = graph_of("float[1] x", "float[1] y", "y = Neg (x)")
    return find_rounding(dq, reference.constant("w", weight))


def ends_of(found: Rounding) -> tuple[int, int]:
    (low,), (high,) = np.unique(found.low), np.unique(found.high)
    return int(low), int(high)


@pytest.mark.parametrize(
    ("ends", "dtype"),
    [((-4, 3), ml_dtypes.int4), ((-8, 7), ml_dtypes.int4), ((-128, 127), np.int8)],
)
def test_a_grid_with_its_most_negative_integer_stays_one_of_its_bits(ends, dtype):
    integers = np.array([[ends[0], -1], [2, ends[1]]])
    scale = np.array([0.3, 0.7], np.float32)
    constants = {"w_int": integers.astype(dtype), "w_scale": scale, "w_zero": np.zeros(2, dtype)}
    found = rounding_of((integers * scale[:, None]).astype(np.float32), constants)
    assert isinstance(found, Rounding)
    assert ends_of(found) == ends
    larger, new = solve_rounding(found, integers * scale[:, None] * 3.0)
    assert larger.min() >= ends[0]
    assert larger.max() <= ends[1]
    np.testing.assert_allclose(new, 3.0 * scale, rtol=2.0**-22)  # float32, rounded twice


@pytest.mark.parametrize(
    ("steps", "dtype", "ends"),
    [
        (127, np.int8, (-127, 127)),
        (127, np.uint8, (-127, 127)),
        (7, ml_dtypes.int4, (-7, 7)),
        (3, ml_dtypes.int4, (-3, 3)),  # three bits in a type of four
        (7, np.int8, (-7, 7)),
    ],
)
@pytest.mark.parametrize("axis", [None, 0])
def test_the_grid_in_use_is_recognized(steps, dtype, ends, axis):
    weight = normal((ROWS, COLUMNS))
    found = rounding_of(weight, rounded("w", weight, axis, steps=steps, dtype=dtype))
    assert isinstance(found, Rounding)
    assert ends_of(found) == ends
    assert not found.powers_of_two
    integers, scale = solve_rounding(found, weight.astype(np.float64))
    np.testing.assert_array_equal(scale, found.scale)  # nothing changed: nothing changes
    middle = 128 if dtype is np.uint8 else 0
    np.testing.assert_array_equal(
        integers, np.rint(weight / found.along(found.scale)).astype(np.int64) + middle
    )


@pytest.mark.parametrize(
    ("least", "dtype"), [(-4, ml_dtypes.int4), (0, np.uint8)], ids=["int4", "uint8"]
)
def test_every_channel_keeps_a_zero_point_of_its_own(least, dtype):
    integers = np.array([[least, least + 7, least + 2], [least + 5, least + 1, least + 7]])
    zero, scale = np.array([least + 1, least + 7]), np.array([0.5, 0.25], np.float32)
    weight = (integers - zero[:, None]) * scale[:, None]
    constants = {"w_int": integers.astype(dtype), "w_scale": scale, "w_zero": zero.astype(dtype)}
    found = rounding_of(weight.astype(np.float32), constants)
    assert isinstance(found, Rounding)
    np.testing.assert_array_equal(found.low, [-1, -7])
    np.testing.assert_array_equal(found.high, [6, 0])
    same, unchanged = solve_rounding(found, weight)
    np.testing.assert_array_equal(same, integers)
    np.testing.assert_array_equal(unchanged, scale)
    doubled, grown = solve_rounding(found, weight * 2.0)
    np.testing.assert_array_equal(doubled, integers)
    np.testing.assert_allclose(grown, 2.0 * scale, rtol=2.0**-22)  # float32, rounded twice


def test_what_was_clipped_may_be_clipped_again():
    weight, scale = np.array([[0.9, -1.4, 5.0]], np.float32), np.array([1.1], np.float32)
    integers = np.array([[1, -1, 3]], ml_dtypes.int4)
    constants = {"w_int": integers, "w_scale": scale, "w_zero": np.zeros(1, ml_dtypes.int4)}
    found = rounding_of(weight, constants)
    assert isinstance(found, Rounding)
    np.testing.assert_array_equal(solve_rounding(found, weight.astype(np.float64))[1], scale)
    halves, new = solve_rounding(found, weight * np.array([2.0, 1.0, 1.0]))
    np.testing.assert_array_equal(
        new, scale
    )  # 1.8 fits into three steps, and 5.0 is no larger than it was
    np.testing.assert_array_equal(halves, [[2, -1, 3]])
    grown = solve_rounding(found, weight * 1.5)[1]
    np.testing.assert_allclose(grown, 1.5 * scale, rtol=2.0**-22)  # float32, rounded twice


def test_scales_grow_only_where_they_must_and_by_powers_of_two_on_such_a_grid():
    weight = normal((ROWS, COLUMNS))
    gain = np.full(ROWS, 0.75)
    gain[np.abs(weight).max(axis=1).argmax()] = 1.3  # the row that the one scale comes from
    wanted = scaled_weight(weight, gain, axis=0)
    for constants, growth in (
        (rounded("w", weight, None), 1.3),
        (powers_of_two("w", weight), None),
    ):
        found = rounding_of(weight, constants)
        assert isinstance(found, Rounding)
        integers, scale = solve_rounding(found, wanted)
        ratio = float(scale) / float(found.scale)
        if growth is None:
            assert ratio in (1.0, 2.0)
            assert np.frexp(scale)[0] == 0.5
        else:
            assert ratio == pytest.approx(growth, rel=1e-6)
        error = np.abs(integers * float(scale) - wanted)
        assert error.max() <= float(scale) / 2 * (1 + 1e-5)


def test_asymmetric_integers_keep_their_zero_point():
    weight = np.abs(normal((ROWS, COLUMNS))) - 0.3
    scale = np.float32((weight.max() - weight.min()) / 255)
    zero = np.uint8(np.rint(-weight.min() / scale))
    integers = np.clip(np.rint(weight / scale) + zero, 0, 255).astype(np.uint8)
    found = rounding_of(
        weight, {"w_int": integers, "w_scale": np.array(scale), "w_zero": np.array(zero)}
    )
    assert isinstance(found, Rounding)
    assert ends_of(found) == (-int(zero), 255 - int(zero))
    got, grown = solve_rounding(found, weight * 1.25)
    assert got.min() >= 0
    assert got.max() <= 255
    error = (got - int(zero)) * float(grown) - weight * 1.25
    assert np.abs(error).max() <= float(grown) / 2 * (1 + 1e-5)


def test_what_is_not_known_is_refused():
    weight = normal((ROWS, COLUMNS))
    constants = rounded("w", weight, 0)
    other = {**constants, "w_int": np.trunc(weight / constants["w_scale"][:, None]).astype(np.int8)}
    assert "not the nearest" in str(rounding_of(weight, other))
    assert "another shape" in str(rounding_of(weight[:3], constants))
    body = "w = DequantizeLinear <axis = 0, block_size = 2> (q, s) y = MatMul (x, w)"
    graph = graph_of(
        "float[2,8] x", "float[2,6] y", body,
        q=constants["w_int"].T.copy(), s=np.ones((4, 6), np.float32),
    )  # fmt: skip
    assert "blocks" in str(find_rounding(graph.nodes[0], graph.constant("w", weight.T)))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_scaled_weight_multiplies_each_output_channel(groups):
    weight, gain = normal((4, 3, 2, 2)), np.arange(1.0, 3 * groups + 1)
    scaled = scaled_weight(weight, gain, axis=1, groups=groups)
    for row in range(4):
        for column in range(3):
            channel = row // (4 // groups) * 3 + column if groups > 1 else column
            np.testing.assert_array_equal(scaled[row, column], weight[row, column] * gain[channel])


# ------------------------------------------------------------------ in a walk


WIDE = 2 * ROWS


def coarse(form: str, *, quantized: bool, shrinks: bool = True) -> Graph:
    """One scale; in the quantized graph each row's two inputs have shrunk, by row."""
    weight = np.zeros((ROWS, WIDE), np.float32)
    for row in range(ROWS):
        weight[row, 2 * row : 2 * row + 2] = normal((2,), seed=row) + 2
    constants = {"b": np.zeros(ROWS, np.float32), "share": np.ones(WIDE, np.float32)}
    # Not a constant to the passes: nothing in front of the op can take the correction.
    body = "shares = Abs (share) p = Mul (x, shares) [op] y = Gemm <transB = 1> (p, w, b)"
    if not quantized:
        constants["w"] = weight
    else:
        body = f"w = DequantizeLinear (w_int, w_scale, w_zero) {body}"
        made = powers_of_two("w", weight) if form == "powers of two" else rounded("w", weight, None)
        constants |= made
        if shrinks:
            constants["share"] = np.repeat(np.linspace(0.6, 0.95, ROWS), 2).astype(np.float32)
    return graph_of(f"float[N,{WIDE}] x", f"float[N,{ROWS}] y", body, **constants)


def batches_of(count: int = 8, *, seed: int = 0) -> list[dict[str, np.ndarray]]:
    return [{"x": normal((16, WIDE), seed=seed + i) + 0.5} for i in range(count)]


@pytest.mark.parametrize("form", ["one scale", "powers of two"])
def test_one_scale_still_takes_a_gain_per_channel(form):
    reference, quantized = (coarse(form, quantized=q) for q in (False, True))
    structure, before = quantized.to_text(), array_of(quantized.tensors()["w_int"]).copy()
    result = compensate(reference, quantized, batches_of())
    assert result.method == "cwac"
    assert quantized.to_text() == structure
    dq = quantized.producer(quantized.node("op").inputs[1])
    q, scale = array_of(dq.inputs[0]), array_of(dq.inputs[1])
    assert (q != before).any()
    assert scale.shape == ()
    if form == "powers of two":
        assert np.frexp(scale)[0] == 0.5
    pairs = [(run(reference, b)[0], run(quantized, b)[0]) for b in batches_of(4, seed=50)]
    # An 8-bit grid with one scale for rows of nearly one size, as if there were no shrinking.
    assert sqnr_db(*(np.concatenate(side) for side in zip(*pairs, strict=True))) > 38.0


@pytest.mark.parametrize("form", ["one scale", "powers of two"])
def test_a_refit_that_would_not_help_is_taken_back(form):
    """Gains that only follow the noise of rounding: the new rounding is as bad as the old one."""
    quantized = coarse(form, quantized=True, shrinks=False)
    reference = coarse(form, quantized=False)
    nodes = {node.name: node for node in quantized.nodes}
    site = find_site(quantized, nodes, reference.node("op"))
    assert isinstance(site, Site)
    wanted = [run(reference, batch)[0] for batch in batches_of()]

    def moments() -> SimpleNamespace:
        got = [run(quantized, batch)[0] for batch in batches_of()]
        pairs = zip(got, wanted, strict=True)
        return SimpleNamespace(fit=[PairMoments.of(a, t, axis=-1) for a, t in pairs])

    measured = moments().fit
    fingerprint = quantized.fingerprint()
    harmful = ChannelAffine(gain=np.full(ROWS, 0.8), offset=np.zeros(ROWS))
    (kept,) = refit(quantized, site, measured, harmful, moments)
    assert (kept.gain == 1.0).all()
    assert quantized.fingerprint() == fingerprint
    identity = ChannelAffine.identity(ROWS)
    assert refit(quantized, site, measured, identity, moments) == (identity,)


@pytest.mark.parametrize("target", ["qnn-htp", "vitis-xint8"])
def test_targets_with_coarse_grids_keep_them(target):
    """One scale for each weight of a product, powers of two where they were, biases to match."""
    reference, rules, policy = transformer(), TARGETS[target], policy_of()
    batches = [{"x": normal((2, 6, 32), seed=i)} for i in range(6)]
    plan = make_plan(reference, rules, policy)
    table = minmax(reference, plan, batches)
    results = []

    def compensation(graph: Graph) -> PassReport:
        results.append(compensate(reference, graph, batches))
        return results[0].report

    # Its last step is `check_bias_scales`.
    plain, _ = build_quantized(reference, plan, table, rules, policy)
    graph, _ = build_quantized(reference, plan, table, rules, policy, compensation=compensation)
    assert [node.op for node in graph.nodes] == [node.op for node in plain.nodes]
    assert not any("one gain" in r.reason for r in results[0].report.refusals)
    for node in graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            scale = array_of(node.inputs[1])
            assert scale.shape == ()
            if target == "vitis-xint8" and "_bias" not in node.name:
                assert np.frexp(scale)[0] == 0.5, node.name
