"""Rows: what they hold, how many they stand for, and that they are bounded and repeatable."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.passes.equalize.rows import EXTREMES, ROWS, Extremes, rows_of
from tests.oracle import reference


def conv(attributes: str, weight: np.ndarray, shape: str) -> tuple[Graph, np.ndarray]:
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[{shape}] x) => (float[a,b,c,d] y) '
        f"{{ y = Conv <{attributes}> (x, w) }}"
    )
    graph = Graph.from_text(text, w=weight)
    array = np.random.default_rng(0).standard_normal(graph.inputs[0].shape).astype(np.float32)
    return graph, array


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("pads = [1,1,1,1]", "1,4,6,6"),
        ("strides = [2,2], pads = [0,1,2,1]", "1,4,7,6"),
        ("dilations = [2,1]", "1,4,8,6"),
        ('auto_pad = "SAME_UPPER", strides = [2,2]', "1,4,6,7"),
        ('auto_pad = "SAME_LOWER"', "1,4,4,4"),
    ],
)
def test_patches_times_weights_are_outputs_of_the_convolution(attributes, shape):
    weight = np.random.default_rng(1).standard_normal((5, 4, 3, 3)).astype(np.float32)
    graph, array = conv(attributes, weight, shape)
    out = reference(graph.to_model(), {"x": array})["y"]
    rows, counts = rows_of(graph.nodes[0], array, 1, np.random.default_rng(2))
    products = rows.reshape(len(rows), -1) @ weight.reshape(5, -1).T
    flat = np.moveaxis(out, 1, -1).reshape(-1, 5)
    distance = np.abs(products[:, None] - flat[None]).max(axis=2).min(axis=1)
    assert distance.max() < 1e-4
    assert counts.sum() == pytest.approx(len(flat))


def matmul() -> Graph:
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N,T,8] x) => (float[N,T,4] y) '
        "{ y = MatMul (x, w) }"
    )
    return Graph.from_text(text, w=np.ones((8, 4), np.float32))


def test_the_rows_with_the_largest_values_are_always_kept():
    array = np.random.default_rng(0).standard_normal((1, 500, 8)).astype(np.float32)
    places = [7, 130, 131, 499]
    array[0, places, 3] = [100, -200, 300, 50]
    rows, counts = rows_of(matmul().nodes[0], array, 1, np.random.default_rng(0))
    assert len(rows) == ROWS
    kept = {float(v) for v in rows[:EXTREMES, 3, 0]}
    assert kept == {100.0, -200.0, 300.0, 50.0}
    assert counts[:EXTREMES].tolist() == [1.0] * EXTREMES
    assert counts.sum() == pytest.approx(500)


def test_sums_over_rows_estimate_sums_over_all():
    array = np.random.default_rng(0).standard_normal((1, 400, 8)).astype(np.float32)
    array[0, 5] *= 50
    sums = []
    for seed in range(200):
        rows, counts = rows_of(matmul().nodes[0], array, 1, np.random.default_rng(seed))
        sums.append(float(np.square(rows).sum(axis=(1, 2)) @ counts))
    whole = float(np.square(array).sum())
    assert np.mean(sums) == pytest.approx(whole, rel=0.02)


def test_the_same_seed_draws_the_same_rows():
    array = np.random.default_rng(0).standard_normal((1, 400, 8)).astype(np.float32)
    first, second = (
        rows_of(matmul().nodes[0], array, 4, np.random.default_rng([0, 3]))[0] for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_extremes_are_exact_by_label():
    labels = np.array([0, 1, 1, 2]).reshape(1, 1, 4)
    extremes = Extremes(labels=labels)
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((2, 9, 4)).astype(np.float32) for _ in range(3)]
    for array in arrays:
        extremes.add(array, 2)
    low, high = extremes.over(range(3))
    whole = np.concatenate(arrays)
    assert low[1] == whole[:, :, 1:3].min()
    assert high[2] == whole[:, :, 3].max()
    assert extremes.mean[0][1] == pytest.approx(float(arrays[0][:, :, 1:3].mean()), abs=1e-6)
