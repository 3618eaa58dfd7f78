"""What learns by gradients aims at the network with float weights where scales are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

from qpass.graph import Graph
from qpass.passes.round_weights import round_weights
from qpass.passes.tune import tune
from qpass.targets import TARGETS
from qpass.verify.metrics import sqnr_db
from tests.frozen_networks import Frozen, frozen, outputs
from tests.small_models import feeds_of, residual_cnn

pytestmark = pytest.mark.torch


def learned(case: Frozen, aim: Graph | None, batches: list[Any]) -> Graph:
    graph = case.graph.copy()
    round_weights(
        case.reference,
        graph,
        batches,
        case.numbers,
        method="adaround",
        iterations=20,
        threads=1,
        aim=aim,
    )
    return graph


def tuned(case: Frozen, aim: Graph | None, batches: list[Any]) -> Graph:
    graph = case.graph.copy()
    tuning = tune(case.reference, graph, batches, steps=120, threads=1, aim=aim)
    assert tuning.report.changed
    return graph


@pytest.mark.parametrize("fit", [learned, tuned])
def test_unseen_samples_are_closer_to_it(fit: Callable[..., Graph]) -> None:
    case = frozen(residual_cnn(), "w4a4", TARGETS["openvino"])
    batches, unseen = feeds_of(case.reference, 32), feeds_of(case.reference, 24, seed=99)
    graphs = [case.graph, *(fit(case, aim, batches) for aim in (None, case.aim))]
    wanted = outputs(case.aim, unseen)
    nearest, old, new = (sqnr_db(wanted, outputs(graph, unseen)) for graph in graphs)
    assert new > old + 0.5
    assert new > nearest + 1.0
