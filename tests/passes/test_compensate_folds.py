"""Folds of a compensation are exact and free; what they cannot take is refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.fold_affine import find_site, fold
from qpass.passes.lower import lower_biases
from tests.truncated import header, quantized_weight, run

CASES = {
    "conv": (
        "float[2, 4, 5, 5] x", (6, 4, 3, 3), 0, 0,
        "[op] y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", (1, 6, 1, 1),
    ),
    "depthwise": (
        "float[2, 4, 5, 5] x", (4, 1, 3, 3), 0, 0,
        "[op] y = Conv <group = 4> (x, w, b)", (1, 4, 1, 1),
    ),
    "transposed": (
        "float[2, 4, 5, 5] x", (4, 6, 3, 3), 1, 1,
        "[op] y = ConvTranspose (x, w, b)", (1, 6, 1, 1),
    ),
    "gemm": ("float[5, 4] x", (6, 4), 0, 0, "[op] y = Gemm <transB = 1> (x, w, b)", (1, 6)),
    "gemm not transposed": ("float[5, 4] x", (4, 6), 1, 1, "[op] y = Gemm (x, w, b)", (1, 6)),
    "matmul": ("float[2, 5, 4] x", (4, 6), 1, 1, "[op] h = MatMul (x, w) y = Add (b, h)", (6,)),
}  # fmt: skip


def linear_case(name: str, *, quantized: bool, per_channel: bool = True) -> Graph:
    source, shape, axis, scale_axis, body, wide = CASES[name]
    random = np.random.default_rng(3)
    weight = random.standard_normal(shape).astype(np.float32)
    constants = {"b": random.standard_normal(np.prod(wide)).astype(np.float32)}
    if quantized:
        constants |= quantized_weight("w", weight, axis, steps=127, per_channel=per_channel)
        dq = f"DequantizeLinear <axis = {scale_axis}>" if per_channel else "DequantizeLinear"
        body = f"w = {dq} (w_int, w_scale) {body}"
    else:
        constants["w"] = weight
    return Graph.from_text(header(source, "float[] y".replace("[]", ""), body), **constants)


def with_affine(graph: Graph, affine: ChannelAffine, shape) -> Graph:
    """The explicit form: Mul and Add behind the graph's output."""
    graph = graph.copy()
    (out,) = graph.outputs
    inner = graph.variable("inner", out.dtype, None)
    graph.set_output(graph.producer(out), 0, inner)
    scaled = graph.variable("scaled", out.dtype, None)
    parts = [
        graph.constant(name, values.reshape(shape).astype(np.float32))
        for name, values in (("gain", affine.gain), ("offset", affine.offset))
    ]
    graph.add(graph.make("Mul", [inner, parts[0]], [scaled], name="mul"))
    graph.add(graph.make("Add", [scaled, parts[1]], [out], name="add"))
    return graph


def feeds_of(graph: Graph) -> dict[str, np.ndarray]:
    shape = [int(size) for size in graph.inputs[0].shape]
    random = np.random.default_rng(4)
    return {"x": random.standard_normal(shape).astype(np.float32)}


def fold_into(graph: Graph, reference: Graph, affine: ChannelAffine):
    site = find_site(graph, {node.name: node for node in graph.nodes}, reference.node("op"))
    fold(graph, site, affine)
    return site


