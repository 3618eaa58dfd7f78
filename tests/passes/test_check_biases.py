"""The QGemm trap: a bias in the wrong unit is computed without a word, so it must not get out."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.errors import InternalError
from qpass.graph import Graph, array_of
from qpass.passes.check_biases import check_bias_scales
from qpass.passes.fold_affine import find_site, fold
from qpass.passes.lower import lower_biases
from tests.folds import affine_of, graph_of, normal, rounded

ROWS = 6
FORMS = {
    "gemm": ("float[5,4] x", (ROWS, 4), 0, "y = Gemm <transB = 1> (xd, w, b)", "float[5,6] y"),
    "conv": ("float[1,4,5,5] x", (ROWS, 4, 3, 3), 0, "y = Conv (xd, w, b)", "float[1,6,3,3] y"),
    "transposed": (
        "float[1,4,3,3] x", (4, ROWS, 2, 2), 1, "y = ConvTranspose (xd, w, b)", "float[1,6,4,4] y",
    ),
}  # fmt: skip


def integer_graph(form: str, *, per_channel: bool = True) -> tuple[Graph, Graph]:
    source, shape, axis, op, out = FORMS[form]
    weight = normal(shape)
    bias = {"b": normal((ROWS,), seed=5)}
    reference = graph_of(source, out, f"xd = Identity (x) [op] {op}", w=weight, **bias)
    body = f"""
    xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)
    w = DequantizeLinear <axis = {axis}> (w_int, w_scale, w_zero) [op] {op}
    """
    graph = graph_of(
        source, out, body,
        **rounded("w", weight, axis if per_channel else None), **bias,
        s=np.float32(0.031), z=np.uint8(120),
    )  # fmt: skip
    return reference, graph


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_biases_that_were_lowered_after_the_fold_pass(form, per_channel):
    reference, graph = integer_graph(form, per_channel=per_channel)
    nodes = {node.name: node for node in graph.nodes}
    fold(graph, find_site(graph, nodes, reference.node("op")), affine_of(ROWS))
    assert check_bias_scales(graph) == 0  # a float bias has no scale
    assert lower_biases(graph).changed == 1
    assert check_bias_scales(graph) == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_fold_after_the_bias_was_lowered_is_caught(form):
    reference, graph = integer_graph(form)
    lower_biases(graph)
    dq = graph.producer(graph.node("op").inputs[1])
    gain = affine_of(ROWS).gain
    scaled = array_of(dq.inputs[1]) * gain
    graph.set_input(dq, 1, graph.constant("stale", scaled.astype(np.float32)))
    with pytest.raises(InternalError, match="op: the scale of its int32 bias is off"):
        check_bias_scales(graph)
    assert reference.node("op") is not None


def test_one_part_in_a_million_is_the_limit():
    for error, fails in ((5e-7, False), (3e-6, True)):
        _, graph = integer_graph("gemm")
        lower_biases(graph)
        dq = graph.producer(graph.node("op").inputs[2])
        scale = array_of(dq.inputs[1]).astype(np.float64)
        scale[3] *= 1 + error
        graph.set_input(dq, 1, graph.constant("off", scale.astype(np.float32)))
        if fails:
            with pytest.raises(InternalError):
                check_bias_scales(graph)
        else:
            assert check_bias_scales(graph) == 1


def test_an_int32_bias_needs_integer_operands_and_as_many_scales_as_channels():
    _, graph = integer_graph("gemm")
    lower_biases(graph)
    node = graph.node("op")
    dq = graph.producer(node.inputs[2])
    short = graph.copy()
    stale = short.producer(short.node("op").inputs[2])
    short.set_input(stale, 1, short.constant("few", array_of(dq.inputs[1])[:5]))
    with pytest.raises(InternalError, match="5 bias scales"):
        check_bias_scales(short)
    graph.set_input(node, 0, graph.inputs[0])
    with pytest.raises(InternalError, match="no integer operands"):
        check_bias_scales(graph)
