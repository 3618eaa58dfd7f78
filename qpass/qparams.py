"""What a tensor should become (`TensorSpec`) and the numbers it gets (`QParams`): pure numpy.

``q = saturate(round_half_even(x / scale) + zero_point)`` and ``x ~= (q - zero_point) * scale``, in
float32, the arithmetic of ONNX QuantizeLinear and DequantizeLinear (opset 21).

Constraints of `QParams`, checked on construction:
    Q1 scale is positive and finite;
    Q2 zero_point lies within the storage type;
    Q3 zero_point has the storage dtype;
    Q4 a symmetric spec has zero_point 0 (128 for unsigned 8 bit);
    Q5 axis is given exactly for per-channel and per-block scales;
    Q6 scale and zero_point have the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.dtypes import StorageType

Array = NDArray[Any]
Granularity = Literal["per_tensor", "per_channel", "per_block"]

# Smallest scale that is used: below it x / scale overflows float32 for ordinary x.
MIN_SCALE: Final = 1e-12
HALF: Final = np.finfo(np.float16)
EXACT_BITS: Final = 16  # float32 holds all integers below 2^24


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """The kind of integers a tensor should become; `QParams` adds the numbers.

    `bits` may be smaller than the storage type (w3a8 is stored in int4). `narrow_range` drops the
    most negative integer so that a sign flip stays representable. `fixed` pins the real range.
    `half_scale` rounds the scale to a number that float16 holds, where it is a normal one there.
    """

    storage: StorageType
    symmetric: bool
    bits: int = 8
    granularity: Granularity = "per_tensor"
    axis: int | None = None
    block_size: int | None = None
    narrow_range: bool = False
    power_of_two: bool = False
    half_scale: bool = False
    fixed: tuple[float, float] | None = None

    @property
    def qmin(self) -> int:
        """Smallest integer that this spec uses."""
        if not self.storage.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """Largest integer that this spec uses."""
        return (1 << (self.bits - int(self.storage.signed))) - 1

    def describe(self) -> str:
        """Short text for tables, such as ``u8 asymmetric`` or ``s8 symmetric per_channel(0)``."""
        kind = f"{'s' if self.storage.signed else 'u'}{self.bits}"
        text = f"{kind} {'symmetric' if self.symmetric else 'asymmetric'}"
        if self.granularity == "per_channel":
            text += f" per_channel({self.axis})"
        if self.granularity == "per_block":
            text += f" per_block({self.axis},{self.block_size})"
        return text + (" pow2" if self.power_of_two else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class QParams:
    """Scale (float32) and zero_point (storage dtype) of one tensor, scalar or per `axis`."""

    scale: Array
    zero_point: Array
    storage: StorageType
    qmin: int
    qmax: int
    axis: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        """Check the constraints Q1 to Q6."""
        if not (np.all(self.scale > 0) and np.all(np.isfinite(self.scale))):
            raise ValueError("Q1: scale must be positive and finite")
        zero_point = self.zero_point.astype(np.int64)
        if np.any(zero_point < self.storage.qmin) or np.any(zero_point > self.storage.qmax):
            raise ValueError(f"Q2: zero_point outside of {self.storage.name}")
        if self.zero_point.dtype != np.dtype(self.storage.numpy):
            raise ValueError(f"Q3: zero_point is {self.zero_point.dtype}, not {self.storage.name}")
        if (self.axis is None) != (self.scale.ndim == 0):
            raise ValueError("Q5: axis goes with a scale that is not a scalar")
        if self.scale.shape != self.zero_point.shape:
            raise ValueError(f"Q6: scale {self.scale.shape}, zero_point {self.zero_point.shape}")


def as_half(scale: Array) -> Array:
    """Round scales, float64, to numbers of float16; those too small or large for it stay."""
    half = np.clip(scale, HALF.tiny, HALF.max).astype(np.float16).astype(np.float64)
    rounded: Array = np.where((scale >= HALF.tiny) & (scale <= HALF.max), half, scale)
    return rounded


def choose_qparams(spec: TensorSpec, low: Array | float, high: Array | float) -> QParams:
    """Turn real ranges into scale and zero_point.

    `low` and `high` are scalars, or arrays of one value per channel (per block: the shape of the
    scale). Zero is always included, so that padding and ReLU stay exact. A range of zero width gets
    scale 1: all values are zero. With `power_of_two` the scale is rounded up, so nothing clips.
    """
    if spec.fixed is not None:
        low, high = spec.fixed
    low64 = np.minimum(np.asarray(low, np.float64), 0.0)
    high64 = np.maximum(np.asarray(high, np.float64), 0.0)
    span = float(spec.qmax - spec.qmin)
    if spec.symmetric:
        # 128 is the middle of an unsigned type; only 127 steps lie above it.
        steps = float(spec.qmax) if spec.storage.signed else float(spec.qmax // 2)
        scale = np.maximum(-low64, high64) / steps
    else:
        scale = (high64 - low64) / span
    scale = np.where(scale < MIN_SCALE, 1.0, scale)
    if spec.power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale) - 1e-9))
    if spec.half_scale:
        scale = as_half(scale)
    scale32 = scale.astype(np.float32)
    if spec.symmetric:
        middle = 0 if spec.storage.signed else (spec.qmax + 1) // 2
        zero_point = np.full(scale.shape, middle, np.int64)
    else:
        zero_point = np.rint(spec.qmin - low64 / scale32.astype(np.float64)).astype(np.int64)
        zero_point = np.clip(zero_point, spec.qmin, spec.qmax)
    return QParams(
        scale=scale32,
        zero_point=zero_point.astype(spec.storage.numpy),
        storage=spec.storage,
        qmin=spec.qmin,
        qmax=spec.qmax,
        axis=spec.axis if spec.granularity != "per_tensor" else None,
        block_size=spec.block_size,
    )


def expand(values: Array, qparams: QParams, shape: tuple[int, ...]) -> Array:
    """Broadcast a per-channel or per-block array to the `shape` of the tensor it belongs to."""
    if qparams.axis is None:
        return values
    axis = qparams.axis % len(shape)
    if qparams.block_size is not None:
        whole = np.repeat(values, qparams.block_size, axis=axis)
        return whole[(slice(None),) * axis + (slice(0, shape[axis]),)]
    return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def quantize(x: Array, qparams: QParams) -> Array:
    """Quantize float `x` to the storage dtype of `qparams`, bit for bit as QuantizeLinear does.

    With `bits` below the storage type the result saturates at the narrower bounds.
    """
    return _integers(x, qparams).astype(np.int32).astype(qparams.storage.numpy)


def _integers(x: Array, qparams: QParams) -> Array:
    """Return the stored integers as float32."""
    scale = expand(qparams.scale, qparams, x.shape)
    zero_point = expand(qparams.zero_point.astype(np.float32), qparams, x.shape)
    q = np.asarray(np.asarray(x, np.float32) / scale)  # numpy makes a scalar of a 0-d quotient
    np.rint(q, out=q)
    q += zero_point
    return np.clip(q, qparams.qmin, qparams.qmax, out=q)


def dequantize(q: Array, qparams: QParams) -> Array:
    """Return the float32 values of stored integers, as DequantizeLinear does."""
    zero_point = expand(qparams.zero_point.astype(np.int32), qparams, q.shape)
    scale = expand(qparams.scale, qparams, q.shape)
    return (q.astype(np.int32) - zero_point).astype(np.float32) * scale


def fake_quantize(x: Array, qparams: QParams) -> Array:
    """Return `dequantize(quantize(x))`: what the integers stand for."""
    if qparams.storage.bits > EXACT_BITS:
        return dequantize(quantize(x, qparams), qparams)
    # float32 holds these integers and their differences exactly, so nothing is stored between.
    q = _integers(x, qparams)
    q -= expand(qparams.zero_point.astype(np.float32), qparams, x.shape)
    q *= expand(qparams.scale, qparams, x.shape)
    return q


def channel_range(x: Array, axis: int | None) -> tuple[Array, Array]:
    """Return the minimum and maximum of `x`, per `axis` where one is given, float64."""
    axes = None if axis is None else tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return x.min(axis=axes).astype(np.float64), x.max(axis=axes).astype(np.float64)