def affine_of(channels: int, *, dyadic: bool) -> ChannelAffine:
    random = np.random.default_rng(6)
    if dyadic:
        gain = random.choice([0.5, 1.0, 2.0], channels)
        return ChannelAffine(gain=gain, offset=np.zeros(channels))
    return ChannelAffine(
        gain=random.uniform(0.5, 2, channels), offset=random.standard_normal(channels)
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_fold_equals_mul_and_add(case, quantized):
    reference, shape = linear_case(case, quantized=False), CASES[case][5]
    graph = linear_case(case, quantized=quantized)
    feeds, structure = feeds_of(reference), graph.to_text()
    for dyadic in (True, False):
        folded, affine = graph.copy(), affine_of(int(np.prod(shape)), dyadic=dyadic)
        explicit = with_affine(graph, affine, shape if case != "matmul" else (6,))
        site = fold_into(folded, reference, affine)
        assert (site.gain, site.offset, site.reasons) == ("channel", True, ())
        assert folded.to_text() == structure
        (got,), (want,) = run(folded, feeds), run(explicit, feeds)
        if dyadic and case != "matmul":  # powers of two do not round: bit for bit
            np.testing.assert_array_equal(got, want)
        if case == "matmul":  # its bias lies behind the corrected tensor
            gain, (bias,) = affine.gain, [array_of(graph.tensors()["b"])]
            want = run(graph, feeds)[0] * gain + (1 - gain) * bias + affine.offset
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_behind_its_q_a_fold_is_bit_for_bit_mul_and_add():
    reference = linear_case("conv", quantized=False)
    graph = linear_case("conv", quantized=True)
    affine = affine_of(6, dyadic=False)
    explicit, folded = with_affine(graph, affine, (1, 6, 1, 1)), graph.copy()
    fold_into(folded, reference, affine)
    outputs = []
    for one in (explicit, folded):
        (out,) = one.outputs
        stored = one.variable("stored", np.dtype(np.uint8), None)
        parts = [one.constant("s", np.float32(0.05)), one.constant("z", np.uint8(128))]
        one.add(one.make("QuantizeLinear", [out, *parts], [stored], name="q"))
        one.outputs = [stored]
        outputs.append(run(one, feeds_of(reference))[0])
    np.testing.assert_array_equal(*outputs)
    assert np.unique(outputs[0]).size > 100


def test_the_int32_bias_gets_the_scale_that_the_fold_has_left():
    random = np.random.default_rng(8)
    body = """
    xq = QuantizeLinear (x, s, z)  xd = DequantizeLinear (xq, s, z)
    w = DequantizeLinear <axis = 0> (w_int, w_scale)
    [op] y = Gemm <transB = 1> (xd, w, b)
    """
    weight = random.standard_normal((6, 4)).astype(np.float32)
    graph = Graph.from_text(
        header("float[5, 4] x", "float[5, 6] y", body),
        s=np.float32(0.03), z=np.uint8(128), b=np.ones(6, np.float32),
        **quantized_weight("w", weight, 0, steps=127),
    )  # fmt: skip
    reference = linear_case("gemm", quantized=False)
    fold_into(graph, reference, affine_of(6, dyadic=False))
    assert lower_biases(graph).changed == 1
    node = graph.node("op")
    w_scale, b_scale = (array_of(graph.producer(node.inputs[i]).inputs[1]) for i in (1, 2))
    np.testing.assert_allclose(b_scale, np.float64(np.float32(0.03)) * w_scale, rtol=1e-6)


def test_one_scale_for_the_weight_takes_one_gain_and_shared_constants_are_cloned():
    reference = linear_case("gemm", quantized=False)
    graph = linear_case("gemm", quantized=True, per_channel=False)
    site = fold_into(graph, reference, ChannelAffine(gain=np.full(6, 1.5), offset=np.ones(6)))
    assert (site.gain, site.gain_axis) == ("tensor", None)
    assert "one gain" in site.reasons[0]
    shared = linear_case("gemm", quantized=False)
    copy = shared.copy()
    fold_into(copy, reference, affine_of(6, dyadic=False))
    np.testing.assert_array_equal(
        array_of(shared.tensors()["w"]), array_of(reference.tensors()["w"])
    )


@pytest.mark.parametrize(
    ("case", "edit", "reason"),
    [
        ("matmul", "Mul", "no bias behind it"),
        ("gemm", "beta", "Gemm with beta"),
        ("gemm", "pow2", "powers of two"),
    ],
)
def test_refusals_say_why(case, edit, reason):
    reference, graph = (linear_case(case, quantized=q) for q in (False, True))
    if edit == "Mul":
        graph.producer(graph.outputs[0]).op = "Mul"
    elif edit == "beta":
        graph.node("op").attrs["beta"] = 2.0
    else:
        dq = graph.producer(graph.node("op").inputs[1])
        graph.set_input(dq, 1, graph.constant("two", np.full(6, 0.25, np.float32)))
    site = find_site(graph, {node.name: node for node in graph.nodes}, reference.node("op"))
    assert reason in " ".join(site.reasons)


def test_a_conv_without_bias_gets_one():
    reference, graph = (linear_case("conv", quantized=q) for q in (False, True))
    graph.drop_input(graph.node("op"), 2)
    (before,) = run(graph, feeds_of(reference))
    affine = ChannelAffine(gain=np.ones(6), offset=np.arange(6.0))
    fold_into(graph, reference, affine)
    (after,) = run(graph, feeds_of(reference))
    # Adding 5 to values of size 10 in float32.
    np.testing.assert_allclose(after, before + np.arange(6.0).reshape(1, 6, 1, 1), atol=1e-5)
