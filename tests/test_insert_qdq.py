"""Inserting Q and DQ: where they stand, what keeps its name, and the numbers in them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from qpass.dtypes import UINT4
from qpass.errors import InternalError, ModelError
from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes import insert_qdq as module
from qpass.passes.insert_qdq import insert_qdq, quantize_in_chunks
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.qparams import (
    QParams,
    channel_range,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from qpass.targets import TARGETS, Target
from qpass.targets.specs import S8_SYMMETRIC, S8_WEIGHT, U8
from tests.small_models import feeds_of, from_text, minmax, policy_of, residual_cnn, run
from tests.strategies import graphs

RANDOM = np.random.default_rng(2)
KERNEL = RANDOM.normal(0, 0.3, (16, 16, 1, 1)).astype(np.float32)
HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def cnn(body: str, outputs: str = "float[1,16,8,8] y", **constants: Any) -> Graph:
    text = f"{HEAD} g (float[1,16,8,8] x) => ({outputs}) {{{body}}}"
    kernels = {"w": KERNEL, "v": KERNEL[::-1].copy(), **constants}
    return from_text(text, **{k: np.asarray(v) for k, v in kernels.items() if k in body})


def inserted(
    graph: Graph, name: str = "ort-x86", precision: str = "w8a8", **options: Any
) -> tuple[Graph, Plan]:
    """A copy of `graph` with every pair in it and min/max numbers of one sample."""
    plan = make_plan(graph, TARGETS[name], policy_of(precision, **options))
    table = minmax(graph, plan, feeds_of(graph, 1))
    result = graph.copy()
    report = insert_qdq(result, plan, table.qparams)
    assert report.changed == len(plan.decisions)
    onnx.checker.check_model(result.to_model(), full_check=True)
    return result, plan


def maker(graph: Graph, tensor: str) -> Node:
    producer = graph.producer(graph.tensors()[tensor])
    assert producer is not None
    return producer


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


# ------------------------------------------------------------------ places


def test_pairs_on_edges_leave_other_readers_alone() -> None:
    graph, _ = inserted(cnn("c = Conv (x, w) y = Add (c, x)"))
    (conv,) = (n for n in graph.nodes if n.op == "Conv")
    (add,) = (n for n in graph.nodes if n.op == "Add")
    assert [maker(graph, t.name).op for t in conv.inputs] == ["DequantizeLinear"] * 2
    assert add.inputs[1] is graph.inputs[0]


def test_resident_tensors_have_one_pair_for_all_readers() -> None:
    graph, _ = inserted(cnn("c = Conv (x, w) d = Conv (c, v) s = Sigmoid (c) y = Add (d, s)"))
    (sigmoid,) = (n for n in graph.nodes if n.op == "Sigmoid")
    dq = maker(graph, sigmoid.inputs[0].name)
    assert dq.op == "DequantizeLinear"
    assert len(dq.outputs[0].outputs) == 2
    # The original name stays on the float side.
    assert maker(graph, "c").op == "Conv"
    assert [n.op for n in graph.tensors()["c"].outputs] == ["QuantizeLinear"]


def test_the_absorbed_activation_stands_before_q() -> None:
    graph, _ = inserted(cnn("c = Conv (x, w) r = Relu (c) y = Conv (r, v)"))
    assert [n.op for n in graph.tensors()["r"].outputs] == ["QuantizeLinear"]
    assert [n.op for n in graph.tensors()["c"].outputs] == ["Relu"]


def test_graph_outputs_keep_their_names() -> None:
    graph, _ = inserted(cnn("y = Conv (x, w)"))
    assert [t.name for t in graph.outputs] == ["y"]
    assert maker(graph, "y").op == "DequantizeLinear"
    assert maker(graph, "y_float").op == "Conv"
    assert "y" in run(graph.to_model(), feeds_of(graph, 1)[0])


def test_a_graph_output_that_is_read_as_well() -> None:
    body = "y = Conv (x, w) z = Conv (y, v)"
    graph, _ = inserted(cnn(body, outputs="float[1,16,8,8] y, float[1,16,8,8] z"))
    assert [t.name for t in graph.outputs] == ["y", "z"]
    second = maker(graph, "z_float")
    assert second.inputs[0] is graph.outputs[0]


@pytest.mark.parametrize("name", ["qnn-htp", "vitis-xint8"])
def test_full_scheme_quantizes_inputs_and_outputs(name: str) -> None:
    source = residual_cnn()
    graph, _ = inserted(source, name)
    assert [n.op for n in graph.inputs[0].outputs] == ["QuantizeLinear"]
    assert maker(graph, "logits").op == "DequantizeLinear"
    assert [t.name for t in (*graph.inputs, *graph.outputs)] == ["image", "logits"]
    # Nothing computes on float tensors: each compute node reads and feeds DQ and Q only.
    for node in graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear", "Relu", "Clip"):
            continue
        producers = [graph.producer(t) for t in node.inputs if not isinstance(t, Constant)]
        assert all(p is not None and p.op == "DequantizeLinear" for p in producers), node.name


CAPTURED = f"""
{HEAD}
g (bool flag, float[1,16,8,8] x) => (float[1,16,8,8] y, float[1,16,8,8] z)
{{
    c = Conv (x, w)
    y = Sigmoid (c)
    z = If (flag) <
        then_branch = yes () => (float[1,16,8,8] t) {{ t = Neg (c) }},
        else_branch = no () => (float[1,16,8,8] e) {{ e = Conv (x, w) }}
    >
}}
"""


def test_bodies_read_what_comes_out_of_dq() -> None:
    """Otherwise the convolution would have a second, float reader and stay float."""
    source = from_text(CAPTURED, w=KERNEL)
    plan = make_plan(source, TARGETS["ort-x86"], policy_of())
    x = feeds_of(cnn("y = Relu (x)"), 1)[0]["x"]
    table = minmax(source, plan, [{"x": x, "flag": np.array(True)}])
    graph = source.copy()
    insert_qdq(graph, plan, table.qparams)
    onnx.checker.check_model(graph.to_model(), full_check=True)
    assert maker(graph, "c").op == "DequantizeLinear"
    got = run(graph.to_model(taps=["c"]), {"x": x, "flag": np.array(True)})
    np.testing.assert_array_equal(got["z"], -got["c"])
    # The other branch keeps the float kernel that it shares.
    other = run(graph.to_model(), {"x": x, "flag": np.array(False)})["z"]
    wanted = run(source.to_model(), {"x": x, "flag": np.array(False)})["z"]
    np.testing.assert_array_equal(other, wanted)


def test_readers_with_a_kind_of_their_own_read_behind_the_common_pair() -> None:
    """Two Q behind one convolution would keep it in float: the second one follows the first."""
    body = """
        c = Conv (x, w) t = Transpose <perm = [0, 1, 3, 2]> (c)
        m = MatMul (t, c) d = Conv (c, v) y = Add (d, m)
    """
    graph, plan = inserted(cnn(body), "openvino")
    assert {d.key: d.spec for d in plan.activations() if d.tensor == "c"} == {
        "c#1": S8_SYMMETRIC,
        "c": U8,
    }
    assert [n.op for n in graph.tensors()["c"].outputs] == ["QuantizeLinear"]
    second = next(n for n in graph.nodes if n.name == "c#1_Q")
    assert maker(graph, second.inputs[0].name).name == "c_DQ"


def test_pairs_behind_a_graph_input_are_in_order() -> None:
    graph, _ = inserted(cnn("m = MatMul (x, x) c = Conv (x, w) y = Add (c, m)"), "openvino")
    position = {id(node): i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for tensor in node.inputs:
            assert all(position[id(m)] < position[id(node)] for m in tensor.inputs)


def test_nodes_that_nobody_needs_are_gone() -> None:
    graph, _ = inserted(cnn("c = Conv (x, w) u = Conv (c, v) y = Sigmoid (x)"))
    assert ops(graph) == {"Sigmoid": 1}


# ------------------------------------------------------------------ constants


def test_shared_weights_are_stored_once_and_dequantized_for_each_reader() -> None:
    """A DQ with two readers is one that the selectors of engines do not take."""
    body = "c = Conv <pads = [1, 1, 1, 1]> (x, w) y = Conv <pads = [1, 1, 1, 1]> (c, w)"
    graph, _ = inserted(cnn(body, w=RANDOM.normal(0, 0.1, (16, 16, 3, 3)).astype(np.float32)))
    weights = [maker(graph, n.inputs[1].name) for n in graph.nodes if n.op == "Conv"]
    assert len({id(n) for n in weights}) == 2
    assert len({id(n.inputs[0]) for n in weights}) == 1


@pytest.mark.parametrize(("op", "axis"), [("Gemm", 1), ("Gemm <transB = 1>", 0), ("MatMul", 1)])
def test_the_axis_is_always_written(op: str, axis: int) -> None:
    """With K == N a wrong axis is not an error but wrong numbers."""
    weight = (np.arange(1, 17)[:, None] * np.arange(1, 17)[None] / 256).astype(np.float32)
    source = from_text(
        f"{HEAD} g (float[2,16] x) => (float[2,16] y) {{ y = {op} (x, w) }}", w=weight
    )
    graph, _ = inserted(source)
    dq = maker(graph, "w_dequantized")
    assert dq.attrs["axis"] == axis
    scale = array_of(dq.inputs[1])
    np.testing.assert_allclose(scale, np.arange(1, 17) / 16 / 127, rtol=1e-6)
    got = run(graph.to_model(taps=["w_dequantized"]), feeds_of(source, 1)[0])["w_dequantized"]
    assert np.all(np.abs(got - weight) <= 0.5001 * np.expand_dims(scale, 1 - axis))


def test_small_weights_of_4_bits_are_packed() -> None:
    graph, _ = inserted(cnn("y = Conv (x, w)"), precision="w4a8", low_bit_edges=True)
    (packed,) = (t for t in graph.to_model().graph.initializer if t.name == "w_quantized")
    assert packed.data_type == onnx.TensorProto.INT4
    assert len(packed.raw_data) == KERNEL.size // 2
    integers = numpy_helper.to_array(packed).astype(int)
    assert (integers.min(), integers.max()) == (-8, 7)


def test_constant_operands_of_followers_become_integers() -> None:
    body = "c = Conv (x, w) s = Add (c, k) y = Conv (s, v)"
    graph, plan = inserted(cnn(body, k=RANDOM.random((16, 1, 1), np.float32)))
    assert [d.kind for d in plan.decisions if d.tensor == "k"] == ["constant"]
    (add,) = (n for n in graph.nodes if n.op == "Add")
    assert [maker(graph, t.name).op for t in add.inputs] == ["DequantizeLinear"] * 2


def test_a_scalar_operand() -> None:
    graph, _ = inserted(cnn("c = Conv (x, w) s = Add (c, k) y = Conv (s, v)", k=np.float32(0.5)))
    got = run(graph.to_model(taps=["k_dequantized"]), feeds_of(graph, 1)[0])
    assert got["k_dequantized"] == np.float32(0.5)


@pytest.mark.parametrize("spec", [S8_WEIGHT, S8_SYMMETRIC], ids=["channel", "tensor"])
@pytest.mark.parametrize("shape", [(7, 5), (40, 3, 2), (9,)])
def test_pieces_give_the_same_integers(
    monkeypatch: pytest.MonkeyPatch, spec: Any, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 10)
    values = RANDOM.standard_normal(shape).astype(np.float32)
    axes = tuple(range(1, values.ndim))
    low, high = (values.min(axes), values.max(axes)) if spec is S8_WEIGHT else (-2.0, 2.0)
    numbers = choose_qparams(spec, low, high)
    got = quantize_in_chunks(Constant("c", values), numbers)
    np.testing.assert_array_equal(got, quantize(values, numbers))


def test_pieces_know_an_axis_that_is_counted_from_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 10)
    values = RANDOM.standard_normal((6, 5)).astype(np.float32)
    numbers = choose_qparams(replace(S8_WEIGHT, axis=-2), values.min(axis=1), values.max(axis=1))
    got = quantize_in_chunks(Constant("c", values), numbers)
    np.testing.assert_array_equal(got, quantize(values, numbers))


# ------------------------------------------------------------------ meaning


def test_a_stale_plan_is_a_bug() -> None:
    source = cnn("y = Conv (x, w)")
    plan = make_plan(source, TARGETS["ort-x86"], policy_of())
    table = minmax(source, plan, feeds_of(source, 1))
    graph = source.copy()
    graph.set_input(graph.nodes[0], 0, graph.variable("other", np.float32, [1, 16, 8, 8]))
    with pytest.raises(InternalError, match="stale"):
        insert_qdq(graph, plan, table.qparams)


def test_integers_mean_what_the_float_nodes_get() -> None:
    source = cnn("c = Conv (x, w) y = Sigmoid (c)")
    feeds = feeds_of(source, 1)[0]
    plan = make_plan(source, TARGETS["ort-x86"], policy_of())
    table = minmax(source, plan, [feeds])
    graph = source.copy()
    insert_qdq(graph, plan, table.qparams)
    got = run(graph.to_model(taps=["x_quantized", "x_dequantized"]), feeds)
    numbers: QParams = table.qparams["x"]
    np.testing.assert_array_equal(got["x_quantized"], quantize(feeds["x"], numbers))
    np.testing.assert_array_equal(
        got["x_dequantized"], dequantize(quantize(feeds["x"], numbers), numbers)
    )


def try_plan(graph: Graph, target: Target) -> Plan | None:
    try:
        return make_plan(graph, target, policy_of())
    except ModelError:
        return None


@given(graphs(), st.sampled_from(sorted(TARGETS)))
def test_any_graph_stays_valid_and_keeps_its_interface(graph: Graph, name: str) -> None:
    plan = try_plan(graph, TARGETS[name])
    if plan is None:
        return
    tensors = graph.tensors()
    numbers = {
        d.key: choose_qparams(d.spec, -9.0, 9.0)
        if d.kind == "activation"
        else choose_qparams(d.spec, *channel_range(array_of(tensors[d.tensor]), d.spec.axis))
        for d in plan.decisions
    }
    result = graph.copy()
    insert_qdq(result, plan, numbers)
    model = result.to_model()
    onnx.checker.check_model(model, full_check=True)
    assert [v.name for v in model.graph.output] == [t.name for t in graph.outputs]
    # Every Q feeds exactly one DQ, and every DQ of a constant one node.
    for node in result.nodes:
        if node.op == "QuantizeLinear":
            assert [n.op for n in node.outputs[0].outputs] == ["DequantizeLinear"]
        if node.op == "DequantizeLinear" and isinstance(node.inputs[0], Constant):
            assert len(node.outputs[0].outputs) == 1


@pytest.mark.parametrize("precision", ["w8a6", "w4a3", "w8a8", "w4a4", "w8a16"])
def test_activations_saturate_at_their_own_bits(precision: str) -> None:
    """A type may hold more integers than are wanted: 6 bits lie in a byte, 3 in four bits."""
    source = cnn("c = Conv (x, w) y = Sigmoid (c)")
    plan = make_plan(source, TARGETS["ort-x86"], policy_of(precision, low_bit_edges=True))
    (decision,) = (d for d in plan.activations() if d.tensor == "x")
    bits = decision.spec.bits
    table = minmax(source, plan, feeds_of(source, 1)).qparams
    low, high = -0.5, 1.0  # most of the values lie outside
    table = {**table, decision.key: choose_qparams(decision.spec, low, high)}
    graph = source.copy()
    insert_qdq(graph, plan, table)
    assert ("Clip" in {n.op for n in graph.nodes}) == (bits not in (4, 8, 16))
    feeds = feeds_of(source, 1)[0]
    got = run(graph.to_model(taps=["x_dequantized"]), feeds)["x_dequantized"]
    np.testing.assert_allclose(got, fake_quantize(feeds["x"], table[decision.key]), atol=1e-6)
    assert len(np.unique(got)) <= 2**bits


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_large_weights_with_blocks_are_quantized_in_pieces(
    monkeypatch: pytest.MonkeyPatch, axis: int
) -> None:
    values = RANDOM.normal(0, 1, (100, 96)).astype(np.float32)
    blocks = [100, 96]
    blocks[axis] = -(-blocks[axis] // 16)
    random = np.random.default_rng(1)
    numbers = QParams(
        scale=random.uniform(0.1, 0.3, blocks).astype(np.float32),
        zero_point=random.integers(0, 16, blocks).astype(UINT4.numpy),
        storage=UINT4,
        qmin=0,
        qmax=15,
        axis=axis,
        block_size=16,
    )
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2000)
    graph = from_text(
        f"{HEAD} g (float[2,100] x) => (float[2,96] y) {{ y = MatMul (x, w) }}", w=values
    )
    constant = next(t for t in graph.constants() if t.name == "w")
    found = quantize_in_chunks(constant, numbers)
    np.testing.assert_array_equal(found.astype(int), quantize(values, numbers).astype(int))
