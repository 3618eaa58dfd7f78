"""What torch runs of a unit: not what lies in front of the layers, and nothing where it cannot."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from qpass.graph import Graph
from qpass.passes.round_weights import round_weights
from qpass.passes.rounding import gradient
from qpass.passes.rounding.replay import Rounding
from tests.rounded import fidelity, numbers_of, quantized_at
from tests.small_models import feeds_of, from_text, weights

pytestmark = pytest.mark.torch
RECURRENT = """
<ir_version: 10, opset_import: ["": 21]>
rnn (float[4,6,12] x) => (float[4,10] y)
{
    steps = Transpose <perm = [1, 0, 2]> (x)
    all, last = GRU <hidden_size = 16> (steps, gates, states)
    h = Squeeze (last, first)
    a = MatMul (h, a_w)
    b = Relu (a)
    c = MatMul (b, c_w)
    d = Tanh (c)
    y = MatMul (d, d_w)
}
"""


def recurrent(text: str = RECURRENT) -> Graph:
    random = np.random.default_rng(4)
    constants = {
        "gates": weights(random, 1, 48, 12, fan_in=12),
        "states": weights(random, 1, 48, 16, fan_in=16),
        "first": np.array([0], np.int64),
        "a_w": weights(random, 16, 32 if "c_w" in text else 16, fan_in=16),
        "c_w": weights(random, 32, 16, fan_in=32),
        "d_w": weights(random, 16, 3 if "[4,3]" in text else 10, fan_in=16),
        "more": weights(random, 1, 96, 32, fan_in=32),
        "again": weights(random, 1, 96, 32, fan_in=32),
    }
    return from_text(text, **{name: array for name, array in constants.items() if name in text})


def rounded(reference: Graph, graph: Graph, numbers: object, **options: object) -> Rounding:
    settings = {"method": "adaround", "iterations": 60, "threads": 1, "seed": 5, **options}
    samples = feeds_of(reference, settings.pop("samples", 24))  # type: ignore[arg-type]
    return round_weights(reference, graph, samples, numbers, **settings)  # type: ignore[arg-type]


def test_cells_in_front_of_the_layers_are_run_by_the_engine() -> None:
    """No function for GRU is needed in torch: its output is an input of the part."""
    reference = recurrent()
    graph, table, plan = quantized_at(reference, "w3a8", low_bit_edges=False)
    before = fidelity(reference, graph)
    rounding = rounded(reference, graph, numbers_of(plan, table), samples=96, iterations=200)
    reasons = [refusal.reason for refusal in rounding.report.refusals]
    assert not any("GRU has no gradient" in reason for reason in reasons), reasons
    assert not any("differ" in reason for reason in reasons), reasons
    assert "sweep: node_y does not read its elements each by itself" in reasons  # of node_a
    assert rounding.learned
    assert fidelity(reference, graph) > before + 1.0


def test_a_cell_between_the_layers_leaves_the_unit_to_closed_forms() -> None:
    between = """t = Unsqueeze (a, first)
    g, b0 = GRU <hidden_size = 32> (t, more, again)
    b = Squeeze (b0, first)"""
    reference = recurrent(RECURRENT.replace("b = Relu (a)", between))
    found = {}
    for method in ("unit", "adaround"):
        graph, table, plan = quantized_at(reference, "w3a8", low_bit_edges=False)
        rounding = rounded(reference, graph, numbers_of(plan, table), method=method)
        found[method] = graph.fingerprint()
    assert not rounding.learned
    reasons = {refusal.where: refusal.reason for refusal in rounding.report.refusals}
    assert "GRU has no gradient here (node_" in reasons["node_a"]
    assert "the integers of unit stay" in reasons["node_c"]
    assert found["adaround"] == found["unit"]


def test_where_gradients_come_to_nothing_the_outputs_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer alone in its unit has its channels rounded by what the outputs see of them."""
    monkeypatch.setattr(
        "qpass.passes.round_weights.reconstruct_unit", lambda *_, **__: gradient.Learned()
    )
    text = RECURRENT.replace("c = MatMul (b, c_w)\n    d = Tanh (c)", "d = Tanh (b)")
    reference = recurrent(text.replace("[4,10]", "[4,3]"))
    found: dict[str, float] = {}
    for spare in ("by outputs", "none"):
        if spare == "none":
            monkeypatch.setattr("qpass.passes.round_weights.find_metric", lambda *_: None)
        graph, table, plan = quantized_at(reference, "w3a8", low_bit_edges=False)
        assert rounded(reference, graph, numbers_of(plan, table), samples=64).layers
        found[spare] = fidelity(reference, graph)
    assert found["by outputs"] > found["none"]
