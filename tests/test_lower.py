"""Idioms for engines: int32 biases, biases with more dimensions, Sum; and dynamic ranges."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import qpass.passes
from qpass.graph import Graph, Node, array_of
from qpass.passes.dynamic import make_dynamic
from qpass.passes.insert_qdq import insert_qdq
from qpass.passes.lower import lower_biases, raise_matmul_biases, sum_before_norm
from qpass.planner import plan as make_plan
from qpass.targets import TARGETS
from qpass.verify.metrics import sqnr_db
from tests.small_models import feeds_of, from_text, minmax, policy_of, run, transformer

RANDOM = np.random.default_rng(3)
HEAD = '<ir_version: 10, opset_import: ["": 21]>'
KERNEL = RANDOM.normal(0, 0.3, (16, 16, 1, 1)).astype(np.float32)
BIAS = RANDOM.normal(0, 1, 16).astype(np.float32)


def with_pairs(text: str, name: str = "ort-x86", **constants: Any) -> Graph:
    """A graph with Q and DQ in it, before anything is lowered."""
    graph = from_text(f"{HEAD} g {text}", **{k: np.asarray(v) for k, v in constants.items()})
    plan = make_plan(graph, TARGETS[name], policy_of())
    table = minmax(graph, plan, feeds_of(graph, 2))
    insert_qdq(graph, plan, table.qparams)
    return graph


def conv(bias: Any = BIAS, name: str = "ort-x86") -> Graph:
    text = "(float[1,16,4,4] x) => (float[1,16,4,4] y) { y = Conv (x, w, b) }"
    return with_pairs(text, name, w=KERNEL, b=bias)


def gemm(bias: Any, name: str = "ort-x86") -> Graph:
    text = "(float[2,16] x) => (float[2,16] y) { y = Gemm (x, w, b) }"
    return with_pairs(text, name, w=KERNEL.reshape(16, 16), b=bias)


def node(graph: Graph, op: str) -> Node:
    (found,) = (n for n in graph.nodes if n.op == op)
    return found


def maker(graph: Graph, found: Node, index: int) -> Node:
    producer = graph.producer(found.inputs[index])
    assert producer is not None
    return producer


# ------------------------------------------------------------------ int32 biases


@pytest.mark.parametrize("make", [conv, gemm])
@pytest.mark.parametrize("name", ["ort-x86", "ort-arm", "qnn-htp", "vitis-xint8"])
def test_bias_scale_is_the_product_of_the_other_two(make: Any, name: str) -> None:
    graph = make(BIAS, name)
    feeds = feeds_of(graph, 1)[0]
    before = run(graph.to_model(), feeds)["y"]
    report = lower_biases(graph)
    assert (report.changed, report.refusals) == (1, ())
    linear = node(graph, "Conv" if make is conv else "Gemm")
    x, w, b = (maker(graph, linear, i) for i in range(3))
    x_scale, w_scale, b_scale = (array_of(dq.inputs[1]) for dq in (x, w, b))
    # One rounding to float32 of the product of float32 numbers.
    wanted = (x_scale.astype(np.float64) * w_scale.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(b_scale, wanted)
    assert array_of(b.inputs[0]).dtype == np.int32
    assert len(b.inputs) == 2  # its zero point is 0 by definition
    assert b.attrs == ({"axis": 0} if w_scale.ndim else {})
    restored = array_of(b.inputs[0]) * b_scale.astype(np.float64)
    # Half a step of rounding; float32 scales are half a unit off, of integers of up to 2**17.
    assert np.all(np.abs(restored - BIAS) <= 0.5 * b_scale + 1e-7 * np.abs(BIAS))
    onnx.checker.check_model(graph.to_model(), full_check=True)
    after = run(graph.to_model(), feeds)["y"]
    # Where the output is quantized a rounding may fall to the other side: one of its steps.
    step = np.abs(np.diff(np.unique(before))).min() if name != "ort-x86" or make is conv else 0.0
    assert np.abs(after - before).max() <= max(float(step), 2 * float(b_scale.max())) * 1.01


def test_lowering_twice_changes_nothing() -> None:
    graph = conv()
    lower_biases(graph)
    before = graph.fingerprint()
    assert lower_biases(graph).changed == 0
    assert graph.fingerprint() == before


@pytest.mark.parametrize(
    "bias", [np.ones(1, np.float32), np.ones((1, 16), np.float32), np.float32(1)]
)
def test_biases_of_other_shapes_are_refused(bias: Any) -> None:
    graph = gemm(bias)
    before = graph.fingerprint()
    report = lower_biases(graph)
    assert report.changed == 0
    assert [r.where for r in report.refusals] == ["node_y"]
    assert "one value for each scale" in report.refusals[0].reason
    assert graph.fingerprint() == before


def test_a_bias_that_does_not_fit_is_refused() -> None:
    report = lower_biases(conv(BIAS * np.float32(1e9)))
    assert report.changed == 0
    assert "does not fit in int32" in report.refusals[0].reason


def test_float_linear_ops_are_left_alone() -> None:
    text = "(float[1,16,4,4] x) => (float[1,16,4,4] y) { c = Conv (x, w, b) y = Conv (c, v) }"
    graph = from_text(f"{HEAD} g {text}", w=KERNEL, b=BIAS, v=KERNEL)
    assert lower_biases(graph).changed == 0


def test_transposed_convolutions_have_int32_biases_too() -> None:
    text = "(float[1,16,4,4] x) => (float[1,16,4,4] y) { y = ConvTranspose (x, w, b) }"
    graph = with_pairs(text, "qnn-htp", w=KERNEL, b=BIAS)
    assert lower_biases(graph).changed == 1
    transposed = node(graph, "ConvTranspose")
    assert maker(graph, transposed, 1).attrs["axis"] == 1
    assert array_of(maker(graph, transposed, 2).inputs[0]).dtype == np.int32
    onnx.checker.check_model(graph.to_model(), full_check=True)


# ------------------------------------------------------------------ MatMul biases

MATMUL = "(float[2,3,16] x) => (float[2,3,16] y) { m = MatMul (x, w) y = Add (m, b) }"


def test_matmul_biases_get_more_dimensions_and_mean_the_same() -> None:
    graph = with_pairs(MATMUL, w=KERNEL.reshape(16, 16), b=BIAS)
    feeds = feeds_of(graph, 1)[0]
    before = run(graph.to_model(), feeds)["y"]
    assert raise_matmul_biases(graph, 3).changed == 1
    assert array_of(node(graph, "Add").inputs[1]).shape == (1, 1, 16)
    np.testing.assert_array_equal(run(graph.to_model(), feeds)["y"], before)
    assert raise_matmul_biases(graph, 3).changed == 0


def test_matmul_biases_behind_float_products_stay() -> None:
    graph = from_text(f"{HEAD} g {MATMUL}", w=KERNEL.reshape(16, 16), b=BIAS)
    assert raise_matmul_biases(graph, 3).changed == 0


def test_a_product_of_rank_2_is_refused() -> None:
    text = "(float[3,16] x) => (float[3,16] y) { m = MatMul (x, w) y = Add (m, b) }"
    graph = with_pairs(text, w=KERNEL.reshape(16, 16), b=BIAS)
    report = raise_matmul_biases(graph, 3)
    assert (report.changed, [r.reason for r in report.refusals]) == (0, ["rank is 2"])


# ------------------------------------------------------------------ Sum


def test_residual_adds_in_front_of_norms_become_sums() -> None:
    graph = transformer()
    feeds = feeds_of(graph, 1)[0]
    before = run(graph.to_model(), feeds)["y"]
    assert sum_before_norm(graph).changed == 1  # x1; the first norm reads the input
    assert graph.producer(graph.tensors()["x1"]).op == "Sum"
    np.testing.assert_array_equal(run(graph.to_model(), feeds)["y"], before)
    assert sum_before_norm(graph).changed == 0


def test_biases_in_front_of_norms_stay_adds() -> None:
    text = "(float[2,3,16] x) => (float[2,3,16] y) { a = Add (x, b) y = LayerNormalization (a, s) }"
    graph = from_text(f"{HEAD} g {text}", b=BIAS, s=BIAS)
    assert sum_before_norm(graph).changed == 0


# ------------------------------------------------------------------ dynamic ranges


def dynamic(source: Graph) -> Graph:
    graph = source.copy()
    plan = make_plan(source, TARGETS["ort-x86"], policy_of(activations="dynamic"))
    insert_qdq(graph, plan, minmax(source, plan, feeds_of(source, 2)).qparams)
    assert make_dynamic(graph, plan.integer_nodes()).changed == 4
    return graph


def test_dynamic_ranges_replace_every_matmul_with_weights() -> None:
    source = transformer()
    graph = dynamic(source)
    ops = Counter(n.op for n in graph.nodes)
    assert (ops["MatMulInteger"], ops["DynamicQuantizeLinear"], ops["MatMul"]) == (4, 4, 2)
    onnx.checker.check_model(graph.to_model(), full_check=True)
    feeds = feeds_of(source, 2, seed=5)[1]
    # onnxruntime's MatMulInteger is not exact on every CPU; the evaluator's is.
    (got,) = ReferenceEvaluator(graph.to_model()).run(None, dict(feeds))
    # 8 bits per tensor and per column: 40 dB is what one product has.
    assert sqnr_db(run(source.to_model(), feeds)["y"], got) > 30


def test_readers_of_one_tensor_share_its_dynamic_range() -> None:
    text = """(float[2,3,16] x) => (float[2,3,16] y)
        { a = MatMul (x, w) b = MatMul (x, v) y = Add (a, b) }"""
    matrix = KERNEL.reshape(16, 16)
    graph = from_text(f"{HEAD} g {text}", w=matrix, v=matrix[::-1].copy())
    plan = make_plan(graph, TARGETS["ort-x86"], policy_of(activations="dynamic"))
    insert_qdq(graph, plan, minmax(graph, plan, feeds_of(graph, 1)).qparams)
    make_dynamic(graph, plan.integer_nodes())
    ops = Counter(n.op for n in graph.nodes)
    assert (ops["MatMulInteger"], ops["DynamicQuantizeLinear"]) == (2, 1)
    onnx.checker.check_model(graph.to_model(), full_check=True)


# ------------------------------------------------------------------ a rule of the house


def code_words(path: Path) -> set[str]:
    """Strings and identifiers of a file, lower case; no docstrings, comments and imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(owner.body[0].value)
        for owner in ast.walk(tree)
        if isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef)
        and owner.body
        and isinstance(owner.body[0], ast.Expr)
    }
    words = set()
    for part in ast.walk(tree):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            words |= {part.value} if id(part) not in docstrings else set()
        words |= {getattr(part, name) for name in ("id", "attr", "arg") if hasattr(part, name)}
    return {word.lower() for word in words if word}


PASSES = sorted(Path(next(iter(qpass.passes.__path__))).rglob("*.py"))
NAMES = {"onnxruntime", "openvino", "tensorrt", "qnn", "vitis", "xint8", "htp", "x86"} | set(
    TARGETS
)


@pytest.mark.parametrize("path", PASSES, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_no_pass_knows_the_name_of_an_engine(path: Path) -> None:
    """What differs between targets reaches a pass as an option, never as a target."""
    words = code_words(path)
    assert {word for word in words for name in NAMES if name in word} == set()
    assert "qpass.targets" not in path.read_text(encoding="utf-8")


def test_the_rule_of_the_house_would_find_one(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text('"""For OpenVINO."""\nif target.name == "ort-x86":  # TensorRT\n    pass\n')
    words = code_words(path)
    assert "ort-x86" in words
    assert not any("openvino" in word for word in words)
