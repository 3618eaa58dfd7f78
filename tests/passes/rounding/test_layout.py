"""Convolutions as matrix products: rows are explicit patches, whatever the attributes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from qpass.graph import Graph
from qpass.passes.rounding.hessian import InputSums
from qpass.passes.rounding.layout import layout_of

CASES = {
    "plain": ((2, 3, 7, 6), (4, 3, 3, 3), ""),
    "padded": ((2, 3, 5, 6), (4, 3, 3, 3), "pads = [1, 0, 2, 1]"),
    "strided": ((2, 3, 9, 8), (4, 3, 3, 3), "pads = [1, 1, 1, 1], strides = [2, 3]"),
    "dilated": ((1, 2, 9, 9), (4, 2, 3, 2), "pads = [2, 2, 2, 2], dilations = [2, 3]"),
    "grouped": ((2, 6, 5, 5), (4, 3, 3, 3), "group = 2, pads = [1, 1, 1, 1]"),
    "depthwise": ((2, 4, 6, 6), (4, 1, 3, 3), "group = 4, strides = [2, 2], pads = [1, 1, 1, 1]"),
    "pointwise": ((2, 5, 3, 4), (6, 5, 1, 1), ""),
    "same upper": ((1, 2, 7, 6), (3, 2, 3, 2), 'auto_pad = "SAME_UPPER", strides = [2, 2]'),
    "same lower": ((1, 2, 7, 6), (3, 2, 3, 2), 'auto_pad = "SAME_LOWER", strides = [2, 1]'),
    "valid": ((1, 2, 7, 6), (3, 2, 3, 2), 'auto_pad = "VALID"'),
    "one dimension": ((2, 3, 11), (4, 3, 3), "pads = [1, 1], strides = [2]"),
}


def conv(x_shape: tuple[int, ...], w_shape: tuple[int, ...], attributes: str) -> Graph:
    weight = np.random.default_rng(0).standard_normal(w_shape).astype(np.float32)
    shape = ", ".join(map(str, x_shape))
    free = ", ".join("ABCD"[: len(x_shape)])
    text = (
        f'<ir_version: 10, opset_import: ["": 21]> g (float[{shape}] x) => (float[{free}] y)'
        f"{{ y = Conv <{attributes}> (x, w) }}"
    )
    return Graph.from_text(text.replace(" <> ", " "), w=weight)


def run(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0])


@pytest.mark.parametrize("case", CASES)
def test_rows_times_matrix_is_the_convolution(case: str) -> None:
    graph = conv(*CASES[case])
    node = graph.nodes[0]
    layout = layout_of(node)
    assert not isinstance(layout, str)
    x = np.random.default_rng(1).standard_normal(CASES[case][0]).astype(np.float32)
    y = run(graph.to_model(), x)
    rows = np.arange(layout.positions(y))
    product = layout.input_rows(x, rows) @ layout.matrix(node.inputs[1].values.astype(np.float64))
    # float32 sums of at most 27 products of numbers around one.
    np.testing.assert_allclose(product, layout.output_rows(y, rows), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_hessian_is_that_of_explicit_patches(case: str) -> None:
    """The patches come from the convolution itself: one-hot kernels pick single elements."""
    graph = conv(*CASES[case])
    layout = layout_of(graph.nodes[0])
    assert not isinstance(layout, str)
    shape, w_shape, attributes = CASES[case]
    groups, inputs = layout.groups, layout.inputs
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    picker = conv(shape, (groups * inputs, *w_shape[1:]), attributes)
    hot = np.tile(np.eye(inputs), (groups, 1)).reshape(picker.nodes[0].inputs[1].shape)
    picker.nodes[0].inputs[1].values = hot.astype(np.float32)
    patches = np.moveaxis(run(picker.to_model(), x), 1, -1).reshape(-1, groups, inputs)
    patches = patches.astype(np.float64)
    centered = patches - patches.mean(axis=0)
    y = run(graph.to_model(), x)
    rows = np.arange(layout.positions(y))
    for one, wanted in ((False, patches), (True, centered)):
        sums = InputSums(layout=layout, centered=one)
        half = len(rows) // 2
        sums.update(x, y, rows[:half])
        sums.update(x, y, rows[half:])
        np.testing.assert_allclose(sums.xx, np.einsum("ngi,ngj->gij", wanted, wanted), atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_scatter_is_the_adjoint_of_the_rows(case: str) -> None:
    """<rows(x), r> == <x, scatter(r)> for all x and r."""
    graph = conv(*CASES[case])
    layout = layout_of(graph.nodes[0])
    assert not isinstance(layout, str)
    random = np.random.default_rng(2)
    x = random.standard_normal(CASES[case][0])
    y = run(graph.to_model(), x.astype(np.float32))
    rows = layout.input_rows(x, np.arange(layout.positions(y)))
    r = random.standard_normal(rows.shape)
    np.testing.assert_allclose(np.vdot(rows, r), np.vdot(x, layout.scatter(r, x.shape)), rtol=1e-12)


@pytest.mark.parametrize(
    ("op", "shape"), [("MatMul", (5, 3)), ("Gemm", (5, 3)), ("Gemm <transB = 1>", (3, 5))]
)
def test_matrices(op: str, shape: tuple[int, int]) -> None:
    weight = np.arange(15, dtype=np.float32).reshape(shape)
    text = (
        '<ir_version: 10, opset_import: ["": 21]> g (float[N, 5] x) => (float[N, 3] y)'
        f"{{ y = {op} (x, w) }}"
    )
    node = Graph.from_text(text, w=weight).nodes[0]
    layout = layout_of(node)
    assert not isinstance(layout, str)
    matrix = layout.matrix(weight)
    assert matrix.shape == (1, 5, 3)
    np.testing.assert_array_equal(layout.restore(matrix), weight)


@pytest.mark.parametrize("case", CASES)
def test_restore_undoes_matrix(case: str) -> None:
    node = conv(*CASES[case]).nodes[0]
    layout = layout_of(node)
    assert not isinstance(layout, str)
    values = node.inputs[1].values
    np.testing.assert_array_equal(layout.restore(layout.matrix(values)), values)


@pytest.mark.parametrize(
    ("text", "weight", "reason"),
    [
        ("ConvTranspose (x, w)", (2, 3, 3, 3), "ConvTranspose"),
        ("MatMul (x, w)", (1, 2, 4, 4), "4 dimensions"),
        ("Gemm <transA = 1> (x, w)", (4, 4), "transA"),
        ("Gemm <alpha = 0.5> (x, w)", (4, 4), "alpha"),
    ],
)
def test_ops_without_columns_are_refused(text: str, weight: tuple[int, ...], reason: str) -> None:
    rank = "2, 2, 4, 4" if len(weight) == 4 else "4, 4"
    graph = Graph.from_text(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[{rank}] x) => (y) {{ y = {text} }}',
        w=np.ones(weight, np.float32),
    )
    found = layout_of(graph.nodes[0])
    assert isinstance(found, str)
    assert reason in found
