"""Norms take corrections exactly, and where nothing can, nodes are added only on demand."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes import correct_between as module
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.compensate import compensate
from qpass.passes.fold_consumer import NormSite, find_norm_site, fold_into_norm
from qpass.passes.runtime_affine import (
    RuntimeChange,
    RuntimePlace,
    find_runtime_place,
    insert_affine,
)
from qpass.verify.metrics import sqnr_db
from tests.folds import affine_of, explicit, graph_of, normal, rounded, run

WIDTH = 6
VECTOR = {"g": normal((WIDTH,), seed=1), "o": normal((WIDTH,), seed=2)}
MAP = {name: values.reshape(WIDTH, 1, 1) for name, values in VECTOR.items()}
ROW, IMAGE = f"float[2,5,{WIDTH}]", f"float[2,{WIDTH},3,3]"

STATISTICS = {"m": normal((WIDTH,), seed=3), "v": np.abs(normal((WIDTH,), seed=4)) + 1}

# name: (shape, body, constants, axis, takes a gain, takes an offset)
NORMS = {
    "layer norm": (ROW, "[op] y = LayerNormalization (x, g, o)", VECTOR, -1, True, True),
    "layer norm, no bias": (ROW, "[op] y = LayerNormalization (x, g)", VECTOR, -1, True, True),
    "instance norm": (IMAGE, "[op] y = InstanceNormalization (x, g, o)", VECTOR, -3, True, True),
    "batch norm": (
        IMAGE,
        "[op] y = BatchNormalization (x, g, o, m, v)",
        {**VECTOR, **STATISTICS},
        -3,
        True,
        True,
    ),
    "unified norm": (ROW, "h = Mul (x, g) [op] y = Add (h, o)", VECTOR, -1, True, True),
    "unified norm of maps": (IMAGE, "h = Mul (g, x) [op] y = Add (o, h)", MAP, -3, True, True),
    "gain alone": (ROW, "s = Sqrt (x) [op] y = Mul (s, g)", VECTOR, -1, True, False),
    "offset alone": (ROW, "[op] y = Add (x, o)", VECTOR, -1, False, True),
    "offset behind GELU": (ROW, "t = Gelu (x) [op] y = Add (t, o)", VECTOR, -1, False, True),
}


def norm_graph(name: str) -> Graph:
    shape, body, constants, *_ = NORMS[name]
    words = body.replace(",", " ").replace("(", " ").replace(")", " ").split()
    used = {key: values for key, values in constants.items() if key in words}
    return graph_of(f"{shape} x", f"{shape} y", body, **used)


def feeds_of(graph: Graph) -> dict[str, np.ndarray]:
    return {"x": np.abs(normal(tuple(graph.inputs[0].shape), seed=5)) + 0.1}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_takes_what_mul_and_add_behind_it_would_do(name):
    graph = norm_graph(name)
    _, _, _, axis, gain, offset = NORMS[name]
    site = find_norm_site(graph, graph.node("op"))
    assert isinstance(site, NormSite)
    rank = len(graph.outputs[0].shape)
    assert (bool(site.scaled), site.offset, site.channels) == (gain, offset, WIDTH)
    assert site.axis % rank == axis % rank
    affine = affine_of(WIDTH)
    affine = ChannelAffine(
        gain=affine.gain if gain else np.ones(WIDTH),
        offset=affine.offset if offset else np.zeros(WIDTH),
    )
    (want,) = run(explicit(graph, "y", affine, axis), feeds_of(graph))
    nodes = [node.op for node in graph.nodes]
    fold_into_norm(graph, site, affine)
    (got,) = run(graph, feeds_of(graph))
    assert [node.op for node in graph.nodes] == nodes
    # Two roundings of float32 in another order.
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


REFUSED = {
    "scale made at run time": (
        ROW,
        "k = Abs (x) s = ReduceMean <keepdims = 0> (k, a) [op] y = LayerNormalization (x, s)",
        {"a": np.array([0, 1])},
        "not a float constant",
    ),
    "two axes": (
        ROW,
        "[op] y = LayerNormalization <axis = 1> (x, table)",
        {"table": normal((5, WIDTH))},
        "not one value for each channel",
    ),
    "training": (
        IMAGE,
        "[op] y, rm, rv = BatchNormalization <training_mode = 1> (x, g, o, m, v)",
        {**VECTOR, **STATISTICS},
        "training mode",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_norms_say_why(why):
    shape, body, constants, reason = REFUSED[why]
    graph = graph_of(f"{shape} x", f"{shape} y", body, **constants)
    site = find_norm_site(graph, graph.node("op"))
    assert isinstance(site, str)
    assert reason in site


def test_what_is_no_norm_and_the_biases_of_linear_ops_are_left_alone():
    body = "h = MatMul (x, w) [op] y = Add (h, o)"
    weights = {"w": normal((WIDTH, WIDTH)), **VECTOR}
    for source, constants in (
        (body, {k: weights[k] for k in "wo"}),
        ("h = MatMul (x, w) s = Mul (h, g) [op] y = Add (s, o)", weights),
        ("[op] y = Gelu (x)", {}),
        ("[op] y = Add (x, table)", {"table": normal((5, WIDTH))}),  # by position as well
        ("h = Mul (x, g) [op] y = Mul (h, x)", {"g": VECTOR["g"]}),
        (
            "[op] s = Add (x, o) m = Mul (s, half) y = Softmax (m)",  # scores have no channels
            {"o": VECTOR["o"], "half": np.float32(0.5)},
        ),
    ):
        graph = graph_of(f"{ROW} x", f"{ROW} y", source, **constants)
        assert find_norm_site(graph, graph.node("op")) is None


# ------------------------------------------------------------------ in a walk

BLOCK = """
[drift] shifted = {drift}
[sum] s = Add (x, shifted)
[norm] n = LayerNormalization (s, g, o)
[fc] h = MatMul (n, w)
y = {head}
"""


def drifted(*, quantized: bool, head: str = "Gelu (h)") -> Graph:
    """The quantized graph is off in front of the norm by an error that differs by channel."""
    weight = normal((WIDTH, WIDTH), seed=7)
    constants = {"g": np.ones(WIDTH, np.float32), "o": np.zeros(WIDTH, np.float32), "w": weight}
    drift = "Identity (x)"
    if quantized:
        # Not linear, so that neither a gain nor an offset of `fc` undoes it.
        drift = "Add (x, table)"
        constants["table"] = np.linspace(-0.6, 0.6, 5 * WIDTH, dtype=np.float32).reshape(5, WIDTH)
        constants["table"] += np.linspace(-1, 1, WIDTH, dtype=np.float32)
    body = BLOCK.format(drift=drift, head=head)
    if "bias" in head:
        constants["bias"] = np.zeros(WIDTH, np.float32)
    if quantized:
        constants |= rounded("w", constants.pop("w"), 1)
        body = f"w = DequantizeLinear <axis = 1> (w_int, w_scale, w_zero) {body}"
    shape = f"float[B,5,{WIDTH}]"
    return graph_of(f"{shape} x", f"{shape} y", body, **constants)


def batches_of(count: int = 12, *, seed: int = 0) -> list[dict[str, np.ndarray]]:
    return [{"x": normal((8, 5, WIDTH), seed=seed + i)} for i in range(count)]


def score(reference: Graph, graph: Graph) -> float:
    pairs = [(run(reference, b)[0], run(graph, b)[0]) for b in batches_of(4, seed=50)]
    return sqnr_db(*(np.concatenate(side) for side in zip(*pairs, strict=True)))


def test_a_norm_in_front_of_a_linear_op_is_corrected(monkeypatch):
    scores = []
    for norms in (True, False):
        if not norms:
            monkeypatch.setattr(module, "find_norm_site", lambda *_: None)
        reference, quantized = drifted(quantized=False), drifted(quantized=True)
        structure = quantized.to_text()
        result = compensate(reference, quantized, batches_of())
        assert result.runtime_ops == ()
        assert quantized.to_text() == structure
        changed = array_of(quantized.node("norm").inputs[2]).any()
        assert changed == (norms and result.method == "cwac")
        scores.append(score(reference, quantized))
    assert scores[0] > scores[1] + 3.0


def test_nodes_are_added_only_on_demand():
    reference = drifted(quantized=False)
    for runtime_ops in (False, True):
        quantized = drifted(quantized=True)
        before = {node.name for node in quantized.nodes}
        result = compensate(reference, quantized, batches_of(), runtime_ops=runtime_ops)
        quantized.sort()
        added = [node for node in quantized.nodes if node.name not in before]
        assert bool(added) is bool(result.runtime_ops) is runtime_ops
        assert {node.op for node in added} <= {"Mul", "Add"}
        refused = " ".join(r.reason for r in result.report.refusals)
        assert ("--allow-runtime-ops would add one" in refused) is True
    # The MatMul has no bias: its offset is one of the nodes, or was not worth one.
    texts = " ".join(result.runtime_ops)
    assert f"({WIDTH} channels)" in texts


def test_a_node_that_saves_too_little_is_not_added(monkeypatch):
    monkeypatch.setattr(module, "LEAST_DB", 60.0)
    reference, quantized = drifted(quantized=False), drifted(quantized=True)
    result = compensate(reference, quantized, batches_of(), runtime_ops=True)
    assert result.runtime_ops == ()
    reasons = [r.reason for r in result.report.refusals if r.rule == "compensate at run time"]
    assert any("on held-out samples, not 60.0" in reason for reason in reasons)


# ------------------------------------------------------------------ inserting nodes


@pytest.mark.parametrize("is_output", [True, False])
def test_inserted_nodes_compute_the_affine_and_outputs_keep_their_names(is_output):
    body = "[op] t = Tanh (x) y = Neg (t)"
    tap = "y" if is_output else "t"
    graph = graph_of(f"{IMAGE} x", f"{IMAGE} y", body)
    affine = affine_of(WIDTH)
    place = RuntimePlace(tap=tap, axis=-3, channels=WIDTH)
    (want,) = run(explicit(graph, tap, affine, -3), feeds_of(graph))
    added = insert_affine(graph, place, affine)
    graph.sort()
    assert [node.op for node in added] == ["Mul", "Add"]
    assert [out.name for out in graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(graph, feeds_of(graph))[0], want)


def test_only_the_op_that_is_needed_is_inserted():
    for affine, ops in (
        (ChannelAffine(gain=np.ones(WIDTH), offset=np.ones(WIDTH)), ["Add"]),
        (ChannelAffine(gain=np.full(WIDTH, 0.5), offset=np.zeros(WIDTH)), ["Mul"]),
        (ChannelAffine.identity(WIDTH), []),
    ):
        graph = graph_of(f"{ROW} x", f"{ROW} y", "[op] t = Tanh (x) y = Neg (t)")
        change = RuntimeChange(place=RuntimePlace(tap="t", axis=-1, channels=WIDTH), affine=affine)
        assert [node.op for node in change.apply(graph)] == ops
        assert change.sentence == f"{' and '.join(ops)} behind t ({WIDTH} channels)"


def test_no_node_stands_between_an_integer_op_and_its_q():
    constants = {"s": np.float32(0.05), "z": np.uint8(128), "w": normal((4, WIDTH, 1, 1))}
    body = """
    xq = QuantizeLinear (x, s, z) xd = DequantizeLinear (xq, s, z)
    [op] c = {} yq = QuantizeLinear (c, s, z) y = DequantizeLinear (yq, s, z)
    """
    for op, found in (("Conv (xd, w)", str), ("AveragePool <kernel_shape = [1, 1]> (xd)", str)):
        used = constants if "w" in op else {k: constants[k] for k in "sz"}
        graph = graph_of(f"{IMAGE} x", "float[2,C,3,3] y", body.format(op), **used)
        place = find_runtime_place(graph, graph.node("op"))
        assert isinstance(place, found)
        assert "out of the integers" in place
    graph = graph_of(f"{IMAGE} x", f"{IMAGE} y", "[op] t = Softmax (x) y = Neg (t)")
    assert find_runtime_place(graph, graph.node("op")) is None
    graph = graph_of(f"{ROW} x", f"{ROW} y", "[op] t = Gelu (x) y = Neg (t)")
    place = find_runtime_place(graph, graph.node("op"))
    assert place == RuntimePlace(tap="t", axis=-1, channels=WIDTH)
