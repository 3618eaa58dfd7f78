"""How much the outputs of the model see of errors that channels of one op make together.

What it does
    Rounding an op channel by channel counts an error in each output channel by itself. What is read
    behind it sees sums of them: a head with 12 classes reads 12 combinations of 64 channels, and an
    error in the others is nothing. With ``J`` the derivative of the model's outputs by the channels
    of the op, errors ``e`` of its channels cost ``e^T G e``, ``G = mean J^T J``. Channels that are
    rounded later then make up for those before, as inputs do within a channel.
Where it is done
    Where a sample has one row that the outputs see: behind the last attention of a classifier, and
    behind a pooling. There a channel is changed and what is behind the op runs in float: one run
    for each channel and batch. Further in front the derivative says little about errors of few
    bits (measured with gradients for all ops: DESIGN.md, 63).
Sources
    The two-sided nearest plane is that of YAQA (Tseng et al., 2025), which sketches G by gradients.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Graph
from qpass.passes.rounding.gptq import Factor, damped, solve_gptq
from qpass.passes.rounding.grid import Grid
from qpass.passes.rounding.layer import Layer
from qpass.stream import Stream
from qpass.submodel import Submodel

Array = NDArray[Any]
RUNS: Final = 4096  # of what is behind an op, at most
STEP: Final = 1e-2  # of a difference quotient, as a share of the root mean square of the outputs
ELEMENTS: Final = 1 << 20  # of a weight: its channels are rounded one by one
DERIVATIVES: Final = 1 << 24  # of one batch, in float64
DAMPING: Final = 0.03  # of G, in units of the mean of its diagonal


def find_metric(stream: Stream, layer: Layer, batches: int) -> Array | None:
    """Return ``G`` of a layer, float64 [outputs, outputs]; None where it is not to be had.

    Args:
        stream: stands in the unit of the layer.
        layer: any that can be rounded.
        batches: how many batches may be looked at.
    """
    layout, graph = layer.layout, stream.reference
    if stream.aim is not graph or layout.groups != 1 or layer.numbers.block_size is not None:
        return None
    if layout.inputs * layout.outputs > ELEMENTS:
        return None
    outputs = _outputs_behind(graph, layer)
    taken = min(batches, RUNS // layout.outputs)
    if not outputs or not taken:
        return None
    maker = stream.session(graph, "float", [layer.output])
    total: Array = np.zeros((layout.outputs, layout.outputs))
    tail: Submodel | None = None
    for number in range(taken):
        feeds = dict(stream.feeds("float", number))
        base = maker.run(feeds)[layer.output]
        live = layer.live[number] if layer.live else None
        shapes = [np.shape(array) for array in stream.batches[number].values()]
        samples = next((shape[0] for shape in shapes if shape), 1)
        if (layout.positions(base) if live is None else int(live.sum())) != samples:
            return None
        if tail is None:
            tail = Submodel(graph, {**feeds, layer.output: base}, outputs)
        changes = _changes(tail, {**feeds, layer.output: base}, layer, base)
        if changes is None or not np.isfinite(changes).all():
            return None
        total += changes @ changes.T / samples
    return total / taken


def _outputs_behind(graph: Graph, layer: Layer) -> list[str]:
    """Return the model's outputs that depend on a layer; none if the layer makes one of them."""
    reached = {id(layer.original.outputs[0])}
    if graph.is_output(layer.original.outputs[0]):
        return []
    for node in graph.nodes:
        if any(id(tensor) in reached for tensor in (*node.inputs, *node.captured)):
            reached.update(id(tensor) for tensor in node.outputs)
    floating = (np.float32, np.float64)
    return [t.name for t in graph.outputs if id(t) in reached and t.dtype in floating]


def _changes(tail: Submodel, feeds: dict[str, Array], layer: Layer, base: Array) -> Array | None:
    """Return the derivatives of all outputs by each channel, float64 [channels, elements].

    None where they are too many to hold, or outputs are not finite.
    """
    before = tail.run(feeds)
    if layer.site.channels * sum(array.size for array in before.values()) > DERIVATIVES:
        return None
    if not all(np.isfinite(array).all() for array in before.values()):
        return None
    sizes = {name: float(np.sqrt(np.mean(np.square(v, dtype=float)))) for name, v in before.items()}
    step = np.float32(STEP * float(np.sqrt(np.mean(np.square(base, dtype=float)))) or STEP)
    found = []
    for channel in range(layer.site.channels):
        moved = base.copy()
        np.moveaxis(moved, layer.site.axis, 0)[channel] += step
        after = tail.run({**feeds, layer.output: moved})
        rows = [(after[n].astype(float) - before[n]).ravel() / (sizes[n] or 1.0) for n in before]
        found.append(np.concatenate(rows) / step)
    return np.stack(found)


def solve_together(weight: Array, factor: Factor, grid: Grid, metric: Array) -> Array:
    """Return integers whose errors cancel where the outputs of the model see them.

    With ``G = L L^T`` and the errors ``E`` [inputs, outputs] the cost is ``tr(E^T H E G)``. The
    weight of output ``k`` is moved by ``sum_(j > k) (L_jk / L_kk) e_j`` for the outputs that have
    been rounded, and rounded as usual; the one with the largest share of ``G`` is the first.

    Args:
        weight: float64 [1, inputs, outputs].
        factor: of the Hessian of the inputs.
        grid: scales and bounds.
        metric: ``G``, float64 [outputs, outputs].
    """
    full = damped(metric[None], DAMPING)[0]
    order = np.argsort(np.diag(full), kind="stable")
    lower = np.linalg.cholesky(full[np.ix_(order, order)])
    error, integers = np.zeros_like(weight[0]), np.empty_like(weight)
    for place in range(len(order) - 1, -1, -1):
        output = order[place]
        own = slice(output, output + 1)
        behind = order[place + 1 :]
        carried = error[:, behind] @ (lower[place + 1 :, place] / lower[place, place])
        target = weight[:, :, own] + carried[None, :, None]
        part = Grid(
            scale=grid.scale[:, :, own],
            zero_point=grid.zero_point[:, :, own],
            qmin=grid.qmin,
            qmax=grid.qmax,
        )
        integers[:, :, own] = solve_gptq(target, factor, part, sweeps=0)
        error[:, output] = (weight[:, :, own] - part.values(integers[:, :, own]))[0, :, 0]
    return integers


def metric_error(error: Array, hessian: Array, metric: Array) -> float:
    """Return ``tr(E^T H E G)`` of errors [1, inputs, outputs]."""
    inner = error[0].T @ (hessian[0] @ error[0])
    return float(np.sum(inner * metric))
