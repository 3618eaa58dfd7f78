"""Flip roundings of a layer where that lowers the error at the end of its unit.

Layers are rounded one after the other, so the first ones know nothing of the last. Once the unit is
rounded, what is left at its output, ``r = wanted - got``, says in which direction each weight of an
earlier layer should have been rounded. With ``z = x_b w_b`` the output of the last layer and ``m``
the derivative of what lies between the two layers::

    g = m * (r w_b^T, put back where its patches came from)      (over the outputs of layer a)
    proposal for output j of layer a:  integers near  w_j + (H_a + lambda I)^-1 (x_a^T g_j) / k_j

where ``k_j`` is the mean of ``m^2`` times the squared norm of the weights that read output ``j``:
one Gauss-Newton step, rounded by coordinate descent from the integers that are there.

A proposal is not trusted. It is written into the graph, the graph is run, and what output ``j``
now gives is compared with before: outputs do not mix on their way to layer b, so the exact effect
of each one at the end of the unit is ``(x_b' - x_b)_j w_b``. Outputs are taken over one by one, in
a fixed order, as long as the error that the ones before them left gets smaller. So the error of the
unit on these rows never rises.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Graph, Node
from qpass.matching import channel_axis
from qpass.passes.rounding.descend import descend
from qpass.passes.rounding.gptq import damped
from qpass.passes.rounding.grid import Grid
from qpass.passes.rounding.layout import Layout

Array = NDArray[Any]
RIDGE: Final = 0.1  # of the Gauss-Newton step, in units of the mean energy of an input
# Ops that work on each element by itself, when their other operands are constants.
ELEMENTWISE: Final = frozenset({
    "Add", "BatchNormalization", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Mish", "Mul", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sub",
    "Swish", "Tanh",
})  # fmt: skip


def is_elementwise_between(graph: Graph, first: Node, last: Node) -> bool:
    """True when `last` reads nothing but elements of the output of `first`, each by itself.

    The channels of both lie along the same axis then. Shapes may be unknown before the graph runs,
    so a constant in between may still be the larger one, and broadcast the output of `first`.
    """
    if channel_axis(first) != channel_axis(last):
        return False
    start, waiting = first.outputs[0], [last.inputs[0]]
    seen: set[int] = set()
    while waiting:
        tensor = waiting.pop()
        if tensor is start or isinstance(tensor, Constant) or not tensor.name:
            continue
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        node = graph.producer(tensor)
        if node is None or node.op not in ELEMENTWISE or node.outputs[0] is not tensor:
            return False
        waiting.extend(node.inputs)
    return True


def propose(
    weight: Array,
    integers: Array,
    hessian: Array,
    slope: Array,
    curvature: Array,
    grid: Grid,
) -> Array:
    """Return other integers for a layer, from one Gauss-Newton step at the end of its unit.

    Args:
        weight: what its integers stand for, [groups, inputs, outputs].
        integers: those integers.
        hessian: ``x^T x`` of its inputs, [groups, inputs, inputs], not damped.
        slope: ``x^T g``, [groups, inputs, outputs].
        curvature: ``k`` of each output, [groups, outputs].
        grid: its scales and bounds.
    """
    full = damped(hessian, RIDGE)
    reach = np.where(curvature > 0.0, curvature, np.inf)[:, None, :]
    target = weight + np.linalg.solve(full, slope / reach)
    found = integers.copy()
    descend(target, full, found, grid)
    return found


def accept(rest: Array, change: Array, weight: Array, layout: Layout) -> tuple[Array, Array]:
    """Choose the outputs of layer a whose proposals lower the error at the end of the unit.

    Args:
        rest: wanted minus got, [groups, rows, outputs] of layer b; means are zero where it can take
            an offset.
        change: what the proposals change in its input rows, [groups, rows, inputs], likewise.
        weight: of layer b, [groups, inputs, outputs].
        layout: of layer b.

    Returns:
        bool [channels], and what is left of `rest`.
    """
    rest = rest.copy()
    columns, width = layout.channel_columns(), layout.columns_per_channel
    accepted = np.zeros(len(columns), bool)
    for channel, (group, begin) in enumerate(columns):
        own = slice(begin, begin + width)
        part = change[group, :, own]
        if not part.any():
            continue
        effect = part @ weight[group, own]
        gain = 2.0 * np.vdot(rest[group], effect) - np.vdot(effect, effect)
        if gain > 0.0:
            rest[group] -= effect
            accepted[channel] = True
    return accepted, rest
