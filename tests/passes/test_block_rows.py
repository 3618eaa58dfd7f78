"""Rows of a block: the positions of its input that lie on those of its output."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.passes.block_rows import strides_of, to_rows
from tests.linear_blocks import outputs
from tests.small_models import from_text


@pytest.mark.parametrize(
    ("before", "after", "axis", "strides"),
    [
        ((2, 5, 16), (2, 5, 16), -1, ()),
        ((2, 16), (2, 32), -1, ()),
        ((2, 8, 9, 7), (2, 8, 9, 7), 1, (1, 1)),
        ((2, 8, 56, 55), (2, 16, 28, 28), 1, (2, 2)),
        ((2, 8, 10), (2, 8, 4), 1, (3,)),
        ((2, 5, 16), (2, 6, 16), -1, None),
        ((2, 8, 8, 8), (2, 8, 6, 6), 1, None),
        ((2, 8, 4, 4), (2, 8, 8, 8), 1, None),
        ((2, 8, 4, 4), (4, 8, 4, 4), 1, None),
        ((2, 16), (2, 1, 16), -1, None),
    ],
)
def test_strides(before, after, axis, strides) -> None:
    assert strides_of(before, after, axis) == strides


def test_rows_are_those_that_the_convolution_sees() -> None:
    x = np.random.default_rng(0).standard_normal((2, 8, 7, 6)).astype(np.float32)
    weight = np.eye(8, dtype=np.float32)[:, :, None, None]
    graph = from_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2,8,7,6] x) => (float[2,8,4,2] y)'
        " { y = Conv <strides = [2, 3]> (x, w) }",
        w=weight,
    )
    taken = to_rows(x, 1, (2, 3))
    np.testing.assert_array_equal(taken, to_rows(outputs(graph, [{"x": x}]), 1, (1, 1)))
