"""The rest of the folding table: forms of weights, and ops beyond one with a scale a channel.

`test_fold_affine` holds the plain rows. All numbers here are multiples of small powers of two with
few digits as well, so that float32 is exact in any order of summation and equality means equality.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import ModelError
from qpass.graph import Graph, array_of
from qpass.modelfile import load_model
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.compensate import compensate
from qpass.passes.fold_affine import Site, find_site, fold
from qpass.passes.normalize import normalize
from qpass.planner import plan as make_plan
from qpass.quantize import build_quantized
from qpass.targets import TARGETS
from qpass.verify.metrics import sqnr_db
from tests.folds import exact_affine, explicit, graph_of, normal, run
from tests.small_models import minmax, policy_of

CHANNELS = 6
Array = np.ndarray[Any, Any]

# name: input, weight, axis of the scales, body (weight w, bias b), shape of b, tap, axis of y
ROWS: dict[str, tuple[Any, ...]] = {
    "conv, three dimensions": (
        [2, 3, 4, 5, 4], (6, 3, 2, 2, 2), 0,
        "[op] y = Conv <pads = [1,0,1,0,1,0]> (x, w, b)", (6,), "y", -4,
    ),
    "conv, one dimension, depthwise": (
        [2, 6, 9], (6, 1, 3), 0,
        "[op] y = Conv <group = 6, dilations = [2]> (x, w, b)", (6,), "y", -2,
    ),
    "conv, same padding": (
        [2, 4, 5, 5], (6, 4, 3, 3), 0,
        '[op] y = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w, b)', (6,), "y", -3,
    ),
    "transposed, one dimension": (
        [2, 4, 5], (4, 6, 3), 1, "[op] y = ConvTranspose <strides = [2]> (x, w, b)", (6,), "y", -2,
    ),
    "gemm transA": ([4, 5], (4, 6), 1, "[op] y = Gemm <transA = 1> (x, w, b)", (6,), "y", -1),
    "gemm, one number as bias": ([5, 4], (4, 6), 1, "[op] y = Gemm (x, w, b)", (1,), "y", -1),
    "matmul, one weight a batch": (
        [2, 5, 4], (2, 4, 6), 2, "[op] h = MatMul (x, w) y = Add (h, b)", (6,), "h", -1,
    ),
    "matmul, one weight a batch, heads": (
        [2, 3, 5, 4], (3, 4, 6), 2, "[op] h = MatMul (x, w) y = Add (h, b)", (1, 1, 1, 6), "h", -1,
    ),
    "matmul, bias by position": (
        [2, 5, 4], (4, 6), 1, "[op] h = MatMul (x, w) y = Add (h, b)", (5, 6), "h", -1,
    ),
    "matmul, bias quantized behind a pair": (
        [2, 5, 4], (4, 6), 1,
        "[op] h = MatMul (x, w) q = QuantizeLinear (h, s, z) d = DequantizeLinear (q, s, z) "
        "y = Add (d, b)",
        (6,), "d", -1,
    ),
}  # fmt: skip
# How the integers are stored, and what the zero points are.
FORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "int8": (np.int8, (0,)),
    "uint8": (np.uint8, (128,)),
    "uint8, zero points that differ": (np.uint8, (3, 128, 127, 255, 0, 64)),
    "int4": (ml_dtypes.int4, (0,)),
    "uint4": (ml_dtypes.uint4, (8,)),
}


def case(name: str, form: str | None) -> Graph:
    """Build one row, with integers of a form or with the float weight that they stand for."""
    source, shape, axis, body, bias, _, _ = ROWS[name]
    dtype, zeros = FORMS[form or "int8"]
    random = np.random.default_rng(2)
    low, high = ml_dtypes.iinfo(dtype).min, ml_dtypes.iinfo(dtype).max
    integers = random.integers(low, high + 1, shape)
    scale = (random.choice([1, 3, 5, 7], shape[axis]) / 64).astype(np.float32)
    zero = np.resize(zeros, shape[axis])
    line = [-1 if i == axis else 1 for i in range(len(shape))]
    constants: dict[str, Array] = {"b": (random.integers(-64, 65, bias) / 16).astype(np.float32)}
    if "QuantizeLinear" in body:
        constants |= {"s": np.float32(0.5), "z": np.uint8(128)}
    if form is None:
        constants["w"] = ((integers - zero.reshape(line)) * scale.reshape(line)).astype(np.float32)
    else:
        constants |= {
            "w_int": integers.astype(dtype),
            "w_scale": scale,
            "w_zero": zero.astype(dtype),
        }
        body = f"[dq] w = DequantizeLinear <axis = {axis}> (w_int, w_scale, w_zero) {body}"
    outs = ",".join(f"D{i}" for i in range(len(source)))
    sizes = ",".join(str(size) for size in source)
    return graph_of(f"float[{sizes}] x", f"float[{outs}] y", body, **constants)


def whole_numbers(name: str) -> dict[str, Array]:
    return {"x": np.random.default_rng(3).integers(-4, 5, ROWS[name][0]).astype(np.float32)}


def site_of(graph: Graph, reference: Graph, name: str = "op") -> Site:
    site = find_site(graph, {node.name: node for node in graph.nodes}, reference.node(name))
    assert isinstance(site, Site), site
    return site


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "int8") for name in ROWS), *(("gemm transA", f) for f in FORMS)]
)
def test_folded_equals_explicit_bit_for_bit(name, form):
    reference, graph = case(name, None), case(name, form)
    affine, feeds = exact_affine(CHANNELS), whole_numbers(name)
    *_, tap, axis = ROWS[name]
    if tap == "d":  # behind the pair a gain would act on rounded numbers: the offset alone is equal
        affine = ChannelAffine(gain=np.ones(CHANNELS), offset=affine.offset)
    site = site_of(graph, reference)
    assert (site.gain, site.offset, site.rounding, site.reasons) == ("channel", True, None, ())
    (plain,) = run(graph, feeds)
    (want,) = run(explicit(graph, tap, affine, axis), feeds)
    integers = array_of(graph.node("dq").inputs[0]).copy()
    zeros = array_of(graph.node("dq").inputs[2]).copy()
    ops = [node.op for node in graph.nodes]
    fold(graph, site, affine)
    (got,) = run(graph, feeds)
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, plain)
    np.testing.assert_array_equal(array_of(graph.node("dq").inputs[0]), integers)
    np.testing.assert_array_equal(array_of(graph.node("dq").inputs[2]), zeros)
    assert [node.op for node in graph.nodes] == ops


@pytest.mark.parametrize("integer", [False, True])
def test_a_grouped_transposed_convolution_equals_explicit_where_integers_can_hold_it(integer):
    """The groups share the scales of axis 1. Gains of 1/2 on even integers round nothing."""
    random = np.random.default_rng(5)
    integers = (2 * random.integers(-31, 32, (4, 3, 3, 3))).astype(np.int8)
    integers[:, :, 0, 0] = 126  # the scale is the one that this weight would get
    scale = np.array([0.25, 0.75, 1.25], np.float32)
    constants = {"b": (random.integers(-64, 65, CHANNELS) / 16).astype(np.float32)}
    place = "float[2,4,5,5] x", f"float[2,{CHANNELS},7,7] y"
    body = "[op] y = ConvTranspose <group = 2> (x, w, b)"
    weight = integers * scale.reshape(1, 3, 1, 1)
    reference = graph_of(*place, body, w=weight, **constants)
    graph = reference.copy()
    if integer:
        dq = f"[dq] w = DequantizeLinear <axis = 1> (q, s, z) {body}"
        zero = np.zeros(3, np.int8)
        graph = graph_of(*place, dq, q=integers, s=scale, z=zero, **constants)
    affine = ChannelAffine(
        gain=np.array([0.5, 1.0, 0.5, 1.0, 1.0, 0.5]), offset=exact_affine(CHANNELS).offset
    )
    feeds = {"x": random.integers(-4, 5, (2, 4, 5, 5)).astype(np.float32)}
    (want,) = run(explicit(graph, "y", affine, -3), feeds)
    site = site_of(graph, reference)
    assert (site.gain, site.groups, site.rounding is not None) == ("channel", 2, integer)
    fold(graph, site, affine)
    np.testing.assert_array_equal(run(graph, feeds)[0], want)
    if integer:
        np.testing.assert_array_equal(array_of(graph.node("dq").inputs[1]), scale)


def test_one_scale_for_the_weight_equals_explicit_where_integers_can_hold_it():
    random = np.random.default_rng(6)
    integers = (2 * random.integers(-63, 64, (CHANNELS, 4))).astype(np.int8)
    scale = np.float32(0.375)
    place = "float[5,4] x", f"float[5,{CHANNELS}] y"
    body = "[op] y = Gemm <transB = 1> (x, w, b)"
    bias = {"b": np.zeros(CHANNELS, np.float32)}
    reference = graph_of(*place, body, w=integers * scale, **bias)
    dq = f"w = DequantizeLinear (q, s, z) {body}"
    graph = graph_of(*place, dq, q=integers, s=scale, z=np.int8(0), **bias)
    affine = ChannelAffine(
        gain=np.array([0.5, 1.0, 1.0, 0.5, 0.5, 1.0]), offset=exact_affine(CHANNELS).offset
    )
    feeds = {"x": random.integers(-4, 5, (5, 4)).astype(np.float32)}
    (want,) = run(explicit(graph, "y", affine, -1), feeds)
    fold(graph, site_of(graph, reference), affine)
    np.testing.assert_array_equal(run(graph, feeds)[0], want)


def test_scales_of_another_axis_are_rounded_again_or_get_one_gain():
    """Scales by input channel hold no gain by output channel."""
    weight = normal((4, CHANNELS))
    scale = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    integers = np.rint(weight / scale[:, None]).astype(np.int8)
    place = "float[5,4] x", f"float[5,{CHANNELS}] y"
    body = "[op] h = MatMul (x, w) y = Add (h, b)"
    bias = {"b": np.zeros(CHANNELS, np.float32)}
    reference = graph_of(*place, body, w=weight, **bias)
    dq = f"w = DequantizeLinear <axis = 0> (q, s, z) {body}"
    numbers = {"s": scale, "z": np.zeros(4, np.int8), **bias}
    assert site_of(graph_of(*place, dq, q=integers, **numbers), reference).rounding is not None
    moved = integers.copy()
    moved[0, 0] ^= 1
    site = site_of(graph_of(*place, dq, q=moved, **numbers), reference)
    assert site.gain == "tensor"
    assert "do not lie along the output channels" in site.reasons[0]


@pytest.mark.parametrize("why", ["beta", "made at run time", "by row"])
def test_a_bias_inside_of_the_op_that_cannot_follow_refuses_the_gain_too(why):
    """``gain * (x W + b)`` needs ``gain * b``."""
    constants = {"w": normal((4, CHANNELS)), "b": np.ones(CHANNELS, np.float32)}
    body, reason = "[op] y = Gemm <beta = 2.0> (x, w, b)", "Gemm with beta"
    if why == "made at run time":
        body, reason = "c = Abs (b) [op] y = Gemm (x, w, c)", "its bias is computed at run time"
    elif why == "by row":
        constants["b"] = normal((5, CHANNELS))
        body, reason = "[op] y = Gemm (x, w, b)", "its bias differs from row to row"
    graph = graph_of("float[5,4] x", f"float[5,{CHANNELS}] y", body, **constants)
    site = site_of(graph, graph.copy())
    assert (site.gain, site.offset) == ("none", False)
    assert reason in site.reasons


# ------------------------------------------------------------------ what normalization prepares

FOLDED_FIRST = {
    "conv, batch norm": (
        "float[2,4,5,5] x", "float[2,6,3,3] y",
        "[op] h = Conv (x, w) y = BatchNormalization (h, g, o, m, v)",
        {"w": (6, 4, 3, 3), "g": (6,), "o": (6,), "m": (6,), "v": (6,)}, "Conv",
    ),
    "conv transposed, batch norm": (
        "float[2,4,5,5] x", "float[2,6,7,7] y",
        "[op] h = ConvTranspose (x, w) y = BatchNormalization (h, g, o, m, v)",
        {"w": (4, 6, 3, 3), "g": (6,), "o": (6,), "m": (6,), "v": (6,)}, "ConvTranspose",
    ),
    "gemm, alpha and beta": (
        "float[5,4] x", "float[5,6] y",
        "[op] y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, o)",
        {"w": (6, 4), "o": (6,)}, "Gemm",
    ),
    "layer scale": (
        "float[5,4] x", "float[5,6] y", "[op] h = MatMul (x, w) a = Add (h, o) y = Mul (a, g)",
        {"w": (4, 6), "o": (6,), "g": (6,)}, "Gemm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED_FIRST)
def test_what_scales_and_shifts_the_output_is_in_the_op_before_it_is_corrected(name):
    source, result, body, shapes, op = FOLDED_FIRST[name]
    constants = {
        key: np.abs(normal(shape, seed=i)) + 0.5 for i, (key, shape) in enumerate(shapes.items())
    }
    graph = graph_of(source, result, body, **constants)
    plain = graph.copy()
    normalize(graph)
    assert [node.op for node in graph.nodes if node.op != "Add"] == [op]
    (linear,) = [node.name for node in graph.nodes if node.op == op]
    site = site_of(graph, graph.copy(), linear)
    assert (site.gain, site.offset, site.reasons) == ("channel", True, ())
    affine = exact_affine(CHANNELS)
    feeds = {"x": normal(tuple(plain.inputs[0].shape), seed=9)}
    rank = len(plain.inputs[0].shape)
    axis = 1 - rank if op.startswith("Conv") else -1
    (want,) = run(explicit(plain, "y", affine, axis), feeds)
    fold(graph, site, affine)
    # The products of constants were rounded to float32 in another order.
    np.testing.assert_allclose(run(graph, feeds)[0], want, rtol=2e-5, atol=2e-5)


# ------------------------------------------------------------------ contributed ops

FUSED = {
    "QLinearConv": "",
    "QLinearMatMul": "",
    "MatMulInteger": "",
    "ConvInteger": "",
    "DynamicQuantizeLinear": "",
    "QGemm": "com.microsoft",
    "MatMulNBits": "com.microsoft",
    "MatMulIntegerToFloat": "com.microsoft",
    "DynamicQuantizeMatMul": "com.microsoft",
}


@pytest.mark.parametrize("op", FUSED)
def test_models_that_hold_quantized_ops_are_refused_by_name(op, tmp_path: Path):
    """Their float weights are gone, and with them what every fit aims at."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, ["x", "w"], ["y"], name="fused", domain=FUSED[op])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.zeros((4, 6), np.int8), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    path = tmp_path / "fused.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match=f"quantized already: it has a {op}"):
        load_model(path)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
