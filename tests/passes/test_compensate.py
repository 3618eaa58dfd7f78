"""Compensation: folds are exact and free, errors fall, and nothing ever gets worse."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qpass.graph import Constant, Graph, array_of
from qpass.passes import compensate as module
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.compensate import compensate
from qpass.passes.fold_affine import find_site, fold
from qpass.passes.lower import lower_biases
from qpass.passes.model_gate import judge
from qpass.passes.output_range import output_range
from qpass.stream import Step
from qpass.verify.metrics import sqnr_db

WIDTH = 8


def run(model: onnx.ModelProto | Graph, feeds) -> list[np.ndarray]:
    """Run node by node, as the graph says."""
    model = model.to_model() if isinstance(model, Graph) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def quantized_weight(name: str, weight: np.ndarray, axis: int, *, steps: int = 7, per_channel=True):
    """Constants of a DQ weight, rounded towards zero: biased on purpose, as 4-bit rounding is."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    top = np.abs(weight).max(axis=others if per_channel else None, keepdims=True) / steps
    stored = np.trunc(weight / top).astype(np.int8)
    scale = top.ravel() if per_channel else top.reshape(())
    return {f"{name}_int": stored, f"{name}_scale": scale.astype(np.float32)}


def header(inputs: str, outputs: str, body: str) -> str:
    return f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({outputs}) {{ {body} }}'


def mlp(*, quantized: bool, depth: int = 3) -> Graph:
    """Depth times MatMul, Add, Relu; positive inputs make truncation of weights a bias."""
    random = np.random.default_rng(0)
    lines, constants, x = [], {}, "x"
    for i in range(depth):
        weight = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 2
        constants[f"b{i}"] = random.uniform(0, 1, WIDTH).astype(np.float32)
        if quantized:
            constants |= quantized_weight(f"w{i}", weight, 1)
            lines.append(f"w{i} = DequantizeLinear <axis = 1> (w{i}_int, w{i}_scale)")
        else:
            constants[f"w{i}"] = weight
        lines += [
            f"[fc{i}] h{i} = MatMul ({x}, w{i})",
            f"a{i} = Add (h{i}, b{i})",
            f"r{i} = Relu (a{i})",
        ]
        x = f"r{i}"
    text = header(f"float[N, {WIDTH}] x", f"float[N, {WIDTH}] r{depth - 1}", "\n".join(lines))
    graph = Graph.from_text(text, **constants)
    graph.infer_shapes()
    return graph


def batches_of(count: int, rows: int = 8, *, seed: int = 1, mean: float = 1.0):
    random = np.random.default_rng(seed)
    return [
        {"x": (random.standard_normal((rows, WIDTH)) + mean).astype(np.float32)}
        for _ in range(count)
    ]


def test_it_brings_a_model_closer_on_unseen_samples_without_touching_its_structure():
    reference, quantized = mlp(quantized=False), mlp(quantized=True)
    structure, integers = quantized.to_text(), array_of(quantized.tensors()["w0_int"]).copy()
    unseen = batches_of(4, seed=99)
    want = np.concatenate([run(reference, feeds)[0] for feeds in unseen])
    before = sqnr_db(want, np.concatenate([run(quantized, feeds)[0] for feeds in unseen]))
    result = compensate(reference, quantized, batches_of(8))
    after = sqnr_db(want, np.concatenate([run(quantized, feeds)[0] for feeds in unseen]))
    assert result.method == "cwac"
    assert after > before + 6.0
    assert result.verdict.after_db > result.verdict.before_db
    assert [layer.name for layer in result.layers] == ["fc0", "fc1", "fc2"]
    for layer in result.layers:
        assert layer.sqnr_db_after > layer.sqnr_db_before
        assert layer.gain_and_offset + layer.offset_only + layer.unchanged == WIDTH
    assert quantized.to_text() == structure
    np.testing.assert_array_equal(array_of(quantized.tensors()["w0_int"]), integers)
    assert result.report.changed == 3


# What follows each linear op, and whether its bias lies inside.
SETTLED = {
    "bias behind": "h = MatMul (x, w) y = Add (h, b)",
    "bias inside": "h = Gemm (x, w, b) y = Relu (h)",
    "no bias": "h = Gemm (x, w) y = Relu (h)",
    "nothing takes an offset": "h = MatMul (x, w) y = Relu (h)",
    "read twice": "h = Gemm (x, w, b) r = Relu (h) y = Add (h, r)",
    "one scale": "h = Gemm (x, t, b) y = Relu (h)",
}


