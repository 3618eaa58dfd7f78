"""How a linear op reads channels, and folding a per-channel affine into its weights and bias.

A linear op that reads y = a * x + c gives W y + b = (W diag(a)) x + (b + W c). Zero padding comes
between: a padded op sees 0 and not c outside of its input, so it can take a alone. The sums are
taken in float64 and rounded once, to the dtype of W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Constant, Graph, Node, Variable, array_of
from qpass.passes.normalize.folding import (
    Array,
    constant_of,
    given_input,
    other_input,
    rank_of,
    sole_reader,
    write_constant,
)
from qpass.passes.normalize.linear_folding import Affine, is_per_channel, write_bias

READERS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReader:
    """A linear op that takes channels in, each with weights of its own.

    axis: axis of the channels in its weight (for Conv counted within a group).
    obstacle: why it cannot take an offset, "" where it can.
    """

    node: Node
    axis: int
    obstacle: str = ""


def linear_reader(node: Node, index: int, axis: int, channels: int) -> LinearReader | str:
    """Return how `node` reads the channels at `axis` of its input `index`, or why it does not."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op not in READERS or node.domain not in (None, "", "ai.onnx"):
        return f"{node.op} is not linear"
    if index != 0:
        return f"{node.op} reads it as operand {index}"
    if not isinstance(weight, Constant) or len(weight.shape) < 2:
        return f"the weights of {node.op} are not constant"
    if weight.dtype not in (np.float32, np.float64):
        return f"its weight is {weight.dtype}"
    rank, groups = rank_of(node.inputs[0]), int(node.attrs.get("group", 1))
    if node.op == "MatMul":
        wanted, rows, obstacle = None if rank is None else rank - 1, len(weight.shape) - 2, ""
    elif node.op == "Gemm":
        wanted, rows = (0 if node.attrs.get("transA", 0) else 1), int(node.attrs.get("transB", 0))
        if (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)) != (1.0, 1.0):
            return "Gemm with alpha or beta"
        obstacle = _bias_obstacle(node)
    elif node.op == "Conv":
        wanted, rows = 1, 1
        obstacle = _padding(node) or _bias_obstacle(node)
    else:
        wanted, rows = 1, 0
        obstacle = "ConvTranspose adds an offset up by place"
    if axis != wanted:
        return f"{node.op} does not take axis {axis} as its channels"
    if int(weight.shape[rows]) * (groups if node.op == "Conv" else 1) != channels:
        return f"{node.op} has another number of channels"
    if not np.isfinite(array_of(weight)).all():
        return "its weight is not finite"
    return LinearReader(node=node, axis=rows, obstacle=obstacle)


def _padding(node: Node) -> str:
    padded = any(node.attrs.get("pads", ()))
    padded = padded or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return "it is padded with zeros, not with the offset" if padded else ""


def _bias_obstacle(node: Node) -> str:
    bias = given_input(node, 2)
    if bias is None:
        return ""
    values = constant_of(bias)
    if values is None:
        return "its bias is not constant"
    row = node.op == "Conv" or is_per_channel(node, values)
    return "" if row else "its bias is not one value for each channel"


def absorbed(reader: LinearReader, affine: Affine) -> tuple[Array, Array]:
    """Return, in float64, the weight with the gain and what the offset adds to each output."""
    weight = array_of(reader.node.inputs[1]).astype(np.float64)
    if reader.node.op == "Conv":
        groups, outputs = int(reader.node.attrs.get("group", 1)), weight.shape[0]
        by_group = [v.reshape(groups, -1) for v in (affine.gain, affine.offset)]
        gain, offset = (np.repeat(v, outputs // groups, axis=0) for v in by_group)
        taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
        trailing = [1] * (weight.ndim - 2)
        return weight * gain.reshape(*gain.shape, *trailing), (taps * offset).sum(axis=1)
    gain = affine.gain.reshape([-1 if i == reader.axis else 1 for i in range(weight.ndim)])
    if reader.node.op == "ConvTranspose":
        return weight * gain, np.zeros(1)
    shift = affine.offset.reshape(gain.shape) * weight  # a stack of matrices: one row for each
    return weight * gain, shift.sum(axis=reader.axis, keepdims=weight.ndim > 2)


def overflow(reader: LinearReader, affine: Affine) -> str:
    """Return why the folded numbers cannot be stored, "" when they can."""
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = absorbed(reader, affine)
    limit = np.finfo(reader.node.inputs[1].dtype).max
    fits = all((np.abs(v) <= limit).all() for v in numbers)
    return "" if fits else "what it is folded to is not finite"


def absorb(graph: Graph, reader: LinearReader, affine: Affine) -> None:
    """Let the constants of `reader` do the work of `affine` on its input.

    The offset of an op with an `obstacle` must be zero.
    """
    node = reader.node
    weight, shift = absorbed(reader, affine)
    write_constant(graph, node, 1, weight.astype(node.inputs[1].dtype))
    if not affine.offset.any():
        return
    if node.op == "MatMul":
        add_behind(graph, node, shift)
        return
    bias = given_input(node, 2)
    old = np.zeros(1) if bias is None else array_of(bias).astype(np.float64)
    write_bias(graph, node, old.ravel() + shift)


def add_behind(graph: Graph, node: Node, shift: Array) -> None:
    """Add `shift` to the output of a MatMul: in the Add behind it, or in a new one."""
    out = node.outputs[0]
    dtype = node.inputs[1].dtype
    add = sole_reader(graph, out)
    operand = other_input(add, out) if add is not None and add.op == "Add" else None
    values = None if operand is None else constant_of(operand)
    rank = rank_of(out)
    if add is not None and values is not None and rank is not None and values.ndim <= rank:
        index = 0 if add.inputs[1] is out else 1
        write_constant(graph, add, index, (values + shift).astype(dtype))
        return
    product = graph.variable(f"{out.name}_product", out.dtype, out.shape)
    graph.set_output(node, 0, product)
    constant = graph.constant(f"{node.name}_bias", shift.astype(dtype))
    graph.add(graph.make("Add", [product, constant], [out], name=f"{node.name}_add"), after=node)


def write_affine(graph: Graph, source: Variable, affine: Affine, axis: int, last: Node) -> None:
    """Write `affine` of `source` as Mul and Add in front of `last`, for the output of `last`.

    `last` is removed; its output keeps its name. A gain of 1 or an offset of 0 needs no node.
    """
    out, dtype, rank = last.outputs[0], source.dtype or np.float32, rank_of(source) or 1
    steps = [("Mul", affine.gain)] if (affine.gain != 1.0).any() else []
    steps += [("Add", affine.offset)] if affine.offset.any() or not steps else []
    shape = [-1] + [1] * (rank - 1 - axis)
    graph.remove(last)
    for number, (op, values) in enumerate(steps):
        operand = graph.constant(f"{last.name}_{op}", values.astype(dtype).reshape(shape))
        final = number == len(steps) - 1
        target = out if final else graph.variable(f"{out.name}_{op}", dtype, source.shape)
        graph.add(graph.make(op, [source, operand], [target], name=last.name), before=last)
        source = target
