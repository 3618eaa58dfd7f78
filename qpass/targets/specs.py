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
S8_WEIGHT_PER_TENSOR: Final = TensorSpec(storage=INT8, symmetric=True, narrow_range=True)
