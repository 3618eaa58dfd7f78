"""What a site of scale migration consists of: readers, products of activations, constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from qpass.graph import Node
from qpass.passes.affine.absorb import LinearReader
from qpass.passes.equalize.labels import Labels

# What takes the scale in front: a norm, a linear op, another constant; with products of activations
# between: softmax(A) V, or Q K^T, of which one side takes the scale and the other its inverse; or
# all that writes to a residual stream.
Kind = Literal["norm", "linear", "value", "logits", "stream", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A constant that takes scales: input `index` of `node` times ``s[labels] ** power``.

    `labels` broadcast against the constant.
    """

    node: Node
    index: int
    labels: Labels
    power: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A linear op whose input is times ``s[labels] ** power``: its weight takes the inverse."""

    linear: LinearReader
    labels: Labels  # one for each input channel
    power: int

    def of(self, nodes: Mapping[str, Node]) -> Reader:
        """Return the same op of a copy of the graph, whose nodes are given by name."""
        node = nodes[self.linear.node.name]
        return replace(self, linear=replace(self.linear, node=node))


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A MatMul of two activations of which `operand` (1) or both (-1) are scaled.

    `labels` are those of the right operand; with both, the left has them transposed.
    """

    node: Node
    both: bool
    labels: Labels
    power: int  # of the right operand


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A Clip that the scale passes: what it lets through is divided by ``s[labels]``.

    ``clip(x / s)`` is ``clip(x) / s`` only while x stays within s times the ends. So scales are at
    most 1, and so large that all that calibration saw in a channel still passes: a channel that
    reaches an end of the Clip keeps the scale 1, a smaller one may grow until it does. What is
    never seen may then be clipped earlier, as by any range that was calibrated.
    """

    tensor: str  # the output of the Clip
    low: float  # at most 0
    high: float  # at least 0
    labels: Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place for one set of scales, numbered from 1; label 0 is the scale 1.

    shift: the constant that an offset can be subtracted from, in front of the scale (`find_shift`):
    the bias of a norm, that of V, or what is added in front of a residual stream. All readers make
    up for it in biases that are there.
    """

    tensor: str
    kind: Kind
    groups: int
    readers: tuple[Reader, ...] = ()
    products: tuple[Product, ...] = ()
    slots: tuple[Slot, ...] = ()
    tensors: frozenset[str] = frozenset()  # everything that is scaled
    shift: Slot | None = None
    bounds: tuple[Bound, ...] = ()

    @property
    def name(self) -> str:
        """The linear op the site stands for, for reports."""
        nodes = [r.linear.node for r in self.readers] + [p.node for p in self.products]
        return str(nodes[0].name)

    def of(self, nodes: Mapping[str, Node]) -> Site:
        """Return the same site of a copy of the graph, whose nodes are given by name."""
        slots = {id(s): replace(s, node=nodes[s.node.name]) for s in self.slots}
        return replace(
            self,
            readers=tuple(reader.of(nodes) for reader in self.readers),
            products=tuple(replace(p, node=nodes[p.node.name]) for p in self.products),
            slots=tuple(slots.values()),
            shift=None if self.shift is None else slots[id(self.shift)],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A tensor whose scale nothing takes up; `readers` could take theirs behind a bought Mul."""

    tensor: str
    reason: str
    readers: tuple[Reader, ...]

    def of(self, nodes: Mapping[str, Node]) -> Refused:
        """Return the same of a copy of the graph, whose nodes are given by name."""
        return replace(self, readers=tuple(reader.of(nodes) for reader in self.readers))
