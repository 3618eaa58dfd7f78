"""Storage types: bounds, ONNX enums, packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from qpass.dtypes import (
    INT4,
    INT8,
    INT16,
    INT32,
    STORAGE_TYPES,
    UINT4,
    UINT8,
    UINT16,
    StorageType,
    storage_for,
    storage_of,
)
from tests.strategies import storages


def test_bounds_are_those_of_two_s_complement() -> None:
    assert [(t.qmin, t.qmax) for t in (INT4, UINT4, INT8, UINT8, INT16, UINT16)] == [
        (-8, 7),
        (0, 15),
        (-128, 127),
        (0, 255),
        (-32768, 32767),
        (0, 65535),
    ]
    assert (INT32.qmin, INT32.qmax) == (-(2**31), 2**31 - 1)


@pytest.mark.parametrize("storage", STORAGE_TYPES, ids=lambda s: s.name)
def test_the_onnx_enum_and_the_numpy_dtype_belong_together(storage: StorageType) -> None:
    values = np.array([storage.qmin, 0, 1, storage.qmax]).astype(storage.numpy)
    proto = numpy_helper.from_array(values, "t")
    assert proto.data_type == storage.onnx
    assert storage_of(proto.data_type) is storage
    np.testing.assert_array_equal(
        numpy_helper.to_array(proto).astype(np.int64), [storage.qmin, 0, 1, storage.qmax]
    )


@given(storages(), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_packing_is_a_bijection_for_every_length(
    storage: StorageType, size: int, seed: int
) -> None:
    """Two 4-bit values share a byte: odd sizes leave half a byte over."""
    random = np.random.default_rng(seed)
    integers = random.integers(storage.qmin, storage.qmax, size, endpoint=True)
    proto = numpy_helper.from_array(integers.astype(storage.numpy), "t")
    assert len(proto.raw_data) == (size * storage.bits + 7) // 8
    np.testing.assert_array_equal(numpy_helper.to_array(proto).astype(np.int64), integers)


@given(st.integers(2, 16), st.booleans())
def test_storage_for_is_the_smallest_that_holds_the_bits(bits: int, signed: bool) -> None:
    storage = storage_for(bits, signed=signed)
    assert storage.signed is signed
    assert storage.bits >= bits
    smaller = [t for t in STORAGE_TYPES if t.signed is signed and bits <= t.bits < storage.bits]
    assert smaller == []


def test_there_is_no_storage_above_16_bits() -> None:
    with pytest.raises(ValueError, match="17-bit"):
        storage_for(17, signed=True)


def test_float_is_no_storage_type() -> None:
    with pytest.raises(KeyError):
        storage_of(1)
