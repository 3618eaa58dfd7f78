"""Static norms: closed forms are least squares; a norm is replaced only where that is good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qpass.errors import PreconditionError
from qpass.graph import Graph
from qpass.passes.normalize import check_normalized, normalize
from qpass.passes.static_norm import Batches, replace_norms
from qpass.passes.static_norm.solve import (
    ChannelMoments,
    CrossMoments,
    solve_refit,
    solve_static_norm,
)
from tests import oracle

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
# Three norms in a row of residual blocks: the first and the last are left alone.
BODY = """
    a0 = LayerNormalization(x, g0, c0)
    a1 = MatMul(a0, w0)
    r1 = Add(x, a1)
    b0 = LayerNormalization(r1, g1, c1)
    b1 = MatMul(b0, w1)
    r2 = Add(r1, b1)
    d0 = LayerNormalization(r2, g2, c2)
    y = MatMul(d0, w2)
"""


def network() -> Graph:
    random = np.random.default_rng(0)
    made: dict[str, Any] = {f"w{i}": 0.02 * random.standard_normal((24, 24)) for i in range(3)}
    made |= {f"g{i}": random.uniform(0.5, 1.5, 24) for i in range(3)}
    made |= {f"c{i}": random.standard_normal(24) for i in range(3)}
    text = f"{HEAD} g (float[N,8,24] x) => (float[N,8,24] y) {{ {BODY} }}"
    graph = Graph.from_text(text, **{k: v.astype(np.float32) for k, v in made.items()})
    for node in graph.nodes:
        node.name = f"node_{node.outputs[0].name}"
    normalize(graph)
    return graph


def batches(spread: float) -> Batches:
    """Tokens whose sizes differ by a factor of about exp(spread)."""
    random = np.random.default_rng(1)

    def batch() -> dict[str, np.ndarray]:
        tokens = random.standard_normal((4, 8, 24))
        tokens *= np.sqrt(24) / np.linalg.norm(tokens, axis=-1, keepdims=True)
        tokens = tokens - tokens.mean(-1, keepdims=True)
        sizes = np.exp(spread * random.standard_normal((4, 8, 1)))
        return {"x": (3 * sizes * tokens).astype(np.float32)}

    return Batches(fit=[batch() for _ in range(12)], check=[batch() for _ in range(4)])


def test_the_fit_is_least_squares_by_channel() -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((500, 6)) + 100  # a mean far above the deviation
    y = 0.3 * x + 0.1 * random.standard_normal((500, 6)) - 7
    moments = ChannelMoments(x, y)
    for part in np.split(np.arange(500), 5):
        moments.add(x[part], y[part])
    fit = solve_static_norm(moments)
    for channel in range(6):
        gain, offset = np.polyfit(x[:, channel], y[:, channel], 1)
        assert fit.gain[channel] == pytest.approx(gain, rel=1e-9)
        assert fit.offset[channel] == pytest.approx(offset, rel=1e-7)
    r2 = [np.corrcoef(x[:, i], y[:, i])[0, 1] ** 2 for i in range(6)]
    assert fit.r2 == pytest.approx(np.mean(r2), rel=1e-9)
    np.testing.assert_allclose(fit.mean, y.mean(axis=0), rtol=1e-12)


def test_channels_that_do_not_vary() -> None:
    x = np.array([[1.0, 2.0, 5.0], [1.0, 3.0, 5.0], [1.0, 4.0, 5.0]])
    y = np.array([[7.0, 4.0, 1.0], [7.0, 6.0, 2.0], [7.0, 8.0, 3.0]])
    moments = ChannelMoments(x, y)
    moments.add(x, y)
    fit = solve_static_norm(moments)
    np.testing.assert_allclose(fit.gain, [0, 2, 0])
    np.testing.assert_allclose(fit.offset, [7, 0, 2])
    assert fit.r2 == pytest.approx(0.5)  # of the two that vary, one is met


def test_the_refit_is_ridge_regression() -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((400, 5))
    y = x / np.linalg.norm(x, axis=1, keepdims=True) + random.standard_normal(5)
    moments = ChannelMoments(x, y)
    moments.add(x, y)
    fit = solve_static_norm(moments)
    crossed = CrossMoments(fit)
    crossed.add(x[:150], y[:150])
    crossed.add(x[150:], y[150:])
    change = solve_refit(crossed.own, crossed.cross, ridge=1e-2)
    weight = random.standard_normal((5, 7))
    fitted = fit.gain * x + fit.offset
    own, real = fitted - fitted.mean(axis=0), y - y.mean(axis=0)
    damping = 1e-2 * np.trace(own.T @ own) / 5
    rows = np.vstack([own, np.sqrt(damping) * np.eye(5)])
    wanted = np.vstack([real @ weight, np.sqrt(damping) * weight])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(weight + change @ weight, solution, atol=1e-10)


def test_a_norm_of_tokens_of_one_size_becomes_static() -> None:
    graph = network()
    found, report = replace_norms(graph, batches(0.0), threshold=0.98)
    assert report.changed == 1
    assert sum(node.op == "LayerNormalization" for node in found.nodes) == 2
    assert sum(node.op == "LayerNormalization" for node in graph.nodes) == 3  # left alone
    check_normalized(found)
    # The residual edge reads r1 raw and b0 has one reader: nothing of the norm is left.
    assert not any(node.op in ("Mul", "Div") for node in found.nodes)
    x = batches(0.0).check[0]
    wanted = oracle.ort_plain(graph.to_model(), x)["y"]
    for engine in oracle.ENGINES:
        got = engine(found.to_model(), x)["y"]
        assert 10 * np.log10((wanted**2).sum() / ((wanted - got) ** 2).sum()) > 30


def test_tokens_of_all_sizes_are_refused_with_their_r2() -> None:
    graph = network()
    found, report = replace_norms(graph, batches(0.8), threshold=0.98)
    assert found is graph
    assert report.changed == 0
    reasons = {r.where: r.reason for r in report.refusals}
    assert reasons["node_b0"].startswith("a gain and an offset explain R2 = 0.")
    assert (
        reasons["node_a0"] == reasons["node_d0"] == "it is the first or the last norm of the model"
    )


def test_outputs_that_suffer_are_refused() -> None:
    graph = network()
    found, report = replace_norms(graph, batches(0.8), threshold=0.01, edges=True)
    assert found is graph
    assert len(report.refusals) == 3
    assert all("the outputs of the model keep" in r.reason for r in report.refusals)


def test_samples_are_needed_on_both_sides() -> None:
    given = batches(0.0)
    with pytest.raises(PreconditionError, match="others to check with"):
        replace_norms(network(), Batches(fit=given.fit, check=[]), threshold=0.98)
