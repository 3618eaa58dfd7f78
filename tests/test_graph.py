"""The graph seam: each hole of onnx-graphsurgeon that the module names, and the editing it offers.

The numbers 1 to 6 are those of the module's docstring.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import InternalError
from qpass.graph import SHARED_LIMIT, Constant, Graph, array_of
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


def with_constant(values: np.ndarray[Any, Any], op: str = "Identity") -> onnx.ModelProto:
    """A model with one initializer `w` that a node reads."""
    proto = numpy_helper.from_array(values, "w")
    graph = helper.make_graph(
        [helper.make_node(op, ["w"], ["y"], name="n")],
        "g",
        [],
        [helper.make_tensor_value_info("y", proto.data_type, values.shape)],
        [proto],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


# ------------------------------------------------------------------ 1: constants of any dtype

DTYPES = (
    ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
    ml_dtypes.bfloat16, np.float16, np.float64, np.int8, np.uint16, np.int64, np.bool_,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_1_constants_keep_dtype_and_bytes(dtype: Any) -> None:
    values = np.arange(7).astype(dtype)  # an odd count: half a byte of int4 is left over
    model = with_constant(values)
    graph = Graph(model)
    (constant,) = graph.constants()
    np.testing.assert_array_equal(array_of(constant).astype(float), values.astype(float))
    assert graph.to_model().graph.initializer[0] == model.graph.initializer[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_1_new_constants_of_any_dtype(dtype: Any) -> None:
    graph = Graph.from_text(CHAIN)
    values = (np.arange(5) % 2).astype(dtype)
    constant = graph.constant("c", values)
    graph.add(graph.make("Identity", [constant], [graph.variable("kept")], name="n"))
    (written,) = graph.to_model().graph.initializer
    assert numpy_helper.to_array(written).dtype == values.dtype
    np.testing.assert_array_equal(numpy_helper.to_array(written).astype(float), np.arange(5) % 2)


def external_model(folder: Path, values: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """`with_constant`, its data in `folder`/w.bin behind 16 other bytes."""
    model = with_constant(values)
    proto = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(bytes(16) + proto.raw_data)
    proto.ClearField("raw_data")
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "16")):
        proto.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.int4], ids=["float32", "int4"])
def test_1_external_data_is_read_when_asked_for_and_stays_on_disk(
    tmp_path: Path, dtype: Any
) -> None:
    values = (np.arange(600) % 7).astype(dtype).reshape(20, 30)
    model = external_model(tmp_path, values)
    graph = Graph(model, tmp_path)
    (constant,) = graph.constants()
    assert tuple(constant.shape) == (20, 30)
    np.testing.assert_array_equal(array_of(constant).astype(float), values.astype(float))
    written = graph.to_model().graph.initializer[0]
    assert written.external_data == model.graph.initializer[0].external_data
    assert not written.raw_data
    (tmp_path / "w.bin").unlink()
    with pytest.raises(FileNotFoundError):  # nothing was kept from the first read
        array_of(constant)


# ------------------------------------------------------------------ 2: identity


def twins() -> Graph:
    """Two nodes that are equal in everything but their place: same op, name and attributes."""
    return Graph.from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        twins (float[2] x) => (float[2] y, float[2] z)
        {
            y = Relu (x)
            z = Relu (x)
        }
        """
    )


def test_2_the_second_of_two_equal_nodes_is_removed() -> None:
    graph = twins()
    first, second = graph.nodes
    first.name = second.name = "same"
    graph.remove(second)
    (kept,) = graph.nodes
    assert kept is first
    assert first.inputs[0].outputs == [first]
    assert second.inputs == []


def test_2_inputs_are_set_on_the_node_that_was_meant() -> None:
    graph = twins()
    first, second = graph.nodes
    first.name = second.name = "same"
    other = graph.variable("other", np.float32, [2])
    graph.set_input(second, 0, other)
    assert first.inputs[0] is graph.inputs[0]
    assert second.inputs[0] is other
    assert [n is first for n in graph.inputs[0].outputs] == [True]
    assert [n is second for n in other.outputs] == [True]


