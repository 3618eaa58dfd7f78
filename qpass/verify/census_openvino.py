"""Read back what OpenVINO's CPU plugin made of a model, from its runtime model.

Measured on 2026.4.1:

- The element types of the first two inputs of a linear op are what can be relied on: both i8 or
  u8 means an integer product; float activations with i4, i8 or u8 weights are weight compression.
  `primitiveType` agrees for static shapes (``brgemm_avx512_I8``) but starts with ``undef`` for
  dynamic ones, and `runtimePrecision` is the type of the *weights* for compressed weights.
- The plugin gathers attention and small stacks of linear layers into ``Subgraph`` ops whose body
  cannot be seen. ``SNIPPETS_MODE=DISABLE`` leaves these ops apart; precisions are decided before
  that step, so the census is taken with it. A census therefore has no ``Subgraph`` where the real
  run may have one.
- A node keeps its ONNX name, or that of its output when it has none, or when it makes a graph
  output (then also ``NAME_original``). Conv and Gemm with bias are split: the product is
  ``NAME/WithoutBiases``, the sum ``NAME``. Dequantization that moved behind the op is
  ``NAME/DequantizationMultiply`` and ``.../DequantizationSubtract``. An op that was merged with a
  Mul behind it carries only the name of that Mul.
- The bodies of If and Loop do not show: what is inside cannot be traced.
- MatMulInteger runs as a float FullyConnected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qpass.verify.engine_op import Census, EngineOp, Kind, Precision
from qpass.verify.engines import compile_openvino, openvino_config, openvino_version

_LINEAR: Final = frozenset({
    "Convolution",
    "Deconvolution",
    "DeformableConvolution",
    "FullyConnected",
    "GatherMatmul",
    "LLMMLP",
    "MHA",
    "MatMul",
    "QKVProjection",
    "ScaledDotProductAttention",
    "ScaledDotProductAttentionWithKVCache",
})  # fmt: skip
# The second input is the state, not the weight.
_RECURRENT: Final = frozenset({"RNNCell", "RNNSeq"})
_NOT_RUN: Final = frozenset({"Const", "Constant", "Input", "Output", "Parameter", "Result"})
_OTHER: Final = frozenset({
    "Broadcast",
    "Concatenation",
    "Convert",
    "FakeQuantize",
    "Gather",
    "Pad",
    "Reorder",
    "Reshape",
    "ShapeOf",
    "Split",
    "StridedSlice",
    "Tile",
    "Transpose",
})  # fmt: skip
_BYTES: Final = frozenset({"i8", "u8"})
_SMALL: Final = _BYTES | {"i2", "i4", "u1", "u2", "u3", "u4", "u6", "nf4"}
_FLOATS: Final = frozenset({"f32", "f16", "bf16", "f64"})
_SUFFIX: Final = re.compile(
    r"(_original|/WithoutBiases|/DequantizationMultiply|/DequantizationSubtract|/transpose_[ab])$"
)


def read_back_openvino(model: Path, config: Mapping[str, str]) -> Census:
    """Return the census of `model` in OpenVINO's CPU plugin.

    Raises:
        EngineError: OpenVINO is not installed or refused the model.
    """
    compiled = compile_openvino(
        model, openvino_config(config={"SNIPPETS_MODE": "DISABLE", **config})
    )
    runtime = compiled.get_runtime_model()
    ops = tuple(op for node in runtime.get_ordered_ops() for op in _engine_op(node))
    return Census(engine="openvino", version=openvino_version(), ops=ops)


def _engine_op(node: Any) -> Iterator[EngineOp]:
    info = node.get_rt_info()
    layer = info["layerType"].astype(str)
    if layer in _NOT_RUN:
        return
    inputs = [port.get_element_type().to_string() for port in node.inputs()]
    precision, kind = _classify(layer, inputs, info["runtimePrecision"].astype(str))
    originals = info["originalLayersNames"].astype(str).split(",")
    covers = dict.fromkeys(
        alias for name in (node.get_friendly_name(), *originals) for alias in _aliases(name)
    )
    yield EngineOp(
        name=node.get_friendly_name(),
        op=layer,
        precision=precision,
        kind=kind,
        covers=tuple(name for name in covers if name),
    )


def _classify(layer: str, inputs: list[str], runtime: str) -> tuple[Precision, Kind]:
    if layer in _RECURRENT:
        return ("integer" if inputs[0] in _BYTES and runtime in _BYTES else "float"), "linear"
    if layer in _LINEAR:
        activation, weight = inputs[:2]
        if activation in _BYTES and weight in _BYTES:
            return "integer", "linear"
        if activation not in _BYTES and weight in _SMALL:
            return "integer", "weight_only"
        return "float", "linear"
    if layer in _OTHER:
        return "other", "other"
    if runtime in _BYTES:
        return "integer", "other"
    return ("float" if runtime in _FLOATS else "other"), "other"


def _aliases(name: str) -> Iterator[str]:
    """Yield `name`, then what is left as the marks of the plugin are taken off one by one."""
    while True:
        yield name
        shorter = _SUFFIX.sub("", name)
        if shorter == name:
            return
        name = shorter
