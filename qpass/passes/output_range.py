"""Move the range of the Q behind a linear op when a correction has moved the op's output.

What it does
    The calibrated range stays in the same proportion to the extremes of the tensor: what was
    clipped on purpose stays clipped. The extremes before are those of the float model, which was
    calibrated; those after are ``gain * y + offset`` of the quantized model, both on the same
    samples. Changes below `TOLERANCE` are left alone, for they are noise.
Preconditions
    Biases are still float: their scale does not depend on the ranges yet. Ranges that several
    tensors share stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from onnx import helper

from qpass.dtypes import storage_of
from qpass.graph import Constant, Graph, Node, array_of
from qpass.passes.channel_affine import Array, ChannelAffine
from qpass.passes.fold_affine import Slot
from qpass.passes.insert_qdq import RANGE_KEY
from qpass.qparams import MIN_SCALE

TOLERANCE: Final = 0.02  # share of the range


@dataclass(slots=True, kw_only=True)
class Extremes:
    """Smallest and largest values: per channel of the quantized tap, of all of the float one."""

    low: Array | None = None
    high: Array | None = None
    float_low: float = field(default=np.inf)
    float_high: float = field(default=-np.inf)

    def update(self, quantized: Array, floating: Array, *, axis: int) -> None:
        """Add one batch."""
        axis %= quantized.ndim
        low, high = (
            # One axis after the other: many times faster than both around the channels at once.
            look(
                look(quantized, axis=tuple(range(axis + 1, quantized.ndim))),
                axis=tuple(range(axis)),
            )
            for look in (np.min, np.max)
        )
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.float_low = min(self.float_low, float(floating.min()))
        self.float_high = max(self.float_high, float(floating.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Factors for the two ends of a range."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRange:
    """The Q of an output, its DQs, and the clipping between the op and the Q."""

    quantizer: Node
    dequantizers: tuple[Node, ...]
    floor: float
    ceiling: float


def output_range(graph: Graph, tap: str) -> OutputRange | None:
    """Return the Q behind tensor `tap` if it is the only one to have its scale, else None.

    None as well where the user fixed the range.
    """
    tensor = graph.tensors()[tap]
    floor, ceiling = -np.inf, np.inf
    readers = graph.consumers(tensor)
    if len(readers) == 1 and readers[0][0].op in ("Relu", "Clip"):
        clip = readers[0][0]
        limits = clip.inputs[1:]
        if not all(isinstance(t, Constant) or not t.name for t in limits):
            return None
        ends = [0.0] if clip.op == "Relu" else [-np.inf, np.inf]
        for i, limit in enumerate(limits):
            ends[i] = float(array_of(limit)) if limit.name else ends[i]
        floor, ceiling = ends[0], ends[-1] if len(ends) == 2 else ceiling
        readers = graph.consumers(clip.outputs[0])
    quantizers = [node for node, _ in readers if node.op == "QuantizeLinear"]
    if len(quantizers) != 1 or len(quantizers[0].inputs) < 3:
        return None
    q = quantizers[0]
    dequantizers = tuple(node for node, _ in graph.consumers(q.outputs[0]))
    if any(node.op != "DequantizeLinear" for node in dequantizers) or _is_tied(graph, q):
        return None
    if any(entry.key == RANGE_KEY for entry in q.extra.metadata_props):
        return None
    return OutputRange(quantizer=q, dequantizers=dequantizers, floor=floor, ceiling=ceiling)


def solve_stretch(place: OutputRange, extremes: Extremes, affine: ChannelAffine) -> Stretch | None:
    """Return how far the ends of the range have moved; None when less than `TOLERANCE`."""
    assert extremes.low is not None
    assert extremes.high is not None
    limits = (place.floor, place.ceiling)
    low, high = np.clip(
        [
            (affine.gain * extremes.low + affine.offset).min(),
            (affine.gain * extremes.high + affine.offset).max(),
        ],
        *limits,
    )
    float_low, float_high = np.clip([extremes.float_low, extremes.float_high], *limits)
    span = float_high - float_low
    if not np.isfinite([low, high, span]).all() or span <= 0.0:
        return None
    if max(abs(low - float_low), abs(high - float_high)) <= TOLERANCE * span:
        return None
    return Stretch(low=_ratio(low, float_low), high=_ratio(high, float_high))


def stretch_range(graph: Graph, place: OutputRange, stretch: Stretch) -> None:
    """Change scale and zero point of the Q and of its DQs."""
    scale, zero = (array_of(tensor) for tensor in place.quantizer.inputs[1:3])
    storage = storage_of(helper.np_dtype_to_tensor_dtype(zero.dtype))
    zero64 = float(zero)
    low = (storage.qmin - zero64) * float(scale) * stretch.low
    high = (storage.qmax - zero64) * float(scale) * stretch.high
    if zero64 in (0.0, (storage.qmax + 1) // 2) and storage.qmin - zero64 < 0.0:  # symmetric
        factor = max(stretch.low, stretch.high)
        if float(np.frexp(scale)[0]) == 0.5:  # it stays a power of two
            factor = float(np.exp2(np.rint(np.log2(factor)))) if factor > 0.0 else 1.0
        new_scale = float(scale) * factor
        new_zero = zero64
    else:
        new_scale = (high - low) / (storage.qmax - storage.qmin)
        new_zero = float(
            np.clip(np.rint(storage.qmin - low / new_scale), storage.qmin, storage.qmax)
        )
    if not MIN_SCALE < new_scale < np.inf:
        return
    for node in (place.quantizer, *place.dequantizers):
        Slot(node=node, index=1).write(graph, np.array(new_scale, scale.dtype))
        Slot(node=node, index=2).write(graph, np.array(new_zero).astype(zero.dtype))


def _ratio(after: float, before: float) -> float:
    """Return after / before for two ends on the same side of zero, else 1."""
    return after / before if before * after > 0.0 else 1.0


def _is_tied(graph: Graph, quantizer: Node) -> bool:
    def numbers(node: Node) -> tuple[bytes, bytes] | None:
        if not all(isinstance(t, Constant) for t in node.inputs[1:3]):
            return None
        scale, zero = (array_of(t) for t in node.inputs[1:3])
        return (scale.tobytes(), zero.tobytes()) if scale.ndim == 0 else None

    own = numbers(quantizer)
    return own is None or any(
        node is not quantizer and node.op == "QuantizeLinear" and numbers(node) == own
        for node in graph.nodes
        if node.op == "QuantizeLinear" and len(node.inputs) > 2
    )
