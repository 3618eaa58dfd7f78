"""Patch embeddings as products: equal outputs, the integer graph, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qpass
from qpass.graph import Graph
from qpass.modelfile import save_model
from qpass.passes.normalize import check_normalized, normalize
from qpass.passes.patch_matmul import patches_to_matmul
from qpass.targets import TARGETS, load_target
from tests.folds import graph_of
from tests.oracle import ENGINES, Run, reference, relative_error

Array = np.ndarray[Any, Any]
CONV = "image = Conv <kernel_shape = [4, 2], strides = [4, 2]> (x, w, b)\n"
FLAT = "rows = Reshape (image, flat)\ntokens = Transpose <perm = [0, 2, 1]> (rows)\n"
HEAD = "s = Softmax (tokens)\nm = ReduceMean <keepdims = 0> (s, one)\n[last] y = MatMul (m, head)"
EMBEDDING = CONV + FLAT + HEAD
GRID = CONV + "tokens = Transpose <perm = [0, 2, 3, 1]> (image)\n" + HEAD.replace("one", "two")


def embedding(body: str, size: str = "8, 6", **constants: Array) -> Graph:
    """Two by three patches of four by two, three channels, five filters."""
    random = np.random.default_rng(4)
    given = {
        "w": random.standard_normal((5, 3, 4, 2)).astype(np.float32),
        "b": random.standard_normal(5).astype(np.float32),
        "head": random.standard_normal((5, 4)).astype(np.float32),
        "flat": np.array([0, 5, -1], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([1, 2], np.int64),
        **constants,
    }
    used = {name: array for name, array in given.items() if name in body}
    graph = graph_of(f"float[N, 3, {size}] x", "float[N, 4] y", body, **used)
    normalize(graph)
    return graph


def images(samples: int = 3, size: tuple[int, int] = (8, 6)) -> dict[str, Array]:
    random = np.random.default_rng(9)
    return {"x": random.standard_normal((samples, 3, *size)).astype(np.float32)}


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("body", [EMBEDDING, GRID], ids=["flattened", "grid"])
def test_the_product_is_the_convolution(engine: Run, body: str) -> None:
    graph = embedding(body)
    wanted = reference(graph.to_model(), images())
    report = patches_to_matmul(graph)
    check_normalized(graph)
    assert report.changed == 1
    assert not report.refusals
    made = ["Reshape", "Transpose", "Reshape", "MatMul", "Add"]
    assert [node.op for node in graph.nodes[:6]] == [*made, "Softmax"]
    # Sums of 24 products of size one, whose errors the softmax passes on at most, and their mean
    # over up to 6 tokens; exp in float32, then 5 products, relative to the largest output.
    room = (24 + 6 + 5) * np.finfo(np.float32).eps
    assert relative_error(engine(graph.to_model(), images()), wanted) < room


def test_names_of_the_op_and_of_the_tokens_stay() -> None:
    graph = embedding(EMBEDDING.replace("image =", "[embed] image ="))
    patches_to_matmul(graph)
    (product,) = [node for node in graph.nodes if node.name == "embed"]
    assert product.op == "MatMul"
    assert "tokens" in graph.tensors()


def test_a_batch_of_any_size_goes_through() -> None:
    graph = embedding(EMBEDDING)
    patches_to_matmul(graph)
    for samples in (1, 5):
        assert reference(graph.to_model(), images(samples))["y"].shape == (samples, 4)


@pytest.mark.parametrize(
    ("body", "size", "reason"),
    [
        (EMBEDDING.replace("[4, 2]> (", "[4, 2], pads = [0, 2, 0, 0]> ("), "8, 6", "padded"),
        (EMBEDDING.replace("[4, 2]> (", '[4, 2], auto_pad = "SAME_UPPER"> ('), "8, 6", "padded"),
        (EMBEDDING.replace("[4, 2]> (", "[4, 2], dilations = [1, 2]> ("), "8, 7", "dilated"),
        (EMBEDDING, "9, 6", "an edge"),
        (EMBEDDING, "H, 6", "are open"),
        (EMBEDDING.replace("flat)", "odd)"), "8, 6", "not flattened"),
    ],
)
def test_refusals_say_why(body: str, size: str, reason: str) -> None:
    graph = embedding(body, size, odd=np.array([0, 6, 5], np.int64))
    report = patches_to_matmul(graph)
    assert not report.changed
    assert [refusal.where for refusal in report.refusals] == [graph.nodes[0].name]
    assert reason in report.refusals[0].reason


def test_groups_are_refused() -> None:
    weight = np.ones((5 * 3, 1, 4, 2), np.float32)
    body = EMBEDDING.replace("strides", "group = 3, strides")
    graph = embedding(
        body,
        w=weight,
        b=np.ones(15, np.float32),
        flat=np.array([0, 15, -1], np.int64),
        head=np.ones((15, 4), np.float32),
    )
    assert "groups" in patches_to_matmul(graph).refusals[0].reason


@pytest.mark.parametrize(
    "body",
    [
        EMBEDDING.replace("strides = [4, 2]", "strides = [2, 2]"),
        CONV + "p = GlobalAveragePool (image)\nf = Flatten (p)\ny = MatMul (f, head)",
        CONV
        + FLAT
        + HEAD.replace("y =", "z =")
        + "\nr = ReduceMean <keepdims = 0> (image, last)\ns = MatMul (r, back)\n"
        "t = ReduceMean <keepdims = 0> (s, one)\ny = Add (z, t)",
    ],
    ids=["windows overlap", "no tokens", "another op reads the image"],
)
def test_other_convolutions_stay_without_a_word(body: str) -> None:
    graph = embedding(body, last=np.array([3]), back=np.ones((2, 4), np.float32))
    before = graph.to_text()
    report = patches_to_matmul(graph)
    assert not report.changed
    assert not report.refusals
    assert graph.to_text() == before


def test_targets_whose_convolutions_may_stay_float_keep_them() -> None:
    wanted = {name for name in TARGETS if load_target(name).rounds_convolutions}
    assert wanted == {"ort-x86", "ort-x86-avx2", "ort-arm"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "embedding.onnx"
    save_model(embedding(EMBEDDING), path)
    return path


@pytest.fixture
def with_a_gain(tmp_path: Path) -> Path:
    """The gain is folded into the product behind it: another rewrite, for all targets."""
    head = HEAD.replace("(tokens)", "(mixed)")
    gain = np.linspace(0.5, 2.0, 5, dtype=np.float32)
    body = CONV + FLAT + "g = Mul (tokens, gain)\nr = Relu (tokens)\nq = MatMul (g, mix)\n"
    graph = embedding(body + "mixed = Add (q, r)\n" + head, gain=gain, mix=np.eye(5, dtype="f4"))
    save_model(graph, tmp_path / "gain.onnx")
    return tmp_path / "gain.onnx"


def optimized(model: Path, name: str, **options: Any) -> tuple[set[str], set[str]]:
    """Return the ops of the file, and the tensors that are rounded."""
    data = [{"x": image[None]} for image in images(16)["x"]]
    out = model.with_name(name)
    qpass.optimize(model, data=data, output=out, engines=("ort",), compensate="none", **options)
    nodes = onnx.load(out).graph.node
    quantized = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    return {node.op_type for node in nodes}, quantized


def test_onnxruntime_gets_the_embedding_unrounded(model: Path) -> None:
    ops, rounded = optimized(model, "ort.onnx")
    assert "Conv" not in ops
    assert any(name.endswith("_patches") for name in rounded)
    assert not {"image", "rows", "tokens"} & rounded


def test_other_forms_of_quantization_keep_the_convolution(model: Path) -> None:
    assert "Conv" in optimized(model, "vino.onnx", target="openvino")[0]
    assert "Conv" in optimized(model, "weights.onnx", precision="w8")[0]


@pytest.mark.parametrize("name", ["model", "with_a_gain"])
def test_statistics_for_all_targets_serve_the_rewritten_graph(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    data = [{"x": image[None]} for image in images(16)["x"]]
    stats = qpass.calibrate(model, data=data, output=tmp_path / "stats.npz")
    ops, rounded = optimized(model, "stats.onnx", stats=str(stats))
    assert "Conv" not in ops
    assert any(name.endswith("_patches") for name in rounded)
    plain = optimized(model, "plain.onnx", equalize=False, calibrate="minmax")
    assert plain[1] == rounded
    again = optimized(model, "again.onnx", stats=str(stats), calibrate="minmax")
    assert again[1] == rounded
    scales = [
        {i.name: onnx.numpy_helper.to_array(i).tobytes() for i in onnx.load(f).graph.initializer}
        for f in (model.with_name("plain.onnx"), model.with_name("again.onnx"))
    ]
    patches = [name for name in scales[0] if name.endswith("_patches_scale")]
    assert patches
    assert all(scales[0][name] == scales[1][name] for name in patches)
