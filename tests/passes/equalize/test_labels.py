"""Labels move as the elements of a tensor do: compared with the op itself, run on the labels."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.passes.equalize.labels import (
    move_backward,
    move_forward,
    reduced,
    reshaped,
    vector,
)
from tests.oracle import reference

MOVES = {
    "Transpose": ("y = Transpose <perm = [0,2,1]> (x)", "float[2,4,6] x", 1),
    "Reshape heads": ("y = Reshape (x, heads)", "float[2,5,6] x", 2),
    "Reshape rows": ("y = Reshape (x, rows)", "float[2,5,6] x", 2),
    "Flatten": ("y = Flatten (x)", "float[2,6,3] x", 1),
    "Unsqueeze": ("y = Unsqueeze (x, one)", "float[2,6] x", 1),
    "Slice": ("y = Slice (x, one, four, one)", "float[2,6,3] x", 1),
    "Gather": ("y = Gather <axis = 1> (x, picks)", "float[2,6,3] x", 1),
    "Gather one": ("y = Gather <axis = 1> (x, first)", "float[2,3,6] x", 2),
    "Split": ("y, z = Split <axis = 1, num_outputs = 2> (x)", "float[2,6,3] x", 1),
    "Concat": ("y = Concat <axis = 1> (x, k)", "float[2,6,3] x", 1),
}


def moved(name: str) -> tuple[Graph, np.ndarray, int]:
    body, signature, axis = MOVES[name]
    graph = Graph.from_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({signature}) => (float[a,b] y) {{ {body} }}',
        heads=np.array([2, 5, 2, 3]),
        rows=np.array([10, 6]),
        one=np.array([1]),
        four=np.array([4]),
        picks=np.array([5, 0, -2]),
        first=np.array(0),
        k=np.zeros((2, 4, 3), np.float32),
    )
    graph.outputs[0].shape = None
    graph.infer_shapes()
    node = graph.nodes[0]
    model = graph.to_model()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    shape = tuple(graph.inputs[0].shape)
    labels = np.arange(1, shape[axis] + 1).reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    whole = np.broadcast_to(labels, shape).astype(np.float32)
    result = reference(model, {"x": whole})["y"]
    for out in node.outputs:
        out.shape = list(result.shape)
    return graph, labels, axis


@pytest.mark.parametrize("name", MOVES)
def test_labels_go_where_the_elements_go(name):
    graph, labels, _ = moved(name)
    node = graph.nodes[0]
    whole = np.broadcast_to(labels, graph.inputs[0].shape).astype(np.float32)
    model = graph.to_model()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    wanted = reference(model, {"x": whole})["y"]
    out, found = move_forward(node, 0, labels)[0]
    assert out is node.outputs[0]
    np.testing.assert_array_equal(np.broadcast_to(found, wanted.shape), wanted)


@pytest.mark.parametrize("name", MOVES)
def test_backward_is_the_inverse_for_what_is_selected(name):
    graph, labels, _ = moved(name)
    node = graph.nodes[0]
    out, forward = move_forward(node, 0, labels)[0]
    back = dict(move_backward(node, out, forward))[0]
    kept = np.isin(labels, forward)
    shape = np.broadcast_shapes(labels.shape, back.shape)
    wanted = np.broadcast_to(np.where(kept, labels, 0), shape)
    np.testing.assert_array_equal(np.broadcast_to(back, shape), wanted)


def test_a_reshape_is_followed_behind_unknown_sizes():
    labels = np.arange(1, 7).reshape(1, 1, 6)
    found = reshaped(labels, ["N", "T", 6], ["N", "T", 2, 3])
    np.testing.assert_array_equal(found, labels.reshape(1, 1, 2, 3))
    np.testing.assert_array_equal(reshaped(labels, ["N", "T", 6], ["M", 6]), labels[0])
    assert reshaped(labels, ["N", "T", 6], ["N", "U"]) is None


def test_labels_along_another_axis_are_no_vector():
    assert vector(np.arange(6).reshape(1, 6, 1), 2, 6) is None
    assert vector(np.ones((1, 1, 1), np.int64), 2, 3).tolist() == [1, 1, 1]
    assert vector(np.arange(8).reshape(1, 8), 1, 5) is None


def test_equal_labels_are_shortened():
    assert reduced(np.ones((2, 3), np.int64)).shape == (1, 1)
    assert reduced(np.array([[1, 2], [1, 2]])).shape == (1, 2)
