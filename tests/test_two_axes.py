"""Tensors that a Conv reads by its channels and a MatMul by its last axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qpass.choose import importance
from qpass.graph import Graph
from qpass.passes.equalize.apply import buy_mul
from qpass.passes.equalize.sites import direct_readers
from qpass.passes.equalize.solve import Scales
from qpass.planner import plan as make_plan
from qpass.targets import TARGETS
from tests.jobs import engine, model_of, optimize, saved
from tests.small_models import feeds_of, from_text, policy_of, run, weights

BEHIND_CONV = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,6,12] x) => (float[N,LENGTH,5] y) {
  [conv] a = Conv(x, w)
  [act] b = Relu(a)
  [fc] y = MatMul(b, v)
}
"""
BESIDE_CONV = """
<ir_version: 10, opset_import: ["": 21]>
g (float[2,C,12] x) => (float[2,4,12] y, float[2,C,5] z) {
  e = Sin(x)
  y = Conv(e, w)
  z = MatMul(e, v)
}
"""


def beside_conv(channels: int) -> Graph:
    random = np.random.default_rng(3)
    return from_text(
        BESIDE_CONV.replace("C,", f"{channels},"),
        w=weights(random, 4, channels, 1, fan_in=channels),
        v=weights(random, 12, 5, fan_in=12),
    )


@pytest.mark.parametrize("channels", [8, 12])  # as many as the last axis has, or not
@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_matmul_behind_conv(tmp_path: Path, channels: int, precision: str) -> None:
    text = BEHIND_CONV.replace("LENGTH", str(channels))
    path = saved(model_of(text, w=(channels, 6, 1), v=(12, 5)), tmp_path)
    samples = {"x": np.random.default_rng(2).standard_normal((32, 6, 12)).astype(np.float32)}
    report = optimize(path, samples, precision=precision)
    assert report.ok
    assert engine(report).sqnr_db > (25.0 if precision == "w8a8" else 15.0)


@pytest.mark.parametrize("channels", [8, 12])
def test_importance_is_of_one_axis(channels: int) -> None:
    graph = beside_conv(channels)
    plan = make_plan(graph, TARGETS["ort-x86"], policy_of())
    decision = next(d for d in plan.activations() if d.tensor == "e")
    assert importance(graph, decision) is None


@pytest.mark.parametrize("channels", [8, 12])
def test_bought_mul_is_for_the_readers_of_one_axis(channels: int) -> None:
    graph = beside_conv(channels)
    before = graph.to_model()
    readers = direct_readers(graph, graph.tensors()["e"], {"node_y", "node_z"})
    assert [reader.linear.node.name for reader in readers] == ["node_y"]
    scale = np.exp(np.random.default_rng(4).standard_normal(channels + 1))
    scales = Scales(method="test", scale=scale, shift=np.zeros(channels + 1))
    assert buy_mul(graph, "e", readers, scales) == ""
    after = graph.to_model()
    for feeds in feeds_of(graph, 2):
        wanted, got = run(before, feeds), run(after, feeds)
        for name in wanted:
            # Products of float32 numbers times reciprocals: a few roundings of 12 terms.
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5)
