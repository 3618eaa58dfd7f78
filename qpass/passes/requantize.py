"""Round an integer weight again after its float values were scaled by channel.

What it does
    A gain per channel goes into the weight's scales where there is one scale per channel. One scale
    for the whole weight (QNN's MatMul, power-of-two targets), or one shared by the groups of a
    ConvTranspose, cannot take it; the float weight can, and is rounded to integers once more.
    Scales grow where the scaled weight needs it, by a power of two where they were powers of two,
    so the grid stays the one that the target asked for.
Why it is correct
    Nothing else knows the float weight: the new integers are the nearest ones to ``gain * w`` on
    their grid. They are other integers than before, so their rounding differs; whoever calls it has
    to look at the output again.
Preconditions
    The integers are what rounding the float weight to the nearest gives. A weight that was rounded
    by another method would lose what that method gained: it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from onnx import helper

from qpass.dtypes import StorageType, storage_of
from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes.channel_affine import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How integers came from a float weight.

    `low` and `high` are the integers in use, relative to the zero points `zero`: a storage type may
    hold fewer bits than it could. All three are int64 and have the shape of `scale`. `axis` is that
    of the scales, None for one scale.
    """

    weight: Array  # float
    scale: Array
    zero: Array
    axis: int | None
    low: Array
    high: Array
    powers_of_two: bool

    def along(self, values: Array) -> Array:
        """Give one value for each scale the shape that broadcasts over the weight."""
        if self.axis is None:
            return values.reshape(())
        shape = [-1 if i == self.axis else 1 for i in range(self.weight.ndim)]
        return values.reshape(shape)

    def round(self, weight: Array, scale: Array) -> Array:
        """Return the nearest integers, relative to the zero points, float64."""
        ratio = weight.astype(np.float32) / self.along(scale).astype(np.float32)
        return np.clip(np.rint(ratio), self.along(self.low), self.along(self.high))

    def nearest(self) -> Array:
        """Return the nearest integers to the weight, relative to the zero points."""
        return self.round(self.weight, self.scale)

    def values(self, centred: Array, scale: Array | None = None) -> Array:
        """Return what integers relative to the zero points stand for, float64."""
        scale = self.scale if scale is None else scale
        values: Array = centred * self.along(scale.astype(np.float64))
        return values


def find_rounding(dequantizer: Node, weight: Constant) -> Rounding | str:
    """Return how the integers behind `dequantizer` came from `weight`, or why that is unknown."""
    found = _grid_of(dequantizer, weight)
    if isinstance(found, Rounding) and (_centred(dequantizer, found) != found.nearest()).any():
        return "its integers are not the nearest ones to the float weight"
    return found


def find_grid(dequantizer: Node, weight: Constant) -> Rounding | str:
    """As `find_rounding`, for integers that any method has chosen.

    Where they are not the nearest ones to `weight`, what they stand for takes its place: a change
    that is small against a step leaves them as they are.
    """
    found = _grid_of(dequantizer, weight)
    if not isinstance(found, Rounding):
        return found
    centred = _centred(dequantizer, found)
    if (centred != found.nearest()).any():
        return replace(found, weight=found.values(centred))
    return found


def _grid_of(dequantizer: Node, weight: Constant) -> Rounding | str:
    stored = dequantizer.inputs[0]
    if not isinstance(stored, Constant) or dequantizer.attrs.get("block_size", 0):
        return "its scales belong to blocks"
    values, kept = array_of(weight), array_of(stored)
    integers = kept.astype(np.int64)
    scale = array_of(dequantizer.inputs[1])
    if values.shape != integers.shape:
        return "its integers have another shape than the float weight"
    zero = np.zeros(scale.shape, np.int64)
    if len(dequantizer.inputs) > 2:
        zero = array_of(dequantizer.inputs[2]).astype(np.int64)
    axis = int(dequantizer.attrs.get("axis", 1)) % values.ndim if scale.ndim else None
    storage = storage_of(helper.np_dtype_to_tensor_dtype(kept.dtype))
    low, high = _used(integers, storage, zero)
    return Rounding(
        weight=values,
        scale=scale,
        zero=zero,
        axis=axis,
        low=low,
        high=high,
        powers_of_two=bool((np.frexp(scale)[0] == 0.5).all()),
    )


