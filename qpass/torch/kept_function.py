# mypy: disallow-subclassing-any=False
"""``qpass::UnifiedNorm``: the layer as one node that keeps its name through an exporter.

What it does
    `as_node` computes `UnifiedNorm` at inference; both exporters of torch write it as one node of
    domain ``qpass``. `function_proto` is what the node means, in ops of ONNX; engines inline it.
Preconditions
    float32; the channel is the last axis of `X`; `scale`, `B` and `var` have one element a channel.
"""

from __future__ import annotations

from typing import Any, Final

import onnx
import torch
from onnx import helper

DOMAIN: Final = "qpass"
VERSION: Final = 1
NAME: Final = "UnifiedNorm"
_TYPE: Final = f"{DOMAIN}::{NAME}"


class _Traced(torch.autograd.Function):
    """The node for the TorchScript exporter, which asks a Function for its `symbolic`."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> torch.Tensor:
        del ctx
        x, scale, bias, var, epsilon = operands
        return x / torch.sqrt(var + epsilon) * scale + bias

    @staticmethod
    def symbolic(g: Any, *operands: Any) -> Any:
        *tensors, epsilon = operands
        node = g.op(_TYPE, *tensors, epsilon_f=epsilon)
        node.setType(tensors[0].type())
        return node


def as_node(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, var: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return ``x / sqrt(var + epsilon) * scale + bias``, to be exported as one node."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            _TYPE,
            (x, scale, bias, var),
            {"epsilon": epsilon},
            dtype=x.dtype,
            shape=x.shape,
            version=VERSION,
        )
    return _Traced.apply(x, scale, bias, var, epsilon)


def function_proto(opset: int) -> onnx.FunctionProto:
    """Return the function for a model that imports version `opset` of ONNX, 13 or newer."""
    epsilon = helper.make_node("Constant", [], ["epsilon"])
    epsilon.attribute.append(
        onnx.AttributeProto(
            name="value_float", ref_attr_name="epsilon", type=onnx.AttributeProto.FLOAT
        )
    )
    nodes = [
        epsilon,
        helper.make_node("Add", ["var", "epsilon"], ["moment"]),
        helper.make_node("Sqrt", ["moment"], ["deviation"]),
        helper.make_node("Div", ["X", "deviation"], ["z"]),
        helper.make_node("Mul", ["z", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "B"], ["Y"]),
    ]
    return helper.make_function(
        DOMAIN,
        NAME,
        ["X", "scale", "B", "var"],
        ["Y"],
        nodes,
        [helper.make_opsetid("", opset)],
        attribute_protos=[helper.make_attribute("epsilon", 1e-5)],
    )
