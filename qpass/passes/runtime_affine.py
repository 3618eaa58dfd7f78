"""Corrections that cost an op: Mul and Add, or Add alone, where nothing else can take one.

What it does
    Puts ``gain * y + offset`` per channel behind a tensor, as nodes. Only on demand
    (`--allow-runtime-ops`), and only where it surely helps: by `CONFIDENCE` standard errors over
    groups of samples in every channel that changes, and by `LEAST_DB` of the tensor's error on the
    samples that were held out.
Where
    Outputs of linear ops whose scale or bias cannot take it (a MatMul without a bias behind it, one
    scale for the whole weight); sums of residual blocks; products of two activations; activations
    and pooling that are read in float.
Where not
    Between DQ, op and Q: the op would leave the integers, which costs more than any correction is
    worth. MatMul is the exception, for MatMul and Add is how ONNX writes a bias. Behind Softmax,
    whose rows sum to one.
Preconditions
    As for `fold_affine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import LINEAR_OPS, Constant, Graph, Node, Tensor
from qpass.passes.channel_affine import ChannelAffine

CONFIDENCE: Final = 2.0
LEAST_DB: Final = 0.5
ACTIVATIONS: Final = frozenset({
    "AveragePool", "Elu", "Erf", "Gelu", "GlobalAveragePool", "HardSigmoid", "HardSwish",
    "LeakyRelu", "MaxPool", "Mish", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Swish", "Tanh", "ThresholdedRelu",
})  # fmt: skip
_BY_IMAGE: Final = frozenset({"AveragePool", "GlobalAveragePool", "MaxPool"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimePlace:
    """A tensor behind which nodes may stand; its channels lie along `axis` (from the end)."""

    tap: str
    axis: int
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeChange:
    """Nodes behind one tensor; `apply` puts them into any copy of the quantized graph."""

    place: RuntimePlace
    affine: ChannelAffine

    def apply(self, graph: Graph) -> tuple[Node, ...]:
        """Insert Mul where a gain is not 1, and Add where an offset is not 0."""
        return insert_affine(graph, self.place, self.affine)

    @property
    def sentence(self) -> str:
        """What was added, for the report."""
        ops = [
            op
            for op, changed in (
                ("Mul", (self.affine.gain != 1.0).any()),
                ("Add", self.affine.offset.any()),
            )
            if changed
        ]
        return f"{' and '.join(ops)} behind {self.place.tap} ({self.place.channels} channels)"


def find_runtime_place(graph: Graph, node: Node) -> RuntimePlace | str | None:
    """Return the place behind `node`, why there is none, or None: it is not looked for.

    Args:
        graph: the quantized graph.
        node: a node of it that is not a linear op with a site that takes everything.
    """
    if node.domain not in (None, "", "ai.onnx") or not _is_looked_for(node):
        return None
    out = node.outputs[0]
    axis = _channel_axis(node)
    size = None if out.shape is None or axis is None else out.shape[axis]
    if axis is None or not isinstance(size, int) or size < 2:
        return "the number of its channels is not known"
    if out.name in graph.captured:
        return "a body of control flow reads it"
    readers = graph.consumers(out)
    quantized_in = any(
        maker is not None and maker.op == "DequantizeLinear"
        for maker in (graph.producer(t) for t in node.inputs)
    )
    fused = node.op != "MatMul" and quantized_in
    if fused and any(reader.op == "QuantizeLinear" for reader, _ in readers):
        return "an op between it and its Q would take it out of the integers"
    return RuntimePlace(tap=out.name, axis=axis, channels=size)


def insert_affine(graph: Graph, place: RuntimePlace, affine: ChannelAffine) -> tuple[Node, ...]:
    """Insert ``gain * y + offset`` behind the tensor; all its readers get the result.

    A graph output keeps its name: it is what the last node makes.
    """
    tensor: Tensor = graph.tensors()[place.tap]
    anchor = graph.producer(tensor)
    assert anchor is not None
    shape = (place.channels, *([1] * (-place.axis - 1)))
    readers = graph.consumers(tensor)
    added: list[Node] = []
    current = tensor
    for op, values, needed in (
        ("Mul", affine.gain, bool((affine.gain != 1.0).any())),
        ("Add", affine.offset, bool(affine.offset.any())),
    ):
        if not needed:
            continue
        constant = graph.constant(
            f"{place.tap}_{op.lower()}", values.reshape(shape).astype(np.float32)
        )
        result = graph.variable(f"{place.tap}_corrected", tensor.dtype, tensor.shape)
        node = graph.make(op, [current, constant], [result], name=f"{place.tap}_{op}")
        graph.add(node, after=anchor)
        added.append(node)
        anchor, current = node, result
    if not added:
        return ()
    for reader, index in readers:
        graph.set_input(reader, index, current)
    if graph.is_output(tensor):
        inner = graph.variable(f"{place.tap}_uncorrected", tensor.dtype, tensor.shape)
        maker = graph.producer(tensor)
        assert maker is not None
        slot = next(i for i, out in enumerate(maker.outputs) if out is tensor)
        graph.set_output(maker, slot, inner)
        graph.set_input(added[0], 0, inner)
        graph.set_output(added[-1], 0, tensor)
        for reader, index in readers:
            graph.set_input(reader, index, tensor)
    return tuple(added)


def _is_looked_for(node: Node) -> bool:
    if node.op in LINEAR_OPS or node.op in ACTIVATIONS:
        return True
    return node.op == "Add" and not any(isinstance(t, Constant) for t in node.inputs)


def _channel_axis(node: Node) -> int | None:
    """Return the axis of the channels, from the end.

    Feature maps have them at 1: what a Conv makes, and what pooling reads. Elsewhere they are last.
    """
    shape = node.outputs[0].shape
    if shape is None or len(shape) < 2:
        return None
    if node.op in ("Conv", "ConvTranspose") or node.op in _BY_IMAGE:
        return 1 - len(shape)
    return _axis_of_map(node, len(shape))


def _axis_of_map(node: Node, rank: int) -> int:
    """Return the axis of the channels of an elementwise op: that of the linear op before it."""
    seen: set[int] = set()
    waiting = list(node.inputs)
    while waiting:
        maker = next(iter(waiting.pop(0).inputs), None)
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        if maker.op in ("Conv", "ConvTranspose") or maker.op in _BY_IMAGE:
            return 1 - rank
        if maker.op in ("Gemm", "MatMul", "LayerNormalization", "Reshape", "Transpose"):
            return -1
        waiting.extend(maker.inputs[:2])
    return -1
