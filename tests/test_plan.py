"""The plan as a whole: reasons, files, determinism, time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import RecipeError
from qpass.graph import Graph
from qpass.passes.insert_qdq import insert_qdq
from qpass.plan import read_plan
from qpass.qparams import choose_qparams
from qpass.targets import TARGETS
from qpass.targets.specs import S8_WEIGHT
from tests.planning import (
    captured,
    plan_or_none,
    planned,
    two_kinds,
)
from tests.small_models import residual_cnn, transformer
from tests.strategies import graphs


def small_graphs() -> Iterator[Graph]:
    yield residual_cnn()
    yield transformer()
    yield two_kinds()
    yield captured()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_everything_has_a_because(name: str) -> None:
    for graph in small_graphs():
        plan = planned(graph, TARGETS[name])
        assert all(d.because for d in plan.decisions)
        assert all(n.because for n in plan.nodes)
        assert [n.name for n in plan.nodes] == [n.name for n in graph.nodes]


@given(graphs(), st.sampled_from(sorted(TARGETS)))
def test_plans_are_deterministic(graph: Graph, name: str) -> None:
    first, again = (plan_or_none(g, TARGETS[name]) for g in (graph, Graph(graph.to_model())))
    assert (first is None) == (again is None)
    if first is not None and again is not None:
        assert first.to_json() == again.to_json()
        assert all(d.because for d in first.decisions)


@pytest.mark.parametrize("precision", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_plan_file_gives_the_same_plan_again(tmp_path: Path, name: str, precision: str) -> None:
    for graph in small_graphs():
        ranges = {"x": (-1.0, 2.0)} if "x" in graph.tensors() else {}
        plan = planned(graph, TARGETS[name], precision, ranges=ranges)
        path = tmp_path / "plan.json"
        path.write_text(plan.to_json())
        back = read_plan(path)
        assert (back.target, back.precision) == (name, precision)
        assert back.node_names == {n.name for n in plan.nodes}
        again = planned(
            graph,
            TARGETS[name],
            precision,
            float_nodes=back.float_nodes,
            ranges=back.ranges,
            node_bits=back.node_bits,
        )
        assert again.decisions == plan.decisions
        assert [(n.precision, n.bits, n.because) for n in again.nodes] == [
            (n.precision, n.bits, n.because) for n in plan.nodes
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("[]", "schema 1"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 1, "nodes": [{"name": "n", "precision": "int8"}]}', "int8"),
        (
            '{"schema": 1, "nodes": [], "tensors": [{"tensor": "t", "range": [1]}]}',
            "damaged",
        ),
    ],
)
def test_bad_plan_files_are_the_users_mistake(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_plan(path)


def test_time_is_linear_in_the_number_of_nodes() -> None:
    """1,000 blocks of Conv, Relu, Conv, Add, Relu with one kernel: nothing may be quadratic."""
    nodes, last = [helper.make_node("Conv", ["x", "w"], ["stem"], name="stem")], "stem"
    for i in range(1_000):
        a, r, c, s, out = (f"{kind}{i}" for kind in ("a", "r", "c", "s", "o"))
        nodes += [
            helper.make_node("Conv", [last, "w"], [a], name=f"conv{i}"),
            helper.make_node("Relu", [a], [r], name=f"relu{i}"),
            helper.make_node("Conv", [r, "w"], [c], name=f"second{i}"),
            helper.make_node("Add", [c, last], [s], name=f"add{i}"),
            helper.make_node("Relu", [s], [out], name=f"last{i}"),
        ]
        last = out
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 32, 4, 4]) for n in ("x", last)
    ]
    kernel = numpy_helper.from_array(np.ones((32, 32, 1, 1), np.float32), "w")
    model = helper.make_model(
        helper.make_graph(nodes, "long", infos[:1], infos[1:], [kernel]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    graph = Graph(model)
    begin = time.process_time()
    plan = planned(graph)
    numbers = {
        d.key: choose_qparams(d.spec, -np.ones(32), np.ones(32))
        if d.spec.axis is not None
        else choose_qparams(d.spec, -1.0, 1.0)
        for d in plan.decisions
    }
    insert_qdq(graph, plan, numbers)
    seconds = time.process_time() - begin
    # The stem is one more, and nothing behind the last Add is integer.
    assert len(plan.integer_nodes()) == 1_000 * 3
    assert sum(n.op == "QuantizeLinear" for n in graph.nodes) == 1_000 * 3 + 1
    assert seconds < 2.5  # of the processor; 20,000 nodes may take 10
    onnx.checker.check_model(graph.to_model())


def test_the_specs_of_the_tables_are_not_changed_by_planning() -> None:
    planned(residual_cnn())
    assert S8_WEIGHT.axis == 0
