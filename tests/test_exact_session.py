"""Sessions for trials compute what the file says, on CPUs without VNNI as well."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qpass.exact_session import open_exact
from qpass.targets import TARGETS
from tests.jobs import model_of

DEPTH = 64


def product(activation: str, low: int, value: int) -> onnx.ModelProto:
    """DQ(x) @ DQ(w): large integers, whose pairwise products do not fit 16 bits."""
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g ({activation}[4,{DEPTH}] x) => (float[4,8] y) {{
      a = DequantizeLinear (x, s, z)
      b = DequantizeLinear <axis = 1> (w, t, u)
      y = MatMul (a, b)
    }}"""
    return model_of(
        text,
        s=np.float32(1),
        z=np.array(low, activation),
        w=np.full((DEPTH, 8), value, np.int8),
        t=np.ones(8, np.float32),
        u=np.zeros(8, np.int8),
    )


@pytest.mark.parametrize(
    ("target", "activation", "x"),
    [("ort-x86", "uint8", 255), ("ort-arm", "int8", 127), ("tensorrt", "int8", -128)],
)
def test_products_are_exact(target: str, activation: str, x: int) -> None:
    session = open_exact(product(activation, 0, 127), TARGETS[target], threads=1)
    (got,) = session.run(None, {"x": np.full((4, DEPTH), x, activation)})
    assert (got == DEPTH * x * 127).all()