def test_blocks_behind_float_activations_are_corrected_inside_of_matmulnbits(dtype, tmp_path: Path):
    """Weights alone: gains go into all blocks of a column, offsets into the Add; one op stays."""
    rows, columns, block = 64, 16, 16
    random = np.random.default_rng(8)
    middle = 8 if dtype is ml_dtypes.uint4 else 0
    integers = random.integers(-7, 8, (rows, columns))
    scale = (random.choice([1, 3, 5, 7], (rows // block, columns)) / 64).astype(np.float32)
    weight = (integers * np.repeat(scale, block, axis=0)).astype(np.float32)
    place = f"float[3,{rows}] x", f"float[3,{columns}] y"
    body = "[op] h = MatMul (x, w) y = Add (h, b)"
    bias = {"b": (np.arange(columns) / 8).astype(np.float32)}
    reference = graph_of(*place, body, w=weight, **bias)
    graph = graph_of(
        *place,
        f"w = DequantizeLinear <axis = 0, block_size = {block}> (q, s, z) {body}",
        q=(integers + middle).astype(dtype), s=scale, z=np.full(scale.shape, middle, dtype), **bias,
    )  # fmt: skip
    affine = exact_affine(columns)
    feeds = {"x": random.integers(-4, 5, (3, rows)).astype(np.float32)}
    (want,) = run(explicit(graph, "h", affine, -1), feeds)
    site = site_of(graph, reference)
    assert (site.gain, site.offset, site.reasons) == ("channel", True, ())
    fold(graph, site, affine)
    np.testing.assert_array_equal(run(graph, feeds)[0], want)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(graph.to_model().SerializeToString(), options)
    (fused,) = session.run(None, feeds)
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ops.count("MatMulNBits") == 1
    assert "DequantizeLinear" not in ops
    np.testing.assert_allclose(fused, want, rtol=1e-6)


def test_weights_alone_are_compensated_and_the_ops_stay():
    """The whole way: plan, blocks of four bits, fit, fold; what runs is what ran without."""
    width = 64
    reference = graph_of(
        f"float[N,4,{width}] x", f"float[N,4,{width}] y",
        "[first] h = MatMul (x, w) a = Add (h, b) g = Gelu (a) [second] y = MatMul (g, v)",
        w=normal((width, width), seed=1) / 8, v=normal((width, width), seed=2) / 8,
        b=normal((width,), seed=3),
    )  # fmt: skip
    batches = [{"x": normal((8, 4, width), seed=i) + 1} for i in range(8)]
    target, policy = TARGETS["ort-x86"], policy_of("w4", low_bit_edges=True)
    plan = make_plan(reference, target, policy)
    graphs = []
    for fit in (False, True):
        graph, _ = build_quantized(
            reference, plan, minmax(reference, plan, batches), target, policy,
            compensation=(lambda g: compensate(reference, g, batches).report) if fit else None,
        )  # fmt: skip
        graphs.append(graph)
    plain, fitted = graphs
    # Scales in float16 behind a Cast are those that lose nothing there: gains make others of them.
    kept = [[node.op for node in graph.nodes if node.op != "Cast"] for graph in graphs]
    assert kept[0] == kept[1]
    assert "DequantizeLinear" in kept[0]
    unseen = {"x": normal((32, 4, width), seed=99) + 1}
    (want,), (before,), (after,) = (run(g, unseen) for g in (reference, plain, fitted))
    assert sqnr_db(want, after) > sqnr_db(want, before) + 0.5
