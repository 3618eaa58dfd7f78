"""Read back what onnxruntime made of a model: save its optimized graph and classify the nodes.

How nodes are named there, measured on 1.31.1; `_aliases` and `_covers` follow from it:

- QLinearConv, QLinearMatMul, MatMulIntegerToFloat, QGemm, DynamicQuantizeMatMul, MatMulNBits and
  FusedConv keep the name of the Conv, MatMul or Gemm. Layout changes append ``_token_N``; the
  output of the op is then called after the node, and the tensor of the file appears behind a
  Transpose, or not at all where two Transposes cancelled out.
- MatMul + Add: ``NAME/MatMulAddFusion``, between two Reshapes when the rank is above two.
- MatMul with a scale or a Transpose: ``NAME/MatMulScaleFusion/``,
  ``NAME/MatmulTransposeFusion/``, also one after the other.
- Gemm + activation: ``fused NAME``.
- A float Conv in the NCHWc layout is called after the last tensor it absorbed, ``TENSOR_nchwc``,
  and its weight and bias lose their names (``reorder_token_N``).
- A node without name stays without, or gets the suffix alone. Its weight remains: quantized ops
  keep the initializer's name (MatMulNBits appends ``_T``). Equal scales are merged, so the name
  of a scale identifies nothing.
- A Conv or Gemm between DQ and Q becomes QLinearConv or QGemm even when its weight is float in the
  file (WeightBiasQuantization, at load); a MatMul does not.
- Types of tensors are saved for most of the tensors, not for those made by layout changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import onnx
import onnxruntime as ort

from qpass.verify.engine_op import (
    INTEGER_LINEAR,
    LINEAR,
    WEIGHT_ONLY_LINEAR,
    Census,
    EngineOp,
    Kind,
    Precision,
)
from qpass.verify.engines import open_session, session_options

_FUSION_SUFFIX: Final = re.compile(
    r"(_token_\d+|_nchwc|/MatMulAddFusion|/MatMulScaleFusion/|/MatmulTransposeFusion/)$"
)
# Change the layout of a result, not its meaning.
_LAYOUT_OPS: Final = frozenset({"Transpose", "Reshape", "ReorderInput", "ReorderOutput"})
# Between an initializer and the op that uses it.
_WEIGHT_PATH: Final = frozenset({"DequantizeLinear", "Transpose", "Reshape", "Cast"})
_OTHER_OPS: Final = _LAYOUT_OPS | {
    "Cast",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "DepthToSpace",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "Expand",
    "Flatten",
    "Gather",
    "GatherBlockQuantized",
    "GatherElements",
    "GatherND",
    "Identity",
    "If",
    "Loop",
    "Pad",
    "QuantizeLinear",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Shape",
    "Size",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Unsqueeze",
}
# Contributed ops that exist for 8-bit tensors only.
_INTEGER_ONLY: Final = frozenset({"NhwcMaxPool", "QEmbedLayerNormalization"})
_FLOAT_TYPES: Final = frozenset({
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BFLOAT16,
})  # fmt: skip
_BYTE_TYPES: Final = frozenset({onnx.TensorProto.INT8, onnx.TensorProto.UINT8})


def read_back_ort(model: Path, workdir: Path, config: Mapping[str, str]) -> Census:
    """Return the census of `model` in onnxruntime's CPU provider with all optimizations.

    The optimized graph passes through two files in `workdir` (structure, and the initializers,
    which keeps models above 2 GB possible); both are removed again.

    Raises:
        EngineError: onnxruntime refused the model.
    """
    saved = workdir / f"{model.stem}.optimized.onnx"
    weights = saved.with_suffix(".data")
    external = {"session.optimized_model_external_initializers_file_name": weights.name}
    options = session_options(config={**config, **external})
    options.optimized_model_filepath = str(saved)
    try:
        open_session(model, options)
        graph = onnx.load(saved, load_external_data=False).graph
    finally:
        saved.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)
    return Census(engine="ort", version=str(ort.__version__), ops=tuple(_ops(graph)))


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the bodies of If, Loop and Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _ops(graph: onnx.GraphProto) -> Iterator[EngineOp]:
    initializers = {tensor.name for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output if name}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.output)
        if value.type.HasField("tensor_type")
    }
    for node in graph.node:
        precision, kind = _classify(node, types)
        yield EngineOp(
            name=node.name,
            op=node.op_type,
            precision=precision,
            kind=kind,
            covers=_covers(node, producers, readers, initializers),
        )
        for body in subgraphs(node):
            yield from _ops(body)


def _classify(node: onnx.NodeProto, types: Mapping[str, int]) -> tuple[Precision, Kind]:
    op = node.op_type
    if op in WEIGHT_ONLY_LINEAR:
        return "integer", "weight_only"
    if op in LINEAR:
        return ("integer" if op in INTEGER_LINEAR else "float"), "linear"
    if op in _OTHER_OPS:
        return "other", "other"
    if op.startswith("QLinear") or op in _INTEGER_ONLY:
        return "integer", "other"
    # Without a type the tensor was made by a fusion, and those fuse float ops.
    element = types.get(node.output[0], onnx.TensorProto.FLOAT)
    if element in _FLOAT_TYPES:
        return "float", "other"
    return ("integer" if element in _BYTE_TYPES else "other"), "other"


def _covers(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, list[onnx.NodeProto]],
    initializers: set[str],
) -> tuple[str, ...]:
    names = dict.fromkeys(_aliases(node.name))
    pending = [name for name in node.output if name]
    while pending:
        tensor = pending.pop()
        names[tensor] = None
        pending += [
            output
            for reader in readers.get(tensor, ())
            if reader.op_type in _LAYOUT_OPS and reader.input[0] == tensor
            for output in reader.output
            if output not in names
        ]
    for tensor in node.input:
        root = tensor
        while root in producers and producers[root].op_type in _WEIGHT_PATH:
            root = producers[root].input[0]
        if root in initializers:
            names.update(dict.fromkeys((root, root.removesuffix("_T"))))
    return tuple(name for name in names if name)


def _aliases(name: str) -> Iterator[str]:
    """Yield `name`, then what is left as the marks of the fusions are taken off one by one."""
    yield name
    name = name.removeprefix("fused ")
    while True:
        yield name
        shorter = _FUSION_SUFFIX.sub("", name)
        if shorter == name:
            return
        name = shorter
