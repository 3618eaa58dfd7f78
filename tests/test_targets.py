"""Every target on small models and on the shipped ones: valid, exact in its idioms, close to float.

The engines that can run here must run what the plan wants in integers; the other targets are held
to the rules that their documentation states.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qpass.errors import RecipeError
from qpass.graph import Constant, Graph, Node, array_of
from qpass.modelfile import load_model
from qpass.passes.normalize import normalize
from qpass.qparams import TensorSpec
from qpass.targets import TARGETS, Target, load_target
from qpass.targets.schema import with_bits
from qpass.targets.specs import S8, S8_WEIGHT
from qpass.verify import available_engines, read_back
from qpass.verify.metrics import ErrorMeter
from qpass.verify.trace import trace
from tests.small_models import Quantized, feeds_of, quantize, residual_cnn, run, transformer

MODELS = Path(__file__).parent.parent / "models"
NAMES = (
    "ort-x86", "ort-x86-avx2", "ort-arm", "openvino", "openvino-avx2", "tensorrt", "qnn-htp",
    "vitis-xint8",
)  # fmt: skip
CASES = ("residual_cnn", "transformer", "digits_cnn", "digits_vit")
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
WORST_DB = 15.0
needs_openvino = pytest.mark.skipif("openvino" not in available_engines(), reason="needs openvino")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A float model, samples to quantize it with, and others to judge it by."""

    graph: Graph
    calibration: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


@cache
def case(name: str) -> Case:
    if name in ("residual_cnn", "transformer"):
        graph = residual_cnn() if name == "residual_cnn" else transformer()
        return Case(graph=graph, calibration=feeds_of(graph), held_out=feeds_of(graph, 2, seed=12))
    graph = load_model(MODELS / f"{name}.onnx", opset=17)
    normalize(graph)
    images = {}
    for part in ("calibration", "test"):
        with np.load(MODELS / f"digits_{part}.npz") as file:
            images[part] = file["image"][:32]
    feeds = [[{"image": images[part]}] for part in ("calibration", "test")]
    return Case(graph=graph, calibration=feeds[0], held_out=feeds[1])


@cache
def quantized(model: str, name: str) -> Quantized:
    found = case(model)
    return quantize(found.graph, TARGETS[name], found.calibration)


def pairs(nodes: list[Node]) -> list[Node]:
    return [n for n in nodes if n.op in ("QuantizeLinear", "DequantizeLinear")]


every_model = pytest.mark.parametrize("model", CASES)
every_target = pytest.mark.parametrize("name", NAMES)


# ------------------------------------------------------------------ tables


def test_the_registry() -> None:
    assert tuple(TARGETS) == NAMES
    assert all(TARGETS[name].name == name for name in NAMES)
    assert load_target("tensorrt") is TARGETS["tensorrt"]
    with pytest.raises(RecipeError, match="no target called 'trt'") as caught:
        load_target("trt")
    assert "tensorrt" in str(caught.value)
    with pytest.raises(RecipeError, match=r"did you mean ort-x86\?"):
        load_target("ORT-X86")


@every_target
def test_every_rule_has_a_source(name: str) -> None:
    target = TARGETS[name]
    assert target.sources
    for rule in target.rules:
        assert "https://" in rule.source, sorted(rule.ops)
    for source in target.sources:
        assert source.startswith("https://")


@every_target
def test_rules_are_complete_and_do_not_hide_each_other(name: str) -> None:
    seen: Counter[str] = Counter()
    for rule in TARGETS[name].rules:
        seen.update(rule.ops)
        if rule.role == "linear":
            assert rule.activation is not None
            assert rule.weight is not None
            assert rule.weight.symmetric
            assert rule.weight.qmin - middle(rule.weight) >= -128
        if rule.role == "passthrough":
            assert rule.tie
            assert rule.weight is None
        if rule.output == "required":
            assert rule.role == "linear"
    assert seen.most_common(1)[0][1] == 1


def middle(spec: TensorSpec) -> int:
    return 0 if spec.storage.signed else (spec.qmax + 1) // 2


def test_arm_has_the_rules_of_x86_in_signed_integers() -> None:
    x86, arm = TARGETS["ort-x86"], TARGETS["ort-arm"]
    assert [rule.ops for rule in arm.rules] == [rule.ops for rule in x86.rules]
    for rule in arm.rules:
        assert {rule.activation, rule.lhs, rule.rhs} <= {S8, None}
        assert rule.weight in (S8_WEIGHT, None)
        assert "measured" not in rule.source
        assert "AVX" not in rule.source


