"""Find the residual blocks of a float graph; nothing is named by the user.

A residual Add has an operand, the skip, that leads back through ops with one data input to a tensor
that the other operand, the branch, is made from: the entry of the block. The skip may be the entry
itself or, where channels or strides change, a convolution or a chain of ops behind it. The branch
must hold a linear op with constant weights and end in one, so that the axis of the channels is
known; a branch of convolutions that moves no axes may end in anything (SiLU, a gate).

A transformer layer has two such Adds, one behind attention and one behind the MLP. A block whose
branch multiplies two activations is joined with the one behind it if that one does not, so a
layer is one block, as in QwT; a normalization between the two (post-norm) does not part them.

Adds around other residual Adds (the long skips of U-Nets, both branches of a parallel layer) are
not blocks: what lies inside of them is compensated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from qpass.graph import Constant, Graph, Node, Tensor
from qpass.matching import channel_axis, is_float32
from qpass.report.model import Refusal
from qpass.units import is_weighted

RULE: Final = "find blocks"
# Only the first input of these carries data; the others are shapes, indices and ratios.
MOVERS: Final = frozenset({
    "Cast", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice",
    "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
KEEPERS: Final = frozenset({"Cast", "Dropout", "Identity"})  # of them: axes stay where they are
NO_END: Final = "its branch does not end in a linear op"
# What normalizations are made of where the exporter has taken them apart.
ELEMENTWISE: Final = frozenset({
    "Add", "Cast", "Div", "Mul", "Pow", "ReduceMean", "Relu", "Sqrt", "Sub",
})  # fmt: skip
NORMS: Final = frozenset({
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
    "RMSNormalization",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One residual block, by names of the float graph.

    `add` is the node whose output is that of the block, `entry` the tensor it starts from, `first`
    the input of its first linear op where that has the shape of the entry, `last` the linear op
    that its branch ends in, if it is one, `axis` that of the channels in entry and output (1 or
    -1), and `mixes` says that its branch multiplies two activations.
    """

    add: str
    entry: str
    output: str
    first: str | None
    last: str | None
    axis: int
    mixes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBlocks:
    """The blocks in execution order, and the residual Adds that are none, with reasons."""

    blocks: tuple[Block, ...]
    refusals: tuple[Refusal, ...]


def find_blocks(graph: Graph) -> FoundBlocks:
    """Return the residual blocks of a float graph; shapes have been inferred, nothing changes."""
    ancestry = _Ancestry(graph)
    blocks: list[Block] = []
    refusals: list[Refusal] = []
    outputs: list[tuple[Tensor, Tensor]] = []  # entry and output of each block
    for node in graph.nodes:
        entry = _entry(graph, ancestry, node)
        if entry is None:
            continue
        out = node.outputs[0]
        inside = ancestry.between(entry, out)
        linear = [one for one in inside if is_weighted(one)]
        if not linear:
            continue  # a rotation, a gate: no block of a network
        end = _end(graph, ancestry, entry, node, inside)
        reason = end if isinstance(end, str) else ""
        if any(_is_inside(ancestry, entry, out, *inner) for inner in outputs):
            reason = "it goes around other blocks, which are compensated"
        if reason:
            refusals.append(Refusal(rule=RULE, where=node.name, reason=reason))
            continue
        assert not isinstance(end, str)
        last, axis = end
        first = linear[0].inputs[0]
        blocks.append(
            Block(
                add=node.name,
                entry=entry.name,
                output=out.name,
                first=first.name if _same_shape(ancestry, entry, first) else None,
                last=None if last is None else last.name,
                axis=axis,
                mixes=any(_multiplies_activations(one) for one in inside),
            )
        )
        outputs.append((entry, out))
    return FoundBlocks(blocks=tuple(_joined(graph, blocks)), refusals=tuple(refusals))


