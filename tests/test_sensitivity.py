"""Segments, and the error of each layer at the outputs against running the model for each layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qpass.dtypes import storage_for
from qpass.graph import Graph, Node, array_of
from qpass.program import Precision
from qpass.qparams import TensorSpec, channel_range, choose_qparams, fake_quantize
from qpass.segments import MOST, segments
from qpass.sensitivity import LayerError, Rounded, measure
from qpass.units import is_weighted
from tests.planning import cnn
from tests.small_models import feeds_of, from_text, residual_cnn, run_each, transformer

Array = np.ndarray
W4, W8 = Precision.parse("w4a8"), Precision.parse("w8a8")


def rounded(weight: Array, bits: int) -> Array:
    spec = TensorSpec(storage=storage_for(bits, signed=True), symmetric=True, bits=bits)
    return fake_quantize(weight, choose_qparams(spec, *channel_range(weight, None)))


def rounder(node: Node, level: Precision) -> Rounded:
    return Rounded(weight=rounded(array_of(node.inputs[1]), level.weight))


def levels_of(graph: Graph) -> dict[str, list[Precision | None]]:
    return {node.name: [W4, W8, None] for node in graph.nodes if is_weighted(node)}


def deep(layers: int = 6) -> Graph:
    random = np.random.default_rng(4)
    body = "t0 = Identity (x)\n"
    constants = {}
    for i in range(layers):
        body += f"m{i} = MatMul (t{i}, w{i})\n r{i} = Relu (m{i})\n t{i + 1} = Add (r{i}, t{i})\n"
        constants[f"w{i}"] = (random.standard_normal((24, 24)) / 5).astype(np.float32)
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[8,24] x) => (float[8,24] y) {{ {body} y = Identity (t{layers}) }}"""
    return from_text(text, **constants)


def true_error(graph: Graph, name: str, bits: int, feeds: list[dict[str, Array]]) -> float:
    """Run the whole model with one layer rounded: what the estimate stands for."""
    other = graph.copy()
    node = other.node(name)
    other.set_input(node, 1, other.constant("r", rounded(array_of(node.inputs[1]), bits)))
    shares = []
    pairs = list(zip(*(run_each(one.to_model(), feeds) for one in (graph, other)), strict=True))
    for output in graph.outputs:
        error = power = 0.0
        for pair in pairs:
            wanted, got = (found[output.name].astype(np.float64) for found in pair)
            error, power = error + np.square(got - wanted).sum(), power + np.square(wanted).sum()
        shares.append(error / power)
    return float(np.mean(shares))


# ------------------------------------------------------------------ segments


@pytest.mark.parametrize("make", [residual_cnn, transformer, deep])
def test_segments_hold_every_node_once_and_in_order(make: Callable[[], Graph]) -> None:
    graph = make()
    names = [node.name for part in segments(graph) for node in part.nodes]
    assert names == [node.name for node in graph.nodes]


def test_segments_end_where_one_tensor_carries_everything() -> None:
    parts = segments(transformer())
    assert [[n.name for n in part.nodes if is_weighted(n)] for part in parts] == [
        ["node_qkv0"],  # the input of the model, which goes past it, carries no error
        ["node_proj0"],
        ["node_up0", "node_down0"],
    ]
    assert [part.outputs for part in parts] == [("merged",), ("x1",), ("y",)]


def test_segments_without_such_a_place_end_after_some_layers() -> None:
    """Every layer's output is an output of the graph: no tensor carries everything."""
    body = " ".join(f"c{i} = Conv ({f'c{i - 1}' if i else 'x'}, w)" for i in range(20))
    outputs = ", ".join(f"float[1,16,8,8] c{i}" for i in range(20))
    parts = segments(cnn(body, outputs=outputs))
    assert [sum(is_weighted(n) for n in part.nodes) for part in parts] == [1, MOST, MOST, 3]


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("make", [residual_cnn, transformer, deep])
def test_errors_are_those_of_running_each_layer_alone(make: Callable[[], Graph]) -> None:
    graph = make()
    feeds = feeds_of(graph, 6)
    found = measure(graph, levels_of(graph), rounder, feeds)
    assert [layer.name for layer in found] == list(levels_of(graph))
    for layer in found:
        for level, error in zip(layer.levels, layer.errors, strict=True):
            if level is None:
                assert error == 0.0
                continue
            true = true_error(graph, layer.name, level.weight, feeds)
            # A segment's gain is that of all errors that come in; one of them may have another
            # direction, and so another gain. Within a factor of four it tells 4 bits from 8.
            assert 0.25 < error / true < 4.0


