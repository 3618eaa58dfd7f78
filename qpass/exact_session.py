"""Sessions of onnxruntime that compute what a quantized file says, as fast as this CPU allows.

Where the kernels saturate (`qpass.saturation`) there are exact ones for unsigned activations;
files with signed ones are run as they are written, without the optimizer.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime as ort

from qpass.protos import has_narrow_activations
from qpass.saturation import exact_entries, saturates
from qpass.targets.schema import Target
from qpass.verify.engines import KEEP_SIGNED, session_options
from qpass.verify.session import NARROW_IN_FLOAT


def open_exact(model: onnx.ModelProto, target: Target, *, threads: int = 0) -> Any:
    """Return a session for a quantized model of `target`, or for a float one.

    Measured without VNNI against a session without optimizer: resnet18 39 to 73 ms, mobilenet_v2
    13 to 25 ms, vit_tiny 38 to 63 ms.
    """
    signed = target.activation.storage.signed
    exact = {} if signed else exact_entries()
    if has_narrow_activations(model):
        exact = NARROW_IN_FLOAT
    return ort.InferenceSession(
        model.SerializeToString(),
        session_options(
            threads=threads,
            optimize=not (signed and saturates()),
            config={**KEEP_SIGNED, **exact},
        ),
        providers=["CPUExecutionProvider"],
    )
