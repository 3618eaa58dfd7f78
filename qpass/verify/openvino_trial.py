"""Let another process find out whether OpenVINO survives a file.

Measured on 2026.4.1: a Concat of float tensors whose output is quantized to 4 bits in front of a
Conv corrupts the memory of the process that compiles it (with 8 bits, and with quantizers in front
of the Concat, it does not). No exception comes of that, and nothing is left to report it. So files
that quantize activations to 4 bits are compiled by a process of their own first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnx

from qpass.errors import ModelError
from qpass.skim import skim

FOUR_BITS: Final = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
ZERO_POINT: Final = 2  # number of the input of QuantizeLinear that has the type of its output
_COMPILE: Final = (
    "import json, sys, openvino;"
    "openvino.Core().compile_model(sys.argv[1], 'CPU', json.loads(sys.argv[2]))"
)


def crash_of(model: Path, config: Mapping[str, Any]) -> str | None:
    """Return how a process ends that compiles `model`, if something kills it.

    Tried where activations are quantized to 4 bits; what cannot be read is left to the engine.
    """
    if not has_narrow_activations(model):
        return None
    command = [sys.executable, "-c", _COMPILE, str(model), json.dumps(dict(config))]
    code = subprocess.run(command, capture_output=True, check=False).returncode  # noqa: S603 - ours
    # A refusal is an exception, which the caller gets in words when it compiles the file itself.
    return f"a process that compiled it was killed by signal {-code}" if code < 0 else None


def has_narrow_activations(model: Path) -> bool:
    """True for a file that quantizes activations to 4 bits; False for one that cannot be read."""
    try:
        graph = skim(model).graph
    except ModelError:
        return False
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return any(
        node.op_type == "QuantizeLinear"
        and len(node.input) > ZERO_POINT
        and types.get(node.input[ZERO_POINT]) in FOUR_BITS
        for node in graph.node
    )
