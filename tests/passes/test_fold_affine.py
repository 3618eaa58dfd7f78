"""Each row of the folding table: what was folded equals Mul and Add behind the op, bit for bit.

All numbers are multiples of small powers of two with few digits, so that float32 arithmetic is
exact in any order of summation and equality means equality.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from qpass.errors import InternalError
from qpass.graph import Graph, array_of
from qpass.passes.channel_affine import ChannelAffine, PairMoments, solve_channel_affine
from qpass.passes.check_biases import check_bias_scales
from qpass.passes.dynamic import make_dynamic
from qpass.passes.fold_affine import Site, find_site, fold
from qpass.passes.lower import lower_biases, raise_matmul_biases
from qpass.passes.weight_only import half_scales
from tests.folds import (
    affine_of,
    exact_affine,
    explicit,
    graph_of,
    normal,
    powers_of_two,
    rounded,
    run,
)

# name: input, weight, axis of the scales, op (weight w, bias b), shape of the bias, tap, axis of y
ROWS = {
    "conv": ([2, 4, 5, 5], (6, 4, 3, 3), 0, "y = Conv <pads = [1,1,1,1]> (x, w, b)", (6,), "y", -3),
    "grouped": ([2, 4, 5, 5], (6, 2, 3, 3), 0, "y = Conv <group = 2> (x, w, b)", (6,), "y", -3),
    "depthwise": ([2, 6, 5, 5], (6, 1, 3, 3), 0, "y = Conv <group = 6> (x, w, b)", (6,), "y", -3),
    "one dimension": ([2, 4, 9], (6, 4, 3), 0, "y = Conv (x, w, b)", (6,), "y", -2),
    "transposed": ([2, 4, 5, 5], (4, 6, 3, 3), 1, "y = ConvTranspose (x, w, b)", (6,), "y", -3),
    "gemm transB": ([5, 4], (6, 4), 0, "y = Gemm <transB = 1> (x, w, b)", (6,), "y", -1),
    "gemm": ([5, 4], (4, 6), 1, "y = Gemm (x, w, b)", (1, 6), "y", -1),
    "gemm alpha": ([5, 4], (4, 6), 1, "y = Gemm <alpha = 0.5> (x, w, b)", (6,), "y", -1),
    "matmul": ([2, 5, 4], (4, 6), 1, "h = MatMul (x, w) y = Add (h, b)", (6,), "h", -1),
    "bias first": ([2, 5, 4], (4, 6), 1, "h = MatMul (x, w) y = Add (b, h)", (1, 1, 6), "h", -1),
    "conv, relu": ([2, 4, 5, 5], (6, 4, 3, 3), 0, "h = Conv (x, w, b) y = Relu (h)", (6,), "h", -3),
    "conv without bias": ([2, 4, 5, 5], (6, 4, 3, 3), 0, "y = Conv (x, w)", None, "y", -3),
}  # fmt: skip
CHANNELS = 6


def case(name: str, *, integer: bool, block: int | None = None) -> Graph:
    """Build one row, with an integer weight or with the float weight that it stands for."""
    source, shape, axis, body, bias, _, _ = ROWS[name]
    random = np.random.default_rng(2)
    integers = random.integers(-127, 128, shape).astype(np.int8)
    scale = (random.choice([1, 3, 5, 7], shape[axis]) / 64).astype(np.float32)
    line = [-1 if i == axis else 1 for i in range(len(shape))]
    constants = {}
    if bias is not None:
        constants["b"] = (random.integers(-64, 65, bias) / 16).astype(np.float32)
    if integer:
        zero = np.zeros(scale.shape, np.int8)
        constants |= {"w_int": integers, "w_scale": scale, "w_zero": zero}
        body = f"w = DequantizeLinear <axis = {axis}> (w_int, w_scale, w_zero) {body}"
    else:
        constants["w"] = integers * scale.reshape(line)
    place = f"float{source} x".replace(" ", "", len(source) - 1)
    graph = graph_of(
        place, "float y".replace("float", f"float{_output_shape(name)}"), body, **constants
    )
    linear = next(n for n in graph.nodes if n.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"))
    linear.name = "op"
    return graph


def _output_shape(name: str) -> str:
    rank = len(ROWS[name][0])
    return "[" + ",".join(f"D{i}" for i in range(rank)) + "]"


def whole_numbers(name: str) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).integers(-4, 5, ROWS[name][0]).astype(np.float32)}


def site_of(graph: Graph, reference: Graph, name: str = "op") -> Site:
    site = find_site(graph, {node.name: node for node in graph.nodes}, reference.node(name))
    assert isinstance(site, Site), site
    return site


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_folded_equals_explicit_bit_for_bit(name, integer):
    reference, graph = case(name, integer=False), case(name, integer=integer)
    affine, feeds = exact_affine(CHANNELS), whole_numbers(name)
    _, _, _, _, _, tap, axis = ROWS[name]
    site = site_of(graph, reference)
    assert (site.gain, site.offset, site.rounding, site.reasons) == ("channel", True, None, ())
    (plain,) = run(graph, feeds)
    (want,) = run(explicit(graph, tap, affine, axis), feeds)
    structure, integers = graph.to_text(), graph.tensors().get("w_int")
    before = None if integers is None else array_of(integers).copy()
    fold(graph, site, affine)
    (got,) = run(graph, feeds)
    np.testing.assert_array_equal(got, want)
    assert not np.array_equal(got, plain)
    if before is not None:
        np.testing.assert_array_equal(array_of(graph.tensors()["w_int"]), before)
    if ROWS[name][4] is not None:
        assert graph.to_text() == structure  # nothing was added


@pytest.mark.parametrize("name", ["conv", "depthwise", "gemm transB", "matmul"])
def test_fused_integer_kernels_stay_within_one_step(name):
    """With int32 biases and Q around the op, optimizations on: at most one step, on few values."""
    outputs = []
    for folded in (True, False):
        reference, graph = case(name, integer=False), case(name, integer=True)
        affine = affine_of(CHANNELS)
        between_q_and_dq(graph, "x", 0.0625, 128)
        _, _, _, _, _, tap, axis = ROWS[name]
        if folded:
            fold(graph, site_of(graph, reference), affine)
        else:
            graph = explicit(graph, tap, affine, axis)
        lower_biases(graph)
        raise_matmul_biases(graph, 3)
        assert check_bias_scales(graph) == (0 if name == "matmul" else 1)
        between_q_and_dq(graph, "y", 1.0, 128)
        outputs.append(run(graph, {"x": normal(tuple(ROWS[name][0]))}, optimize=folded)[0])
    steps = np.abs(outputs[0] - outputs[1])
    assert steps.max() <= 1.0 + 1e-6
    assert (steps > 0.5).mean() < 0.02
    assert np.unique(outputs[0]).size > 10


def between_q_and_dq(graph: Graph, name: str, scale: float, zero: int) -> None:
    tensor = graph.tensors()[name]
    parts = [graph.constant("s", np.float32(scale)), graph.constant("z", np.uint8(zero))]
    stored = graph.variable("stored", np.dtype(np.uint8), tensor.shape)
    if tensor.inputs:  # an output
        inner = graph.variable("floating", np.dtype(np.float32), tensor.shape)
        graph.set_output(tensor.inputs[0], 0, inner)
        graph.add(graph.make("QuantizeLinear", [inner, *parts], [stored], name="q"))
        graph.add(graph.make("DequantizeLinear", [stored, *parts], [tensor], name="dq"))
        return
    readers = graph.consumers(tensor)
    back = graph.variable("back", np.dtype(np.float32), tensor.shape)
    first = graph.nodes[0]
    graph.add(graph.make("QuantizeLinear", [tensor, *parts], [stored], name="q"), before=first)
    graph.add(graph.make("DequantizeLinear", [stored, *parts], [back], name="dq"), before=first)
    for reader, index in readers:
        graph.set_input(reader, index, back)


@pytest.mark.parametrize("rows", [16, 20])  # the last block may be shorter
def test_blocked_int4_scales_take_the_gain(rows):
    random = np.random.default_rng(5)
    integers = random.integers(-7, 8, (rows, CHANNELS)).astype(ml_dtypes.int4)
    scale = (random.choice([1, 3, 5, 7], (-(-rows // 16), CHANNELS)) / 64).astype(np.float32)
    weight = integers.astype(np.float32) * np.repeat(scale, 16, axis=0)[:rows]
    constants = {"b": np.arange(CHANNELS, dtype=np.float32)}
    place = f"float[3,{rows}] x", f"float[3,{CHANNELS}] y"
    body = "[op] h = MatMul (x, w) y = Add (h, b)"
    reference = graph_of(*place, body, w=weight, **constants)
    graph = graph_of(
        *place,
        f"w = DequantizeLinear <axis = 0, block_size = 16> (q, s) {body}",
        q=integers, s=scale, **constants,
    )  # fmt: skip
    feeds = {"x": random.integers(-4, 5, (3, rows)).astype(np.float32)}
    affine = exact_affine(CHANNELS)
    (want,) = run(explicit(graph, "h", affine, -1), feeds)
    site = site_of(graph, reference)
    assert (site.gain, site.gain_axis) == ("channel", 1)
    fold(graph, site, affine)
    np.testing.assert_array_equal(run(graph, feeds)[0], want)


@pytest.mark.parametrize("half", [True, False])
def test_scales_of_blocks_stay_what_float16_holds(half):
    random = np.random.default_rng(5)
    integers = random.integers(-7, 8, (16, CHANNELS)).astype(ml_dtypes.int4)
    scale = random.uniform(0.01, 0.02, (1, CHANNELS)).astype(np.float16 if half else np.float32)
    scale = scale.astype(np.float32)
    place = "float[3,16] x", f"float[3,{CHANNELS}] y"
    reference = graph_of(*place, "[op] y = MatMul (x, w)", w=integers.astype(np.float32) * scale)
    graph = graph_of(
        *place,
        "w = DequantizeLinear <axis = 0, block_size = 16> (q, s) [op] y = MatMul (x, w)",
        q=integers, s=scale,
    )  # fmt: skip
    gain = random.uniform(0.9, 1.1, CHANNELS)
    fold(graph, site_of(graph, reference), ChannelAffine(gain=gain, offset=np.zeros(CHANNELS)))
    found = array_of(graph.node("op").inputs[1].inputs[0].inputs[1])
    wanted = (scale.astype(np.float64) * gain).astype(np.float16 if half else np.float32)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))
    assert half_scales(graph).changed == int(half)


def test_dynamic_activations_take_the_gain_in_the_scale_behind_the_product():
    """MatMulInteger: the scale enters the Mul behind it, the bias is the Add behind that."""
    reference, graph = case("matmul", integer=False), case("matmul", integer=True)
    affine, feeds = exact_affine(CHANNELS), {"x": normal((2, 5, 4))}
    folded, wanted = graph, explicit(graph, "h", affine, -1)
    fold(folded, site_of(folded, reference), affine)
    for one in (folded, wanted):
        assert make_dynamic(one, {node.name for node in one.nodes}).changed == 1
    (got,), (want,) = run(folded, feeds), run(wanted, feeds)
    # x_scale is no dyadic number: each product rounds once, the two orders differ in the last bit.
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-5)


# ------------------------------------------------------------------ shared weights

SHARED = """
[dq] w = DequantizeLinear <axis = 0> (w_int, w_scale, w_zero)
[op] left = Gemm <transB = 1> (x, w, b)
[other] right = Gemm <transB = 1> (v, w)
y = Add (left, right)
"""


@pytest.mark.parametrize("form", ["one dequantizer", "two dequantizers", "float"])
def test_a_shared_weight_is_cloned_for_the_corrected_op(form):
    rows, columns = 64, 32  # smaller constants are unshared when a graph is loaded
    weight = normal((rows, columns), seed=7)
    constants = {"b": np.ones(rows, np.float32)}
    constants |= {"w": weight} if form == "float" else rounded("w", weight, 0)
    body = SHARED
    if form == "two dequantizers":
        again = "[dq2] w2 = DequantizeLinear <axis = 0> (w_int, w_scale, w_zero)\n"
        body = again + SHARED.replace("(v, w)", "(v, w2)")
    elif form == "float":
        body = "\n".join(line for line in SHARED.splitlines() if "[dq]" not in line)
    place = f"float[5,{columns}] x, float[5,{columns}] v", f"float[5,{rows}] y"
    graph = graph_of(*place, body, **constants)
    plain = "\n".join(line for line in SHARED.splitlines() if "[dq]" not in line)
    reference = graph_of(*place, plain, w=weight, b=constants["b"])
    feeds = {"x": normal((5, columns)), "v": normal((5, columns), seed=8)}
    first, second = affine_of(rows), affine_of(rows, seed=12)
    wanted = explicit(graph, "left", first, -1)
    site = site_of(graph, reference)
    assert (site.gain, site.shared) == ("channel", form != "two dequantizers")
    for affine in (first, second):
        fold(graph, site_of(graph, reference), affine)
        graph.sort()
        (want,) = run(wanted, feeds)
        np.testing.assert_allclose(run(graph, feeds)[0], want, rtol=1e-5, atol=1e-4)
        wanted = explicit(wanted, "shifted", second, -1) if affine is first else wanted
    dequantizers = [node for node in graph.nodes if node.op == "DequantizeLinear"]
    assert len(dequantizers) == (0 if form == "float" else 2)  # cloned once, not twice
    assert len({id(node.inputs[0]) for node in dequantizers}) <= 1  # and the integers never


@pytest.mark.parametrize("gain", [0.0, -1.0, np.nan])
def test_a_gain_that_is_not_positive_never_gets_into_a_scale(gain):
    reference, graph = case("conv", integer=False), case("conv", integer=True)
    gains = np.where(np.arange(CHANNELS) == 2, gain, 1.0)
    bad = ChannelAffine(gain=gains, offset=np.zeros(CHANNELS))
    with pytest.raises(InternalError, match="op: a gain of"):
        fold(graph, site_of(graph, reference), bad)
    # The fit clips what it finds: the opposite of the output, and nothing of it, give 0.5.
    y = normal((400, CHANNELS))
    for target in (-y, 0.0 * y):
        solved = solve_channel_affine(PairMoments.of(y, target, axis=-1))
        assert (solved.gain == 0.5).all()


# ------------------------------------------------------------------ what cannot be taken


def set_beta(graph: Graph) -> None:
    graph.node("op").attrs["beta"] = 2.0


def set_last_op(op: str) -> Callable[[Graph], None]:
    def edit(graph: Graph) -> None:
        graph.producer(graph.outputs[0]).op = op

    return edit


REFUSED = {
    "scaled bias": ("gemm", set_beta, "Gemm with beta"),
    "Mul behind it": ("matmul", set_last_op("Mul"), "no bias behind it"),
    "Max behind it": ("matmul", set_last_op("Max"), "no bias behind it"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_an_offset_that_nothing_can_take_is_refused(why):
    name, edit, reason = REFUSED[why]
    reference, graph = case(name, integer=False), case(name, integer=True)
    edit(graph)
    site = site_of(graph, reference)
    assert not site.offset
    assert reason in " ".join(site.reasons)
    before = run(graph, whole_numbers(name))[0]
    fold(graph, site, ChannelAffine(gain=np.ones(CHANNELS), offset=np.ones(CHANNELS)))
    np.testing.assert_array_equal(run(graph, whole_numbers(name))[0], before)


@pytest.mark.parametrize("behind", ["Gelu", "Softmax", "Sigmoid", "Tanh", "LayerNormalization"])
def test_a_bias_behind_another_op_is_never_taken_for_that_of_the_product(behind):
    other = f"{behind} (h, g)" if behind == "LayerNormalization" else f"{behind} (h)"
    constants = {"b": np.ones(CHANNELS, np.float32), "g": np.ones(CHANNELS, np.float32)}
    weight = normal((4, CHANNELS))
    place = "float[3,4] x", f"float[3,{CHANNELS}] y"
    body = f"[op] h = MatMul (x, w) a = {other} y = Add (a, b)"
    graph = graph_of(*place, body, w=weight, **constants)
    site = site_of(graph, graph.copy())
    assert (site.tap, site.offset, site.bias_slot) == ("h", False, None)


def test_weights_on_a_coarse_grid_are_rounded_again_or_refused():
    weight = normal((CHANNELS, 4), seed=9)
    place = "float[5,4] x", f"float[5,{CHANNELS}] y"
    body = "[op] y = Gemm <transB = 1> (x, w, b)"
    bias = {"b": np.zeros(CHANNELS, np.float32)}
    reference = graph_of(*place, body, w=weight, **bias)
    dq = f"w = DequantizeLinear (w_int, w_scale, w_zero) {body}"
    affine = affine_of(CHANNELS)
    forms = {
        "tensor": rounded("w", weight, None),
        "unsigned": rounded("w", weight, None, dtype=np.uint8),
        "powers of two": powers_of_two("w", weight),
    }
    for form, constants in forms.items():
        graph = graph_of(*place, dq, **constants, **bias)
        site = site_of(graph, reference)
        assert (site.gain, site.reasons) == ("channel", ()), form
        assert site.rounding is not None
        fold(graph, site, affine)
        node = graph.producer(graph.node("op").inputs[1])
        q, scale, zero = (array_of(t) for t in node.inputs)
        wanted = affine.gain[:, None] * weight.astype(np.float64)
        error = (q.astype(np.int64) - int(zero)) * float(scale) - wanted
        assert np.abs(error).max() <= float(scale) / 2 * (1 + 1e-5)
        assert scale.shape == ()
        if form == "powers of two":
            assert np.frexp(scale)[0] == 0.5
        # Integers that were chosen by another method stay what they are.
        other = dict(constants)
        other["w_int"] = constants["w_int"].copy()
        other["w_int"][0, 0] ^= 1
        site = site_of(graph_of(*place, dq, **other, **bias), reference)
        kind = "none" if form == "powers of two" else "tensor"
        assert (site.gain, site.rounding) == (kind, None)
        assert "not the nearest" in site.reasons[0]


@pytest.mark.parametrize("integer", [True, False])
def test_a_grouped_transposed_convolution_takes_one_gain_per_output_channel(integer):
    """Scales lie along axis 1, which the groups share: the integers have to change."""
    weight = normal((4, 3, 3, 3), seed=10)
    place = "float[2,4,5,5] x", f"float[2,{CHANNELS},7,7] y"
    body = "[op] y = ConvTranspose <group = 2> (x, w, b)"
    bias = {"b": normal((CHANNELS,), seed=11)}
    reference = graph_of(*place, body, w=weight, **bias)
    graph = reference.copy()
    if integer:
        dq = f"w = DequantizeLinear <axis = 1> (w_int, w_scale, w_zero) {body}"
        graph = graph_of(*place, dq, **rounded("w", weight, 1), **bias)
    affine, feeds = affine_of(CHANNELS), {"x": normal((2, 4, 5, 5))}
    (want,) = run(explicit(reference, "y", affine, -3), feeds)
    site = site_of(graph, reference)
    assert (site.gain, site.channels, site.groups) == ("channel", CHANNELS, 2)
    assert (site.rounding is not None) is integer
    fold(graph, site, affine)
    (got,) = run(graph, feeds)
    noise = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert noise < (0.01 if integer else 1e-6)  # rounding to 8 bits, or to float32