def test_2_a_node_may_read_a_tensor_twice() -> None:
    graph = Graph.from_text(
        """
        <ir_version: 10, opset_import: ["": 21]>
        square (float[2] x) => (float[2] y) { y = Mul (x, x) }
        """
    )
    (node,) = graph.nodes
    assert graph.consumers(graph.inputs[0]) == [(node, 0), (node, 1)]
    other = graph.variable("other", np.float32, [2])
    graph.set_input(node, 1, other)
    assert graph.consumers(graph.inputs[0]) == [(node, 0)]
    assert graph.consumers(other) == [(node, 1)]


def test_2_disagreement_of_tensor_and_node_is_a_bug() -> None:
    graph = twins()
    first, _ = graph.nodes
    list.clear(first.inputs[0].outputs)
    with pytest.raises(InternalError, match="disagree"):
        graph.set_input(first, 0, graph.variable("other"))


def test_2_editing_is_linear() -> None:
    """Comparing nodes by structure made this quadratic: seconds for a graph of this size."""
    count = 5_000
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(count)]
    info = [helper.make_tensor_value_info(f"t{i}", TensorProto.FLOAT, [1]) for i in (0, count)]
    model = helper.make_model(helper.make_graph(nodes, "long", info[:1], info[1:]))
    graph = Graph(model)
    begin = time.process_time()
    for node in list(graph.nodes):
        new = graph.variable("u", np.float32, [1])
        graph.add(graph.make("Neg", [node.inputs[0]], [new], name="neg"), before=node)
        graph.set_input(node, 0, new)
    graph.sort()
    assert len(graph.nodes) == 2 * count
    assert time.process_time() - begin < 2.5


# ------------------------------------------------------------------ 3: places and order


def test_3_nodes_stand_where_they_were_put() -> None:
    graph = Graph.from_text(CHAIN)
    _, negate, _ = graph.nodes
    for op, where in (("Sin", "before"), ("Cos", "before"), ("Exp", "after"), ("Log", "after")):
        made = graph.make(op, [graph.inputs[0]], [graph.variable(op)], name=op)
        graph.add(made, **{where: negate})
    # Before: in the order of adding. After: the last one added is nearest.
    assert names(graph) == ["Relu", "Sin", "Cos", "Neg", "Log", "Exp", "Abs"]


def test_3_anchors_may_be_new_or_removed_nodes() -> None:
    graph = Graph.from_text(CHAIN)
    _, negate, _ = graph.nodes
    first = graph.make("Sin", [graph.inputs[0]], [graph.variable("s")], name="sin")
    graph.add(first, after=negate)
    graph.add(graph.make("Cos", [first.outputs[0]], [graph.variable("c")], name="cos"), after=first)
    graph.remove(negate)
    assert names(graph) == ["Relu", "Sin", "Cos", "Abs"]


def test_3_sorting_is_stable_and_repairs_order() -> None:
    graph = Graph.from_text(CHAIN)
    relu, negate, _ = graph.nodes
    new = graph.variable("late", np.float32, [2])
    graph.add(graph.make("Sin", [relu.outputs[0]], [new], name="sin"))  # at the end: too late
    graph.set_input(negate, 0, new)
    graph.sort()
    assert names(graph) == ["Relu", "Sin", "Neg", "Abs"]
    onnx.checker.check_model(graph.to_model(), full_check=True)


def test_3_a_circle_is_an_error() -> None:
    graph = Graph.from_text(CHAIN)
    relu, _, absolute = graph.nodes
    graph.set_input(relu, 0, absolute.outputs[0])
    with pytest.raises(InternalError, match="cycle"):
        graph.sort()


# ------------------------------------------------------------------ 4: shared constants


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


