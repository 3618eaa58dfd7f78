"""`round_weights` with `adaround`: whole models, what it refuses, and torch that is not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import qpass
from qpass.errors import RecipeError
from qpass.graph import Graph
from qpass.passes.round_weights import Rounding, replay, round_weights
from qpass.torch.executor import Executor
from qpass.torch.executor_ops import OPS
from qpass.verify.metrics import sqnr_db
from tests.jobs import CNN, DIGITS
from tests.rounded import numbers_of, quantized_at
from tests.small_models import feeds_of, residual_cnn, run, transformer

pytestmark = pytest.mark.torch
MODELS: tuple[Callable[[], Graph], ...] = (residual_cnn, transformer)


def fidelity(reference: Graph, graph: Graph) -> float:
    """SQNR in dB on samples that nobody has seen."""
    name = reference.outputs[0].name
    wanted, got = (
        np.concatenate([run(one.to_model(), f)[name] for f in feeds_of(reference, 24, seed=99)])
        for one in (reference, graph)
    )
    return sqnr_db(wanted, got)


def learned(reference: Graph, graph: Graph, numbers: object, **options: object) -> Rounding:
    """Round with few samples and iterations."""
    settings = {"method": "adaround", "iterations": 10, "threads": 1, "seed": 5, **options}
    return round_weights(reference, graph, feeds_of(reference, 8), numbers, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
def test_closer_to_float_than_nearest_with_the_same_structure(model: Callable[[], Graph]) -> None:
    reference = model()
    graph, table, plan = quantized_at(reference, "w3a8")
    numbers = numbers_of(plan, table)
    before, structure = fidelity(reference, graph), graph.to_text()
    rounding = learned(reference, graph, numbers)
    assert fidelity(reference, graph) > before + 1.0
    assert graph.to_text() == structure
    assert {*rounding.layers, *(r.where for r in rounding.report.refusals)} == set(numbers)
    for name, layer in rounding.layers.items():
        integers = layer.integers.astype(np.int32)
        assert integers.min() >= numbers[name].qmin
        assert integers.max() <= numbers[name].qmax
    again, table, plan = quantized_at(reference, "w3a8")
    replay(rounding, reference, again, numbers_of(plan, table))
    assert again.fingerprint() == graph.fingerprint()


def test_units_get_better_where_they_are_learned() -> None:
    """On one chain of layers the integers of adaround beat those that it starts from."""
    found = {}
    for method in ("unit", "adaround"):
        reference = residual_cnn()
        graph, table, plan = quantized_at(reference, "w2a8")
        numbers = numbers_of(plan, table)
        rounding = learned(reference, graph, numbers, method=method, iterations=40)
        found[method] = graph.fingerprint(), fidelity(reference, graph), rounding
    assert found["unit"][0] != found["adaround"][0]
    assert found["adaround"][1] > found["unit"][1]


def test_two_runs_give_the_same_graph() -> None:
    found = []
    for _ in range(2):
        reference = residual_cnn()
        graph, table, plan = quantized_at(reference, "w3a8")
        learned(reference, graph, numbers_of(plan, table), iterations=10)
        found.append(graph.fingerprint())
    assert found[0] == found[1]


def test_a_unit_with_an_op_that_is_missing_keeps_the_closed_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The unit that reads the pooled tensor is named; the others are learned."""
    monkeypatch.setattr(
        "qpass.torch.executor.OPS", {op: function for op, function in OPS.items() if op != "Clip"}
    )
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, "w3a8")
    rounding = learned(reference, graph, numbers_of(plan, table))
    reasons = {r.where: r.reason for r in rounding.report.refusals}
    assert "Clip has no gradient here" in reasons["node_logits"]
    assert "the integers of unit stay" in reasons["node_logits"]
    assert "Clip" not in reasons.get("node_stem", "")
    assert rounding.report.changed > 0


def test_many_levels_are_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "__init__", None)  # nothing may run
    reference = residual_cnn()
    graph, table, plan = quantized_at(reference, "w8a8")
    numbers = numbers_of(plan, table)
    rounding = learned(reference, graph, numbers)
    reasons = [r.reason for r in rounding.report.refusals]
    assert sum("levels" in reason for reason in reasons) == len(numbers)


def test_without_torch_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RecipeError, match="--round adaround needs torch") as error:
        qpass.optimize(
            CNN, data=DIGITS, precision="w4a8", round="adaround", output=tmp_path / "m.onnx"
        )
    assert "pip install 'qpass[torch]'" in str(error.value)
