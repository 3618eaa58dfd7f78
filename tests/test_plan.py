"""The plan as a whole: reasons, files, determinism, time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import qpass
from qpass.api import make_options
from qpass.errors import RecipeError
from qpass.graph import Graph
from qpass.passes.insert_qdq import insert_qdq
from qpass.pipeline import prepare
from qpass.plan import Plan, read_plan
from qpass.qparams import choose_qparams
from qpass.run import start
from qpass.targets import TARGETS
from qpass.targets.specs import S8_WEIGHT
from tests.jobs import model_of, saved
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


PLAN_HEAD = '"schema": 1, "target": "ort-x86", "precision": "w8a8", "fingerprint": ""'
PLAN_NODE = '{"name": "n", "op": "", "rule": "", "precision": "int8", "bits": "", "because": ""}'
PLAN_TENSOR = (
    '{"tensor": "t", "kind": "activation", "spec": "", "group": null, "readers": "all", '
    '"because": "", "range": [1]}'
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("[]", "schema 1"),
        ('{"schema": 1}', "head of the plan lacks the key 'target'"),
        (f'{{{PLAN_HEAD}, "nodes": 3, "tensors": []}}', "damaged"),
        (f'{{{PLAN_HEAD}, "nodes": [{PLAN_NODE}], "tensors": []}}', "int8"),
        (f'{{{PLAN_HEAD}, "nodes": [], "tensors": [{PLAN_TENSOR}]}}', r"tensor t is \[1\]"),
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


# ------------------------------------------------------------------ edits of a plan file

WIDE = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,16] x) => (float[N,16] y)
{ [a] p = MatMul (x, w) [r] q = Relu (p) [b] s = MatMul (q, w2) [c] y = MatMul (s, w3) }
"""


def three_layers(folder: Path) -> Path:
    return saved(model_of(WIDE, w=(16, 16), w2=(16, 16), w3=(16, 16)), folder)


def edited(model: Path, edit: Callable[[dict[str, Any]], object], **options: Any) -> Path:
    """Write a plan of `model` and edit it."""
    data = json.loads(qpass.plan(model, **options).to_json())
    edit(data)
    path = model.with_name("plan.json")
    path.write_text(json.dumps(data))
    return path


def given_back(model: Path, plan: Path, **options: Any) -> Plan:
    run = start(model, make_options(plan=str(plan), **options))
    prepare(run)
    assert run.plan is not None
    return run.plan


def node_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(node for node in data["nodes"] if node["name"] == name)


def tensor_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(tensor for tensor in data["tensors"] if tensor["tensor"] == name)


@pytest.mark.parametrize(
    "ends",
    [
        [1, -1], [0, 0], [1, 2], [-2, -1], [0, 1e-12], ["NaN", 1], [-1e300, 1e300], [0, 10**400],
        [-1], [-1, 0, 1], [True, 1], ["-1", "1"], 5, "wide", {},
    ],
)  # fmt: skip
def test_a_range_has_two_finite_ends_around_zero(ends: Any, tmp_path: Path) -> None:
    if ends == ["NaN", 1]:
        ends = [float("nan"), 1]
    path = edited(three_layers(tmp_path), lambda data: tensor_of(data, "q").update(range=ends))
    with pytest.raises(RecipeError, match="the range of tensor q is") as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


