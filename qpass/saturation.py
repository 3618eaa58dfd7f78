"""Whether this processor multiplies 8-bit integers exactly, and what makes onnxruntime do so.

Without VNNI instructions, x86 kernels for u8 times s8 use ``vpmaddubsw``, which adds two products
in int16: 2 * 255 * 127 does not fit and saturates. onnxruntime then computes other numbers than
the file says (measured with 1.31.1 on AVX2: 64 products of 255 * 127 give 1,048,544 instead of
2,072,640), silently. The session entry ``session.x64quantprecision`` makes it use slower kernels
for u8 times u8, which are exact; OpenVINO has no such switch. Weights of 7 bits never saturate:
2 * 255 * 63 < 2^15.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

EXACT_KERNELS: Final[Mapping[str, str]] = {"session.x64quantprecision": "1"}
_DEPTH: Final = 64  # products in each sum of the probe; a multiple of every kernel's step


@cache
def saturates() -> bool:
    """Return True where onnxruntime's product of u8 and s8 is not exact on this processor.

    Found by running it: one product of the largest numbers, about a millisecond, once a process.
    """
    weight = np.full((_DEPTH, 8), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [8, _DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": np.full((8, _DEPTH), 255, np.uint8)})
    return bool((np.asarray(product) != _DEPTH * 255 * 127).any())


def exact_entries() -> Mapping[str, str]:
    """Return the session entries that make onnxruntime's integer products exact here."""
    return EXACT_KERNELS if saturates() else {}
