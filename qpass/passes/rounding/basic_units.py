"""Basic units: adjacent linear ops whose rounding errors can cancel, found in the float graph.

The error of a unit's output holds products of the errors of its layers, so what one layer does
wrong another can make up for (Lin et al., "UWC: unit-wise calibration towards rapid network
compression", BMVC 2021). A linear op joins the unit before it when

- it is fed by members of the unit and by nothing else, and what feeds it is read by nobody but
  members (a chain of a residual block; expand, depthwise, project; the two layers of an MLP; the
  output projection behind the attention of the unit's projections), or
- the unit so far is only projections of one tensor, and this is another one (query, key, value);

and when no chain of the unit gets longer than `STAGES`. So a unit ends before a residual sum, for
the sum is fed from outside, and behind an op whose output a skip reads, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qpass.graph import Graph, Node
from qpass.units import is_weighted, reads

STAGES: Final = 3


def find_basic_units(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """Return the units as names of linear ops, all in execution order; every op is in one."""
    feeders, readers = _neighbours(graph)
    units: list[list[str]] = []
    stage: dict[str, int] = {}
    origin = ""  # the tensor that the unit's projections read, while there is nothing else in it
    for node in graph.nodes:
        if not is_weighted(node):
            continue
        name, source = node.name, node.inputs[0].name
        unit = units[-1] if units else []
        inside = {*unit, name}
        fed = feeders[name]
        if unit and source == origin:
            stage[name] = 1
        elif (
            unit
            and fed
            and fed <= inside
            and all(readers[one] <= inside for one in fed)
            and max(stage[one] for one in fed) < STAGES
        ):
            stage[name] = 1 + max(stage[one] for one in fed)
            origin = ""
        else:
            units.append([])
            stage[name], origin = 1, source
        units[-1].append(name)
    return tuple(tuple(unit) for unit in units)


def _neighbours(graph: Graph) -> tuple[Mapping[str, set[str]], Mapping[str, set[str]]]:
    """Return for each linear op those that feed it, and those that it feeds, directly.

    An output of the graph, and a tensor from an input, count as the op "".
    """
    nodes: list[Node] = [node for node in graph.nodes if is_weighted(node)]
    bits = {node.name: 1 << (i + 1) for i, node in enumerate(nodes)}
    made_of = {tensor.name: 1 for tensor in graph.inputs}  # bit 0: an input of the graph
    feeders: dict[str, set[str]] = {}
    readers: dict[str, set[str]] = {node.name: set() for node in nodes}

    def names(mask: int) -> set[str]:
        return {"" if not i else nodes[i - 1].name for i in range(len(nodes) + 1) if mask >> i & 1}

    for node in graph.nodes:
        mask = 0
        for name in reads(node):
            mask |= made_of.get(name, 0)
        if node.name in bits and is_weighted(node):
            feeders[node.name] = names(mask)
            for one in feeders[node.name] - {""}:
                readers[one].add(node.name)
            mask = bits[node.name]
        for tensor in node.outputs:
            made_of[tensor.name] = mask
    for tensor in graph.outputs:
        for one in names(made_of.get(tensor.name, 0)) - {""}:
            readers[one].add("")
    return feeders, readers