@pytest.mark.parametrize("body", SETTLED)
def test_what_a_fold_does_is_what_another_run_gives(body, monkeypatch):
    """The walk computes the corrected outputs; running the ops again ends at the same constants."""
    weight = np.random.default_rng(3).standard_normal((WIDTH, WIDTH)).astype(np.float32) / 2
    first = SETTLED[body].replace("h = ", "[fc0] h = ").replace(" t,", " w,")
    text = f"{first} [fc1] g = MatMul (y, v) z = Add (g, c)"
    biases = {"b": np.full(WIDTH, 0.5, np.float32), "c": np.zeros(WIDTH, np.float32)}
    shape = f"float[N, {WIDTH}] x", f"float[N, {WIDTH}] z"
    reference = Graph.from_text(header(*shape, text), w=weight, v=weight.T.copy(), **biases)
    reference.infer_shapes()
    axis = "" if body == "one scale" else "<axis = 1>"
    stored = quantized_weight("w", weight, 1, per_channel=body != "one scale")
    stored |= quantized_weight("v", weight.T.copy(), 1)
    dequantized = f"w = DequantizeLinear {axis} (w_int, w_scale) v = DequantizeLinear <axis = 1> "
    graphs, settled = [], []
    real = Step.settle
    for again in (False, True):
        quantized = Graph.from_text(
            header(*shape, f"{dequantized} (v_int, v_scale) {text}"), **stored, **biases
        )
        monkeypatch.setattr(
            Step,
            "settle",
            lambda *args, again=again, **given: (
                settled.append(again) or again or real(*args, **given)
            ),
        )
        assert compensate(reference, quantized, batches_of(8)).method == "cwac"
        graphs.append(quantized)
    assert settled == [False, False, True, True]
    one, other = (
        {name: array_of(t) for name, t in graph.tensors().items() if isinstance(t, Constant)}
        for graph in graphs
    )
    assert one.keys() == other.keys()
    for name, values in one.items():
        # Sums of float32 that differ in their last bits; gains and offsets are smooth in them.
        np.testing.assert_allclose(values, other[name], rtol=1e-4, atol=1e-5)


def test_bias_alone_leaves_the_scales():
    reference, quantized = mlp(quantized=False), mlp(quantized=True)
    scale = array_of(quantized.tensors()["w1_scale"]).copy()
    result = compensate(reference, quantized, batches_of(8), method="bias")
    assert result.method == "bias"
    np.testing.assert_array_equal(array_of(quantized.tensors()["w1_scale"]), scale)
    assert all(layer.gain_and_offset == 0 for layer in result.layers)


def test_the_local_target_corrects_each_op_for_itself():
    reference, quantized = mlp(quantized=False), mlp(quantized=True)
    assert compensate(reference, quantized, batches_of(8), target="local").method == "cwac"


@pytest.mark.parametrize("same", [True, False])
def test_a_change_that_does_not_surely_help_is_not_made(same, monkeypatch):
    """The trap: fits look good on their samples, the outputs of unseen ones say otherwise."""
    reference = mlp(quantized=False)
    quantized = mlp(quantized=not same)
    if not same:
        fitted = module.solve_gated

        def harmful(groups, **options):
            solved = fitted(groups, **options)
            affine = ChannelAffine(gain=solved.affine.gain, offset=solved.affine.offset + 5.0)
            return type(solved)(
                affine=affine, gain_and_offset=0, offset_only=WIDTH, unchanged=0, unusable=0
            )

        monkeypatch.setattr(module, "solve_gated", harmful)
    fingerprint = quantized.fingerprint()
    result = compensate(reference, quantized, batches_of(8))
    assert (result.method, result.report.changed) == ("none", 0)
    assert quantized.fingerprint() == fingerprint
    assert [r.rule for r in result.report.refusals] == ["compensate cwac", "compensate bias"]
    assert "no sure improvement" in result.report.refusals[0].reason


def test_it_has_to_beat_the_baseline():
    """The float model cannot be beaten; the graph itself can. Its offsets are not fitted twice."""
    reference, quantized = mlp(quantized=False), mlp(quantized=True)
    before = quantized.fingerprint()
    result = compensate(reference, quantized, batches_of(8), baseline=reference)
    assert result.method == "none"
    assert [r.rule for r in result.report.refusals] == ["compensate cwac"]
    assert quantized.fingerprint() == before
    assert compensate(reference, quantized, batches_of(8)).method == "cwac"