def _centred(dequantizer: Node, rounding: Rounding) -> Array:
    """Return the integers that are there, relative to the zero points."""
    integers: Array = array_of(dequantizer.inputs[0]).astype(np.int64)
    return integers - rounding.along(rounding.zero)


def _used(integers: Array, storage: StorageType, zero: Array) -> tuple[Array, Array]:
    """Return the ends of the grids in use, relative to the zero points `zero`, in their shape.

    They are those of the smallest type of a whole number of bits that holds the integers. With one
    zero point it lies around that one, and the most negative integer, which some grids leave out,
    belongs to it where it is used. With several it lies around 0, and is used as a whole.
    """
    if np.unique(zero).size > 1:
        reach = 1 << int(max(integers.max(), -integers.min() - 1)).bit_length()
        return (-reach if storage.signed else 0) - zero, reach - 1 - zero
    middle = int(zero.flat[0])
    centred = integers - middle
    lowest, highest = int(centred.min(initial=-1)), int(centred.max(initial=1))
    reach = (1 << max(highest, -lowest - 1, 1).bit_length()) - 1
    low = max(storage.qmin - middle, min(lowest, -reach))
    return np.full_like(zero, low), np.full_like(zero, min(storage.qmax - middle, reach))


def scaled_weight(weight: Array, gain: Array, *, axis: int, groups: int = 1) -> Array:
    """Return a weight whose output channel c is multiplied by ``gain[c]``, float64.

    Args:
        weight: of a linear op, any rank.
        gain: one entry per output channel.
        axis: of the output channels (of those of one group for ConvTranspose).
        groups: of a ConvTranspose: they lie along axis 0.
    """
    wide = weight.astype(np.float64)
    if groups == 1:
        scaled: Array = wide * gain.reshape([-1 if i == axis else 1 for i in range(wide.ndim)])
        return scaled
    rows, columns = wide.shape[:2]
    split = wide.reshape(groups, rows // groups, columns, *wide.shape[2:])
    shaped = gain.reshape(groups, 1, columns, *([1] * (wide.ndim - 2)))
    product: Array = (split * shaped).reshape(wide.shape)
    return product


def solve_rounding(rounding: Rounding, weight: Array) -> tuple[Array, Array]:
    """Return integers and scales for a changed float weight.

    Scales stay as they are where the integers in use are enough, and grow where they are not; what
    was clipped before may be clipped as much again.

    Args:
        rounding: of the weight as it was.
        weight: what it is to be, the same shape.

    Returns:
        Integers with the zero points (int64) and scales (float32, the shape they had).
    """
    scale = rounding.scale.astype(np.float64)
    had = np.maximum(_needed(rounding, rounding.weight), scale)
    growth = np.maximum(_needed(rounding, weight) / had, 1.0)
    if rounding.powers_of_two:
        growth = np.exp2(np.ceil(np.log2(growth) - 1e-6))
    new = (scale * growth).astype(np.float32)
    integers = rounding.round(weight, new) + rounding.along(rounding.zero)
    return integers.astype(np.int64), new


def _needed(rounding: Rounding, weight: Array) -> Array:
    """Return the smallest scales with which nothing of `weight` is clipped, float64."""
    low, high = (rounding.along(end) for end in (rounding.low, rounding.high))
    reach = np.where(weight < 0, weight / np.minimum(low, -1), weight / np.maximum(high, 1))
    others = tuple(i for i in range(weight.ndim) if i != rounding.axis)
    needed = reach.max(axis=others if rounding.axis is not None else None)
    return np.asarray(needed, np.float64).reshape(rounding.scale.shape)


def requantize(graph: Graph, dequantizer: Node, rounding: Rounding, weight: Array) -> None:
    """Put a changed float weight, as integers and scales, behind `dequantizer` alone."""
    write_integers(graph, dequantizer, *solve_rounding(rounding, weight))


def write_integers(graph: Graph, dequantizer: Node, integers: Array, scale: Array) -> None:
    """Put new integers and scales behind `dequantizer` alone; types stay."""
    stored, old_scale = dequantizer.inputs[:2]
    for index, tensor, values in (
        (0, stored, integers.astype(array_of(stored).dtype)),
        (1, old_scale, scale),
    ):
        new = graph.constant(tensor.name, values)
        graph.set_input(dequantizer, index, new)
        if not tensor.outputs and tensor.name not in graph.captured:
            new.name = tensor.name