def test_masks_across_segments_carry_no_error() -> None:
    """Causal masks of transformers are computed once, and read in every block."""
    random = np.random.default_rng(7)
    weights = {f"w{i}": (random.standard_normal((24, 24)) / 5).astype(np.float32) for i in range(3)}
    plain = """m0 = MatMul (x, w0) r0 = Relu (m0) m1 = MatMul (r0, w1) r1 = Relu (m1)
               m2 = MatMul (r1, w2) y = Identity (m2)"""
    masked = """{make} m0 = MatMul (x, w0) r0 = Relu (m0) s0 = Where (keep, r0, r0)
                m1 = MatMul (s0, w1) r1 = Relu (m1) s1 = Max (r1, low)
                m2 = MatMul (s1, w2) y = Where (keep, m2, m2)"""
    text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[8,24] x) => (float[8,24] y) {{ {body} }}"""
    make = "keep = Greater (x, zero) low = Where (keep, bottom, bottom)"
    constants = {"zero": np.float32(0), "bottom": np.float32(-np.inf)}
    without = from_text(text.format(body=plain), **weights)
    graph = from_text(text.format(body=masked.format(make=make)), **weights, **constants)
    assert {"keep", "low"} <= {name for part in segments(graph) for name in part.outputs}
    feeds = feeds_of(graph, 4)
    found = measure(graph, levels_of(graph), rounder, feeds)
    expected = measure(without, levels_of(without), rounder, feeds)
    for got, wanted in zip(found, expected, strict=True):
        assert got.errors == pytest.approx(wanted.errors, rel=1e-6)


def test_the_order_of_the_layers_is_right() -> None:
    """What the knapsack needs: which layer costs more."""
    graph = deep(10)
    feeds = feeds_of(graph, 6)
    found = measure(graph, levels_of(graph), rounder, feeds)
    true = [true_error(graph, layer.name, 4, feeds) for layer in found]
    ranks = [np.argsort(np.argsort(values)) for values in (true, [e.errors[0] for e in found])]
    assert np.corrcoef(*ranks)[0, 1] > 0.8


def test_inputs_are_rounded_as_the_level_says() -> None:
    graph = deep(1)

    def coarse(node: Node, level: Precision) -> Rounded:
        return Rounded(weight=array_of(node.inputs[1]), inputs={0: np.rint})

    (layer,) = measure(graph, {"node_m0": [W4, None]}, coarse, feeds_of(graph, 2))
    assert layer.errors[0] > 1e-4
    (same,) = measure(graph, {"node_m0": [None]}, coarse, feeds_of(graph, 2))
    assert same == LayerError(name="node_m0", levels=(None,), errors=(0.0,))


def test_products_of_activations_are_rounded_on_both_sides() -> None:
    graph = from_text(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[4,8,8] a, float[4,8,8] b) => (float[4,8,8] y) {
          m = MatMul (a, b)
          y = MatMul (m, w) }""",
        w=np.eye(8, dtype=np.float32),
    )
    feeds = feeds_of(graph, 3)

    def coarse(node: Node, level: Precision) -> Rounded:
        return Rounded(weight=None, inputs={0: np.rint, 1: np.floor})

    (layer,) = measure(graph, {"node_m": [W4, W8]}, coarse, feeds)
    error = power = 0.0
    for feed in feeds:
        exact = feed["a"].astype(np.float64) @ feed["b"]
        error += float(np.square(np.rint(feed["a"]) @ np.floor(feed["b"]) - exact).sum())
        power += float(np.square(exact).sum())
    # The layer behind it is the identity; sums of eight float32 products.
    assert layer.errors == pytest.approx([error / power] * 2, rel=1e-5)


def test_the_graph_is_not_changed() -> None:
    graph = deep()
    before = graph.fingerprint()
    measure(graph, levels_of(graph), rounder, feeds_of(graph, 1))
    assert graph.fingerprint() == before
