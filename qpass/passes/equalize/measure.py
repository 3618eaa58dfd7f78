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

from qpass.choose import WIDE_BITS
from qpass.graph import LINEAR_OPS, Node, array_of
from qpass.passes.equalize.linear_error import TINY, WEIGHT_ELEMENTS, LinearError
from qpass.passes.equalize.rows import ProductRows, SiteRows
from qpass.passes.equalize.site import Product, Reader, Slot
from qpass.passes.equalize.solve import Scales
from qpass.plan import Plan
from qpass.qparams import TensorSpec, choose_qparams, fake_quantize

Array = NDArray[Any]

# Shares of the full range that are tried: the ranges that are chosen later may clip as well.
SHARES: Final = (1.0, 0.85, 0.7, 0.5)
COARSE_SHARES: Final = (*SHARES, 0.35, 0.25)  # with few levels they clip more


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
    """Errors of one site; what does not depend on scales is computed once and kept."""

    readers: Sequence[Reader]
    products: Sequence[Product]
    rows: SiteRows
    specs: Specs
    elements: int = WEIGHT_ELEMENTS  # of each weight that are looked at
    powers: dict[str, float] = field(default_factory=dict)  # product -> power of its output
    exact: dict[tuple[str, int], Array] = field(default_factory=dict)  # product, sample -> output
    ops: dict[str, LinearError] = field(default_factory=dict)

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the full range that are worth trying."""
        names = [(reader.linear.node.name, 0) for reader in self.readers]
        names += [(product.node.name, index) for product in self.products for index in (0, 1)]
        few = any(self.specs.activations[name].bits < WIDE_BITS for name in names)
        return COARSE_SHARES if few else SHARES

    def errors(self, scales: Scales, samples: Sequence[int], share: float = 1.0) -> Array:
        """Return the error of each sample, float64: the sum over the ops of their shares."""
        total = np.zeros(len(samples))
        for reader in self.readers:
            key = (reader.linear.node.name, 0)
            low, high = self._range(key, reader.power, scales, share)
            total += self._op(reader).errors(scales, samples, low, high)
        for product in self.products:
            total += self._product(product, scales, samples, share)
        return total

    def _op(self, reader: Reader) -> LinearError:
        name = reader.linear.node.name
        if name not in self.ops:
            self.ops[name] = LinearError(
                reader=reader,
                rows=self.rows.linear[name],
                activation=self.specs.activations[name, 0],
                weight=self.specs.weights[name],
                elements=self.elements,
            )
        return self.ops[name]

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
            error = noisy_left @ noisy_right
            error -= left @ moved if shift.any() else self._exact(node.name, number, left, right)
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

    def _exact(self, name: str, number: int, left: Array, right: Array) -> Array:
        if (name, number) not in self.exact:
            self.exact[name, number] = left @ right
        return self.exact[name, number]


def _product_power(rows: ProductRows) -> float:
    outs = [left @ right for left, right in zip(rows.left, rows.right, strict=True)]
    return float(np.mean([np.square(out, dtype=np.float64).sum() for out in outs]))


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