def test_4_small_constants_are_unshared_and_merged_again() -> None:
    graph = shared(4)
    add, multiply = graph.nodes
    assert add.inputs[1] is not multiply.inputs[1]
    (initializer,) = graph.to_model().graph.initializer
    assert initializer.name == "c"
    graph.copy()  # a copy of the graph merges them as well
    assert len(graph.copy().to_model().graph.initializer) == 1


def test_4_a_changed_copy_is_written_on_its_own() -> None:
    graph = shared(4)
    add, _ = graph.nodes
    name = add.inputs[1].name
    graph.set_input(add, 1, graph.constant("other", np.ones(4, np.float32)))
    assert len(graph.to_model().graph.initializer) == 2
    assert name not in [t.name for t in graph.to_model().graph.initializer]
    x = np.ones(4, np.float32)
    np.testing.assert_array_equal(run(graph.to_model(), {"x": x})["y"], 2 * np.arange(4))


def test_4_large_constants_stay_shared() -> None:
    graph = shared(SHARED_LIMIT // 4 + 1)
    add, multiply = graph.nodes
    assert add.inputs[1] is multiply.inputs[1]


# ------------------------------------------------------------------ 5: what else a model holds


def test_5_metadata_domains_and_doc_strings_survive() -> None:
    node = helper.make_node("FastGelu", ["x"], ["y"], name="n", domain="com.microsoft")
    node.doc_string = "of the node"
    node.metadata_props.add(key="origin", value="layer 3")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        doc_string="of the graph",
    )
    graph.quantization_annotation.add(tensor_name="x")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    header: dict[str, Any] = {"producer_name": "p", "producer_version": "2", "domain": "d"}
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=10, model_version=3, doc_string="doc", **header
    )
    model.metadata_props.add(key="author", value="me")
    assert Graph(model).to_model() == model
    assert Graph(model).copy().to_model() == model


def test_5_nameless_nodes_get_names_that_are_free() -> None:
    graph = Graph.from_text(CHAIN)
    assert len({node.name for node in graph.nodes}) == 3
    assert all(node.name for node in graph.nodes)


# ------------------------------------------------------------------ 6: control flow

BRANCHES = """
<ir_version: 10, opset_import: ["": 21]>
choose (bool flag, float[2] x) => (float[2] y, float[2] z)
{
    used = Relu (x)
    z = Abs (x)
    y = If (flag) <
        then_branch = yes () => (float[2] t) { t = Add (used, w) },
        else_branch = no () => (float[2] e) { e = Identity (x) }
    >
}
"""


def branches() -> Graph:
    return Graph.from_text(BRANCHES, w=np.array([10, 20], np.float32))


def test_6_bodies_stay_as_they_are() -> None:
    model = onnx.parser.parse_model(BRANCHES)
    body = next(a for a in model.graph.node[2].attribute if a.name == "then_branch")
    graph = branches()
    written = graph.to_model().graph.node[2]
    assert next(a.g for a in written.attribute if a.name == "then_branch") == body.g
    onnx.checker.check_model(graph.to_model(), full_check=True)


def test_6_what_a_body_reads_is_known_and_kept() -> None:
    graph = branches()
    choose = next(node for node in graph.nodes if node.op == "If")
    assert {t.name for t in choose.captured} == {"used", "w", "x"}
    assert any(isinstance(t, Constant) for t in choose.captured)
    assert graph.remove_unused() == 0  # nobody but the body reads `used`
    graph.sort()
    feeds = {"flag": np.array(True), "x": np.array([-1, 2], np.float32)}
    np.testing.assert_array_equal(run(graph.copy().to_model(), feeds)["y"], [10, 22])


def test_6_makers_of_captured_tensors_come_first() -> None:
    graph = branches()
    relu, _, choose = graph.nodes
    graph._nodes = [choose, relu, graph.nodes[1]]
    graph.sort()
    assert names(graph) == ["Relu", "If", "Abs"]
