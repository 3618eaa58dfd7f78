"""Rows of a softmax by their largest probability: the same function, and fewer errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

import qpass
from qpass.calibrate import open_samples
from qpass.calibrate.inputs import input_specs
from qpass.graph import Graph
from qpass.migration_trial import Job
from qpass.passes.equalize.measure import Specs
from qpass.passes.equalize.row_maxima import (
    RowMaxima,
    divide_rows,
    find_row_maxima,
    judge_row_maxima,
)
from qpass.passes.equalize.rows import ProductRows
from qpass.planner import plan as make_plan
from qpass.qparams import choose_qparams, fake_quantize
from qpass.targets import load_target
from tests.small_models import policy_of

TEXT = """
<ir_version: 10, opset_import: ["": {opset}]>
attention (float[B,2,N,M] scores, float[B,2,M,8] v) => (float[B,2,N,8] y{more})
{{
    p = Softmax <axis = {axis}> (scores)
    [context] y = MatMul ({operands})
    {rest}
}}
"""


def attention(
    *, opset: int = 21, axis: int = -1, operands: str = "p, v", more: str = "", rest: str = ""
) -> Graph:
    graph = Graph.from_text(
        TEXT.format(opset=opset, axis=axis, operands=operands, more=more, rest=rest)
    )
    graph.infer_shapes()
    return graph


def places(graph: Graph) -> list[RowMaxima]:
    plan = make_plan(graph, load_target("ort-x86"), policy_of("w4a4", low_bit_edges=True))
    specs = Specs.of(plan, graph.nodes)
    return list(find_row_maxima(graph, list(plan.integer_nodes()), specs))


def feeds(seed: int, tokens: int = 24, keys: int = 64) -> dict[str, np.ndarray]:
    """Every eighth query looks at one key, the others at all."""
    random = np.random.default_rng(seed)
    scores = random.standard_normal((1, 2, tokens, keys))
    scores[:, :, ::8] += 12.0 * np.eye(tokens, keys)[::8]
    values = random.standard_normal((1, 2, keys, 8)) + 0.5
    return {"scores": scores.astype(np.float32), "v": values.astype(np.float32)}


@pytest.mark.parametrize("opset", [17, 21], ids=["axes as attribute", "axes as input"])
def test_the_function_stays_in_the_reference_and_in_onnxruntime(opset: int):
    graph = attention(opset=opset)
    before = graph.to_model()
    (place,) = places(graph)
    divide_rows(graph, place)
    graph.infer_shapes()
    after = graph.to_model()
    onnx.checker.check_model(after, full_check=True)
    assert [node.op for node in graph.nodes] == ["Softmax", "ReduceMax", "Div", "MatMul", "Mul"]
    for given in (feeds(1), feeds(2, tokens=3, keys=5)):
        (wanted,) = ReferenceEvaluator(before).run(None, given)
        (reference,) = ReferenceEvaluator(after).run(None, given)
        session = ort.InferenceSession(
            after.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (engine,) = session.run(None, given)
        # A row is a mean of values with weights that sum to one; a division, a product more and
        # sums of up to 64 terms in float32 move it by at most 70 roundings of the largest value.
        bound = 70 * 2.0**-24 * float(np.abs(given["v"]).max())
        np.testing.assert_allclose(reference, wanted, rtol=0, atol=bound)
        np.testing.assert_allclose(engine, wanted, rtol=0, atol=bound)


def test_what_is_rounded_reaches_one_in_every_row():
    graph = attention()
    (place,) = places(graph)
    divide_rows(graph, place)
    model = graph.to_model(taps=[place.divided])
    (divided,) = ReferenceEvaluator(model).run([place.divided], feeds(3))
    np.testing.assert_array_equal(divided.max(axis=-1), 1.0)
    assert divided.min() >= 0.0


@pytest.mark.parametrize(
    "graph",
    [
        attention(axis=2),
        attention(operands="p, w", rest="w = Identity (v)"),
        attention(more=", float[B,2,N,M] z", rest="z = Neg (p)"),
        attention(more=", float[B,2,N,M] p"),
    ],
    ids=["over another axis", "fits", "read by others", "an output"],
)
def test_only_a_softmax_over_rows_that_nothing_else_reads(graph: Graph, request):
    fits = request.node.callspec.id == "fits"
    graph.sort()
    assert len(places(graph)) == fits


@pytest.mark.parametrize(
    ("target", "precision", "divides"),
    [
        ("ort-x86", "w4a4", True),
        ("openvino", "w4a6", True),
        ("ort-x86", "w4a8", False),
        ("ort-x86", "w8a8", False),
        ("qnn-htp", "w4a4", False),
    ],
)
def test_few_levels_and_a_target_that_leaves_maxima_in_float(
    target: str, precision: str, divides: bool
):
    """A target with integers everywhere would round the maxima, too."""
    job = Job(
        target=load_target(target),
        policy=policy_of(precision),
        taps=lambda *_: [],
        samples=open_samples([feeds(0)], input_specs(attention().to_model())),
        held=(),
    )
    assert job.divides_rows is divides


def kept(samples: int, *, sharp: bool) -> ProductRows:
    rows = ProductRows()
    for number in range(samples):
        given = feeds(number)
        scores = given["scores"] if sharp else np.minimum(given["scores"], 3.0)
        shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
        rows.samples.append(number)
        rows.left.append(shifted / shifted.sum(axis=-1, keepdims=True))
        rows.right.append(given["v"])
    return rows


def spec_of_scores():
    graph = attention()
    plan = make_plan(graph, load_target("ort-x86"), policy_of("w4a4", low_bit_edges=True))
    return Specs.of(plan, graph.nodes).activations["context", 0]


def test_sharp_and_flat_rows_gain_and_like_rows_do_not():
    """What is said to be gained is what rounding really leaves."""
    spec = spec_of_scores()
    mixed = judge_row_maxima(kept(8, sharp=True), spec)
    alike = judge_row_maxima(kept(8, sharp=False), spec)
    assert mixed.sure
    assert mixed.gain_db > 6.0
    assert alike.gain_db < 6.0  # the bit that three ops have to be worth
    rows = kept(8, sharp=True)
    numbers = choose_qparams(spec, 0.0, 1.0)
    for left, right in zip(rows.left, rows.right, strict=True):
        top = left.max(axis=-1, keepdims=True)
        exact = left @ right
        found = np.square(fake_quantize(left / top, numbers) * top @ right - exact).sum()
        plain = min(
            np.square(fake_quantize(left, choose_qparams(spec, 0.0, end)) @ right - exact).sum()
            for end in np.linspace(0.02, 1.0, 50)
        )
        assert found < plain / 4.0


def test_one_sample_to_judge_by_is_not_enough():
    assert not judge_row_maxima(kept(2, sharp=True), spec_of_scores()).sure


LAYER = """
<ir_version: 10, opset_import: ["": 21]>
layer (float[B,64,16] x) => (float[B,64,16] y)
{
    [query] q = MatMul (x, q_w)
    [key] k = MatMul (x, k_w)
    turned = Transpose <perm = [0, 2, 1]> (k)
    [scores] s = MatMul (q, turned)
    sharpened = Mul (s, sharpness)
    p = Softmax <axis = -1> (sharpened)
    [value] v = MatMul (x, v_w)
    [context] c = MatMul (p, v)
    [head] y = MatMul (c, y_w)
}
"""


def layer() -> tuple[Graph, list[dict[str, np.ndarray]]]:
    """Every eighth token looks at one other token, and the rest at all."""
    random = np.random.default_rng(11)
    weights = {name: random.standard_normal((16, 16)) / 4.0 for name in ("q_w", "k_w", "v_w")}
    sharpness = np.full((64, 1), 0.02)
    sharpness[::8] = 4.0
    constants = {**weights, "y_w": np.eye(16), "sharpness": sharpness}
    graph = Graph.from_text(LAYER, **{k: v.astype(np.float32) for k, v in constants.items()})
    graph.infer_shapes()
    tokens = random.standard_normal((40, 1, 64, 16)) + 1.0
    return graph, [{"x": one.astype(np.float32)} for one in tokens]


@pytest.mark.parametrize(("precision", "bought"), [("w4a4", True), ("w4a8", False)])
def test_a_whole_run_buys_rows_with_few_levels_alone(tmp_path: Path, precision: str, bought: bool):
    graph, samples = layer()
    path = tmp_path / "m.onnx"
    path.write_bytes(graph.to_model().SerializeToString())
    result = qpass.optimize(
        path,
        data=samples,
        samples=24,
        output=tmp_path / "o.onnx",
        precision=precision,
        low_bit_edges=True,
        # Nothing else has few levels, so that the model as a whole feels the product.
        bits=tuple(f"{name}=w8a8" for name in ("query", "key", "value", "scores", "head")),
    )
    said = [note for note in result.notes if "added at run time: rows of p " in note]
    assert bool(said) is bought
    model = onnx.load(result.output)
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("ReduceMax") == bought
    if bought:
        made = {name: node for node in model.graph.node for name in node.output}
        (divide,) = (node for node in model.graph.node if node.op_type == "Div")
        (quantizer,) = (
            node for node in model.graph.node if node.input and node.input[0] == divide.output[0]
        )
        assert quantizer.op_type == "QuantizeLinear"
        assert divide.output[0] in made
        scales = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        assert scales[quantizer.input[1]] == np.float32(1 / 15)
