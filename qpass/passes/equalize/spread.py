"""Follow the scale of a tensor through a graph, until constants take it up.

From the tensor that is divided by s, the scale goes forward and backward through the ops that
commute with it. The weights of linear ops behind take s; in front, 1 / s goes to gain and bias of a
norm, output channels and bias of a linear op, or the constant of a Mul, Add or Concat. Of a product
of two activations the columns are those of the right operand; where the scaled channels are summed
over (Q K^T) the other operand takes the inverse.

Every op that is passed obeys f(s * x) == s * f(x) for positive s by channel. Channels for which
something does not are fixed to the scale 1; labels that have to be equal are joined. A Clip around
zero does so for scales that the site's bounds allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from qpass.graph import LINEAR_OPS, Constant, Graph, Node, Tensor
from qpass.matching import clip_ends, weight_axis
from qpass.passes.affine.absorb import LinearReader, linear_reader
from qpass.passes.equalize.field import Field
from qpass.passes.equalize.labels import (
    MOVERS,
    Labels,
    along,
    move_backward,
    move_forward,
    reduced,
    varying,
    vector,
)
from qpass.passes.equalize.linear import channels_of
from qpass.passes.equalize.shift import find_shift
from qpass.passes.equalize.site import Bound, Kind, Product, Reader, Site, Slot
from qpass.units import is_weighted

# f(s * x) == s * f(x) for s > 0 by channel; labels may not change along the axes they pool over.
HOMOGENEOUS: Final = frozenset({"Abs", "LeakyRelu", "Relu"})
POOLS: Final = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
# Normalizations and the axis of their channels.
NORMS: Final = {
    "BatchNormalization": 1,
    "InstanceNormalization": 1,
    "LayerNormalization": -1,
    "RMSNormalization": -1,
}
MOST_TENSORS: Final = 4096  # the residual streams of large models have hundreds


@dataclass(slots=True)
class Spread(Field):
    """Follows one set of scales through the graph."""

    graph: Graph
    readers: dict[int, tuple[LinearReader, Labels, int]] = field(default_factory=dict)
    products: dict[int, tuple[Node, bool, Labels, int]] = field(default_factory=dict)
    givers: list[Node] = field(default_factory=list)
    bounds: dict[int, Bound] = field(default_factory=dict)
    streams: bool = False  # activations are added up on the way

    def start(self, tensor: Tensor, labels: Labels) -> None:
        """Follow the division of `tensor` by s[labels] as far as it goes."""
        self.parents = list(range(int(labels.max()) + 1))
        self.label(tensor, labels, -1)
        while self.waiting:
            tensor = self.waiting.pop()
            if len(self.fields) > MOST_TENSORS:
                self.fix_all("the scale would spread over a large part of the model")
                return
            self._visit(tensor)

    def _visit(self, tensor: Tensor) -> None:
        _, labels, power = self.fields[id(tensor)]
        if self.graph.is_output(tensor):
            self.fix(labels, f"{tensor.name} is an output of the model")
        if tensor.name in self.graph.captured:
            self.fix(labels, f"control flow reads {tensor.name}")
        producer = self.graph.producer(tensor)
        if producer is None:
            self.fix(labels, f"{tensor.name} is an input of the model")
        else:
            self._backward(producer, tensor, labels, power)
        for node, index in self.graph.consumers(tensor):
            if node is not producer and node.op != "Shape":
                self._forward(node, index, labels, power)

    # ------------------------------------------------------------------ backward

    def _backward(self, node: Node, tensor: Tensor, labels: Labels, power: int) -> None:
        if node.domain not in (None, "", "ai.onnx"):
            self.fix(labels, f"{node.op} takes no scale")
        elif node.op in MOVERS:
            moved = move_backward(node, tensor, labels)
            if moved is None:
                self.fix(labels, f"{node.op} {node.name} mixes its channels")
                return
            for index, part in moved:
                if not self._known_part(node, tensor, labels, power):
                    self.give(node, index, part, power)
        elif self._commutes(node, labels, power):
            self.label(node.inputs[0], labels, power)
        elif node.op in NORMS:
            self._norm(node, labels, power)
        elif node.op in LINEAR_OPS and is_weighted(node):
            self._linear(node, labels, power)
        elif node.op == "MatMul":
            self._columns(node, labels, power)
        elif node.op in ("Add", "Sub"):
            self._sum(node, labels, power)
        elif node.op in ("Mul", "Div"):
            self._scaled(node, labels, power)
        else:
            self.fix(labels, f"{node.op} in front takes no scale")

    def _known_part(self, node: Node, tensor: Tensor, labels: Labels, power: int) -> bool:
        """Join with what the source of Split, Slice or Gather has; True when it has labels."""
        known = self.fields.get(id(node.inputs[0]))
        if node.op not in ("Gather", "Slice", "Split") or known is None or known[2] != power:
            return False
        moved = move_forward(node, 0, known[1]) or []
        parts = [part for out, part in moved if out is tensor]
        self.join(parts[0], labels)
        return True

    def _commutes(self, node: Node, labels: Labels, power: int) -> bool:
        """True when the op may follow the scale as well as go before it."""
        if node.op in POOLS:
            return not any(axis > 1 for axis in varying(labels))
        return node.op in HOMOGENEOUS or (node.op == "Clip" and self._bounds(node, labels, power))

    def _bounds(self, node: Node, labels: Labels, power: int) -> bool:
        """Note the ends of a Clip as bounds of the scales; False where they cannot be kept."""
        ends = clip_ends(node)
        if ends is None or not ends[0] <= 0.0 <= ends[1] or power != -1:
            return False
        bound = Bound(tensor=node.outputs[0].name, low=ends[0], high=ends[1], labels=labels)
        self.bounds.setdefault(id(node), bound)
        return True

    def _norm(self, node: Node, labels: Labels, power: int) -> None:
        rank = labels.ndim
        axis = NORMS[node.op] % rank
        size = node.inputs[1].shape[0] if node.inputs[1].shape else 0
        row = vector(labels, axis, int(size)) if size else None
        last = int(node.attrs.get("axis", -1)) % rank == rank - 1
        constants = [t for t in node.inputs[1:3] if t.name]
        if node.op in ("LayerNormalization", "RMSNormalization") and not last:
            self.fix(labels, f"{node.op} goes over more than the last axis")
            return
        if row is None or not all(isinstance(t, Constant) for t in constants):
            self.fix(labels, f"the constants of {node.op} do not lie along its channels")
            return
        self.givers.append(node)
        for index in range(1, 1 + len(constants)):
            self.take(node, index, row, power)

    def _linear(self, node: Node, labels: Labels, power: int) -> None:
        shape = node.inputs[1].shape
        axis = weight_axis(node, len(shape)) % len(shape)
        outputs, out_axis = int(shape[axis]), 1 if node.op.startswith("Conv") else labels.ndim - 1
        row = vector(labels, out_axis, outputs)
        grouped = node.op == "ConvTranspose" and int(node.attrs.get("group", 1)) > 1
        if row is None or grouped or (node.op == "MatMul" and len(shape) != 2):
            self.fix(labels, f"{node.op} {node.name} has no weights by these channels")
            return
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        if bias is not None and not isinstance(bias, Constant):
            self.fix(labels, f"the bias of {node.name} is not constant")
            return
        self.givers.append(node)
        self.take(node, 1, along(axis, len(shape), row), power)
        if bias is not None:
            self.take(node, 2, row, power)

    def _columns(self, node: Node, labels: Labels, power: int) -> None:
        """A product of activations: its columns are those of the right operand."""
        right = node.inputs[1]
        rank = len(right.shape) if right.shape is not None else -1
        if rank != labels.ndim or rank - 2 in varying(labels):
            self.fix(labels, f"the rows of the product {node.name} are scaled")
            return
        self.products[id(node)] = (node, False, labels, power)
        self.label(right, labels, power)

    def _sum(self, node: Node, labels: Labels, power: int) -> None:
        left, right = node.inputs
        if isinstance(left, Constant) == isinstance(right, Constant):
            self._residual(node, labels, power)
            return
        constant, data = (0, 1) if isinstance(left, Constant) else (1, 0)
        if node.inputs[data].shape is None or len(node.inputs[data].shape) != labels.ndim:
            self.fix(labels, f"{node.name} broadcasts its data")
            return
        self.take(node, constant, labels, power)
        self.label(node.inputs[data], labels, power)

    def _residual(self, node: Node, labels: Labels, power: int) -> None:
        """Two activations are added: both are scaled alike, and so is the whole residual stream."""
        for tensor in node.inputs:
            shape = tensor.shape
            if shape is None or len(shape) != labels.ndim:
                self.fix(labels, f"{node.name} adds activations of different ranks")
                return
            if any(shape[axis] != labels.shape[axis] for axis in varying(labels)):
                self.fix(labels, f"{node.name} broadcasts channels")
                return
        self.streams = True
        for tensor in node.inputs:
            self.label(tensor, labels, power)

    def _scaled(self, node: Node, labels: Labels, power: int) -> None:
        """Mul and Div: a constant factor takes the scale, else the factor that can."""
        if any(id(tensor) in self.fields for tensor in node.inputs):
            return  # the scale came from that factor
        for index in (0, 1):
            if isinstance(node.inputs[index], Constant):
                self.givers.append(node)
                self.take(node, index, labels, -power if index and node.op == "Div" else power)
                return
        if node.op == "Mul":
            for index in (0, 1):
                tensor = node.inputs[index]
                same = tensor.shape is not None and len(tensor.shape) == labels.ndim
                if same and node.inputs[1 - index] is not tensor and self._gives(tensor):
                    self.label(tensor, labels, power)
                    return
        self.fix(labels, f"no factor of {node.op} {node.name} takes a scale")

    def _gives(self, tensor: Tensor) -> bool:
        """True when a linear op or a norm makes `tensor`, but for a bias and movers."""
        for _ in range(MOST_TENSORS):
            node = self.graph.producer(tensor)
            if node is None or len(self.graph.consumers(tensor)) > 1:
                return False
            if is_weighted(node) or node.op in NORMS:
                return True
            data = [t for t in node.inputs if t.name and not isinstance(t, Constant)]
            if node.op not in MOVERS | HOMOGENEOUS | {"Add", "Sub"} or len(data) != 1:
                return False
            tensor = data[0]
        return False

    # ------------------------------------------------------------------ forward

    def _forward(self, node: Node, index: int, labels: Labels, power: int) -> None:
        if node.domain not in (None, "", "ai.onnx"):
            self.fix(labels, f"{node.op} reads it")
        elif node.op in MOVERS:
            moved = move_forward(node, index, labels)
            if moved is None:
                self.fix(labels, f"{node.op} {node.name} mixes its channels")
                return
            known = self.fields.get(id(node.outputs[0])) if node.op == "Concat" else None
            if known is not None and known[2] == power:  # only this input's part of it
                parts = dict(move_backward(node, node.outputs[0], known[1]) or [])
                self.join(parts[index], labels)
                return
            for out, part in moved:
                self.label(out, part, power)
        elif index == 0 and self._commutes(node, labels, power):
            self.label(node.outputs[0], labels, power)
        elif node.op in LINEAR_OPS and is_weighted(node) and index == 0:
            self._read(node, labels, power)
        elif node.op == "MatMul":
            self._operand(node, index, labels, power)
        elif node.op in ("Add", "Sub"):
            self._summand(node, labels, power)
        elif node.op in ("Mul", "Div") and not (node.op == "Div" and index == 1):
            self._factor(node, index, labels, power)
        else:
            self.fix(labels, f"{node.op} {node.name} reads it")

    def _read(self, node: Node, labels: Labels, power: int) -> None:
        channels = channels_of(node)
        axis = 1 if node.op.startswith("Conv") else labels.ndim - 1
        row = None if channels is None else vector(labels, axis, channels)
        reader = (
            "other channels"
            if row is None or channels is None
            else linear_reader(node, 0, axis, channels)
        )
        if isinstance(reader, str) or row is None:
            self.fix(labels, f"{node.name}: {reader}")
            return
        self.readers[id(node)] = (reader, row, power)

    def _operand(self, node: Node, index: int, labels: Labels, power: int) -> None:
        rank = labels.ndim
        other = node.inputs[1 - index]
        if other.shape is None or len(other.shape) != rank or isinstance(other, Constant):
            self.fix(labels, f"{node.name} multiplies it by something of another rank")
            return
        inner, outer = (rank - 1, rank - 2) if index == 0 else (rank - 2, rank - 1)
        if inner in varying(labels) and outer not in varying(labels):  # both sides of Q K^T
            mirrored = labels.swapaxes(-1, -2)
            right = labels if index == 1 else mirrored
            self.products[id(node)] = (node, True, right, power if index == 1 else -power)
            self.label(other, mirrored, -power)
        elif index == 1 and inner not in varying(labels):
            self.products[id(node)] = (node, False, labels, power)
            self.label(node.outputs[0], labels, power)
        else:
            self.fix(labels, f"the rows of the product {node.name} are scaled")

    def _summand(self, node: Node, labels: Labels, power: int) -> None:
        out = node.outputs[0]
        if out.shape is None or len(out.shape) != labels.ndim:
            self.fix(labels, f"{node.name} broadcasts it")
            return
        self.label(out, labels, power)  # the other summand follows when `out` is visited

    def _factor(self, node: Node, index: int, labels: Labels, power: int) -> None:
        out = node.outputs[0]
        square = node.inputs[0] is node.inputs[-1]
        if square or out.shape is None or len(out.shape) != labels.ndim:
            self.fix(labels, f"{node.op} {node.name} reads it")
            return
        taken = any((id(node), i) in self.taken for i in (0, 1))
        if taken or id(node.inputs[1 - index]) in self.fields:
            self.fix(labels, f"both factors of {node.name} are scaled")
            self.fix(self.fields[id(out)][1] if id(out) in self.fields else labels, "")
            return
        self.label(out, labels, power)

    # ------------------------------------------------------------------ result

    def result(self, origin: Tensor) -> Site | str:
        """Return the site, or why there is none."""
        roots = [self.find(label) for label in range(len(self.parents))]
        free = sorted({root for root in roots if root})
        number = {0: 0, **{root: i + 1 for i, root in enumerate(free)}}
        table = np.array([number[root] for root in roots], np.int64)
        readers = tuple(
            Reader(linear=linear, labels=table[labels], power=power)
            for linear, labels, power in self.readers.values()
            if table[labels].any()
        )
        products = tuple(
            Product(node=node, both=both, labels=reduced(table[labels]), power=power)
            for node, both, labels, power in self.products.values()
            if table[labels].any()
        )
        slots = tuple(
            Slot(node=s.node, index=s.index, labels=table[s.labels], power=s.power)
            for s in self.slots
            if table[s.labels].any()
        )
        if not (readers or products) or not slots:
            return self.reason or "nothing takes its scale up"
        whole = len(free) == len(self.parents) - 1
        return Site(
            tensor=origin.name,
            kind=self._kind(products),
            groups=len(free),
            readers=readers,
            products=products,
            slots=slots,
            tensors=frozenset(
                t.name for t, labels, _ in self.fields.values() if table[labels].any()
            ),
            shift=find_shift(self.graph, readers, products, slots) if whole else None,
            bounds=tuple(
                replace(bound, labels=table[bound.labels])
                for bound in self.bounds.values()
                if table[bound.labels].any()
            ),
        )

    def _kind(self, products: Sequence[Product]) -> Kind:
        if products:
            return "logits" if any(p.both for p in products) else "value"
        if self.streams:
            return "stream"
        if any(node.op in NORMS for node in self.givers):
            return "norm"
        return "linear" if any(node.op in LINEAR_OPS for node in self.givers) else "constant"
