"""Corrections in front of linear ops: exact in their weights, and refused where they are not.

As in `test_fold_affine` all numbers have few binary digits: equality means equality.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.fold_linear import PADDED, InputSite, find_input_site, fold_into_input
from tests.folds import exact_affine, graph_of, normal, powers_of_two, rounded, run

Array = np.ndarray[Any, Any]
INPUTS, OUTPUTS = 4, 6

# name: input, weight, axis of the scales, body (weight w, bias b), axis of the input channels
ROWS: dict[str, tuple[Any, ...]] = {
    "conv": ([2, 4, 5, 5], (6, 4, 3, 3), 0, "[op] y = Conv (x, w, b)", -3),
    "conv without bias": ([2, 4, 5, 5], (6, 4, 3, 3), 0, "[op] y = Conv (x, w)", -3),
    "grouped": ([2, 4, 5, 5], (6, 2, 3, 3), 0, "[op] y = Conv <group = 2> (x, w, b)", -3),
    "strides": (
        [2, 4, 7, 7], (6, 4, 3, 3), 0,
        "[op] y = Conv <strides = [2,2], dilations = [2,2]> (x, w, b)", -3,
    ),
    "valid": ([2, 4, 9], (6, 4, 3), 0, '[op] y = Conv <auto_pad = "VALID"> (x, w, b)', -2),
    "three dimensions": ([2, 4, 4, 4, 4], (6, 4, 2, 2, 2), 0, "[op] y = Conv (x, w, b)", -4),
    "gemm": ([5, 4], (4, 6), 1, "[op] y = Gemm (x, w, b)", -1),
    "gemm transB": ([5, 4], (6, 4), 0, "[op] y = Gemm <transB = 1> (x, w, b)", -1),
    "matmul": ([2, 5, 4], (4, 6), 1, "[op] h = MatMul (x, w) y = Add (h, b)", -1),
}  # fmt: skip


def case(name: str, *, integer: bool, dtype: Any = np.int8) -> Graph:
    """Build one row; the float weight is what the integers stand for."""
    source, shape, axis, body, _ = ROWS[name]
    random = np.random.default_rng(2)
    most = 7 if dtype is ml_dtypes.int4 else 127
    middle = 128 if dtype is np.uint8 else 0
    # Multiples of four: gains of 0.25, 0.5 and 0.75 on them round nothing.
    integers = 4 * random.integers(-(most // 4), most // 4 + 1, shape)
    scale = (random.choice([1, 3, 5, 7], shape[axis]) / 64).astype(np.float32)
    line = [-1 if i == axis else 1 for i in range(len(shape))]
    constants: dict[str, Array] = {}
    if "b)" in body:
        constants["b"] = (random.integers(-64, 65, OUTPUTS) / 16).astype(np.float32)
    if integer:
        zero = np.full(scale.shape, middle).astype(dtype)
        constants |= {"q": (integers + middle).astype(dtype), "s": scale, "z": zero}
        body = f"[dq] w = DequantizeLinear <axis = {axis}> (q, s, z) {body}"
    else:
        constants["w"] = (integers * scale.reshape(line)).astype(np.float32)
    sizes, outs = ",".join(map(str, source)), ",".join(f"D{i}" for i in range(len(source)))
    return graph_of(f"float[{sizes}] x", f"float[{outs}] y", body, **constants)


def site_of(graph: Graph, reference: Graph, name: str = "op") -> InputSite | str:
    return find_input_site(graph, {node.name: node for node in graph.nodes}, reference.node(name))


def explicit(graph: Graph, affine: ChannelAffine, axis: int) -> Graph:
    """Return a copy with Mul and Add in front of the op alone."""
    graph = graph.copy()
    node, shape = graph.node("op"), (-1, *([1] * (-axis - 1)))
    tensor = node.inputs[0]
    for op, values in (("Mul", affine.gain), ("Add", affine.offset)):
        constant = graph.constant(op.lower(), values.reshape(shape).astype(np.float32))
        result = graph.variable(f"after_{op}", tensor.dtype, tensor.shape)
        graph.add(graph.make(op, [tensor, constant], [result], name=f"explicit_{op}"), before=node)
        tensor = result
    graph.set_input(node, 0, tensor)
    return graph


def gentle(*, offset: bool = True) -> ChannelAffine:
    """Gains that multiples of four can take without rounding, and offsets of few digits."""
    shifts = exact_affine(INPUTS).offset if offset else np.zeros(INPUTS)
    return ChannelAffine(gain=np.array([0.5, 1.0, 0.75, 0.25]), offset=shifts)


def whole_numbers(name: str) -> dict[str, Array]:
    return {"x": np.random.default_rng(3).integers(-4, 5, ROWS[name][0]).astype(np.float32)}


FORMS = {"float": None, "int8": np.int8, "uint8": np.uint8, "int4": ml_dtypes.int4}


@pytest.mark.parametrize(
    ("name", "form"),
    [*((name, "int8") for name in ROWS), *(("gemm", form) for form in FORMS), ("conv", "float")],
)
def test_folded_equals_explicit_bit_for_bit(name, form):
    dtype = FORMS[form] or np.int8
    reference = case(name, integer=False, dtype=dtype)
    graph = case(name, integer=form != "float", dtype=dtype)
    affine, feeds = gentle(), whole_numbers(name)
    site = site_of(graph, reference)
    assert isinstance(site, InputSite), site
    assert (site.channels, site.no_offset, site.tap, site.float_tap) == (INPUTS, "", "x", "x")
    (plain,) = run(graph, feeds)
    (want,) = run(explicit(graph, affine, ROWS[name][-1]), feeds)
    ops = [node.op for node in graph.nodes]
    scales = None if form == "float" else array_of(graph.node("dq").inputs[1]).copy()
    fold_into_input(graph, site, affine)
    (got,) = run(graph, feeds)
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, plain)
    assert [node.op for node in graph.nodes] == ops
    if scales is not None:
        np.testing.assert_array_equal(array_of(graph.node("dq").inputs[1]), scales)


def test_integers_are_the_nearest_to_the_scaled_weight_half_to_even():
    weight = normal((INPUTS, OUTPUTS))
    reference, graph = products(weight)
    gain = np.array([0.93, 1.0, 0.71, 1.1])
    site = site_of(graph, reference)
    assert isinstance(site, InputSite)
    old_scale, old = (array_of(graph.node("dq").inputs[i]).copy() for i in (1, 0))
    fold_into_input(graph, site, ChannelAffine(gain=gain, offset=np.zeros(INPUTS)))
    stored, scale, zero = (array_of(t) for t in graph.node("dq").inputs)
    assert (stored.dtype, zero.dtype) == (np.int8, np.int8)
    # Scales grow where a weight outgrows its integers, and nowhere else.
    scaled = gain[:, None] * weight.astype(np.float64)
    needed = np.abs(scaled).max(axis=0) / 127
    np.testing.assert_allclose(scale, np.maximum(old_scale, needed), rtol=1e-6)
    np.testing.assert_array_equal(stored, np.rint((scaled / scale).astype(np.float32)))
    assert not np.array_equal(stored, old)
    same = scale == old_scale
    np.testing.assert_array_equal(stored[1, same], old[1, same])  # the gain is 1


def test_integers_that_another_method_chose_are_kept_where_the_change_is_small():
    weight = normal((INPUTS, OUTPUTS))
    reference, graph = products(weight)
    chosen = array_of(graph.node("dq").inputs[0]).copy()
    chosen[1:, 0] += 1  # not the nearest
    graph.set_input(graph.node("dq"), 0, graph.constant("q", chosen))
    site = site_of(graph, reference)
    assert isinstance(site, InputSite)
    gain = np.array([1.0, 1.001, 1.0, 0.61])
    fold_into_input(graph, site, ChannelAffine(gain=gain, offset=np.zeros(INPUTS)))
    stored = array_of(graph.node("dq").inputs[0])
    np.testing.assert_array_equal(stored[:3], chosen[:3])
    np.testing.assert_array_equal(stored[3], np.rint(chosen[3] * 0.61))


def products(weight: Array, **more: Array) -> tuple[Graph, Graph]:
    """MatMul and Add in float and with an int8 weight, scales along the outputs."""
    inputs, outputs = weight.shape
    place = f"float[3,{inputs}] x", f"float[3,{outputs}] y"
    body = "[op] h = MatMul (x, w) y = Add (h, b)"
    bias = {"b": np.zeros(outputs, np.float32)}
    dq = f"[dq] w = DequantizeLinear <axis = 1> (w_int, w_scale, w_zero) {body}"
    integers = rounded("w", weight, 1)
    return graph_of(*place, body, w=weight, **bias), graph_of(*place, dq, **integers, **bias)


@pytest.mark.parametrize(
    "pads", ["pads = [1,1,1,1]", "pads = [0,0,0,1]", 'auto_pad = "SAME_LOWER"']
)
def test_padding_refuses_the_offset_and_takes_the_gain(pads):
    """At the borders the op would read zeros that have no offset."""
    place = "float[2,4,5,5] x", "float[2,6,D2,D3] y"
    body = f"[op] y = Conv <{pads}> (x, w, b)"
    random = np.random.default_rng(4)
    constants = {
        "w": (random.integers(-31, 32, (6, 4, 3, 3)) / 8).astype(np.float32),
        "b": np.zeros(6, np.float32),
    }
    graph = graph_of(*place, body, **constants)
    site = site_of(graph, graph.copy())
    assert isinstance(site, InputSite)
    assert site.no_offset == PADDED
    feeds = {"x": random.integers(-4, 5, (2, 4, 5, 5)).astype(np.float32)}
    (want,) = run(explicit(graph, gentle(offset=False), -3), feeds)
    fold_into_input(graph, site, gentle(offset=False))
    np.testing.assert_array_equal(run(graph, feeds)[0], want)


def refused_graph(why: str) -> tuple[Graph, Graph]:
    """Return the float and the quantized graph of an input that no correction goes into."""
    shape: tuple[int, ...] = (INPUTS, OUTPUTS)
    place, body = (f"float[3,{INPUTS}] x", "float[D0,D1] y"), "[op] y = Gemm (x, w, b)"
    outputs, attributes, numbers = OUTPUTS, "axis = 1", {}
    if why in ("depthwise", "transposed"):
        shape = (INPUTS, 1, 3, 3) if why == "depthwise" else (INPUTS, OUTPUTS, 3, 3)
        op = "Conv <group = 4>" if why == "depthwise" else "ConvTranspose"
        place, body = ("float[2,4,5,5] x", "float[D0,D1,D2,D3] y"), f"[op] y = {op} (x, w, b)"
        outputs = INPUTS if why == "depthwise" else OUTPUTS
        attributes = f"axis = {0 if why == 'depthwise' else 1}"
    elif why == "one weight a batch":
        shape, body = (3, INPUTS, OUTPUTS), "[op] h = MatMul (x, w) y = Add (h, b)"
        place, attributes = ("float[3,2,4] x", "float[D0,D1,D2] y"), "axis = 2"
    elif why == "alpha":
        body = "[op] y = Gemm <alpha = 0.5> (x, w, b)"
    weight = normal(shape, seed=5)
    bias = {"b": np.zeros(outputs, np.float32)}
    numbers = rounded("w", weight, int(attributes[-1]))
    if why == "powers of two":
        numbers, attributes = powers_of_two("w", weight), "axis = 0"
    elif why == "one scale":
        numbers, attributes = rounded("w", weight, None), "axis = 0"
    elif why == "blocks":
        numbers = {
            "w_int": np.ones(shape, np.int8),
            "w_scale": np.full((2, OUTPUTS), 0.3, np.float32),
            "w_zero": np.zeros((2, OUTPUTS), np.int8),
        }
        attributes = "axis = 0, block_size = 2"
    dq = f"[dq] w = DequantizeLinear <{attributes}> (w_int, w_scale, w_zero) {body}"
    return graph_of(*place, body, w=weight, **bias), graph_of(*place, dq, **numbers, **bias)


REFUSED = {
    "depthwise": "the gain of the output is that of the input",
    "transposed": "ConvTranspose with such a weight is no product of rows and columns",
    "one weight a batch": "its weight has 3 dimensions",
    "alpha": "Gemm with transA or alpha",
    "powers of two": "one scale for all its outputs",
    "one scale": "one scale for all its outputs",
    "blocks": "its scales belong to blocks",
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_take_a_gain_says_why(why):
    reference, graph = refused_graph(why)
    found = site_of(graph, reference)
    assert isinstance(found, str), found
    assert REFUSED[why] in found


def test_without_a_bias_behind_it_a_product_takes_the_gain_alone():
    weight = normal((INPUTS, OUTPUTS))
    graph = graph_of(
        f"float[3,{INPUTS}] x",
        f"float[3,{OUTPUTS}] y",
        "[op] h = MatMul (x, w) y = Gelu (h)",
        w=weight,
    )
    site = site_of(graph, graph.copy())
    assert isinstance(site, InputSite)
    assert "there is no bias behind it" in site.no_offset


@pytest.mark.parametrize("integer", [True, False])
def test_each_reader_of_a_tensor_decides_for_itself_and_shared_weights_are_cloned(integer):
    """`other` reads the same input and the same weight; a Relu reads the input too."""
    weight = normal((32, 64), seed=7)  # smaller constants are unshared when a graph is loaded
    body = """
    [op] left = Gemm (x, w, b)
    [other] right = Gemm (x, w, b)
    back = Relu (x)
    """
    place = "float[5,32] x", "float[5,64] left, float[5,64] right, float[5,32] back"
    bias = {"b": np.zeros(64, np.float32)}
    reference = graph_of(*place, body, w=weight, **bias)
    graph = reference.copy()
    if integer:
        dq = f"[dq] w = DequantizeLinear <axis = 1> (w_int, w_scale, w_zero) {body}"
        graph = graph_of(*place, dq, **rounded("w", weight, 1), **bias)
    feeds = {"x": normal((5, 32))}
    before = run(graph, feeds)
    affine = exact_affine(32)
    (want, *_) = run(explicit(graph, affine, -1), feeds)
    site = site_of(graph, reference)
    assert isinstance(site, InputSite)
    fold_into_input(graph, site, affine)
    graph.sort()
    after = run(graph, feeds)
    for left, right in zip(before[1:], after[1:], strict=True):
        np.testing.assert_array_equal(left, right)
    noise = np.linalg.norm(after[0] - want) / np.linalg.norm(want)
    assert noise < (0.01 if integer else 1e-6)  # rounding to 8 bits, or to float32
    assert sum(node.op == "DequantizeLinear" for node in graph.nodes) == (2 if integer else 0)
