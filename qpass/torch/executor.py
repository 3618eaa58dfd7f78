"""Run a piece of an ONNX graph in torch, so that gradients flow through it.

What it does
    `Executor` walks nodes in order; each is one small function of a table (see `executor_ops` and
    `executor_windows`). Rounding in QuantizeLinear passes gradients straight through and stops them
    where it saturates. A Q with its DQ is one step, so that a caller can mix what it gives with
    what came in (QDrop).
Why not a converter
    Those that are kept up turn whole files into modules with constants of their own. Here weights,
    biases and activations of a piece change from step to step, Q and DQ need a gradient, and an op
    that is missing must be known by name before anything runs.
Preconditions
    Nodes are in topological order and have no bodies. Integer tensors stay on the CPU: they are
    shapes, axes and indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from qpass.dtypes import STORAGE_TYPES, UINT8, StorageType
from qpass.graph import Constant, Node, array_of
from qpass.torch.executor_errors import UnsupportedOpError
from qpass.torch.executor_ops import OPS
from qpass.torch.executor_quantize import fake_quantize
from qpass.torch.narrow import narrowed

__all__ = ["Executor", "Mix", "Tensors", "UnsupportedOpError"]

Tensors = Mapping[str, torch.Tensor]
Mix = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DOMAINS: Final = (None, "", "ai.onnx")


@dataclass(frozen=True, slots=True)
class _Step:
    """One node, or a Q with the DQ behind it (`quantizes`); `narrow` is for some of `run`.

    No later step reads the tensors that are named in `last`.
    """

    name: str
    op: str
    run: Callable[..., Any]
    narrow: Callable[..., Any]
    attrs: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    quantizes: bool = False
    last: tuple[str, ...] = ()


def has_function(node: Node) -> bool:
    """True where torch has a function for a node here."""
    return node.domain in DOMAINS and node.op in OPS


class Executor:
    """Some nodes of a graph as a differentiable function of tensors by name."""

    def __init__(
        self, nodes: Sequence[Node], *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Look every node up, and move float constants to `device` as `dtype`.

        Raises:
            UnsupportedOpError: a node has an op that the table lacks; it is named.
        """
        for node in nodes:
            if not has_function(node):
                raise UnsupportedOpError(f"{node.op} has no gradient here", where=node.name)
        self.device, self._dtype = device, dtype
        self._constants = {
            tensor.name: self.tensor(array_of(tensor))
            for node in nodes
            for tensor in node.inputs
            if isinstance(tensor, Constant)
        }
        self._steps = _steps_of(nodes, device)

    def tensor(self, array: NDArray[Any]) -> torch.Tensor:
        """Return an array as a tensor: floats on the device, integers and truth values not."""
        if array.dtype.kind == "f":
            return torch.from_numpy(np.array(array)).to(self.device, self._dtype)
        if array.dtype.kind in "biu":
            return torch.from_numpy(array.astype(bool if array.dtype.kind == "b" else np.int64))
        # The narrow integers of ml_dtypes, which numpy counts among the voids.
        return torch.from_numpy(array.astype(np.int64))

    def constant(self, name: str) -> torch.Tensor:
        """Return a constant of the nodes."""
        return self._constants[name]

    def run(
        self,
        given: Tensors,
        outputs: Sequence[str],
        *,
        scaled: Tensors | None = None,
        added: Tensors | None = None,
        mix: Mix | None = None,
        narrow: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Compute some tensors.

        Args:
            given: inputs by name; a constant or an output of a node that is given is taken as it
                is.
            outputs: names of the tensors to return.
            scaled: what outputs of nodes are multiplied by, by name of the output.
            added: what is added to them then.
            mix: called with the input of a Q and the output of the DQ behind it; returns what the
                readers of the DQ get.
            narrow: compute products with wide weights in bfloat16, see `narrow`.

        Raises:
            UnsupportedOpError: a node has attributes that its function does not know, or an output
                that is wanted and that its function does not give.
        """
        scaled, added = scaled or {}, added or {}
        values: dict[str, Any] = {"": None, **self._constants, **given}
        wanted = set(outputs)
        for step in self._steps:
            if any(name not in given for name in step.outputs):
                results = _results(step, values, mix, narrow)
                for name in step.outputs[len(results) :]:
                    if name in wanted or (name and name not in step.last):
                        raise UnsupportedOpError(
                            f"{step.op} does not give {name} here", where=step.name
                        )
                for name, value in zip(step.outputs, results, strict=False):
                    if name not in given:
                        value = value * scaled[name] if name in scaled else value
                        values[name] = value + added[name] if name in added else value
            for name in step.last:
                if name not in wanted:
                    values.pop(name, None)
        return tuple(values[name] for name in outputs)


def _results(step: _Step, values: Tensors, mix: Mix | None, narrow: bool) -> tuple[Any, ...]:
    operands = [values[name] for name in step.inputs]
    try:
        result = (step.narrow if narrow else step.run)(step.attrs, *operands)
    except UnsupportedOpError as error:
        raise UnsupportedOpError(error.what, where=step.name) from error
    if step.quantizes and mix is not None:
        result = mix(operands[0], result)
    return result if isinstance(result, tuple) else (result,)


def _steps_of(nodes: Sequence[Node], device: str) -> list[_Step]:
    closed = _closed_quantizers(nodes)
    fused = {id(quantizer) for quantizer in closed.values()}
    steps = []
    for node in nodes:
        quantizer = closed.get(id(node))
        source = node if quantizer is None else quantizer
        attrs = dict(source.attrs)
        if source.op == "QuantizeLinear":
            storage = _storage(source)
            attrs |= {"qmin": storage.qmin, "qmax": storage.qmax}
        if source.op == "Cast":
            attrs["device"] = device
        if id(node) not in fused:
            run = OPS[node.op] if quantizer is None else fake_quantize
            steps.append(
                _Step(
                    name=node.name,
                    op=node.op,
                    run=run,
                    narrow=narrowed(node.op, run),
                    attrs=attrs,
                    inputs=tuple(tensor.name for tensor in source.inputs),
                    outputs=tuple(tensor.name for tensor in node.outputs),
                    quantizes=quantizer is not None,
                )
            )
    return _with_last(steps)


def _with_last(steps: Sequence[_Step]) -> list[_Step]:
    """Say of each step what no later one reads, so that it need not be kept."""
    seen = {""}
    found = []
    for step in reversed(steps):
        last = tuple({*step.inputs, *step.outputs} - seen)
        seen.update(last)
        found.append(replace(step, last=last))
    return found[::-1]


def _closed_quantizers(nodes: Sequence[Node]) -> dict[int, Node]:
    """Return for each DQ (by id) the Q in front of it whose integers nothing else reads."""
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for tensor in node.inputs:
            readers.setdefault(tensor.name, []).append(node)
    closed: dict[int, Node] = {}
    for node in nodes:
        if node.op == "QuantizeLinear":
            after = readers.get(node.outputs[0].name, [])
            if after and all(_undoes(one, node) for one in after):
                closed |= {id(one): node for one in after}
    return closed


def _undoes(node: Node, quantizer: Node) -> bool:
    """True for a DQ with the scale and the zero point of a Q."""
    if node.op != "DequantizeLinear" or len(node.inputs) != len(quantizer.inputs):
        return False
    return all(
        left is right
        or (
            isinstance(left, Constant)
            and isinstance(right, Constant)
            and np.array_equal(array_of(left), array_of(right))
        )
        for left, right in zip(node.inputs[1:], quantizer.inputs[1:], strict=True)
    )


def _storage(node: Node) -> StorageType:
    """Return the type of the integers of a QuantizeLinear."""
    if len(node.inputs) < 3:
        return UINT8
    zero_point = node.inputs[2]
    if not isinstance(zero_point, Constant):
        raise UnsupportedOpError("its zero point is computed at run time", where=node.name)
    dtype = array_of(zero_point).dtype
    for storage in STORAGE_TYPES:
        if np.dtype(storage.numpy) == dtype:
            return storage
    raise UnsupportedOpError(f"QuantizeLinear to {dtype}", where=node.name)
