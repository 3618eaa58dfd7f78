"""Find for each linear node of a model the op of the engine's graph that computes it.

Engines rename, fuse and drop; no single name survives everywhere (the modules `census_ort` and
`census_openvino` list what was measured). `trace` therefore asks for all nodes by the most certain
sign first, and only then for the rest by the next one:

1. the name of the node;
2. the names of its outputs;
3. the name of its weight's initializer, when no other linear node uses it;
4. the names of nodes and tensors behind it, nearest first, along ops that engines fuse into a
   linear op or let its dequantization pass. Such a sign is not proof that the op is not another
   one's, so here an op that has been found already is not taken again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Final

import onnx

from qpass.verify.census_ort import subgraphs
from qpass.verify.engine_op import LINEAR, Census, EngineOp

_PASSED: Final = frozenset({
    "Add",
    "BatchNormalization",
    "Cast",
    "Clip",
    "DequantizeLinear",
    "Div",
    "Elu",
    "Erf",
    "Flatten",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Mish",
    "Mul",
    "Neg",
    "PRelu",
    "QuantizeLinear",
    "Relu",
    "Reshape",
    "Sigmoid",
    "Softplus",
    "Squeeze",
    "Sub",
    "Sum",
    "Swish",
    "Tanh",
    "Transpose",
    "Unsqueeze",
})  # fmt: skip
# Between an initializer and the linear op that uses it.
_WEIGHT_PATH: Final = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Transpose"}
)


def trace(original: onnx.ModelProto, census: Census) -> dict[str, EngineOp | None]:
    """Map each linear node of `original` to the engine op that computes it.

    Args:
        original: the model that the engine was given (weights are not needed, external data need
            not be loaded).
        census: what `read_back` returned for that file.

    Returns:
        One entry a linear node, bodies of If and Loop included, in graph order. The key is the
        node's name, or its first output where it has none. The value is None when no engine op
        could be recognized: the node was folded into a constant, or is hidden in a body that the
        engine does not show.
    """
    scopes = list(_Scope.all_in(original.graph))
    uses = Counter(scope.weight(node) for scope in scopes for node in scope.linear)
    index = _Index(op for op in census.ops if op.kind != "other")
    found: dict[str, EngineOp | None] = {
        _key(node): None for scope in scopes for node in scope.linear
    }

    def signs(step: int, scope: _Scope, node: onnx.NodeProto) -> Iterable[str]:
        if step == 0:
            return (node.name,)
        if step == 1:
            return tuple(node.output)
        if step == 2:
            weight = scope.weight(node)
            return (weight,) if weight and uses[weight] == 1 else ()
        return scope.behind(node)

    for step in range(4):
        for scope in scopes:
            for node in scope.linear:
                if found[_key(node)] is None:
                    names = signs(step, scope, node)
                    found[_key(node)] = index.find(names, reuse=step < 3)
    return found


def _key(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


class _Index:
    """The linear ops of a census by the names they cover."""

    def __init__(self, ops: Iterable[EngineOp]) -> None:
        self._by_name: dict[str, list[EngineOp]] = {}
        for op in ops:
            for name in op.covers:
                self._by_name.setdefault(name, []).append(op)
        self._taken: set[int] = set()

    def find(self, names: Iterable[str], *, reuse: bool) -> EngineOp | None:
        """Return the op that the first known name leads to; one not found before, if there is."""
        for name in names:
            candidates = self._by_name.get(name, []) if name else []
            fresh = [op for op in candidates if id(op) not in self._taken]
            if fresh or (reuse and candidates):
                op = (fresh or candidates)[0]
                self._taken.add(id(op))
                return op
        return None


class _Scope:
    """One graph with the maps that the search needs."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.linear = [node for node in graph.node if node.op_type in LINEAR]
        self._producers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    @classmethod
    def all_in(cls, graph: onnx.GraphProto) -> Iterator[_Scope]:
        """Yield the scope of `graph` and of all graphs inside its nodes."""
        yield cls(graph)
        for node in graph.node:
            for body in subgraphs(node):
                yield from cls.all_in(body)

    def weight(self, node: onnx.NodeProto) -> str:
        """Return the name of the tensor that the second operand is stored in, "" without one."""
        # QLinear ops list (x, scale, zero point) before the weight.
        position = 3 if node.op_type.startswith(("QLinear", "QGemm")) else 1
        name = node.input[position] if len(node.input) > position else ""
        while name in self._producers and self._producers[name].op_type in _WEIGHT_PATH:
            name = self._producers[name].input[0]
        return "" if name in self._producers else name

    def behind(self, node: onnx.NodeProto) -> Iterator[str]:
        """Yield the names of nodes and tensors behind `node`, nearest first."""
        pending = deque(node.output)
        seen = set(pending)
        while pending:
            for reader in self._readers.get(pending.popleft(), ()):
                if reader.op_type not in _PASSED:
                    continue
                yield reader.name
                for name in reader.output:
                    if name not in seen:
                        seen.add(name)
                        pending.append(name)
                        yield name
