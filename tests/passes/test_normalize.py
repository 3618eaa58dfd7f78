"""Folds change no number, a second time nothing, and leave what they must not touch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qpass.errors import PostconditionError
from qpass.graph import Graph
from qpass.modelfile import load_model
from qpass.passes.normalize import check_normalized, normalize
from tests.jobs import CNN, TINY, VIT

RANDOM = np.random.default_rng(6)
HALF = np.float32(0.5)
IMAGE = "(float[2,3,6,6] x) => (float[2,4,6,6] y)"
ROWS = "(float[2,5,8] x) => (float[2,5,8] y)"


def values(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


KERNEL, ROW = values(4, 3, 3, 3), values(8)
NORM = {"g": values(4), "h": values(4), "m": values(4), "v": np.abs(values(4)) + HALF}

# name -> (signature and body, constants)
FOLDS = {
    "batch_norm": (IMAGE + "{ a = Conv<pads=[1,1,1,1]>(x, w) "
                   "y = BatchNormalization(a, g, h, m, v) }",
                   {"w": KERNEL, **NORM}),
    "affine": (IMAGE + "{ a = Conv<pads=[1,1,1,1]>(x, w, b) c = Mul(a, s) y = Add(c, t) }",
               {"w": KERNEL, "b": values(4), "s": values(4, 1, 1), "t": values(1, 4, 1, 1)}),
    "subtracted": (IMAGE + "{ a = Conv<pads=[1,1,1,1]>(x, w) y = Sub(t, a) }",
                   {"w": KERNEL, "t": values(4, 1, 1)}),
    "no_ops": (IMAGE + "{ a = Identity(x) b = Cast<to=1>(a) c = Dropout(b) "
               "y = Conv<pads=[1,1,1,1]>(c, w, b0) }", {"w": KERNEL, "b0": values(4)}),
    "constants": (IMAGE + "{ k = Constant<value_float=0.5>() w2 = Mul(w, k) "
                  "y = Conv<pads=[1,1,1,1]>(x, w2) }", {"w": KERNEL}),
    "transposed_grouped": ("(float[1,4,3,3] x) => (float[1,6,6,6] y)"
                           "{ a = ConvTranspose<strides=[2,2], group=2>(x, w) y = Mul(a, s) }",
                           {"w": values(4, 3, 2, 2), "s": values(6, 1, 1)}),
    "matmul_to_gemm": ("(float[5,8] x) => (float[5,4] y) { a = MatMul(x, w) y = Add(a, b) }",
                       {"w": values(8, 4), "b": values(4)}),
    "gemm_alpha_beta": ("(float[5,8] x) => (float[5,4] y)"
                        "{ y = Gemm<alpha=0.5, beta=2.0>(x, w, b) }",
                        {"w": values(8, 4), "b": values(1, 4)}),
    "gelu_erf": (ROWS + "{ a = Div(x, r) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, h) }",
                 {"r": np.float32(2**0.5), "one": np.float32(1), "h": HALF}),
    "gelu_tanh": (ROWS + "{ a = Pow(x, three) b = Mul(a, q) c = Add(x, b) d = Mul(c, p) "
                  "e = Tanh(d) f = Add(e, one) g = Mul(x, h) y = Mul(g, f) }",
                  {"three": np.float32(3), "q": np.float32(0.044715),
                   "p": np.float32((2 / np.pi) ** 0.5), "one": np.float32(1), "h": HALF}),
    "layer_norm": (ROWS + "{ m = ReduceMean(x, axis) a = Sub(x, m) s = Mul(a, a) "
                   "v = ReduceMean(s, axis) e = Add(v, eps) d = Sqrt(e) n = Div(a, d) "
                   "z = Mul(n, g) y = Add(z, b) }",
                   {"axis": np.array([-1]), "eps": np.float32(1e-5), "g": ROW, "b": values(8)}),
    "layer_norm_without_scale": (
        ROWS + "{ m = ReduceMean(x, axis) a = Sub(x, m) s = Mul(a, a) v = ReduceMean(s, axis) "
        "e = Add(v, eps) d = Sqrt(e) n = Div(a, d) z = Add(n, b) y = Mul(z, g) }",
        {"axis": np.array([-1]), "eps": np.float32(1e-5), "g": ROW, "b": values(8)}),
    "hard_swish": (ROWS + "{ a = Add(x, three) b = Clip(a, low, six) c = Mul(x, b) "
                   "y = Div(c, six) }",
                   {"three": np.float32(3), "low": np.float32(0), "six": np.float32(6)}),
    "global_pool": ("(float[2,3,6,6] x) => (float[2,3] y)"
                    "{ y = ReduceMean<keepdims=0>(x, axes) }", {"axes": np.array([2, 3])}),
}  # fmt: skip


def graph_of(name: str) -> Graph:
    body, constants = FOLDS[name]
    text = f'<ir_version: 10, opset_import: ["": 21]> g {body}'
    return Graph.from_text(text, **{k: np.asarray(v) for k, v in constants.items()})


def run(model: onnx.ModelProto, seed: int = 1) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    (value,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 2 for size in value.shape]
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.asarray(session.run(None, {value.name: x})[0])


@pytest.mark.parametrize("name", sorted(FOLDS))
def test_numbers_stay(name: str) -> None:
    graph = graph_of(name)
    wanted = run(graph.to_model())
    report = normalize(graph)
    assert report.changed > 0
    # float32 sums of up to 27 products in another order; values are around 1 to 10.
    np.testing.assert_allclose(run(graph.to_model()), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", sorted(FOLDS))
def test_a_second_time_changes_nothing(name: str) -> None:
    graph = graph_of(name)
    normalize(graph)
    before = graph.fingerprint()
    assert normalize(graph).changed == 0
    assert graph.fingerprint() == before


@pytest.mark.parametrize("path", [CNN, VIT, *TINY.values()], ids=lambda path: path.stem)
def test_exported_models(path: Path) -> None:
    graph = load_model(path, opset=21)
    wanted = run(onnx.load(path))
    normalize(graph)
    check_normalized(graph)
    got = run(graph.to_model())
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        # another reader of the convolution
        ("{ a = Conv<pads=[1,1,1,1]>(x, w) b = Mul(a, s) y = Add(a, b) }", {"s": values(4, 1, 1)}),
        # not per channel
        ("{ a = Conv<pads=[1,1,1,1]>(x, w) y = Mul(a, s) }", {"s": values(1, 1, 6, 6)}),
        # not affine: k / y
        ("{ a = Conv<pads=[1,1,1,1]>(x, w) y = Div(s, a) }", {"s": values(4, 1, 1)}),
    ],
)
def test_what_must_not_be_folded(body: str, constants: dict[str, np.ndarray]) -> None:
    text = f'<ir_version: 10, opset_import: ["": 21]> g {IMAGE} {body}'
    graph = Graph.from_text(text, w=KERNEL, **constants)
    wanted, before = run(graph.to_model()), [node.op for node in graph.nodes]
    normalize(graph)
    assert [node.op for node in graph.nodes] == before
    np.testing.assert_array_equal(run(graph.to_model()), wanted)


def test_batch_norm_that_stays_is_explained() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[2,4,6,6] x) => (float[2,4,6,6] y) { [norm] y = BatchNormalization(x, g, h, m, v) }"""
    report = normalize(Graph.from_text(text, **NORM))
    assert [row.where for row in report.refusals] == ["norm"]


def test_postconditions_are_checked() -> None:
    graph = graph_of("batch_norm")
    with pytest.raises(PostconditionError, match="N4"):
        check_normalized(graph)
    graph.nodes[0].name = graph.nodes[1].name = "same"
    with pytest.raises(PostconditionError, match="N1"):
        check_normalized(graph)
