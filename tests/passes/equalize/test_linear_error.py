"""The error of one linear op: the real arithmetic, and some outputs for all of a large weight."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.dtypes import storage_for
from qpass.graph import Graph, array_of
from qpass.passes.affine.absorb import absorbed, linear_reader
from qpass.passes.equalize.linear_error import (
    WEIGHT_ELEMENTS,
    LinearError,
    row_weights,
    scaled_inputs,
    some_outputs,
)
from qpass.passes.equalize.rows import LinearRows, rows_of
from qpass.passes.equalize.site import Reader
from qpass.passes.equalize.solve import Scales
from qpass.passes.normalize.folding import write_constant
from qpass.passes.normalize.linear_folding import Affine
from qpass.planner import plan
from qpass.qparams import TensorSpec, choose_qparams, fake_quantize
from qpass.targets import load_target
from tests.oracle import reference
from tests.small_models import policy_of

CASES = {
    "matmul": ("float[N,6,8] x", "MatMul (x, w)", (8, 12)),
    "gemm": ("float[N,8] x", "Gemm <transB = 1> (x, w)", (12, 8)),
    "conv": ("float[N,8,5,5] x", "Conv (x, w)", (12, 8, 3, 3)),
    "grouped": ("float[N,8,5,5] x", "Conv <group = 4> (x, w)", (12, 2, 3, 3)),
    "transposed": ("float[N,8,5,5] x", "ConvTranspose (x, w)", (8, 12, 2, 2)),
}


def case(name: str) -> tuple[Graph, Reader, TensorSpec, TensorSpec]:
    """One linear op of 8 channels, and what its operands become."""
    value, op, shape = CASES[name]
    rank = value.count(",") + 1
    dims = ",".join("abcd"[:rank])
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> g ({value}) => (float[{dims}] y) '
        f"{{ [op] y = {op} }}"
    )
    graph = Graph.from_text(text, w=weight)
    graph.infer_shapes()
    axis = 1 if "Conv" in op or rank == 2 else rank - 1
    linear = linear_reader(graph.node("op"), 0, axis, 8)
    assert not isinstance(linear, str), linear
    reader = Reader(linear=linear, labels=np.arange(1, 9), power=-1)
    activation = TensorSpec(storage=storage_for(8, signed=False), symmetric=False)
    weight = TensorSpec(storage=storage_for(8, signed=True), symmetric=True)
    return graph, reader, activation, weight


def scales_of(seed: int = 3) -> Scales:
    random = np.random.default_rng(seed)
    scale = np.concatenate([[1.0], np.exp2(random.uniform(-3, 3, 8))]).astype(np.float32)
    return Scales(method="x", scale=scale.astype(np.float64), shift=np.zeros(9))


@pytest.mark.parametrize("name", list(CASES))
def test_weights_take_the_scales_as_the_edit_does(name):
    _, reader, _, spec = case(name)
    gain = scales_of().scale[1:]
    wanted, _ = absorbed(reader.linear, Affine(gain=gain, offset=np.zeros(8)))
    weight = some_outputs(reader.linear.node, spec, WEIGHT_ELEMENTS)
    got = scaled_inputs(reader, weight, gain.astype(np.float32))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["matmul", "gemm", "conv", "grouped"])
def test_errors_are_those_of_the_op_on_rounded_operands(name):
    graph, reader, activation, weight = case(name)
    shape = [1 if d == "N" else int(d) for d in CASES[name][0][6:-3].split(",")]
    array = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    inputs, counts = rows_of(reader.linear.node, array, 1, np.random.default_rng(2))
    assert (counts == 1.0).all()  # few positions: all are kept
    op = LinearError(
        reader=reader,
        rows=LinearRows(inputs=[inputs], counts=[counts]),
        activation=activation,
        weight=weight,
    )
    low, high = float(array.min()), float(array.max())
    got = float(op.errors(Scales.identity(8), [0], low, high)[0])
    constant = array_of(graph.node("op").inputs[1])
    rounded = graph.copy()
    numbers = choose_qparams(weight, constant.min(), constant.max())
    write_constant(rounded, rounded.node("op"), 1, fake_quantize(constant, numbers))
    exact = reference(graph.to_model(), {"x": array})["y"]
    noisy = fake_quantize(array, choose_qparams(activation, low, high))
    error = reference(rounded.to_model(), {"x": noisy})["y"] - exact
    axis = 1 if "conv" in CASES[name][1].lower() else -1
    powers, errors = (
        np.square(np.moveaxis(v, axis, -1).astype(np.float64)).reshape(-1, 12).sum(axis=1)
        for v in (exact, error)
    )
    wanted = float(row_weights(powers, np.ones(len(powers))) @ errors)
    assert got == pytest.approx(wanted, rel=1e-3)  # float32 sums of what is left after rounding


def test_an_offset_costs_nothing_but_rounding():
    _, reader, activation, weight = case("matmul")
    inputs = np.random.default_rng(1).standard_normal((20, 8, 1)).astype(np.float32) + 5.0
    rows = LinearRows(inputs=[inputs], counts=[np.ones(20)])
    op = LinearError(reader=reader, rows=rows, activation=activation, weight=weight)
    plain = Scales.identity(8)
    moved = Scales(method="m", scale=plain.scale, shift=np.concatenate([[0.0], np.full(8, 5.0)]))
    before = float(op.errors(plain, [0], 0.0, 9.0)[0])
    after = float(op.errors(moved, [0], -4.0, 4.0)[0])
    assert after < before  # the weight's rounding no longer meets the offset


def test_some_outputs_stand_for_a_large_weight():
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N,T,1024] x) => (float[N,T,1024] y) '
        "{ [op] y = MatMul (x, w) }"
    )
    random = np.random.default_rng(0)
    weight = random.standard_normal((1024, 1024)).astype(np.float32)
    graph = Graph.from_text(text, w=weight)
    graph.infer_shapes()
    made = plan(graph, load_target("ort-x86"), policy_of("w8a8"))
    spec = next(d.spec for d in made.weights() if d.kind == "weight")
    part = some_outputs(graph.node("op"), spec, 1 << 18)
    assert part.shape == (1024, 256)
    linear = linear_reader(graph.node("op"), 0, 2, 1024)
    reader = Reader(linear=linear, labels=np.arange(1, 1025), power=-1)
    inputs = random.standard_normal((64, 1024, 1)).astype(np.float32)
    op = LinearError(
        reader=reader,
        rows=LinearRows(inputs=[inputs], counts=[np.ones(64)]),
        activation=next(d.spec for d in made.activations() if d.tensor == "x"),
        weight=spec,
        elements=1 << 18,
    )
    scales = Scales.identity(1024)
    some = float(op.errors(scales, [0], -4.0, 4.0)[0])
    op = LinearError(reader=reader, rows=op.rows, activation=op.activation, weight=spec)
    whole = float(op.errors(scales, [0], -4.0, 4.0)[0])
    # 64 * 256 independent errors: their mean square is known to about 1 %.
    assert some == pytest.approx(whole, rel=0.05)
