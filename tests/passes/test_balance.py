"""Streams between linear ops, written in the basis in which their weights round best."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from qpass.api import make_options
from qpass.errors import RecipeError
from qpass.graph import Graph, array_of
from qpass.options import Options
from qpass.passes.normalize import check_normalized, normalize
from qpass.passes.rotation.balance import balance_streams, solve_balance
from qpass.passes.rotation.hadamard import solve_rotation
from qpass.pipeline import prepare
from qpass.run import Run, model_key, start
from tests import oracle

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
CHANNELS, WIDE = 16, 96
# Products of the network are summed in another order: a dozen float32 roundings.
TOLERANCE = 3e-6

STAGE = """
    s0 = Conv(x, first, offset)
    u = Conv <group = 1> (s0, expand0, spread)
    a = Clip(u, low, high)
    d = Conv <group = 96, pads = [1,1,1,1]> (a, depth)
    b = Clip(d, low, high)
    p = Conv(b, project, offset)
    s = Add(s0, p)
    v = Conv <pads = [1,1,1,1]> (s, expand1, spread)
    y = Relu(v)
"""
SHAPES = {
    "first": (CHANNELS, 8, 1, 1), "offset": (CHANNELS,), "expand0": (WIDE, CHANNELS, 1, 1),
    "spread": (WIDE,), "depth": (WIDE, 1, 3, 3), "project": (CHANNELS, WIDE, 1, 1),
    "expand1": (WIDE, CHANNELS, 3, 3), "inner": (CHANNELS, CHANNELS, 1, 1),
}  # fmt: skip


def graph_of(body: str, outputs: str = "float[A,B,C,D] y") -> Graph:
    """Return a normalized graph whose weights have heavy tails and channels of several sizes."""
    random = np.random.default_rng(5)
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    made = {}
    for name, shape in SHAPES.items():
        if name in words:
            values = random.standard_t(4, shape) / np.prod(shape[1:], dtype=float) ** 0.5
            sizes = 2.0 ** random.uniform(-2, 2, shape[0])
            values *= sizes.reshape(-1, *[1] * (len(shape) - 1))
            made[name] = values.astype(np.float32)
    numbers = {"low": 0.0, "high": 6.0}
    made |= {n: np.array(v, np.float32) for n, v in numbers.items() if n in words}
    graph = Graph.from_text(f"{HEAD} g (float[2,8,6,6] x) => ({outputs}) {{ {body} }}", **made)
    for node in graph.nodes:
        node.name = f"node_{node.outputs[0].name}"
    normalize(graph)
    return graph


def feeds_of() -> dict[str, np.ndarray]:
    random = np.random.default_rng(8)
    return {"x": random.standard_normal((2, 8, 6, 6)).astype(np.float32)}


def weights_rounded(graph: Graph, bits: int) -> Graph:
    """Return a copy whose convolutions have weights rounded to nearest, one scale a channel."""
    copy = graph.copy()
    for node in copy.nodes:
        if node.op == "Conv":
            values = array_of(node.inputs[1]).astype(np.float64)
            scale = np.abs(values).max(axis=(1, 2, 3), keepdims=True) / (2 ** (bits - 1) - 1)
            rounded = (np.rint(values / scale) * scale).astype(np.float32)
            copy.set_input(node, 1, copy.constant(f"{node.name}_rounded", rounded))
    return copy


# ---------------------------------------------------------------------------- the matrix


def spread(size: int, decades: float, seed: int) -> np.ndarray:
    """Return a symmetric matrix with eigenvalues over some decades."""
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return (turn * 10.0 ** np.linspace(0.0, decades, size)) @ turn.T


@pytest.mark.parametrize("size", [1, 2, 24, 40])
def test_what_is_written_and_read_weigh_the_same_in_the_new_basis(size: int) -> None:
    writers, readers = spread(size, 2.0, 1), spread(size, 1.5, 2)
    basis = solve_balance(writers, readers, 3)
    inverse = np.linalg.inv(basis)
    made, read = basis.T @ writers @ basis, inverse @ readers @ inverse.T
    share = np.trace(read) / np.trace(made)
    np.testing.assert_allclose(read, share * made, rtol=0, atol=1e-9 * np.abs(read).max())
    assert abs(np.linalg.det(basis)) == pytest.approx(1.0, rel=1e-9)


def test_no_other_basis_costs_less() -> None:
    writers, readers = spread(12, 2.0, 1), spread(12, 2.0, 2)

    def cost(basis: np.ndarray) -> float:
        inverse = np.linalg.inv(basis)
        return float(np.trace(basis.T @ writers @ basis) * np.trace(inverse @ readers @ inverse.T))

    basis = solve_balance(writers, readers, 0)
    best, random = cost(basis), np.random.default_rng(4)
    assert best < 0.9 * cost(np.eye(12))
    for _ in range(50):
        other = basis + 0.05 * random.standard_normal((12, 12))
        assert best < cost(other)


def test_every_channel_gets_its_share() -> None:
    writers, readers = np.diag(10.0 ** np.linspace(0, 2, 64)), np.diag(np.linspace(1, 5, 64))
    basis = solve_balance(writers, readers, 0)
    energies = np.diag(basis.T @ writers @ basis)
    np.testing.assert_allclose(energies, energies.mean(), rtol=1e-9)
    plain = basis @ solve_rotation(64, 0).T  # without the rotation behind it
    assert np.ptp(np.diag(plain.T @ writers @ plain)) > 2.0 * energies.mean()


# ---------------------------------------------------------------------------- networks


def test_a_stage_is_the_same_function_and_rounds_better() -> None:
    graph, feeds = graph_of(STAGE), feeds_of()
    wanted = oracle.reference(graph.to_model(), feeds)
    plain = weights_rounded(graph, 4)
    ops = Counter(node.op for node in graph.nodes)
    report = balance_streams(graph, 0)
    assert (report.changed, report.refusals) == (6, ())  # two writers with biases, two readers
    assert Counter(node.op for node in graph.nodes) == ops  # constants only
    check_normalized(graph)
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < TOLERANCE, engine
    before, after = (
        oracle.relative_error(oracle.reference(g.to_model(), feeds), wanted)
        for g in (plain, weights_rounded(graph, 4))
    )
    assert after < 0.8 * before


def test_a_seed_gives_one_basis() -> None:
    weights = []
    for seed in (1, 1, 2):
        graph = graph_of(STAGE)
        balance_streams(graph, seed)
        weights.append(graph.fingerprint())
    assert weights[0] == weights[1] != weights[2]


def test_low_rank_factors_of_a_product_are_a_stream() -> None:
    random = np.random.default_rng(2)
    made = {
        name: random.standard_t(4, shape).astype(np.float32)
        for name, shape in (("down", (32, 8)), ("up", (8, 32)), ("c", (8,)))
    }
    text = f"""{HEAD} g (float[3,32] x) => (float[3,32] y) {{
        d = MatMul(x, down) b = Add(d, c) u = MatMul(b, up) y = Add(x, u) }}"""
    graph = Graph.from_text(text, **made)
    normalize(graph)
    feeds = {"x": random.standard_normal((3, 32)).astype(np.float32)}
    wanted = oracle.reference(graph.to_model(), feeds)
    assert balance_streams(graph, 0).changed == 3  # a bias is written, too
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < TOLERANCE, engine


def test_a_scale_of_one_number_is_passed() -> None:
    body = """s = Conv(x, first, offset) k = Mul(s, high) y0 = Conv(s, expand0)
              y1 = Conv(k, expand0) y = Concat<axis = 1>(y0, y1)"""
    graph, feeds = graph_of(body), feeds_of()
    wanted = oracle.reference(graph.to_model(), feeds)
    assert balance_streams(graph, 0).changed == 4
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < TOLERANCE, engine


def test_an_op_may_read_and_write_the_stream() -> None:
    body = """s = Conv(x, first, offset) t = Conv(s, inner, offset) r = Add(s, t)
              y = Conv(r, expand0, spread)"""
    graph, feeds = graph_of(body), feeds_of()
    wanted = oracle.reference(graph.to_model(), feeds)
    assert balance_streams(graph, 0).changed == 6
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < TOLERANCE, engine


def nothing(body: str, outputs: str = "float[A,B,C,D] y") -> list[str]:
    """Return the reasons why nothing changes."""
    graph = graph_of(body, outputs)
    before = graph.fingerprint()
    report = balance_streams(graph, 0)
    assert report.changed == 0
    assert graph.fingerprint() == before
    return [refusal.reason for refusal in report.refusals]


def test_activation_functions_show_no_stream() -> None:
    assert nothing("s = Conv(x, first, offset) a = Relu(s) y = Conv(a, expand0, spread)") == []


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        ("y0 = Conv(s, expand0, spread) z = Relu(s) y1 = Conv(z, expand0) y = Add(y0, y1)",
         "node_z reads it: Relu is not linear"),
        ("q = Sigmoid(s) t = Add(s, q) y = Conv(t, expand0, spread)", "node_q (Sigmoid) writes it"),
    ],
    ids=["read", "written"],
)  # fmt: skip
def test_streams_that_others_make_or_read_stay(middle: str, reason: str) -> None:
    assert nothing(f"s = Conv(x, first, offset) {middle}") == [reason]


def test_a_stream_that_leaves_the_model_stays() -> None:
    body = "s = Conv(x, first, offset) y = Conv(s, expand0, spread)"
    assert nothing(body, "float[A,B,C,D] y, float[2,16,6,6] s") == ["s is an output of the model"]


def changed_weight(change: str) -> list[str]:
    """Return why two convolutions stay, once something was done to the second weight."""
    graph = graph_of("s = Conv(x, first, offset) y = Conv(s, expand0, spread)")
    node = next(n for n in graph.nodes if n.outputs[0].name == "y")
    values = array_of(node.inputs[1]).copy()
    if change == "sparse":
        values[:, ::2] = 0.0
    elif change == "empty":
        values[:] = 0.0
    graph.set_input(node, 1, graph.constant("changed", values))
    if change == "levels":
        graph = weights_rounded(graph, 4)
    report = balance_streams(graph, 0)
    assert report.changed == 0
    return [refusal.reason for refusal in report.refusals]


def test_sparse_weights_stay_sparse() -> None:
    for change in ("sparse", "empty"):
        assert "sparse" in changed_weight(change)[0]


def test_weights_that_round_without_loss_stay() -> None:
    assert "rounding to 4 bits loses" in changed_weight("levels")[0]


# ---------------------------------------------------------------------------- options


def prepared(folder: Path, **options: object) -> Run:
    model = folder / "m.onnx"
    onnx.save(graph_of(STAGE).to_model(), model)
    run = start(model, make_options(**options))
    prepare(run)
    return run


def test_it_runs_by_itself_and_can_be_left_out(tmp_path: Path) -> None:
    names = {
        rotate: [r.name for r in prepared(tmp_path, rotate=rotate).passes if r.changed]
        for rotate in ("auto", "none", "all")
    }
    assert names["none"] == []
    assert names["auto"] == names["all"] == ["balance"]


def test_statistics_are_known_by_the_seed_and_not_by_the_last_digit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [model_key(prepared(tmp_path, **o)) for o in ({}, {"seed": 1}, {"rotate": "none"})]
    assert len(set(keys)) == 3
    exact = np.linalg.inv
    monkeypatch.setattr(np.linalg, "inv", lambda matrix: exact(matrix) * (1.0 + 1e-6))
    assert model_key(prepared(tmp_path)) == keys[0]


def test_given_scales_of_activations_keep_the_basis(tmp_path: Path) -> None:
    scales = tmp_path / "s.json"
    scales.write_text(json.dumps({"s": {"scale": 0.1, "zero_point": 128}}))
    changed = {}
    for given in (None, str(scales)):
        run = prepared(tmp_path, activation_scales=given)
        changed[given] = sum(report.changed for report in run.passes if report.name == "balance")
    assert changed == {None: 6, str(scales): 0}


def test_an_unknown_rotation_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="--rotate around"):
        Options(rotate="around")  # type: ignore[arg-type]
