"""Integer weights behind float activations: the graph, the engine, and the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes.weight_only import gather_blocks, half_scales, straighten_gemms
from qpass.qparams import dequantize
from qpass.verify import open_engine, read_back
from tests.small_models import from_text, run
from tests.weight_only_models import (
    EXACT,
    HEAD,
    IDS,
    OPENVINO,
    built,
    counts,
    language_model,
    matrix,
    needs_openvino,
    nodes,
    product,
    saved,
    weights,
)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (80, 47), (33, 5), (16, 16)])
@pytest.mark.parametrize("precision", ["w4", "w3", "w8"])
def test_products_are_those_of_the_dequantized_weight(
    tmp_path: Path, precision: str, rows: int, columns: int, asymmetric: bool
) -> None:
    """In the engine's kernel, in the reference evaluator, and with numpy in float64."""
    options = {"low_bit_edges": True, "asymmetric_weights": asymmetric, "block_size": 32}
    quantized = built(product(rows, columns), precision=precision, **options)
    path = saved(quantized, tmp_path)
    assert counts(path) == {"MatMulNBits": 1}
    ((integers, numbers),) = weights(quantized).values()
    x = np.random.default_rng(3).standard_normal((2, 3, rows)).astype(np.float32)
    wanted = x.astype(np.float64) @ dequantize(integers, numbers).astype(np.float64)
    tolerance = 1e-5 * np.abs(x).sum(-1).max()  # float32 sums of `rows` products
    for engine, config in (("ort", EXACT), ("reference", None)):
        (got,) = open_engine(engine, path, session_config=config).run({"x": x})
        np.testing.assert_allclose(got, wanted, atol=tolerance)


@needs_openvino
@pytest.mark.parametrize("asymmetric", [False, True])
def test_openvino_reads_the_integers(tmp_path: Path, asymmetric: bool) -> None:
    options = {"low_bit_edges": True, "asymmetric_weights": asymmetric}
    quantized = built(product(80, 48), OPENVINO, **options)
    path = saved(quantized, tmp_path)
    census = read_back("openvino", path, tmp_path)
    assert [(op.op, op.kind) for op in census.weight_only_compute] == [
        ("FullyConnected", "weight_only")
    ]
    x = np.random.default_rng(3).standard_normal((2, 3, 80)).astype(np.float32)
    outputs = [open_engine(name, path).run({"x": x})[0] for name in ("openvino", "reference")]
    np.testing.assert_allclose(*outputs, atol=1e-3)


def test_a_weight_with_two_readers_is_stored_for_each(tmp_path: Path) -> None:
    graph = product(64, 64, "t = MatMul (x, w) r = Relu (t) y = MatMul (r, w)")
    quantized = built(graph, low_bit_edges=True)
    assert [d.key for d in quantized.plan.weights()] == ["w", "w#1"]
    assert counts(saved(quantized, tmp_path))["MatMulNBits"] == 2


@pytest.mark.parametrize(
    ("activation", "ops"),
    [
        ("Relu (t)", {"Max": 1}),
        ("Clip (t, low, high)", {"Max": 1, "Min": 1}),
        ("Clip (t, low)", {"Max": 1}),
        ("Clip (t, , high)", {"Min": 1}),
    ],
)
@pytest.mark.parametrize("bias", ["", "t = Add (t0, b)"])
def test_an_activation_behind_the_product_does_not_hide_it(
    tmp_path: Path, activation: str, ops: dict[str, int], bias: str
) -> None:
    limits = {"low": np.float32(-0.5), "high": np.float32(6), "b": matrix(1, 64)[0]}
    body = f"{'t0' if bias else 't'} = MatMul (x, w) {bias} r = {activation} y = MatMul (r, v)"
    used = {k: v for k, v in limits.items() if k in body.replace("MatMul", "")}
    graph = product(64, 48, body, w=matrix(64, 64), v=matrix(64, 48), **used)
    quantized = built(graph, low_bit_edges=True)
    path = saved(quantized, tmp_path)
    found = counts(path)
    assert found["MatMulNBits"] == 2
    assert {op: found[op] for op in ("Max", "Min") if op in found} == ops
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 3, 64)).astype(np.float32)}
    plain = graph.copy()
    for key, (integers, numbers) in weights(quantized).items():
        node = plain.node({"w": "node_t0" if bias else "node_t", "v": "node_y"}[key])
        plain.set_input(node, 1, plain.constant("d", dequantize(integers, numbers)))
    outputs = [
        open_engine("ort", path, session_config=EXACT).run(feeds)[0],
        run(plain.to_model(), feeds)["y"],
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-3)


