"""The error of one linear op on rows of its input, for given scales and ranges.

The op multiplies rounded rows by its rounded weight; the float product of the same rows is taken
once. The bias changes nothing. Of a large weight some output channels, evenly spread, stand for
all: every candidate is measured on the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.choose import weight_range
from qpass.graph import Node, array_of
from qpass.matching import weight_axis
from qpass.passes.equalize.rows import LinearRows
from qpass.passes.equalize.site import Reader
from qpass.passes.equalize.solve import Scales
from qpass.qparams import QParams, TensorSpec, choose_qparams, fake_quantize

Array = NDArray[Any]

TINY: Final = 1e-30
# Elements of a weight that are looked at: to sort candidates, and to judge the best of them. What
# clipping does to a layer of 512 channels is not known from 64 of them.
QUICK_ELEMENTS: Final = 1 << 17
WEIGHT_ELEMENTS: Final = 1 << 22
FEWEST_OUTPUTS: Final = 32


@dataclass(slots=True, kw_only=True)
class LinearError:
    """Errors of a linear op whose input is divided by scales; a share of its output's power."""

    reader: Reader
    rows: LinearRows
    activation: TensorSpec
    weight: TensorSpec
    elements: int = WEIGHT_ELEMENTS
    _values: Array | None = None  # the weight, float32, of the output channels that are looked at
    _counts: list[Array] = field(default_factory=list)  # by sample, what an error in a row counts
    _stacked: dict[tuple[int, ...], _Rows] = field(default_factory=dict)
    _rounded: tuple[Scales, Array] | None = None  # the last scales and the rounded weight

    def errors(self, scales: Scales, samples: Sequence[int], low: float, high: float) -> Array:
        """Return the error of each sample, float64.

        Args:
            scales: what the input is divided by.
            samples: numbers of samples.
            low: smallest value of the divided input that the integers represent.
            high: the largest one.
        """
        node, labels = self.reader.linear.node, self.reader.labels
        gain = (scales.scale[labels] ** self.reader.power).astype(np.float32)[:, None]
        shift = scales.shift[labels].astype(np.float32)[:, None]
        rows = self._rows(samples)
        moved = (rows.inputs - shift) * gain if shift.any() else rows.inputs * gain
        quantized = fake_quantize(moved, choose_qparams(self.activation, low, high))
        error = apply_linear(node, quantized, self._rounded_weight(scales))
        error -= rows.outputs
        if shift.any():  # an op that is padded takes none, so every tap sees it
            whole = np.broadcast_to(shift, (1, *rows.inputs.shape[1:]))
            error += apply_linear(node, whole, self.values)
        sums = np.square(error, dtype=np.float64).sum(axis=1) * rows.counts
        return np.bincount(rows.owner, sums, minlength=len(samples))

    @property
    def values(self) -> Array:
        """The part of the weight that is looked at, float32."""
        if self._values is None:
            self._values = some_outputs(self.reader.linear.node, self.weight, self.elements)
        return self._values

    def _rounded_weight(self, scales: Scales) -> Array:
        if self._rounded is None or self._rounded[0] is not scales:
            gain = scales.scale[self.reader.labels] ** -self.reader.power
            weight = scaled_inputs(self.reader, self.values, gain.astype(np.float32))
            self._rounded = scales, fake_quantize(weight, weight_numbers(weight, self.weight))
        return self._rounded[1]

    def _rows(self, samples: Sequence[int]) -> _Rows:
        key = tuple(samples)
        if key not in self._stacked:
            if not self._counts:
                self._counts = self._row_weights()
            inputs = np.concatenate([self.rows.inputs[i] for i in samples])
            self._stacked[key] = _Rows(
                inputs=inputs,
                outputs=apply_linear(self.reader.linear.node, inputs, self.values),
                counts=np.concatenate([self.rows.counts[i] * self._counts[i] for i in samples]),
                owner=np.repeat(
                    np.arange(len(samples)), [len(self.rows.counts[i]) for i in samples]
                ),
            )
        return self._stacked[key]

    def _row_weights(self) -> list[Array]:
        node, samples = self.reader.linear.node, len(self.rows.inputs)
        power = [
            np.square(apply_linear(node, inputs, self.values), dtype=np.float64).sum(axis=1)
            for inputs in self.rows.inputs
        ]
        found = row_weights(np.concatenate(power), np.concatenate(self.rows.counts)) * samples
        ends = np.cumsum([len(counts) for counts in self.rows.counts])[:-1]
        return list(np.split(found, ends))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows of some samples: what is read, what comes out, what counts, whose they are."""

    inputs: Array
    outputs: Array
    counts: Array
    owner: Array


def row_weights(power: Array, counts: Array) -> Array:
    """Return what a squared error in each row counts, float64 [rows].

    ``1 / (power + usual)``, with the median of the power for the usual row, scaled so that errors
    as large as the outputs add up to 1. Ordinary rows count alike. A row whose output is many times
    the usual one is judged by its relative error, as what reads it does that normalizes or
    saturates: a few huge tokens would drown all others otherwise (on vit_tiny four of 197 do).
    """
    order = np.argsort(power, kind="stable")
    middle = np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)
    usual = float(power[order[min(int(middle), power.size - 1)]])
    weights = 1.0 / np.maximum(power + usual, TINY)
    result: Array = weights / max(float((weights * power) @ counts), TINY)
    return result


def weight_numbers(weight: Array, spec: TensorSpec) -> QParams:
    """Return scale and zero point of a weight by its extremes."""
    return choose_qparams(spec, *weight_range(weight, spec))


def some_outputs(node: Node, spec: TensorSpec, elements: int) -> Array:
    """Return the weight of a linear op, float32, or an even choice of its output channels.

    All of it where its scales do not belong to single output channels, or it has groups.
    """
    weight = array_of(node.inputs[1]).astype(np.float32)
    axis = weight_axis(node, weight.ndim) % weight.ndim
    outputs = weight.shape[axis]
    wanted = max(elements * outputs // max(weight.size, 1), FEWEST_OUTPUTS)
    own = spec.granularity == "per_channel" and (spec.axis or 0) % weight.ndim == axis
    if wanted >= outputs or not own or int(node.attrs.get("group", 1)) > 1:
        return weight
    return weight.take(np.linspace(0, outputs - 1, wanted).astype(np.int64), axis=axis)


def scaled_inputs(reader: Reader, weight: Array, gain: Array) -> Array:
    """Return `weight` times `gain` [input channels]."""
    node = reader.linear.node
    shape = [1] * weight.ndim
    groups = int(node.attrs.get("group", 1))
    if node.op == "Conv" and groups > 1:
        shape[:2] = weight.shape[:2]
        gain = np.repeat(gain.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    else:
        shape[reader.linear.axis] = -1
    return weight * gain.reshape(shape)


def apply_linear(node: Node, inputs: Array, weight: Array) -> Array:
    """Return the products [rows, outputs] of rows [rows, channels, taps] with a weight."""
    if node.op in ("MatMul", "Gemm"):
        matrix = weight.T if node.op == "Gemm" and node.attrs.get("transB", 0) else weight
        result: Array = inputs[:, :, 0] @ matrix
        return result
    groups = int(node.attrs.get("group", 1))
    count, channels, _ = inputs.shape
    if groups == 1:
        matrix = weight.reshape(len(weight), -1)
        return inputs.reshape(count, -1) @ (matrix.T if node.op == "Conv" else matrix)
    by_group = inputs.reshape(count, groups, -1).transpose(1, 0, 2)
    if node.op == "Conv":
        matrices = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(0, 2, 1)
    else:
        matrices = weight.reshape(groups, channels // groups, -1)
    return (by_group @ matrices).transpose(1, 0, 2).reshape(count, -1)


def corrected_error(got: Array, wanted: Array, counts: Array | None = None) -> Array:
    """Return the squared error that the best gain and offset of each column leave.

    Args:
        got: float [.., rows, columns].
        wanted: the same.
        counts: what each row counts, float64 [rows]; all 1 if None.

    Returns:
        The sum over rows and columns, float64 [..].
    """
    share = np.ones(got.shape[-2]) if counts is None else counts
    share = share[:, None]
    total = share.sum()
    x, y = got.astype(np.float64), wanted.astype(np.float64)
    x = x - (x * share).sum(axis=-2, keepdims=True) / total
    y = y - (y * share).sum(axis=-2, keepdims=True) / total
    xx, xy, yy = ((a * b * share).sum(axis=-2) for a, b in ((x, x), (x, y), (y, y)))
    error: Array = (yy - np.square(xy) / np.maximum(xx, TINY)).sum(axis=-1)
    return np.maximum(error, 0.0)
