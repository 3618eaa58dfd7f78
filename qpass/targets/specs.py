"""Tensor specs that several targets share."""

from __future__ import annotations

from typing import Final

from qpass.dtypes import INT8, UINT8
from qpass.qparams import TensorSpec

U8: Final = TensorSpec(storage=UINT8, symmetric=False)
S8: Final = TensorSpec(storage=INT8, symmetric=False)
S8_SYMMETRIC: Final = TensorSpec(storage=INT8, symmetric=True)
# [-127, 127]: a sign flip stays representable (a negative compensation gain negates integers).
S8_WEIGHT: Final = TensorSpec(
    storage=INT8, symmetric=True, granularity="per_channel", axis=0, narrow_range=True
)
# Zero point 128; the largest magnitude is 127 steps, so 0 is left out as -128 is in S8.
U8_WEIGHT_PER_TENSOR: Final = TensorSpec(storage=UINT8, symmetric=True)
S8_POWER_OF_TWO: Final = TensorSpec(storage=INT8, symmetric=True, power_of_two=True)
S8_WEIGHT_POWER_OF_TWO: Final = TensorSpec(
    storage=INT8, symmetric=True, narrow_range=True, power_of_two=True
)
