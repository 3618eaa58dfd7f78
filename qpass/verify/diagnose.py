"""Say which rule of an engine kept an op in float, by looking at the graph around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qpass.verify.session import IN_FLOAT, INTEGER_PASSES, recorded_entries

# Beside these, an engine's CPU kernels take 8-bit integers only.
NARROW_TYPES: Final[dict[int, str]] = {
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "uint4",
    TensorProto.INT16: "int16",
    TensorProto.UINT16: "uint16",
}


class Diagnosis:
    """Reads one QDQ model and explains, node by node, what may have stopped an engine."""

    def __init__(self, model: onnx.ModelProto, config: Mapping[str, str] | None = None) -> None:
        """Index `model`, whose weights need not be loaded; `config` is what the engine was given.

        Without it the model's metadata say it.
        """
        graph = model.graph
        self.nodes = {node.name: node for node in graph.node}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.constants: Mapping[str, TensorProto] = {i.name: i for i in graph.initializer}
        recorded = {entry.key: entry.value for entry in model.metadata_props}
        entries = {**recorded_entries(recorded), **(config or {})}
        # What makes an engine run Q and DQ in float, by engine.
        self.in_float = {
            engine: f"{key}={value}"
            for engine, key, value in (("ort", IN_FLOAT, "1"), ("openvino", INTEGER_PASSES, "NO"))
            if entries.get(key) == value
        }

    def explain(self, engine: str, name: str) -> tuple[str, str]:
        """Return (rule, reason) for node `name` that `engine` runs in float."""
        node = self.nodes.get(name)
        if node is None:
            return f"{engine}/unknown", "the node is not in the file any more"
        rule = f"{engine}/{node.op_type}"
        dequantizers = [self._dequantizer(tensor) for tensor in node.input[:2]]
        left, right = [*dequantizers, None][:2]
        if left is None and right is not None and right.input[0] in self.constants:
            reason = self._weight_only_reason(engine, node, right)
            return rule, reason or "no rule that we know explains it; please report the model"
        if any(dq is None for dq in dequantizers):
            return rule, "an input is float: no DequantizeLinear in front of it"
        types = [self._stored_type(dq) for dq in dequantizers if dq is not None]
        for stored in types:
            if stored in NARROW_TYPES:
                return rule, f"the engine has no {NARROW_TYPES[stored]} kernel for this op"
        if engine in self.in_float:
            return rule, (
                f"the engine runs Q and DQ of this file in float ({self.in_float[engine]}): it has "
                "activations of 4 bits"
            )
        reason = (
            self._ort_reason(node, types)
            if engine == "ort"
            else self._openvino_reason([dq for dq in dequantizers if dq is not None])
        )
        return rule, reason or "no rule that we know explains it; please report the model"

    def _ort_reason(self, node: onnx.NodeProto, types: list[int]) -> str:
        if types[0] == TensorProto.INT8 and types[1] == TensorProto.UINT8:
            return "int8 activations need int8 weights"
        if node.op_type == "ConvTranspose":
            return "onnxruntime has no integer ConvTranspose"
        if node.op_type == "Conv":
            return self._conv_output_reason(node, types[0])
        if node.op_type == "MatMul" and any(
            reader.op_type == "Add" and self._is_vector(reader) for reader in self._behind(node)
        ):
            return "MatMulAddFusion made a float Gemm of it: the bias behind it is a vector"
        if len(node.input) > 2 and self._dequantizer(node.input[2]) is None:
            return "its bias is float"
        return ""

    def _weight_only_reason(self, engine: str, node: onnx.NodeProto, dq: onnx.NodeProto) -> str:
        """Say why no kernel reads the integer weight behind `dq` (see `qpass.targets.ort_x86`)."""
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in dq.attribute}
        gemm = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type not in ("Gemm", "MatMul"):
            return f"no kernel reads integer weights of {node.op_type} behind float activations"
        if len(self.constants[dq.input[0]].dims) != 2:
            return "its weight is no matrix"
        if engine != "ort":
            return ""
        if gemm.get("transB", 0):
            return "MatMulNBits takes no transposed weight"
        if gemm.get("alpha", 1.0) != 1.0 or gemm.get("transA", 0):
            return "MatMulNBits takes no Gemm with alpha or transA"
        if any(len(self.readers.get(name, ())) > 1 for name in (*dq.input, *dq.output)):
            return "its integer weight, scale or zero point has another reader"
        behind = self._behind(node)
        if len(behind) == 1 and behind[0].op_type in ("Relu", "Clip"):
            return f"{behind[0].op_type} behind it hides it from the fusion"
        block = attributes.get("block_size", 0)
        if block and (block < 16 or block & (block - 1)):
            return f"MatMulNBits takes no blocks of {block}"
        axis = attributes.get("axis", 1) % 2
        if axis != (0 if block else 1) and self.constants[dq.input[1]].dims:
            return f"its scales run along axis {axis}"
        return ""

    def _conv_output_reason(self, node: onnx.NodeProto, stored: int) -> str:
        behind = self._behind(node)
        if node.output[0] in self.outputs:
            return "it writes a graph output: no Q behind it"
        if len(behind) == 1 and behind[0].op_type in ("Relu", "Clip"):
            activation = behind[0]
            behind = self._behind(activation)
            if any(q.op_type == "QuantizeLinear" and self._symmetric(q) for q in behind):
                return f"the {activation.op_type} is not made redundant by the Q behind it"
        if len(behind) != 1 or behind[0].op_type != "QuantizeLinear":
            return "there is no Q as the only reader of its output"
        zero_point = self.constants.get(behind[0].input[2]) if len(behind[0].input) > 2 else None
        if zero_point is not None and zero_point.data_type != stored:
            return "input and output have different integer types"
        return ""

    def _openvino_reason(self, dequantizers: list[onnx.NodeProto]) -> str:
        for side, dq in zip(("left", "right"), dequantizers, strict=True):
            both_activations = dequantizers[1].input[0] not in self.constants
            if side == "left" and not both_activations:
                continue
            if self._zero_point(dq) != 0:
                return f"the zero point of the {side} operand is not 0"
        return ""

    def _behind(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return self.readers.get(node.output[0], [])

    def _dequantizer(self, tensor: str) -> onnx.NodeProto | None:
        node = self.producers.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _stored_type(self, dq: onnx.NodeProto) -> int:
        constant = self.constants.get(dq.input[2]) if len(dq.input) > 2 else None
        constant = constant or self.constants.get(dq.input[0])
        return constant.data_type if constant is not None else TensorProto.UNDEFINED

    def _zero_point(self, dq: onnx.NodeProto) -> int:
        constant = self.constants.get(dq.input[2]) if len(dq.input) > 2 else None
        if constant is None:
            return 0
        return int(np.abs(numpy_helper.to_array(constant).astype(np.int64)).max(initial=0))

    def _symmetric(self, q: onnx.NodeProto) -> bool:
        constant = self.constants.get(q.input[2]) if len(q.input) > 2 else None
        return (
            constant is not None
            and constant.data_type == TensorProto.INT8
            and (self._zero_point(q) == 0)
        )

    def _is_vector(self, add: onnx.NodeProto) -> bool:
        return any(
            name in self.constants and len(self.constants[name].dims) == 1 for name in add.input
        )
