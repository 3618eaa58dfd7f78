"""Edits of a graph by identity: the half of `Graph` that knows nothing of files.

onnx-graphsurgeon keeps the lists of nodes and tensors in step by itself, but finds entries by
structural equality, which is quadratic and can hit the wrong node. Here everything goes by `is`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_graphsurgeon import Constant, Node, Tensor, Variable
from onnx_graphsurgeon.ir.tensor import LazyValues

from qpass.errors import InternalError
from qpass.order import stable_order


class EditableGraph:
    """Nodes in topological order, and the edits that keep nodes and tensors in step."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    captured: frozenset[str]  # tensors that bodies of control flow read
    _nodes: list[Node]
    _before: dict[int, list[Node]]
    _after: dict[int, list[Node]]
    _removed: set[int]
    _names: set[str]
    _numbers: dict[str, int]
    _common: dict[tuple[str, tuple[int, ...], bytes], str]  # value -> first constant of it

    @property
    def nodes(self) -> list[Node]:
        """The nodes in topological order (a list of this moment: edits go through `add`)."""
        if self._before or self._after or self._removed:
            merged: list[Node] = []
            for node in self._nodes:
                self._place(node, merged)
            self._nodes = merged
            self._before, self._after, self._removed = {}, {}, set()
        return self._nodes

    def _place(self, node: Node, merged: list[Node]) -> None:
        for extra in self._before.get(id(node), ()):
            self._place(extra, merged)
        if id(node) not in self._removed:
            merged.append(node)
        for extra in self._after.get(id(node), ()):
            self._place(extra, merged)

    def tensors(self) -> dict[str, Tensor]:
        """Return every named tensor of the graph (bodies of control flow excluded)."""
        found = {tensor.name: tensor for tensor in self.inputs}
        for node in self.nodes:
            for tensor in (*node.inputs, *node.outputs, *node.captured):
                if tensor.name:
                    found[tensor.name] = tensor
        for tensor in self.outputs:  # a constant may be an output that no node reads any more
            found.setdefault(tensor.name, tensor)
        return found

    def is_output(self, tensor: Tensor) -> bool:
        """True when `tensor` is an output of the graph."""
        return any(output is tensor for output in self.outputs)

    @staticmethod
    def producer(tensor: Tensor) -> Node | None:
        """Return the node that makes `tensor`, None for inputs and constants."""
        return tensor.inputs[0] if tensor.inputs else None

    @staticmethod
    def consumers(tensor: Tensor) -> list[tuple[Node, int]]:
        """Return each (node, input index) that reads `tensor`, in order of first use."""
        seen: dict[int, Node] = {id(node): node for node in tensor.outputs}
        return [
            (node, index)
            for node in seen.values()
            for index, read in enumerate(node.inputs)
            if read is tensor
        ]

    def unique_name(self, base: str) -> str:
        """Return `base`, or `base` with the first free number; the name is taken from now on."""
        name, number = base, self._numbers.get(base, 1)
        while name in self._names:
            name, number = f"{base}_{number}", number + 1
        self._numbers[base] = number  # the next search begins here: naming n tensors is linear
        self._names.add(name)
        return name

    def variable(self, base: str, dtype: Any = None, shape: Any = None) -> Variable:
        """Make a tensor with a free name."""
        return Variable(self.unique_name(base), dtype=dtype, shape=shape)

    def constant(self, base: str, array: NDArray[Any]) -> Constant:
        """Make a constant of any ONNX dtype, int4 and fp8 included, with a free name."""
        name = self.unique_name(base)
        array = np.asarray(array)
        if array.dtype.kind in "biuf" and array.dtype.itemsize * 8 != 4:
            return Constant(name, np.array(array, order="C"))
        return Constant(name, LazyValues(numpy_helper.from_array(array, name)))

    def common_constant(self, base: str, array: NDArray[Any]) -> Constant:
        """Make a constant that is written once, with all others of the same value made here."""
        constant = self.constant(base, array)
        key = (str(array.dtype), array.shape, np.asarray(array).tobytes())
        first = self._common.setdefault(key, constant.name)
        if first != constant.name:
            constant.copy_of = first
        return constant

    def make(
        self,
        op: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        name: str,
        attrs: dict[str, Any] | None = None,
        domain: str | None = None,
    ) -> Node:
        """Make a node with a free name; `add` puts it into the graph."""
        node = Node(op, self.unique_name(name), attrs or {}, list(inputs), list(outputs), domain)
        node.extra, node.captured = onnx.NodeProto(), []
        return node

    def add(self, node: Node, *, before: Node | None = None, after: Node | None = None) -> None:
        """Insert `node` next to an anchor, or at the end."""
        if before is not None:
            self._before.setdefault(id(before), []).append(node)
        elif after is not None:
            self._after.setdefault(id(after), []).insert(0, node)
        else:
            self.nodes.append(node)

    def remove(self, node: Node) -> None:
        """Take `node` out and unhook its tensors."""
        for index in reversed(range(len(node.inputs))):
            _drop(node.inputs[index].outputs, node)
            list.pop(node.inputs, index)
        for index in reversed(range(len(node.outputs))):
            _drop(node.outputs[index].inputs, node)
            list.pop(node.outputs, index)
        self._removed.add(id(node))

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        """Make `node` read `tensor` at `index` (appended when one past the end)."""
        if index == len(node.inputs):
            list.append(node.inputs, tensor)
        else:
            _drop(node.inputs[index].outputs, node)
            list.__setitem__(node.inputs, index, tensor)
        list.append(tensor.outputs, node)

    def set_output(self, node: Node, index: int, tensor: Tensor) -> None:
        """Make `node` write `tensor` at `index`."""
        _drop(node.outputs[index].inputs, node)
        list.__setitem__(node.outputs, index, tensor)
        list.append(tensor.inputs, node)

    def drop_input(self, node: Node, index: int) -> None:
        """Remove the last inputs of `node` from `index` on."""
        while len(node.inputs) > index:
            _drop(node.inputs[-1].outputs, node)
            list.pop(node.inputs)

    def replace_uses(self, old: Tensor, new: Tensor) -> None:
        """Let every consumer of `old` read `new`; names of graph outputs are kept.

        When `old` is a graph output its producer is replaced by the one of `new`, which then writes
        the tensor `old`, for users address outputs by name.
        """
        if self.is_output(old):
            maker, producer = self.producer(new), self.producer(old)
            if maker is None:
                msg = f"graph output {old.name} cannot become an alias of {new.name}"
                raise InternalError(msg)
            if producer is not None:
                slot = next(i for i, t in enumerate(producer.outputs) if t is old)
                self.set_output(producer, slot, self.variable(f"{old.name}_unused"))
            slot = next(i for i, t in enumerate(maker.outputs) if t is new)
            self.set_output(maker, slot, old)
            old, new = new, old
        for node, index in self.consumers(old):
            self.set_input(node, index, new)

    def sort(self) -> None:
        """Restore topological order; nodes that are in order already keep their places."""
        nodes = self.nodes
        position = {id(node): i for i, node in enumerate(nodes)}
        needs = [
            {
                position[id(maker)]
                for tensor in (*node.inputs, *node.captured)
                for maker in tensor.inputs
                if id(maker) in position
            }
            for node in nodes
        ]
        self._nodes = [nodes[i] for i in stable_order(needs)]

    def remove_unused(self) -> int:
        """Remove nodes whose outputs nobody reads; return how many went."""
        kept = {tensor.name for tensor in self.outputs}
        gone = 0
        for node in reversed(list(self.nodes)):
            if not any(t.name in kept or t.outputs for t in node.outputs):
                self.remove(node)
                gone += 1
            else:
                kept |= {tensor.name for tensor in node.captured}
        return gone


def _drop(items: list[Any], item: Any) -> None:
    """Remove one entry by identity from a list that graphsurgeon keeps in step with others."""
    for index, found in enumerate(items):
        if found is item:
            list.pop(items, index)
            return
    raise InternalError("a tensor and its node disagree about being connected")
