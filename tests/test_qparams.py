"""Specs and numbers: constraints Q1 to Q6, rounding, ranges; our numpy against onnx's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qpass.dtypes import INT4, INT8, UINT8
from qpass.qparams import (
    QParams,
    TensorSpec,
    channel_range,
    choose_qparams,
    dequantize,
    expand,
    fake_quantize,
    quantize,
)
from qpass.targets.specs import S8_WEIGHT, U8, U8_WEIGHT_PER_TENSOR
from tests.strategies import specs, tensors

Array = np.ndarray[Any, Any]
NUMBERS: dict[str, Any] = {
    "scale": np.float32(0.5),
    "zero_point": np.int8(0),
    "storage": INT8,
    "qmin": -128,
    "qmax": 127,
}
NUMBERS = {k: np.array(v) if isinstance(v, np.generic) else v for k, v in NUMBERS.items()}
EPSILON = float(np.finfo(np.float32).eps)


def numbers_for(x: Array, spec: TensorSpec) -> QParams:
    """Numbers of the min/max range of `x`; blocks get a range each."""
    if spec.granularity != "per_block":
        return choose_qparams(spec, *channel_range(x, spec.axis))
    assert spec.axis is not None
    starts = np.arange(0, x.shape[spec.axis], spec.block_size)
    low = np.minimum.reduceat(x, starts, axis=spec.axis)
    return choose_qparams(spec, low, np.maximum.reduceat(x, starts, axis=spec.axis))


@st.composite
def pairs(draw: st.DrawFn, *, blocks: bool = False) -> tuple[Array, TensorSpec]:
    x = draw(tensors())
    return x, draw(specs(rank=x.ndim, blocks=blocks))


# ------------------------------------------------------------------ constraints


@pytest.mark.parametrize(
    ("constraint", "change"),
    [
        ("Q1", {"scale": np.array(np.float32(0))}),
        ("Q1", {"scale": np.array(np.float32(-1))}),
        ("Q1", {"scale": np.array(np.float32(np.inf))}),
        ("Q1", {"scale": np.array(np.float32(np.nan))}),
        ("Q2", {"zero_point": np.array(8, np.int8), "storage": INT4}),
        ("Q3", {"zero_point": np.array(0, np.uint8)}),
        ("Q5", {"axis": 0}),
        ("Q5", {"scale": np.ones(3, np.float32), "zero_point": np.zeros(3, np.int8)}),
        ("Q6", {"scale": np.ones(3, np.float32), "axis": 0}),
    ],
)
def test_constraint(constraint: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=constraint):
        QParams(**{**NUMBERS, **change})


@given(pairs(blocks=True))
def test_chosen_numbers_keep_the_constraints(pair: tuple[Array, TensorSpec]) -> None:
    x, spec = pair
    numbers = numbers_for(x, spec)  # Q1 to Q3, Q5 and Q6 are checked by QParams itself
    if spec.symmetric:  # Q4
        middle = 0 if spec.storage.signed else (spec.qmax + 1) // 2
        assert set(numbers.zero_point.astype(np.int64).ravel().tolist()) == {middle}
    if spec.power_of_two:
        mantissa, _ = np.frexp(numbers.scale)
        assert set(mantissa.ravel().tolist()) == {0.5}


def test_bounds_of_a_spec() -> None:
    assert (S8_WEIGHT.qmin, S8_WEIGHT.qmax) == (-127, 127)
    three = TensorSpec(storage=INT4, symmetric=True, bits=3, narrow_range=True)
    assert (three.qmin, three.qmax) == (-3, 3)
    assert (U8.qmin, U8.qmax) == (0, 255)


# ------------------------------------------------------------------ quantize


@given(pairs(blocks=True))
def test_fake_quantization_is_what_the_stored_integers_say(pair: tuple[Array, TensorSpec]) -> None:
    x, spec = pair
    numbers = numbers_for(x, spec)
    wanted = dequantize(quantize(x, numbers), numbers)
    np.testing.assert_array_equal(fake_quantize(x, numbers), wanted)


@given(pairs(blocks=True))
def test_error_is_at_most_half_a_step(pair: tuple[Array, TensorSpec]) -> None:
    """In the range; the range holds all values, so a whole step covers a rounded zero point."""
    x, spec = pair
    numbers = numbers_for(x, spec)
    scale = expand(numbers.scale, numbers, x.shape).astype(np.float64)
    error = np.abs(fake_quantize(x, numbers).astype(np.float64) - x)
    # Rounding the zero point moves the range by up to half a step: values at its very end saturate
    # half a step further away. x / scale and its product are float32: a few units of the value.
    steps = 0.5 if spec.symmetric else 1.0
    assert np.all(error <= steps * scale * (1 + 1e-6) + 4 * EPSILON * np.abs(x))


@given(pairs())
def test_quantize_is_monotone(pair: tuple[Array, TensorSpec]) -> None:
    x, spec = pair
    assume(spec.granularity == "per_tensor")
    numbers = numbers_for(x, spec)
    flat = np.sort(x.ravel())
    assert np.all(np.diff(quantize(flat, numbers).astype(np.int64)) >= 0)


@given(pairs(blocks=True))
def test_quantize_is_idempotent(pair: tuple[Array, TensorSpec]) -> None:
    x, spec = pair
    numbers = numbers_for(x, spec)
    once = quantize(x, numbers)
    np.testing.assert_array_equal(quantize(dequantize(once, numbers), numbers), once)


@given(pairs(blocks=True))
def test_integers_stay_within_the_bits(pair: tuple[Array, TensorSpec]) -> None:
    x, spec = pair
    q = quantize(x * np.float32(3), numbers_for(x, spec)).astype(np.int64)
    assert q.min() >= spec.qmin
    assert q.max() <= spec.qmax
    assert q.shape == x.shape


@given(pairs())
def test_zero_is_exact(pair: tuple[Array, TensorSpec]) -> None:
    """Padding and ReLU depend on it."""
    x, spec = pair
    assert not fake_quantize(np.zeros_like(x), numbers_for(x, spec)).any()


def test_halves_round_to_even() -> None:
    numbers = QParams(**{**NUMBERS, "scale": np.array(np.float32(1))})
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert quantize(x, numbers).tolist() == [-2, -2, 0, 0, 2, 2]


def test_a_scalar_stays_an_array_of_rank_0() -> None:
    numbers = choose_qparams(U8, 0.0, 1.0)
    q = quantize(np.array(0.25, np.float32), numbers)
    assert (q.shape, q.dtype, int(q)) == ((), np.uint8, 64)  # 63.75


@given(pairs(blocks=True))
def test_same_bits_as_the_reference_evaluator(pair: tuple[Array, TensorSpec]) -> None:
    """QuantizeLinear and DequantizeLinear of opset 21, where the bits fill the storage type."""
    x, spec = pair
    spec = replace(spec, bits=spec.storage.bits, narrow_range=False)
    numbers = numbers_for(x, spec)
    q, restored = reference_pair(x, numbers)
    np.testing.assert_array_equal(q.astype(np.int64), quantize(x, numbers).astype(np.int64))
    np.testing.assert_array_equal(restored, dequantize(quantize(x, numbers), numbers))


def reference_pair(x: Array, numbers: QParams) -> tuple[Array, Array]:
    attrs = {} if numbers.axis is None else {"axis": numbers.axis}
    if numbers.block_size is not None:
        attrs["block_size"] = numbers.block_size
    storage, shape = numbers.storage.onnx, list(x.shape)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attrs),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attrs),
        ],
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("q", storage, shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
        ],
        [
            numpy_helper.from_array(numbers.scale, "s"),
            numpy_helper.from_array(numbers.zero_point, "z"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    q, restored = ReferenceEvaluator(model).run(None, {"x": x})
    return q, restored


# ------------------------------------------------------------------ choosing


def test_asymmetric_range() -> None:
    numbers = choose_qparams(U8, -1.0, 1.55)
    assert numbers.scale == np.float32(0.01)
    assert numbers.zero_point == 100


def test_a_range_above_zero_begins_at_zero() -> None:
    numbers = choose_qparams(U8, 2.0, 5.1)
    assert (numbers.scale, numbers.zero_point) == (np.float32(0.02), 0)
    signed = choose_qparams(TensorSpec(storage=INT8, symmetric=False), 2.0, 5.1)
    assert (signed.scale, signed.zero_point) == (np.float32(0.02), -128)


def test_no_width_means_scale_1() -> None:
    numbers = choose_qparams(S8_WEIGHT, np.array([0.0, -2.54]), np.array([0.0, 1.0]))
    assert numbers.scale.tolist() == [1.0, np.float32(0.02)]
    assert numbers.zero_point.tolist() == [0, 0]


def test_symmetric_unsigned_weights_have_127_steps_on_both_sides() -> None:
    numbers = choose_qparams(U8_WEIGHT_PER_TENSOR, -1.27, 0.5)
    assert (numbers.scale, numbers.zero_point) == (np.float32(0.01), 128)
    assert quantize(np.array([-1.27, 1.27], np.float32), numbers).tolist() == [1, 255]


@given(st.floats(1e-6, 1e6))
def test_power_of_two_rounds_up_but_not_more_than_needed(high: float) -> None:
    spec = TensorSpec(storage=INT8, symmetric=True, power_of_two=True)
    scale = float(choose_qparams(spec, 0.0, high).scale)
    # An exact power of two must survive the rounding of log2: 1e-9 of its logarithm is granted.
    assert scale >= high / 127 * (1 - 1e-8)
    assert scale < 2 * high / 127


def test_fixed_range_wins() -> None:
    spec = TensorSpec(storage=UINT8, symmetric=False, fixed=(0.0, 1.0))
    assert choose_qparams(spec, -40.0, 50.0).scale == np.float32(1 / 255)


def test_describe() -> None:
    assert U8.describe() == "u8 asymmetric"
    assert S8_WEIGHT.describe() == "s8 symmetric per_channel(0)"
    blocks = TensorSpec(
        storage=INT4, symmetric=True, bits=4, granularity="per_block", axis=0, block_size=32
    )
    assert blocks.describe() == "s4 symmetric per_block(0,32)"