@pytest.mark.parametrize(("bits", "name"), [(4, "int4"), (3, "int4"), (8, "int8"), (12, "int16")])
def test_bits_keep_the_rest_of_a_spec(bits: int, name: str) -> None:
    spec = with_bits(S8_WEIGHT, bits)
    assert (spec.bits, spec.storage.name) == (bits, name)
    assert (spec.narrow_range, spec.symmetric, spec.axis) == (True, True, 0)


# ------------------------------------------------------------------ every target, every model


@every_model
@every_target
def test_the_file_is_valid_and_close_to_float(model: str, name: str) -> None:
    found, made = case(model), quantized(model, name)
    proto, source = made.graph.to_model(), found.graph.to_model()
    onnx.checker.check_model(proto, full_check=True)
    assert [v.name for v in proto.graph.input] == [v.name for v in source.graph.input]
    assert [v.name for v in proto.graph.output] == [v.name for v in source.graph.output]
    meter = ErrorMeter()
    for feeds in found.held_out:
        wanted, got = run(source, feeds), run(proto, feeds)
        for output, values in wanted.items():
            meter.update(values, got[output])
    assert meter.sqnr_db > WORST_DB
    assert meter.sqnr_db < 60  # nearer to float than 8 bits can be: nothing was quantized


@every_model
@every_target
def test_scales_are_positive_and_weights_symmetric(model: str, name: str) -> None:
    made = quantized(model, name)
    for node in pairs(made.graph.nodes):
        scale = array_of(node.inputs[1])
        assert np.all(scale > 0)
        assert np.all(np.isfinite(scale))
    for decision in made.plan.weights():
        if decision.kind == "weight":
            numbers = made.table.qparams[decision.key]
            stored = made.graph.tensors()[f"{decision.key}_quantized"]
            integers = array_of(stored).astype(int) - middle(decision.spec)
            assert integers.min() >= -127
            assert integers.max() <= 127
            assert np.all(numbers.zero_point.astype(int) == middle(decision.spec))


@every_model
@pytest.mark.parametrize("name", [n for n in NAMES if TARGETS[n].bias == "int32"])
def test_every_bias_is_int32_in_the_scale_of_the_product(model: str, name: str) -> None:
    graph, planned = quantized(model, name).graph, quantized(model, name).plan.integer_nodes()
    checked = 0
    for node in graph.nodes:
        if node.op not in ("Conv", "Gemm") or node.name not in planned or len(node.inputs) < 3:
            continue
        x, w, b = (graph.producer(t) for t in node.inputs)
        assert x is not None
        assert w is not None
        assert b is not None
        assert array_of(b.inputs[0]).dtype == np.int32
        product = array_of(x.inputs[1]).astype(np.float64) * array_of(w.inputs[1])
        np.testing.assert_array_equal(array_of(b.inputs[1]), product.astype(np.float32))
        checked += 1
    assert checked == sum(n.op in ("Conv", "Gemm") for n in planned.values())


@every_model
@every_target
def test_planned_nodes_have_integers_on_both_operands(model: str, name: str) -> None:
    made = quantized(model, name)
    planned = made.plan.integer_nodes()
    for node in made.graph.nodes:
        if node.op in LINEAR and node.name in planned:
            for tensor in node.inputs[:2]:
                producer = made.graph.producer(tensor)
                assert producer is not None
                assert producer.op == "DequantizeLinear"


# ------------------------------------------------------------------ what single targets promise


@every_model
def test_tensorrt_is_symmetric_and_quantizes_inputs_only(model: str) -> None:
    made = quantized(model, "tensorrt")
    for node in pairs(made.graph.nodes):
        assert array_of(node.inputs[2]).dtype == np.int8
        assert not array_of(node.inputs[2]).any()
    for decision in made.plan.activations():
        assert decision.edges is not None
        assert decision.spec.granularity == "per_tensor"
    for node in made.graph.nodes:
        if node.op in LINEAR and len(node.inputs) > 2:
            assert isinstance(node.inputs[2], Constant)
            assert node.inputs[2].dtype == np.float32


@pytest.mark.parametrize("model", ["residual_cnn", "digits_cnn"])
def test_tensorrt_has_q_on_the_skip_input_only(model: str) -> None:
    graph = quantized(model, "tensorrt").graph
    skips = []
    for node in graph.nodes:
        if node.op == "Add":
            producers = [graph.producer(t) for t in node.inputs]
            skips.append(sorted(p.op for p in producers if p is not None))
    # In the second block of digits_cnn both inputs come from a convolution: no Q.
    other = [["Conv", "Conv"]] if model == "digits_cnn" else []
    assert skips == [["Conv", "DequantizeLinear"], *other]


