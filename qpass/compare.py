"""Compare two models layer by layer: which op loses how much."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qpass.protos import has_narrow_activations
from qpass.saturation import saturates
from qpass.verify.engines import KEEP_SIGNED, session_options
from qpass.verify.metrics import ErrorMeter
from qpass.verify.session import NARROW_IN_FLOAT

Array = NDArray[Any]
COMPARED_OPS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """How far one tensor of model B is from the same tensor of model A."""

    name: str
    op: str
    tensor: str
    sqnr_db: float
    cosine: float
    max_abs: float
    max_lsb: float | None  # in steps of the Q behind it in B; None where there is none


def common_layers(a: onnx.ModelProto, b: onnx.ModelProto) -> list[tuple[str, str, str]]:
    """Return (node, tensor in A, tensor in B) of the linear ops of A that B has as well.

    A node is the same when its name is; where a graph output was requantized, B's float tensor has
    another name, so tensors go by the node.
    """
    theirs = {node.name: node for node in b.graph.node if node.op_type in COMPARED_OPS}
    return [
        (node.name, node.output[0], theirs[node.name].output[0])
        for node in a.graph.node
        if node.op_type in COMPARED_OPS and node.name in theirs
    ]


def compare_layers(
    a: onnx.ModelProto,
    b: onnx.ModelProto,
    samples: Iterable[Mapping[str, Array]],
    *,
    without: Container[str] = (),
) -> list[LayerDifference]:
    """Run both models on each sample with the outputs of all common linear ops tapped.

    A tapped output keeps an engine from fusing behind it, so integer layers of B are computed as
    their QDQ form says: the numbers show the quantization, not an engine. One sample at a time is
    held in memory. Nodes in `without` are left out.
    """
    layers = [layer for layer in common_layers(a, b) if layer[0] not in without]
    if not layers:
        return []
    sessions = [
        _tapped(model, [layer[1 + side] for layer in layers]) for side, model in enumerate((a, b))
    ]
    meters = [ErrorMeter() for _ in layers]
    for feeds in samples:
        outputs = [session.run(taps, dict(feeds)) for session, taps in sessions]
        for meter, expected, got in zip(meters, *outputs, strict=True):
            meter.update(expected, got)
    ops = {node.name: node.op_type for node in a.graph.node}
    steps = _steps(b)
    return [
        LayerDifference(
            name=name,
            op=ops[name],
            tensor=tensor,
            sqnr_db=meter.sqnr_db,
            cosine=meter.cosine,
            max_abs=meter.max_abs,
            max_lsb=meter.max_abs / steps[other] if other in steps else None,
        )
        for (name, tensor, other), meter in zip(layers, meters, strict=True)
    ]


def _tapped(model: onnx.ModelProto, taps: list[str]) -> tuple[Any, list[str]]:
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    known = {value.name for value in tapped.graph.output}
    types = {value.name: value for value in tapped.graph.value_info}
    for name in dict.fromkeys(taps):
        if name not in known:
            value = types.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            tapped.graph.output.append(value)
    narrow = NARROW_IN_FLOAT if has_narrow_activations(model) else {}
    session = ort.InferenceSession(
        tapped.SerializeToString(),
        # Where kernels saturate, the graph as it is written is the exact one.
        session_options(threads=0, optimize=not saturates(), config={**KEEP_SIGNED, **narrow}),
        providers=["CPUExecutionProvider"],
    )
    return session, taps


def _steps(model: onnx.ModelProto) -> dict[str, float]:
    """Return the scale of the per-tensor Q that reads each tensor, maybe through Relu or Clip."""
    constants = {proto.name: proto for proto in model.graph.initializer}
    steps: dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] in constants:
            scale = numpy_helper.to_array(constants[node.input[1]])
            if scale.size == 1:
                steps.setdefault(node.input[0], float(np.ravel(scale)[0]))
    for node in reversed(model.graph.node):
        if node.op_type in ("Relu", "Clip") and node.output[0] in steps:
            steps.setdefault(node.input[0], steps[node.output[0]])
    return steps
