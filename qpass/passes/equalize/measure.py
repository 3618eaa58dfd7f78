"""The error that quantization makes at the outputs of a site's linear ops, for given scales.

Activations and weights are rounded as the plan says (specs of the target, ranges from the extremes
of all samples), everything else is float. The error of an op is that of its output before the
bias. Errors of several ops are added as shares of the power of their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.choose import weight_range
from qpass.graph import LINEAR_OPS, Node, array_of
from qpass.passes.affine.absorb import absorbed
from qpass.passes.equalize.rows import LinearRows, ProductRows, SiteRows
from qpass.passes.equalize.site import Product, Reader, Slot
from qpass.passes.equalize.solve import Scales
from qpass.passes.normalize.linear_folding import Affine
from qpass.plan import Plan
from qpass.qparams import TensorSpec, choose_qparams, fake_quantize

Array = NDArray[Any]

# Shares of the full range that are tried: the ranges that are chosen later may clip as well.
SHARES: Final = (1.0, 0.85, 0.7, 0.5)
TINY: Final = 1e-30


@dataclass(frozen=True, slots=True)
class Specs:
    """What the plan makes of the operands of the linear ops, by (node, operand)."""

    activations: Mapping[tuple[str, int], TensorSpec]
    weights: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, plan: Plan, nodes: Sequence[Node]) -> Specs:
        """Look up every operand of `nodes` in `plan`."""
        edges = {(e.node, e.index): d.spec for d in plan.decisions for e in d.edges or ()}
        resident = {d.tensor: d.spec for d in plan.activations() if d.edges is None}
        found: dict[tuple[str, int], TensorSpec] = {}
        weights: dict[str, TensorSpec] = {}
        for node in nodes:
            if node.op not in LINEAR_OPS:
                continue
            for index, tensor in enumerate(node.inputs[:2]):
                spec = edges.get((node.name, index), resident.get(tensor.name))
                if spec is not None and not hasattr(tensor, "_values"):
                    found[node.name, index] = spec
                elif spec is not None:
                    weights[node.name] = spec
        return cls(found, weights)

    def obstacle(
        self, readers: Sequence[Reader], products: Sequence[Product], slots: Sequence[Slot] = ()
    ) -> str:
        """Return why the error cannot be told, "" when it can."""
        for reader in readers:
            node = reader.linear.node
            if (node.name, 0) not in self.activations or node.name not in self.weights:
                return f"{node.name} does not read integers of a fixed range"
            if node.op == "MatMul" and len(node.inputs[1].shape) != 2:
                return f"the weight of {node.name} is a stack of matrices"
        for product in products:
            if not {(product.node.name, 0), (product.node.name, 1)} <= set(self.activations):
                return f"{product.node.name} does not read integers of a fixed range"
        for slot in slots:
            spec = self.weights.get(slot.node.name) if slot.index == 1 else None
            if spec is not None and spec.granularity == "per_tensor":
                return f"the weight of {slot.node.name} in front has one scale for all channels"
        return ""


@dataclass(slots=True, kw_only=True)
class Measure:
    """Errors of one site; `powers` and `weights` cache what does not depend on scales."""

    readers: Sequence[Reader]
    products: Sequence[Product]
    rows: SiteRows
    specs: Specs
    powers: dict[str, float] = field(default_factory=dict)  # product -> power of its output
    weights: dict[str, list[Array]] = field(default_factory=dict)  # linear op -> row weights

    def errors(self, scales: Scales, samples: Sequence[int], share: float = 1.0) -> Array:
        """Return the error of each sample, float64: the sum over the ops of their shares."""
        total = np.zeros(len(samples))
        for reader in self.readers:
            total += self._linear(reader, scales, samples, share)
        for product in self.products:
            total += self._product(product, scales, samples, share)
        return total

    def _range(
        self, key: tuple[str, int], power: int, scales: Scales, share: float
    ) -> tuple[float, float]:
        extremes = self.rows.extremes[key]
        low, high = extremes.over(range(self.rows.samples))
        used = np.isfinite(low)
        gain = scales.scale[used] ** power
        shift = scales.shift[used]
        ends = (low[used] - shift) * gain, (high[used] - shift) * gain
        return share * float(ends[0].min()), share * float(ends[1].max())

    def _linear(
        self, reader: Reader, scales: Scales, samples: Sequence[int], share: float
    ) -> Array:
        node = reader.linear.node
        gain = scales.scale[reader.labels] ** reader.power
        shift = scales.shift[reader.labels]
        weight, _ = absorbed(reader.linear, Affine(gain=1.0 / gain, offset=np.zeros_like(gain)))
        rounded = fake_weight(weight.astype(np.float32), self.specs.weights[node.name])
        inputs, counts, owner = _stack(self.rows.linear[node.name], samples)
        moved = ((inputs - shift[:, None]) * gain[:, None]).astype(np.float32)
        spec = self.specs.activations[node.name, 0]
        low, high = self._range((node.name, 0), reader.power, scales, share)
        quantized = fake_quantize(moved, choose_qparams(spec, low, high))
        groups = int(node.attrs.get("group", 1))
        exact = _apply(node, moved, weight.astype(np.float32), groups)
        error = np.square(_apply(node, quantized, rounded, groups) - exact, dtype=np.float64)
        weights = self._row_weights(node, groups)
        counts = counts * np.concatenate([weights[i] for i in samples])
        return _by_sample(error.sum(axis=1) * counts, owner, len(samples))

    def _row_weights(self, node: Node, groups: int) -> list[Array]:
        """Return by sample what an error in each row counts: the weights of `row_weights`."""
        if node.name not in self.weights:
            rows = self.rows.linear[node.name]
            inputs, counts, owner = _stack(rows, range(self.rows.samples))
            out = _apply(node, inputs, array_of(node.inputs[1]).astype(np.float32), groups)
            found = row_weights(np.square(out, dtype=np.float64).sum(axis=1), counts)
            self.weights[node.name] = [
                found[owner == i] * self.rows.samples for i in range(self.rows.samples)
            ]
        return self.weights[node.name]

    def _product(
        self, product: Product, scales: Scales, samples: Sequence[int], share: float
    ) -> Array:
        node, rows = product.node, self.rows.products[product.node.name]
        right_gain = (scales.scale[product.labels] ** product.power).astype(np.float32)
        left_gain = 1 / right_gain.swapaxes(-1, -2) if product.both else np.float32(1.0)
        shift = scales.shift[product.labels].astype(np.float32)
        errors = np.zeros(len(samples))
        place = {number: i for i, number in enumerate(samples)}
        right_range = self._range((node.name, 1), product.power, scales, share)
        right_q = choose_qparams(self.specs.activations[node.name, 1], *right_range)
        left_range = self._range(
            (node.name, 0), -product.power, scales, share if product.both else 1.0
        )
        left_q = choose_qparams(self.specs.activations[node.name, 0], *left_range)
        for number, left, right in zip(rows.samples, rows.left, rows.right, strict=True):
            if number not in place:
                continue
            moved = right - shift
            noisy_right = fake_quantize(moved * right_gain, right_q) / right_gain
            noisy_left = fake_quantize(left * left_gain, left_q) / left_gain
            error = noisy_left @ noisy_right - left @ moved
            errors[place[number]] = float(np.square(error, dtype=np.float64).sum())
        held = sum(number in place for number in rows.samples)
        scale = len(samples) / max(held, 1)  # a sample that was not kept counts as the mean
        missing = [i for number, i in place.items() if number not in rows.samples]
        if held and missing:
            errors[missing] = errors.sum() / held
            scale = 1.0
        if node.name not in self.powers:
            self.powers[node.name] = max(_product_power(rows), TINY)
        return scale * errors / self.powers[node.name]


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


def _product_power(rows: ProductRows) -> float:
    outs = [left @ right for left, right in zip(rows.left, rows.right, strict=True)]
    return float(np.mean([np.square(out, dtype=np.float64).sum() for out in outs]))


def fake_weight(weight: Array, spec: TensorSpec) -> Array:
    """Return the float32 values that the integers of a weight stand for."""
    return fake_quantize(weight, choose_qparams(spec, *weight_range(weight, spec)))


def largest_weights(reader: Reader, groups: int) -> Array:
    """Return the largest magnitude of the weights of each label, float64 [groups + 1]."""
    found = np.zeros(groups + 1)
    np.maximum.at(found, reader.labels, _by_input(reader, np.abs).max(axis=1))
    return found


def weight_power(reader: Reader, groups: int) -> Array:
    """Return the sum of the squared weights of each label, float64 [groups + 1]."""
    size = _by_input(reader, np.square).sum(axis=1)
    return np.bincount(reader.labels, size, minlength=groups + 1)


def _by_input(reader: Reader, of: np.ufunc) -> Array:
    """Return `of` the weights that each input channel meets, float64 [channels, weights]."""
    node = reader.linear.node
    weight: Array = of(array_of(node.inputs[1]).astype(np.float64))
    if node.op != "Conv":
        return np.moveaxis(weight, reader.linear.axis, 0).reshape(
            weight.shape[reader.linear.axis], -1
        )
    parts = int(node.attrs.get("group", 1))
    by_part = weight.reshape(parts, weight.shape[0] // parts, weight.shape[1], -1)
    return by_part.transpose(0, 2, 1, 3).reshape(parts * weight.shape[1], -1)


def _stack(rows: LinearRows, samples: Sequence[int]) -> tuple[Array, Array, Array]:
    inputs = np.concatenate([rows.inputs[i] for i in samples])
    counts = np.concatenate([rows.counts[i] for i in samples])
    owner = np.repeat(np.arange(len(samples)), [len(rows.counts[i]) for i in samples])
    return inputs, counts, owner


def _by_sample(values: Array, owner: Array, samples: int) -> Array:
    return np.bincount(owner, values, minlength=samples)


def _apply(node: Node, inputs: Array, weight: Array, groups: int) -> Array:
    """Return the products [rows, outputs] of rows [rows, channels, taps] with a weight."""
    if node.op in ("MatMul", "Gemm"):
        matrix = weight.T if node.op == "Gemm" and node.attrs.get("transB", 0) else weight
        result: Array = inputs[:, :, 0] @ matrix
        return result
    count, channels, _ = inputs.shape
    by_group = inputs.reshape(count, groups, -1).transpose(1, 0, 2)
    if node.op == "Conv":
        matrices = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(0, 2, 1)
    else:
        matrices = weight.reshape(groups, channels // groups, -1)
    return (by_group @ matrices).transpose(1, 0, 2).reshape(count, -1)
