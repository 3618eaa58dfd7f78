"""The residual sum behind a linear op: what the op can aim at besides its own output.

The last linear op of a branch may aim at the float *sum* minus the quantized skip: then the error
of the skip is corrected where the branch joins it.
"""

from __future__ import annotations

from collections.abc import Mapping

from qpass.graph import Constant, Graph, Node
from qpass.stream import Pair


def skip_of(
    graph: Graph,
    nodes: Mapping[str, Node],
    places: Mapping[str, int],
    linear: Node,
    aims: Mapping[str, Node],
) -> Pair | None:
    """Return the other operand of the residual Add behind `linear`, if it is known by then.

    Of two branches that meet, the one that runs later is the one to correct the sum.

    Args:
        graph: the float graph.
        nodes: those of the quantized graph by name.
        places: where each node of the float graph stands.
        linear: the op in the float graph.
        aims: nodes by name of the graph that is aimed at, whose Add may read the operand behind a
            Q.
    """
    out = linear.outputs[0]
    while True:
        readers = graph.consumers(out)
        if len(readers) != 1 or graph.is_output(out):
            return None
        add, index = readers[0]
        if add.op != "Add":
            return None
        other = add.inputs[1 - index]
        if not isinstance(other, Constant):
            break
        out = add.outputs[0]
    maker = graph.producer(other)
    twin = nodes.get(add.name)
    later = maker is not None and places[maker.name] > places[linear.name]
    if later or twin is None or twin.op != "Add" or other.shape is None or other.shape != out.shape:
        return None
    wanted = aims[add.name].inputs[1 - index]
    return Pair(float_name=wanted.name, quantized_name=twin.inputs[1 - index].name)
