"""Who reads the channels of a tensor, seen through the ops that only move them.

The region of a tensor are the outputs of all movers behind it. An edge of the tensor is linear when
whatever hangs on it ends in linear ops with constant weights: then the tensor may be replaced on
that edge by one that differs by an affine map of its channels, and those ops make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qpass.graph import Graph, Node, Tensor
from qpass.passes.affine.absorb import LinearReader, linear_reader
from qpass.passes.affine.movers import data_indices, moved_axis

Edge = tuple[Node, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One edge of a tensor: the linear ops behind it, or the reason why it is not linear."""

    edge: Edge
    readers: tuple[LinearReader, ...] = ()
    reason: str = ""


class Region:
    """The outputs of all movers behind `tensor`, each with the axis of its channels."""

    def __init__(self, graph: Graph, tensor: Tensor, axis: int, channels: int) -> None:
        """Follow `tensor`, whose `channels` channels are at `axis`."""
        self._graph, self._channels = graph, channels
        self._root = tensor
        self._axes: dict[int, tuple[Tensor, int]] = {id(tensor): (tensor, axis)}
        self._spread()
        self._spoilt: dict[int, str] = {}  # tensor -> why not everything behind it is linear
        self._judge()

    def branches(self) -> list[Branch]:
        """Return every edge of the tensor; an output of the graph is no edge."""
        found = []
        for node, index in self._graph.consumers(self._root):
            reason = self._reason(node, index, self._root)
            readers = () if reason else self._ends(node, index, self._root)
            found.append(Branch(edge=(node, index), readers=tuple(readers), reason=reason))
        return found

    def _spread(self) -> None:
        waiting = [self._root]
        while waiting:
            tensor = waiting.pop()
            axis = self._axes[id(tensor)][1]
            for node, index in self._graph.consumers(tensor):
                moved = moved_axis(node, index, axis)
                inputs = [node.inputs[i] for i in data_indices(node)]
                joined = [self._axes.get(id(t)) for t in inputs]
                if moved is None or any(j is None or j[1] != axis for j in joined):
                    continue
                for out in node.outputs:
                    if out.name and id(out) not in self._axes:
                        self._axes[id(out)] = (out, moved)
                        waiting.append(out)

    def _judge(self) -> None:
        """Mark tensors that must stay, and with them what they are moved from."""
        changed = True
        while changed:
            changed = False
            for tensor, _ in list(self._axes.values())[::-1]:
                if id(tensor) in self._spoilt or tensor is self._root:
                    continue
                edges = self._graph.consumers(tensor)
                reasons = (self._reason(node, index, tensor) for node, index in edges)
                reason = self._own_reason(tensor) or next(filter(None, reasons), "")
                if reason:
                    self._spoilt[id(tensor)] = reason
                    changed = True

    def _own_reason(self, tensor: Tensor) -> str:
        if self._graph.is_output(tensor):
            return f"{tensor.name} is an output of the model"
        return "control flow reads it" if tensor.name in self._graph.captured else ""

    def _reason(self, node: Node, index: int, tensor: Tensor) -> str:
        """Return why the edge from `tensor` to `node` is not linear, "" when it is."""
        axis = self._axes[id(tensor)][1]
        outs = [out for out in node.outputs if out.name]
        if moved_axis(node, index, axis) is not None:
            if all(id(out) in self._axes for out in outs):
                return next((self._spoilt[id(o)] for o in outs if id(o) in self._spoilt), "")
            return f"{node.name} joins it with something else"
        if node.op == "Shape":
            return ""
        reader = linear_reader(node, index, axis, self._channels)
        return f"{node.name}: {reader}" if isinstance(reader, str) else ""

    def _ends(self, node: Node, index: int, tensor: Tensor) -> list[LinearReader]:
        axis = self._axes[id(tensor)][1]
        found: dict[int, LinearReader] = {}
        waiting = [(node, index, axis)]
        seen: set[int] = set()
        while waiting:
            node, index, axis = waiting.pop()
            if moved_axis(node, index, axis) is None:
                reader = linear_reader(node, index, axis, self._channels)
                if not isinstance(reader, str):
                    found[id(node)] = reader
                continue
            for out in node.outputs:
                if id(out) in self._axes and id(out) not in seen:
                    seen.add(id(out))
                    where = self._axes[id(out)][1]
                    waiting += [(n, i, where) for n, i in self._graph.consumers(out)]
        return list(found.values())
