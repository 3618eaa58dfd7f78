"""Half precision models: float32 inside, the same types outside."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qpass.graph import Constant, Graph
from qpass.passes.normalize import normalize
from qpass.passes.normalize.folding import element_type
from tests import oracle

NAMES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
BODY = """<ir_version: 10, opset_import: ["": 21]>
g (KIND[64,4] x, float[64,3] other) => (KIND[64,3] y, float[64,3] z, KIND[64,3] again)
<KIND[4,3] w>
{
    a = MatMul (x, w)
    f = Cast <to = 1> (a)
    z = Add (f, other)
    h = Cast <to = NUMBER> (z)
    y = Add (a, h)
    again = Relu (y)
}"""


def half_model(kind: str) -> onnx.ModelProto:
    text = BODY.replace("KIND", kind).replace("NUMBER", str(int(NAMES[kind])))
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(2).standard_normal(12)
    model.graph.initializer.append(helper.make_tensor("w", NAMES[kind], [4, 3], weight))
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize("kind", NAMES)
def test_everything_inside_is_float32(kind: str) -> None:
    graph = Graph(half_model(kind))
    types = {t.name: element_type(t) for t in (*graph.inputs, *graph.outputs)}
    normalize(graph)
    assert {t.name: element_type(t) for t in (*graph.inputs, *graph.outputs)} == types
    outside = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    inside = [tensor for tensor in graph.tensors().values() if id(tensor) not in outside]
    assert {element_type(t) for t in inside if element_type(t) != TensorProto.INT64} == {1}
    assert any(isinstance(tensor, Constant) for tensor in inside)
    onnx.checker.check_model(graph.to_model(), full_check=True)


def test_the_numbers_are_those_of_half_precision_to_its_rounding() -> None:
    """Four products of half precision and four roundings: about 4 of 2^-11 of the largest value."""
    graph, random = Graph(half_model("float16")), np.random.default_rng(5)
    feeds = {
        "x": random.standard_normal((64, 4)).astype(np.float16),
        "other": random.standard_normal((64, 3)).astype(np.float32),
    }
    wanted = oracle.reference(graph.to_model(), feeds)  # onnxruntime rounds to half at Casts only
    normalize(graph)
    got = oracle.reference(graph.to_model(), feeds)
    assert 0.0 < oracle.relative_error(got, wanted) <= 4 * 2**-11


def test_a_second_time_changes_nothing() -> None:
    graph = Graph(half_model("float16"))
    normalize(graph)
    text = graph.to_text()
    assert normalize(graph).changed == 0
    assert graph.to_text() == text


def test_control_flow_in_half_precision_is_refused() -> None:
    branch = onnx.parser.parse_graph("b () => (float16[3] r) { r = Neg (x) }")
    body = '<ir_version: 10, opset_import: ["": 21]> g (float16[3] x, bool flag) => (float16[3] y)'
    model = onnx.parser.parse_model(body + "{ y = Relu (x) }")
    model.graph.node[0].CopyFrom(
        helper.make_node("If", ["flag"], ["y"], name="if", then_branch=branch, else_branch=branch)
    )
    graph = Graph(model)
    report = normalize(graph)
    assert [(row.rule, row.where) for row in report.refusals] == [("float32", "if")]
    assert [node.op for node in graph.nodes] == ["If"]