def test_the_three_edits_hold(tmp_path: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        node_of(data, "a")["precision"] = "float"
        node_of(data, "b")["bits"] = "w4a8"
        tensor_of(data, "s")["range"] = [-2, 3]

    model = three_layers(tmp_path)
    plan = given_back(model, edited(model, edit))
    nodes = {node.name: node for node in plan.nodes}
    assert nodes["a"].precision == "float"
    assert nodes["b"].bits == "w4a8"
    assert next(d for d in plan.activations() if d.tensor == "s").pinned == (-2.0, 3.0)
    weights = {d.tensor: d.spec.bits for d in plan.weights()}
    assert weights == {"w2": 4, "w3": 8}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda p: tensor_of(p, "q").update(spec="s4 symmetric"), "tensor q has the spec 's4 sym"),
        (lambda p: tensor_of(p, "w2").update(spec="s4 symmetric per_channel(1)"), "tensor w2 has"),
        (lambda p: tensor_of(p, "q").update(tensor="other"), "no tensor other"),
        (lambda p: tensor_of(p, "q").update(readers=[]), r"tensor q has the readers \[\]"),
        (lambda p: tensor_of(p, "q").update(group="g"), "tensor q has the group 'g'"),
        (lambda p: tensor_of(p, "q").update(kind="weight"), "tensor q has the kind 'weight'"),
        (lambda p: tensor_of(p, "q").update(bits=4), "tensor q has the key 'bits'"),
        (lambda p: p["tensors"].remove(tensor_of(p, "q")), "tensor q is missing"),
        (lambda p: p["tensors"].append(tensor_of(p, "q")), "tensor q has the same entry twice"),
        (lambda p: p["nodes"].append(node_of(p, "a")), "node a is there twice"),
        (lambda p: p["nodes"].remove(node_of(p, "a")), "node a is missing"),
        (lambda p: node_of(p, "a").update(op="Conv"), "node a has the op 'Conv'"),
        (lambda p: node_of(p, "a").update(scale=1), "node a has the key 'scale'"),
        (lambda p: node_of(p, "a").update(bits="8"), "bits of node a: precision '8'"),
        (lambda p: node_of(p, "r").update(precision="integer"), "node r is integer in the plan"),
        (lambda p: node_of(p, "r").update(bits="w4a8"), "'r', which is to be w4a8, matches no"),
        (lambda p: tensor_of(p, "w2").update(range=[-1, 1]), "w2, which is a constant"),
        (lambda p: node_of(p, "a").pop("rule"), "node a lacks the key 'rule'"),
        (lambda p: node_of(p, "a").pop("because"), "node a lacks the key 'because'"),
        (lambda p: tensor_of(p, "w2").pop("spec"), "tensor w2 lacks the key 'spec'"),
        (lambda p: p.pop("fingerprint"), "the head of the plan lacks the key 'fingerprint'"),
        (lambda p: p.update(colour="red"), "head of the plan has the key 'colour'"),
        (lambda p: p.update(searched="no"), "searched is 'no'"),
        (lambda p: p.update(activations="never"), "activations 'never'"),
        (lambda p: p.update(precision="w4a8"), "the precision w4a8, and none of its layers"),
    ],
)
def test_what_has_no_effect_is_refused(
    edit: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    model = three_layers(tmp_path)
    path = edited(model, edit)
    with pytest.raises(RecipeError, match=words) as caught:
        given_back(model, path)
    assert str(path) in str(caught.value)


def test_a_range_of_what_is_float_is_refused(tmp_path: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        node_of(data, "b")["precision"] = "float"
        tensor_of(data, "q")["range"] = [-1, 1]

    model = three_layers(tmp_path)
    with pytest.raises(RecipeError, match="the range of tensor q has no effect"):
        given_back(model, edited(model, edit))


def test_bits_that_were_chosen_may_change_again(tmp_path: Path) -> None:
    """The entries of the tensors still show the bits that the plan was made with."""
    model = three_layers(tmp_path)
    path = edited(model, lambda p: node_of(p, "b").update(bits="w6a8"), bits=["b=w4a8"])
    assert {d.tensor: d.spec.bits for d in given_back(model, path).weights()}["w2"] == 6

    def edit(data: dict[str, Any]) -> None:
        tensor_of(data, "w2")["spec"] = "s8 symmetric per_channel(1)"

    with pytest.raises(RecipeError, match="tensor w2 has the spec 's8"):
        given_back(model, edited(model, edit, bits=["b=w4a8"]))


def test_the_precision_is_that_of_the_plan(tmp_path: Path) -> None:
    model = three_layers(tmp_path)
    path = edited(model, lambda p: None, precision="w4a8")
    plan = given_back(model, path)
    assert plan.precision == "w4a8"
    assert {node.name: node.bits for node in plan.nodes}["b"] == "w4a8"
    assert given_back(model, path, precision="w4a8").decisions == plan.decisions
    with pytest.raises(RecipeError, match="give --precision w4a8") as caught:
        given_back(model, path, precision="w8a8")
    assert str(path) in str(caught.value)


def test_layers_that_all_have_other_bits_by_choice(tmp_path: Path) -> None:
    model = three_layers(tmp_path)
    path = edited(model, lambda p: None, precision="w4a8", bits=["*=w8a8"])
    assert given_back(model, path, precision="w4a8").precision == "w4a8"


@pytest.mark.parametrize(
    ("made", "given", "words"),
    [
        ({"activations": "dynamic"}, {"activations": "static"}, "give --activations dynamic"),
        ({"precision": "w4", "block_size": 16}, {"block_size": 32}, "give --block-size 16"),
        ({"precision": "w4"}, {"asymmetric_weights": True}, "leave --asymmetric-weights out"),
    ],
)
def test_options_that_shape_a_plan_are_those_of_the_plan(
    made: dict[str, Any], given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = three_layers(tmp_path)
    path = edited(model, lambda p: None, **made)
    assert given_back(model, path).settings == qpass.plan(model, **made).settings
    with pytest.raises(RecipeError, match=words):
        given_back(model, path, **given)


def test_dynamic_ranges_of_the_nodes_that_a_plan_gives_8_bits(tmp_path: Path) -> None:
    model = three_layers(tmp_path)
    made = {"precision": "w4a4", "bits": ["b=w8a8"], "activations": "dynamic"}
    path = edited(model, lambda p: None, **made)
    assert given_back(model, path).decisions == qpass.plan(model, **made).decisions


def test_bits_beside_a_plan_count(tmp_path: Path) -> None:
    model = three_layers(tmp_path)
    path = edited(model, lambda p: node_of(p, "c").update(bits="w6a8"))
    plan = given_back(model, path, bits=["b*=w4a8"])
    assert {n.name: n.bits for n in plan.nodes if n.bits} == {"a": "w8a8", "b": "w4a8", "c": "w6a8"}
    assert {n.bits for n in given_back(model, path, bits=["*=w4a8"]).nodes} == {"w4a8", ""}


def test_a_plan_of_another_precision_says_so(tmp_path: Path) -> None:
    """Not that its nodes have activations, which weights alone would not."""
    model = three_layers(tmp_path)
    path = edited(model, lambda p: None)
    with pytest.raises(RecipeError, match="the plan has the precision w8a8") as caught:
        given_back(model, path, precision="w4")
    assert str(path) in str(caught.value)