@every_model
@pytest.mark.parametrize("name", ["qnn-htp", "vitis-xint8"])
def test_full_targets_quantize_inputs_outputs_and_nothing_is_left_between(
    model: str, name: str
) -> None:
    made = quantized(model, name)
    for tensor in made.graph.inputs:
        assert {n.op for n in tensor.outputs} <= {"QuantizeLinear", "Shape"}
    for tensor in made.graph.outputs:
        producer = made.graph.producer(tensor)
        assert producer is not None
        assert producer.op == "DequantizeLinear"
    floats = {n.op for n in made.plan.nodes if n.precision == "float"}
    # Shapes are int64; the NPU's table has no Gelu and no Expand.
    assert floats <= {"Shape", "Concat", "Expand", "Gelu", "Sum"}


@every_model
def test_matmul_weights_have_one_scale_on_qnn(model: str) -> None:
    made = quantized(model, "qnn-htp")
    ops = {n.name: n.op for n in made.plan.nodes}
    for decision in made.plan.weights():
        if decision.kind == "weight":
            assert decision.edges is not None
            op = ops[decision.edges[0].node]
            wanted = ("int8", "per_channel") if op == "Conv" else ("uint8", "per_tensor")
            assert (decision.spec.storage.name, decision.spec.granularity) == wanted


@every_model
def test_vitis_scales_are_powers_of_two_everywhere(model: str) -> None:
    made = quantized(model, "vitis-xint8")
    for node in pairs(made.graph.nodes):
        scale = array_of(node.inputs[1])
        assert scale.ndim == 0
        assert np.frexp(scale)[0] == 0.5
        assert len(node.inputs) == 2 or array_of(node.inputs[2]) == 0  # int32 biases have none


def test_vitis_aligns_pooling_with_its_input() -> None:
    made = quantized("digits_cnn", "vitis-xint8")
    pools = [n for n in case("digits_cnn").graph.nodes if n.op == "GlobalAveragePool"]
    for pool in pools:
        scales = {float(made.table.qparams[t.name].scale) for t in (pool.inputs[0], *pool.outputs)}
        assert len(scales) == 1
    assert pools


# ------------------------------------------------------------------ what the engines make of it


def census(model: str, name: str, engine: str, folder: Path) -> dict[str, tuple[str, str]]:
    """Engine op and precision of every linear node of the float model."""
    proto = quantized(model, name).graph.to_model()
    path = folder / "model.onnx"
    onnx.save(proto, path)
    found = trace(proto, read_back(engine, path, folder))
    return {k: ("", "") if op is None else (op.op, op.precision) for k, op in found.items()}


def golden(model: str, name: str, engine: str, folder: Path) -> dict[tuple[str, str], int]:
    rows = census(model, name, engine, folder)
    linear = {n.name for n in case(model).graph.nodes if n.op in LINEAR}
    assert set(rows) == linear
    return dict(Counter(rows.values()))


def test_onnxruntime_runs_every_linear_op_of_the_cnn_in_integers(tmp_path: Path) -> None:
    assert golden("digits_cnn", "ort-x86", "ort", tmp_path) == {
        ("QLinearConv", "integer"): 8,
        ("QGemm", "integer"): 1,
    }


def test_onnxruntime_runs_every_linear_op_of_the_transformer_in_integers(tmp_path: Path) -> None:
    found = golden("digits_vit", "ort-x86", "ort", tmp_path)
    assert {precision for _, precision in found} == {"integer"}
    assert sum(found.values()) == 26  # the patches, six products in four blocks, the head
    assert found["QLinearConv", "integer"] == found["QGemm", "integer"] == 1


@needs_openvino
@pytest.mark.parametrize(("model", "count"), [("digits_cnn", 9), ("digits_vit", 26)])
def test_openvino_runs_every_linear_op_in_integers(model: str, count: int, tmp_path: Path) -> None:
    found = golden(model, "openvino", "openvino", tmp_path)
    assert {precision for _, precision in found} == {"integer"}
    assert sum(found.values()) == count


@pytest.mark.parametrize("model", ["residual_cnn", "transformer"])
@pytest.mark.parametrize(
    ("name", "engine"),
    [("ort-x86", "ort"), pytest.param("openvino", "openvino", marks=needs_openvino)],
)
def test_engines_run_what_was_planned(model: str, name: str, engine: str, tmp_path: Path) -> None:
    rows = census(model, name, engine, tmp_path)
    planned = quantized(model, name).plan.integer_nodes()
    left = {node: rows[node] for node in planned if node in rows and rows[node][1] != "integer"}
    assert left == {}


@every_model
@every_target
def test_every_dialect_loads_in_onnxruntime(model: str, name: str, tmp_path: Path) -> None:
    """Files for other engines are checked there, with its optimizations on."""
    assert census(model, name, "ort", tmp_path)


def test_a_target_is_data() -> None:
    target: Target = TARGETS["ort-x86"]
    with pytest.raises(AttributeError):
        target.opset = 13  # type: ignore[misc]
