"""The compensation of QwT at run time: one linear map from a block's input to its output.

Tokens get a MatMul (a Gemm where there are two dimensions), feature maps a 1x1 convolution in
groups of about 64 input channels whose stride is that of the block. Source: Fu et al.,
"Quantization without Tears", CVPR 2025.

The weights are int8 per output channel where the input comes from integers and the target runs
the op, float otherwise. The offset costs nothing: the convolution has a bias, and behind a MatMul
it goes into the bias of the branch's last linear op, where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qpass.graph import Graph, Node, Tensor
from qpass.passes.block_graph import shift, stored_weight
from qpass.passes.block_linear import Array, CrossMoments, LinearMap, with_best_offset
from qpass.passes.fold_affine import Site, fold
from qpass.qparams import QParams, TensorSpec, channel_range, choose_qparams, dequantize, quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class QwtMap:
    """A linear map as the graph will compute it.

    `linear` has the weights that run, after rounding where `numbers` says how they are stored.
    `maps` says that the channels lie on axis 1.
    """

    linear: LinearMap
    strides: tuple[int, ...]
    maps: bool
    numbers: QParams | None

    def __call__(self, rows: Array) -> Array:
        """Return what is added to the output, [rows, channels], for rows of the input."""
        added: Array = self.linear(rows)
        return added

    def parameters(self, *, free_offset: bool) -> int:
        """Return how many numbers the graph holds more; a bias may have taken the offset."""
        return int(self.linear.weight.size) + (0 if free_offset else self.linear.offset.size)

    @property
    def macs_per_row(self) -> int:
        """Multiplications for each token or position of the output."""
        return int(self.linear.weight.size)

    def build(self, graph: Graph, x: Tensor, add: Node, site: Site | None) -> Tensor:
        """Add the ops that compute the map from `x`; return their output.

        Args:
            graph: the quantized graph.
            x: input of the map.
            add: the sum at the end of the block.
            site: where the offset may go; None: it is added behind the map.
        """
        out, name = add.outputs[0], add.name
        weight = self._constant(graph, f"{name}_qwt_weight")
        offset = self.linear.offset.astype(np.float32)
        z = graph.variable(f"{out.name}_qwt", out.dtype, out.shape)
        if self.maps:
            attrs: dict[str, Any] = {
                "group": self.linear.weight.shape[0],
                "kernel_shape": [1] * len(self.strides),
                "strides": list(self.strides),
            }
            inputs = [x, weight, graph.constant(f"{name}_qwt_bias", offset)]
            graph.add(graph.make("Conv", inputs, [z], name=f"{name}_qwt", attrs=attrs))
            return z
        if out.shape is not None and len(out.shape) == 2:
            inputs = [x, weight, graph.constant(f"{name}_qwt_bias", offset)]
            graph.add(graph.make("Gemm", inputs, [z], name=f"{name}_qwt"))
            return z
        graph.add(graph.make("MatMul", [x, weight], [z], name=f"{name}_qwt"))
        return offset_behind(graph, z, offset, name=f"{name}_qwt", site=site)

    def _constant(self, graph: Graph, name: str) -> Tensor:
        values: Array = self._laid_out()
        if self.numbers is None:
            return graph.constant(name, values)
        return stored_weight(graph, name, quantize(values, self.numbers), self.numbers)

    def _laid_out(self) -> Array:
        return laid_out(self.linear.weight, self.strides if self.maps else None)


def laid_out(weight: Array, strides: tuple[int, ...] | None) -> Array:
    """Return [groups, inputs, outputs] as the weight of a 1x1 Conv, or without strides a MatMul."""
    groups, inputs, outputs = weight.shape
    if strides is None:
        single: Array = weight[0].astype(np.float32)
        return single
    shape = (groups * outputs, inputs, *(1 for _ in strides))
    turned: Array = weight.transpose(0, 2, 1).reshape(shape).astype(np.float32)
    return turned


def offset_behind(
    graph: Graph, z: Tensor, offset: Array, *, name: str, site: Site | None
) -> Tensor:
    """Put `offset` into the bias at `site`, or behind `z`; return what is to be added."""
    if site is not None:
        fold(graph, site, shift(offset))
        return z
    shifted: Tensor = graph.variable(f"{z.name}_shifted", z.dtype, z.shape)
    bias = graph.constant(f"{name}_bias", offset.astype(np.float32))
    graph.add(graph.make("Add", [z, bias], [shifted], name=f"{name}_offset"))
    return shifted


def solve_qwt(
    linear: LinearMap,
    moments: CrossMoments,
    *,
    strides: tuple[int, ...],
    maps: bool,
    weight: TensorSpec | None,
) -> QwtMap:
    """Round the weights as they will be stored, and fit the offset to the rounded ones.

    Args:
        linear: the map in float.
        moments: of all rows that it was fitted to.
        strides: of the 1x1 convolution.
        maps: the channels lie on axis 1.
        weight: kind of the stored weights; None: they stay float32.
    """
    numbers = None
    if weight is not None:
        values = laid_out(linear.weight, strides if maps else None)
        numbers = choose_qparams(weight, *channel_range(values, weight.axis))
        rounded = dequantize(quantize(values, numbers), numbers).astype(np.float64)
        groups, inputs, outputs = linear.weight.shape
        if maps:
            rounded = rounded.reshape(groups, outputs, inputs).transpose(0, 2, 1)
        linear = with_best_offset(moments, rounded.reshape(groups, inputs, outputs))
    return QwtMap(linear=linear, strides=strides, maps=maps, numbers=numbers)