def gemm() -> Graph:
    return from_text(
        f"""{HEAD} g (float[4,64] x) => (float[4,48] y)
        {{ t = Gemm <transB = 1> (x, w, b) r = Relu (t) y = Gemm <transB = 1> (r, v) }}""",
        w=matrix(80, 64),
        v=matrix(48, 80),
        b=matrix(1, 80)[0],
    )


def test_gemm_is_turned_so_that_it_fuses(tmp_path: Path) -> None:
    graph = gemm()
    plan = built(graph.copy(), low_bit_edges=True).plan
    assert {n.precision for n in plan.nodes if n.op == "Gemm"} == {"stored"}
    assert "takes no transposed weight" in nodes(plan)["t"].because
    feeds = {"x": matrix(4, 64, 9)}
    before = run(graph.to_model(), feeds)["y"]
    assert straighten_gemms(graph, {node.name for node in graph.nodes}).changed == 2
    np.testing.assert_allclose(run(graph.to_model(), feeds)["y"], before, rtol=1e-4, atol=1e-3)
    assert counts(saved(built(graph, low_bit_edges=True), tmp_path))["MatMulNBits"] == 2


def test_computed_weights_of_gemm_stay_turned() -> None:
    graph = from_text(
        f"{HEAD} g (float[4,8] x) => (float[4,4] y) {{ y = Gemm <transB = 1> (x, x) }}"
    )
    report = straighten_gemms(graph, {node.name for node in graph.nodes})
    assert (report.changed, [r.reason for r in report.refusals]) == (0, ["its weight is computed"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 80])
def test_an_embedding_gathers_integers(tmp_path: Path, tied: bool, width: int) -> None:
    graph = language_model(tied=tied, width=width)
    quantized = built(graph)
    path = saved(quantized, tmp_path)
    found = counts(path)
    assert (found["GatherBlockQuantized"], found["MatMulNBits"]) == (1, 3)
    integers, numbers = weights(quantized)["table"]
    assert integers.dtype == (np.uint8 if tied else np.dtype(numbers.storage.numpy))
    wanted = dequantize(integers, numbers)[IDS["ids"]]
    got = run(quantized.graph.to_model(taps=["e"]), IDS)["e"]
    np.testing.assert_array_equal(got, wanted)
    # The rest computes what an explicitly dequantized float model computes.
    plain = graph.copy()
    for decision in quantized.plan.weights():
        edge = (decision.edges or ())[0]
        values = dequantize(*weights(quantized)[decision.key])
        plain.set_input(plain.node(edge.node), edge.index, plain.constant("d", values))
    outputs = [
        open_engine("ort", path, session_config=EXACT).run(IDS)[0],
        run(plain.to_model(), IDS)["y"],
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)


def test_gather_without_blocks_is_refused() -> None:
    graph = built(language_model(), OPENVINO).graph
    report = gather_blocks(graph)
    assert report.changed == 0
    assert "no blocks along the rows" in report.refusals[0].reason


@needs_openvino
def test_an_embedding_in_openvino(tmp_path: Path) -> None:
    path = saved(built(language_model(), OPENVINO), tmp_path)
    # With VNNI OpenVINO rounds the activations in front of integer weights to 8 bits by default.
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    outputs = [
        open_engine("openvino", path, session_config=exact).run(IDS)[0],
        open_engine("reference", path).run(IDS)[0],
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ scales in float16


def stored_scales(graph: Graph) -> list[np.dtype[Any]]:
    return [array_of(n.inputs[0]).dtype for n in graph.nodes if n.op == "Cast"]


def test_scales_of_blocks_take_16_bits() -> None:
    quantized = built(product(64, 48), low_bit_edges=True)
    assert stored_scales(quantized.graph) == [np.float16]
    ((_, numbers),) = weights(quantized).values()
    assert numbers.scale.dtype == np.float32
    np.testing.assert_array_equal(
        numbers.scale.astype(np.float16).astype(np.float32), numbers.scale
    )


def test_scales_that_float16_does_not_hold_stay_wide(tmp_path: Path) -> None:
    graph = product(64, 48, w=matrix(64, 48) * 1e-6)
    quantized = built(graph, low_bit_edges=True)
    assert stored_scales(quantized.graph) == []
    assert half_scales(quantized.graph).refusals[0].reason == "its scales are no numbers of float16"
    assert counts(saved(quantized, tmp_path)) == {"MatMulNBits": 1}


def test_blocks_without_zero_points_store_none() -> None:
    for asymmetric, inputs in ((False, 2), (True, 3)):
        made = built(product(64, 48), low_bit_edges=True, asymmetric_weights=asymmetric)
        dequantizer = next(n for n in made.graph.nodes if n.op == "DequantizeLinear")
        assert len(dequantizer.inputs) == inputs
