"""Editing a graph: uses, names, copies, taps."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qpass.errors import InternalError
from qpass.graph import Graph, Node
from tests.small_models import run

CHAIN = """
<ir_version: 10, opset_import: ["": 21]>
chain (float[2] x) => (float[2] y)
{
    a = Relu (x)
    b = Neg (a)
    y = Abs (b)
}
"""


def names(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def shared(size: int) -> Graph:
    return Graph.from_text(
        f"""
        <ir_version: 10, opset_import: ["": 21]>
        shared (float[{size}] x) => (float[{size}] y)
        {{
            a = Add (x, c)
            y = Mul (a, c)
        }}
        """,
        c=np.arange(size, dtype=np.float32),
    )


def test_replacing_uses_keeps_the_name_of_a_graph_output() -> None:
    graph = Graph.from_text(CHAIN)
    absolute = graph.nodes[2]
    new = graph.variable("new", np.float32, [2])
    graph.add(graph.make("Sqrt", [graph.nodes[0].outputs[0]], [new], name="sqrt"))
    graph.replace_uses(absolute.outputs[0], new)
    graph.remove_unused()
    assert names(graph) == ["Relu", "Sqrt"]
    assert [t.name for t in graph.to_model().graph.output] == ["y"]
    onnx.checker.check_model(graph.to_model(), full_check=True)


def test_a_graph_output_cannot_become_an_input() -> None:
    graph = Graph.from_text(CHAIN)
    with pytest.raises(InternalError, match="alias"):
        graph.replace_uses(graph.outputs[0], graph.inputs[0])


def test_removing_what_nobody_reads_goes_through_chains() -> None:
    graph = Graph.from_text(CHAIN)
    x = graph.inputs[0]
    for op in ("Sin", "Cos"):
        out = graph.variable(op.lower(), np.float32, [2])
        graph.add(graph.make(op, [x], [out], name=op))
        x = out
    assert graph.remove_unused() == 2
    assert names(graph) == ["Relu", "Neg", "Abs"]


def test_names_are_taken_once() -> None:
    graph = Graph.from_text(CHAIN)
    assert [graph.unique_name("a") for _ in range(2)] == ["a_1", "a_2"]
    assert graph.copy().unique_name("a") == "a_3"


def test_a_copy_is_independent() -> None:
    graph = shared(4)
    before = graph.fingerprint()
    twin = graph.copy()
    assert twin.fingerprint() == before
    twin.remove(twin.nodes[1])
    twin.nodes[0].attrs["changed"] = 1
    assert graph.fingerprint() == before
    assert len(graph.nodes) == 2


def test_the_fingerprint_sees_structure_and_values() -> None:
    one, other, third = shared(4), shared(4), shared(4)
    other.set_input(other.nodes[0], 1, other.constant("c0", np.zeros(4, np.float32)))
    third.nodes[0].op = "Sub"
    assert len({g.fingerprint() for g in (one, shared(4), other, third)}) == 3


def test_taps_become_outputs_with_the_types_that_were_inferred() -> None:
    graph = Graph.from_text(CHAIN)
    graph.infer_shapes()
    model = graph.to_model(taps=["a", "b", "y"])
    assert [output.name for output in model.graph.output] == ["y", "a", "b"]
    got = run(model, {"x": np.array([-1, 2], np.float32)})
    np.testing.assert_array_equal(got["a"], [0, 2])


def test_shapes_are_inferred_without_the_weights() -> None:
    graph = Graph.from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[N, 40] x) => (float[N, 50] y)
        {
            a = MatMul (x, w)
            y = Relu (a)
        }
        """,
        w=np.zeros((40, 50), np.float32),
    )
    graph.infer_shapes()
    assert graph.tensors()["a"].dtype == np.float32
    assert list(graph.tensors()["a"].shape) == ["N", 50]


def test_nodes_by_name() -> None:
    graph = Graph.from_text(CHAIN)
    first: Node = graph.nodes[0]
    assert graph.node(first.name) is first
    with pytest.raises(KeyError):
        graph.node("nowhere")