class _Ancestry:
    """Which tensors each tensor is made from, as bits of one integer for each tensor."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._bit: dict[int, int] = {}
        self._made_from: dict[int, int] = {}
        for tensor in graph.inputs:
            self._add(tensor, 0)
        for node in graph.nodes:
            sources = 0
            for tensor in (*node.inputs, *node.captured):
                sources |= self._made_from.get(id(tensor), 0)
            for tensor in node.outputs:
                self._add(tensor, sources)

    def _add(self, tensor: Tensor, sources: int) -> None:
        self._bit[id(tensor)] = bit = 1 << len(self._bit)
        self._made_from[id(tensor)] = sources | bit

    def leads_to(self, tensor: Tensor, to: Tensor) -> bool:
        """True when `to` is made from `tensor`, or is `tensor`."""
        return bool(self._bit.get(id(tensor), 0) & self._made_from.get(id(to), 0))

    def between(self, entry: Tensor, out: Tensor) -> list[Node]:
        """Return the nodes on the ways from `entry` to `out`, in execution order."""
        return [
            node
            for node in self._graph.nodes
            if node.outputs
            and any(self.leads_to(t, out) for t in node.outputs)
            and any(self.leads_to(entry, t) for t in (*node.inputs, *node.captured))
        ]


def data_of(node: Node) -> list[Tensor]:
    """Return the inputs of `node` that carry data computed at run time."""
    inputs = node.inputs[:1] if node.op in MOVERS else node.inputs
    return [t for t in inputs if t.name and not isinstance(t, Constant)]


def _entry(graph: Graph, ancestry: _Ancestry, node: Node) -> Tensor | None:
    """Return where the two operands of a residual Add part, None when it is no such Add."""
    if node.op != "Add" or node.captured:
        return None
    left, right = node.inputs
    if isinstance(left, Constant) or isinstance(right, Constant) or left is right:
        return None
    if not (is_float32(left) and is_float32(right)) or not _may_match(left, right):
        return None
    found = [_walk_back(graph, ancestry, *pair) for pair in ((left, right), (right, left))]
    ways = [way for way in found if way is not None]
    return min(ways, key=lambda way: way[0])[1] if ways else None


def _walk_back(
    graph: Graph, ancestry: _Ancestry, skip: Tensor, branch: Tensor
) -> tuple[int, Tensor] | None:
    """Follow ops with one data input from `skip` to what `branch` is made from: steps, tensor."""
    steps, tensor = 0, skip
    while not ancestry.leads_to(tensor, branch):
        maker = graph.producer(tensor)
        sources = [] if maker is None else data_of(maker)
        if len(sources) != 1:
            return None
        tensor, steps = sources[0], steps + 1
    return steps, tensor


def _end(
    graph: Graph, ancestry: _Ancestry, entry: Tensor, add: Node, inside: list[Node]
) -> tuple[Node | None, int] | str:
    """Return the linear op that a branch ends in and the axis of the channels behind the Add."""
    reason = NO_END
    # The longer operand is the branch: it is the later one in the execution order.
    places = {id(node): i for i, node in enumerate(graph.nodes)}
    operands = sorted(add.inputs, key=lambda t: places.get(id(graph.producer(t)), -1), reverse=True)
    for operand in operands:
        path: list[Node] = []
        tensor = operand
        while ancestry.leads_to(entry, tensor) and tensor is not entry:
            maker = graph.producer(tensor)
            assert maker is not None  # the entry lies before it
            if is_weighted(maker):
                axis = _axis_behind(maker, path)
                if axis is not None:
                    return maker, axis
                reason = "the channels of its last linear op cannot be followed to the sum"
                break
            sources = data_of(maker)
            if len(sources) != 1:
                break
            path.append(maker)
            tensor = sources[0]
    axis = _common_axis(inside) if reason == NO_END else None
    return reason if axis is None else (None, axis)


def _common_axis(inside: list[Node]) -> int | None:
    """Return the axis of the channels in all of a branch where no op in it moves axes."""
    if any(node.op in MOVERS - KEEPERS for node in inside):
        return None
    axes = {channel_axis(node) for node in inside if is_weighted(node)}
    return axes.pop() if axes == {1} else None


def _axis_behind(linear: Node, path: list[Node]) -> int | None:
    """Follow the axis of the channels through the ops behind `linear` (`path`, last op first)."""
    axis = channel_axis(linear)
    for node in reversed(path):
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if node.op == "Transpose" and "perm" in node.attrs:
            perm = list(node.attrs["perm"])
            place = perm.index(axis % len(perm))
            axis = -1 if place == len(perm) - 1 else place
        elif node.op in MOVERS - KEEPERS:
            if axis != -1 or not before or not after or not isinstance(after[-1], int):
                return None
            if before[-1] != after[-1]:
                return None
    return axis if axis in (-1, 1) else None


def _is_inside(
    ancestry: _Ancestry, entry: Tensor, out: Tensor, inner_entry: Tensor, inner_out: Tensor
) -> bool:
    """True when another block lies on a way from `entry` to `out`."""
    starts = ancestry.leads_to(entry, inner_entry)
    return starts and inner_out is not entry and ancestry.leads_to(inner_out, out)


def _multiplies_activations(node: Node) -> bool:
    return node.op == "MatMul" and not any(isinstance(t, Constant) for t in node.inputs)


def _joined(graph: Graph, blocks: list[Block]) -> Iterator[Block]:
    """Join each mixing block with the one behind it."""
    tensors, waiting = graph.tensors(), list(blocks)
    while waiting:
        block = waiting.pop(0)
        behind = waiting[0] if waiting else None
        if (
            behind is not None
            and block.mixes
            and not behind.mixes
            and block.axis == behind.axis
            and _follows(graph, tensors[block.output], tensors[behind.entry])
        ):
            waiting.pop(0)
            block = replace(block, add=behind.add, output=behind.output, last=behind.last)
        yield block


def _follows(graph: Graph, out: Tensor, entry: Tensor) -> bool:
    """True when `entry` is `out`, or its normalization."""
    maker = graph.producer(entry)
    if entry is not out and maker is not None and maker.op in NORMS:
        entry = maker.inputs[0]
    return entry is out


def _may_match(a: Tensor, b: Tensor) -> bool:
    """True unless the shapes of `a` and `b` are known to differ."""
    if a.shape is None or b.shape is None:
        return True
    return len(a.shape) == len(b.shape) and all(
        left == right
        for left, right in zip(a.shape, b.shape, strict=True)
        if isinstance(left, int) and isinstance(right, int)
    )


def _same_shape(ancestry: _Ancestry, entry: Tensor, tensor: Tensor) -> bool:
    """True when `tensor` has the shape of `entry`, from which it is made."""
    if entry.shape and tensor.shape:
        return _may_match(entry, tensor)
    return tensor is entry or all(
        node.op in ELEMENTWISE | NORMS for node in ancestry.between(entry, tensor)
    )
