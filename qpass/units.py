"""Cut a graph into units: contiguous slices of the topological order, each with one linear op.

A unit ends in a linear op with constant weights; what follows the last one belongs to the last
unit. Its inputs are whatever it reads from earlier units, its outputs whatever is read later. No
single entry or exit is needed, so skips, U-Nets and graphs with several heads are nothing special.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qpass.graph import LINEAR_OPS, Constant, Graph, Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One slice of the execution order.

    `linear` names the linear op that ends the unit and `tap` its output; both are None in a graph
    without linear ops. Units that end elsewhere by choice have a `tap` and no `linear`. `inputs`
    and `outputs` are names of tensors, of inputs of the graph too.
    """

    linear: str | None
    tap: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int


def is_weighted(node: Node) -> bool:
    """True for a linear op whose second operand is a constant with anything in it."""
    return (
        node.op in LINEAR_OPS
        and node.domain in (None, "", "ai.onnx")
        and len(node.inputs) > 1
        and isinstance(node.inputs[1], Constant)
        and all(node.inputs[1].shape)
        and not isinstance(node.inputs[0], Constant)
    )


def split_into_units(graph: Graph, ends: Collection[str] | None = None) -> tuple[Unit, ...]:
    """Return the units of `graph` in execution order; the graph is not changed.

    Args:
        graph: a float graph.
        ends: names of the nodes that end a unit, whose first output is its tap, instead of the
            linear ops.
    """
    slices: list[list[Node]] = [[]]
    for node in graph.nodes:
        slices[-1].append(node)
        if is_weighted(node) if ends is None else node.name in ends:
            slices.append([])
    tail = slices.pop()
    if slices:
        slices[-1].extend(tail)
    elif tail:
        slices.append(tail)

    last_use: dict[str, int] = {tensor.name: len(slices) for tensor in graph.outputs}
    for number, nodes in enumerate(slices):
        for node in nodes:
            for name in reads(node):
                last_use[name] = max(last_use.get(name, 0), number)
    return tuple(_unit(nodes, number, last_use, ends) for number, nodes in enumerate(slices))


def reads(node: Node) -> list[str]:
    """Return the names of the variables that `node` reads, by its bodies too."""
    return [
        t.name for t in (*node.inputs, *node.captured) if t.name and not isinstance(t, Constant)
    ]


def uses_of(units: Sequence[Unit]) -> dict[str, list[int]]:
    """Return for each tensor that comes from elsewhere the numbers of the units that read it."""
    uses: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        for name in unit.inputs:
            uses.setdefault(name, []).append(number)
    return uses


def _unit(
    nodes: list[Node], number: int, last_use: dict[str, int], ends: Collection[str] | None
) -> Unit:
    made = [tensor.name for node in nodes for tensor in node.outputs if tensor.name]
    inside = set(made)
    read = dict.fromkeys(name for node in nodes for name in reads(node))
    linear = next((node for node in nodes if is_weighted(node)), None)
    end = linear if ends is None else next((node for node in nodes if node.name in ends), None)
    return Unit(
        linear=None if ends is not None or linear is None else linear.name,
        tap=None if end is None else end.outputs[0].name,
        inputs=tuple(name for name in read if name not in inside),
        outputs=tuple(name for name in made if last_use.get(name, -1) > number),
        nodes=len(nodes),
    )