@pytest.mark.parametrize("apart", [False, True])
def test_the_verdict_is_that_of_the_judges(apart: bool):
    reference, quantized, plain = mlp(quantized=False), mlp(quantized=True), mlp(quantized=True)
    batches, judges = batches_of(8), batches_of(3, seed=7)
    verdict = compensate(reference, quantized, batches, judges=judges if apart else ()).verdict
    judged = judges if apart else batches[6:]
    want, before, after = (
        [dict(zip("y", run(graph, feeds), strict=True)) for feeds in judged]
        for graph in (reference, plain, quantized)
    )
    expected = judge(want, before, after)
    assert verdict.before_db == pytest.approx(expected.before_db, abs=1e-3)
    assert verdict.after_db == pytest.approx(expected.after_db, abs=1e-3)


def test_one_batch_cannot_judge():
    result = compensate(mlp(quantized=False), mlp(quantized=True), batches_of(1))
    assert result.method == "none"
    assert "only one batch" in result.report.refusals[0].reason


# ------------------------------------------------------------------ residual branches

RESIDUAL = """
[skip] low = Max (x, floor)
[branch] f = MatMul (x, w)
[bias] g = Add (f, b)
[join] sum = Add (low, g)
"""


def residual(*, quantized: bool) -> Graph:
    """The skip of the quantized graph is off where Max cuts it; only the branch takes numbers."""
    weight = np.random.default_rng(5).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    floor = np.linspace(0.5, 1.5, WIDTH) if quantized else np.full(WIDTH, -9.0)
    constants = {"floor": floor.astype(np.float32), "b": np.zeros(WIDTH, np.float32)}
    body = RESIDUAL.strip()
    if quantized:
        constants |= quantized_weight("w", weight, 1, steps=127)
        body = "w = DequantizeLinear <axis = 1> (w_int, w_scale)\n" + body
    else:
        constants["w"] = weight
    text = header(f"float[N, {WIDTH}] x", f"float[N, {WIDTH}] sum", body)
    graph = Graph.from_text(text, **constants)
    graph.infer_shapes()
    return graph


def test_a_residual_branch_aims_at_the_sum(monkeypatch):
    unseen = batches_of(4, seed=98)
    scores = []
    for aim_at_sum in (True, False):
        if not aim_at_sum:
            monkeypatch.setattr(module, "skip_of", lambda *_: None)
        reference, quantized = residual(quantized=False), residual(quantized=True)
        result = compensate(reference, quantized, batches_of(16))
        assert [layer.residual for layer in result.layers] in ([aim_at_sum], [])
        want, got = (
            np.concatenate([run(graph, feeds)[0] for feeds in unseen])
            for graph in (reference, quantized)
        )
        scores.append(sqnr_db(want, got))
    assert scores[0] > scores[1] + 1.0


# ------------------------------------------------------------------ folds

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


# ------------------------------------------------------------------ output ranges

CLIPPED = """
w = DequantizeLinear <axis = 1> (w_int, w_scale)
[fc0] h0 = Gemm (x, w, b)
r = Relu (h0)
q = QuantizeLinear (r, s, z)
y = DequantizeLinear (q, s, z)
"""


def test_the_output_range_follows_and_keeps_its_clipping():
    random = np.random.default_rng(9)
    weight = random.uniform(0.2, 1, (WIDTH, WIDTH)).astype(np.float32)
    place = f"float[N, {WIDTH}] x", f"float[N, {WIDTH}] y"
    bias = {"b": np.zeros(WIDTH, np.float32)}
    reference = Graph.from_text(
        header(*place, "[fc0] h0 = Gemm (x, w, b) y = Relu (h0)"), w=weight, **bias
    )
    batches = batches_of(8)
    top = max(float(run(reference, feeds)[0].max()) for feeds in batches)
    quantized = Graph.from_text(
        header(*place, CLIPPED), s=np.float32(top / 255), z=np.uint8(0),
        **quantized_weight("w", weight, 1), **bias,
    )  # fmt: skip
    found = output_range(quantized, "h0")
    assert (found.quantizer.op, found.floor, found.ceiling) == ("QuantizeLinear", 0.0, np.inf)
    result = compensate(reference, quantized, batches)
    assert result.method == "cwac"
    scales = {float(array_of(node.inputs[1])) for node in (found.quantizer, *found.dequantizers)}
    assert len(scales) == 1  # Q and DQ agree
    (scale,) = scales
    corrected = max(float(run(quantized, feeds)[0].max()) for feeds in batches)
    # The range ends within the tolerance (2 %) and one step of the largest corrected value.
    assert abs(255 * scale / corrected - 1.0) < 0.03
