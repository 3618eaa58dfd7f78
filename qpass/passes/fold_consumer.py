"""Corrections that float ops with constants per channel can take: norms, and Mul and Add.

What it does
    Where no linear op makes a tensor, its correction ``gain * y + offset`` goes into the op that
    does, when that op ends in an affine with constants: LayerNormalization, InstanceNormalization
    and BatchNormalization (scale and bias), RMSNormalization (scale), and the chain Mul, Add that
    Unified Normalization is at inference. Behind the Add of a residual block that is the norm that
    reads the block's output (pre-norm), or makes it (post-norm).
Why it is exact
    ``gain * (s * n + b) + offset == (gain * s) * n + (gain * b + offset)`` with n the normalized
    input. The next linear op sees what Mul and Add behind the norm would give it, and a gain along
    its *input* channels is just what no scale of its integer weight could express.
What it leaves to others
    The weights of linear ops take gains by input channel too, but have to be rounded again for it:
    see `fold_linear`. An offset in front of a linear op is a constant behind it,
    ``W (x + o) + b == W x + (b + W o)`` (with zero padding only inside of the borders), which the
    fit at its output finds anyway.
Preconditions
    As for `fold_affine`. Constants that were quantized are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import LINEAR_OPS, Constant, Graph, Node, Tensor, array_of
from qpass.passes.channel_affine import Array, ChannelAffine
from qpass.passes.fold_affine import Slot

# Axis of the channels; scale is input 1, bias input 2.
NORMS: Final[Mapping[str, int]] = {
    "BatchNormalization": 1,
    "InstanceNormalization": 1,
    "LayerNormalization": -1,
    "RMSNormalization": -1,
}
_PAIR: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})
# Between the product of an attention and its Softmax.
_SCORE_OPS: Final = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Sub", "Where"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSite:
    """The output of a float op whose constants can take a correction.

    scaled
        Constants that the gain multiplies; empty: only an offset can be taken.
    shifted
        The constant that takes the offset; None: there is none, or `makes_bias`: it is made.
    """

    name: str
    op: str
    tap: str
    axis: int
    channels: int
    scaled: tuple[Slot, ...]
    shifted: Slot | None
    makes_bias: bool = False

    @property
    def offset(self) -> bool:
        """True when an offset can be taken."""
        return self.shifted is not None or self.makes_bias


def find_norm_site(graph: Graph, node: Node) -> NormSite | str | None:
    """Return how the output of `node` can be corrected, why not, or None: it is no such op.

    Args:
        graph: the quantized graph.
        node: a node of it.
    """
    if node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op in NORMS:
        return _norm_site(node)
    if node.op in ("Mul", "Add"):
        return _chain_site(graph, node)
    return None


def fold_into_norm(graph: Graph, site: NormSite, affine: ChannelAffine) -> None:
    """Absorb `affine` into the constants of `site`; what cannot be absorbed must be 1 or 0."""
    if (affine.gain != 1.0).any():
        for slot in site.scaled:
            _write(graph, slot, affine.gain, 0.0)
    if not affine.offset.any():
        return
    if site.shifted is not None:
        _write(graph, site.shifted, 1.0, affine.offset)
    elif site.makes_bias:
        node = next(node for node in graph.nodes if node.name == site.name)
        dtype = node.inputs[1].dtype
        bias = graph.constant(f"{site.name}_bias", affine.offset.astype(dtype))
        graph.set_input(node, 2, bias)


def _write(graph: Graph, slot: Slot, gain: Array | float, offset: Array | float) -> None:
    """Change a constant that holds one value for each channel, in any shape."""
    values = array_of(slot.constant)
    changed = values.astype(np.float64).ravel() * gain + offset
    slot.write(graph, changed.reshape(values.shape).astype(values.dtype))


def _norm_site(node: Node) -> NormSite | str:
    constants = node.inputs[1:]
    if not all(isinstance(t, Constant) or not t.name for t in constants):
        return "its scale or bias is not a float constant"
    if node.op == "BatchNormalization" and node.attrs.get("training_mode", 0):
        return "it is in training mode"
    scale, bias = [*constants, None, None][:2]
    if not isinstance(scale, Constant) or len(scale.shape) != 1:
        return "its scale is not one value for each channel"
    rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
    if NORMS[node.op] == -1 and int(node.attrs.get("axis", -1)) not in (
        -1,
        rank - 1 if rank else -1,
    ):
        return "it normalizes more than the last axis"
    slots = [Slot(node=node, index=1)]
    has_bias = isinstance(bias, Constant)
    if has_bias:
        slots.append(Slot(node=node, index=2))
    return NormSite(
        name=node.name,
        op=node.op,
        tap=node.outputs[0].name,
        axis=NORMS[node.op],
        channels=int(scale.shape[0]),
        scaled=tuple(slots),
        shifted=slots[1] if has_bias else None,
        makes_bias=not has_bias and node.op == "LayerNormalization",
    )


def _chain_site(graph: Graph, node: Node) -> NormSite | None:
    """Return the site of Mul, of Add, or of both in this order with constants per channel."""
    index = _constant_index(node)
    if index is None or _made_by_linear(graph, node.inputs[1 - index]):
        return None  # a bias behind a linear op belongs to the site of that op
    axis = _channel_axis(node.inputs[index])
    if axis is None or _leads_to_softmax(graph, node.outputs[0]):
        return None  # scores have no channels: masks and position biases stay what they are
    own = Slot(node=node, index=index)
    scaled, shifted = [own], None
    if node.op == "Add":
        before = graph.producer(node.inputs[1 - index])
        factor = _constant_index(before) if before is not None and before.op == "Mul" else None
        shifted = own
        if (
            before is not None
            and factor is not None
            and _channel_axis(before.inputs[factor]) == axis
            and len(graph.consumers(before.outputs[0])) == 1
            and not graph.is_output(before.outputs[0])
        ):
            scaled.append(Slot(node=before, index=factor))
        else:
            scaled = []
    else:
        readers = graph.consumers(node.outputs[0])
        behind = readers[0][0] if len(readers) == 1 else None
        if behind is not None and behind.op == "Add" and _constant_index(behind) is not None:
            return None  # the Add is the end of the chain
    return NormSite(
        name=node.name,
        op=node.op,
        tap=node.outputs[0].name,
        axis=axis,
        channels=int(array_of(own.constant).size),
        scaled=tuple(scaled),
        shifted=shifted,
    )


def _constant_index(node: Node) -> int | None:
    """Return which one operand of a binary op is a float constant."""
    found = [i for i, tensor in enumerate(node.inputs) if isinstance(tensor, Constant)]
    if len(found) != 1 or node.inputs[found[0]].dtype not in (np.float32, np.float64):
        return None
    return found[0]


def _channel_axis(tensor: Tensor) -> int | None:
    """Return the axis, from the end, along which a constant differs; None: along none or more."""
    shape = tuple(tensor.shape)
    wide = [i for i, size in enumerate(shape) if size != 1]
    return wide[0] - len(shape) if len(wide) == 1 else None


def _leads_to_softmax(graph: Graph, tensor: Tensor) -> bool:
    waiting, seen = [tensor], {id(tensor)}
    while waiting:
        for reader, _ in graph.consumers(waiting.pop()):
            if reader.op == "Softmax":
                return True
            if reader.op in _SCORE_OPS and id(reader.outputs[0]) not in seen:
                seen.add(id(reader.outputs[0]))
                waiting.append(reader.outputs[0])
    return False


def _made_by_linear(graph: Graph, tensor: Tensor) -> bool:
    maker = graph.producer(tensor)
    while maker is not None and (maker.op in _PAIR or maker.op in ("Add", "Mul")):
        index = 0 if maker.op in _PAIR else _constant_index(maker)
        if index is None:
            return False
        data = maker.inputs[index if maker.op in _PAIR else 1 - index]
        maker = graph.producer(data)
    return maker is not None and maker.op in LINEAR_OPS
