"""Turn a plan and its statistics into numbers: scale and zero point of every decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.observers import TensorStats
from qpass.calibrate.ranges import RangeChoice, solve_range
from qpass.errors import InternalError, RecipeError
from qpass.graph import Graph, array_of
from qpass.plan import Decision, Plan
from qpass.qparams import QParams, TensorSpec, channel_range, choose_qparams

Array = NDArray[Any]

# int32 biases keep a factor of two to the end of the range: the accumulator needs room as well.
BIAS_LIMIT: Final = 2.0**30
# Weight ranges that `mse` tries, as shares of the largest magnitude.
WIDE_BITS: Final = 7  # from here on weights have levels enough to keep their largest magnitude
WEIGHT_SHARES: Final = np.linspace(0.6, 1.0, 41)


@dataclass(frozen=True, slots=True, kw_only=True)
class QTable:
    """Numbers for the decisions of a plan, by decision key."""

    qparams: Mapping[str, QParams]
    ranges: Mapping[str, RangeChoice]


@dataclass(slots=True)
class RangeCache:
    """Ranges that were solved before: plans that differ little ask for the same ones again.

    Statistics are told apart by identity; they are kept alive here, so none takes another's place.
    """

    _solved: dict[tuple[int, TensorSpec, str], tuple[TensorStats, RangeChoice]] = field(
        default_factory=dict
    )

    def solve(self, stats: TensorStats, spec: TensorSpec, method: str) -> RangeChoice:
        """Return `solve_range` of the same arguments."""
        key = (id(stats), spec, method)
        if key not in self._solved:
            self._solved[key] = stats, solve_range(stats, spec, method)
        return self._solved[key][1]


def importance(graph: Graph, decision: Decision) -> Array | None:
    """Return, per channel of an activation, how strongly its error shows behind the linear ops.

    ``importance[c] = sum over the readers of |W[c, :]|^2``, float64: white noise of variance v on
    channel c adds v * importance[c] to the summed squared error of their outputs. None where a
    reader is not a linear op with constant weights or the channels do not line up.
    """
    tensor = graph.tensors()[decision.tensor]
    total: Array | None = None
    for node, index in graph.consumers(tensor):
        if index != 0 or node.op not in ("Conv", "Gemm", "MatMul"):
            continue
        weight = node.inputs[1]
        if weight.inputs or not hasattr(weight, "_values") or len(weight.shape) < 2:
            continue
        squares = np.square(array_of(weight).astype(np.float64))
        if node.op == "Conv":
            groups = int(node.attrs.get("group", 1))
            shape = (groups, squares.shape[0] // groups, *squares.shape[1:])
            power = squares.reshape(shape).sum(axis=(1, *range(3, len(shape)))).ravel()
        elif node.op == "Gemm" and node.attrs.get("transB", 0):
            power = squares.sum(axis=0)
        else:
            power = squares.sum(axis=-1)
            power = power.sum(axis=tuple(range(power.ndim - 1)))
        if total is not None and total.shape != power.shape:
            return None
        total = power if total is None else total + power
    return total


def choose_qtable(
    graph: Graph,
    plan: Plan,
    stats: Mapping[str, TensorStats],
    *,
    method: str = "auto",
    round_method: str = "rtn",
    cache: RangeCache | None = None,
) -> QTable:
    """Choose the numbers of every decision.

    Args:
        graph: the float graph that was calibrated.
        plan: decisions.
        stats: statistics by tensor name.
        method: minmax, percentile, entropy, mse or auto, for activations.
        round_method: `rtn` takes the largest magnitude of the weights, `auto` does so from 8 bits
            on, where clipping saves nothing; all others search the range.
        cache: of ranges, where the same statistics serve several calls.
    """
    cache = RangeCache() if cache is None else cache
    qparams: dict[str, QParams] = {}
    ranges: dict[str, RangeChoice] = {}
    groups: dict[str, list[Decision]] = {}
    for decision in plan.activations():
        groups.setdefault(decision.group or f"\0{decision.key}", []).append(decision)
    for members in groups.values():
        _check_pinned(members)
        # A range that is fixed for one tensor is fixed for all that share its numbers.
        deciding = [d for d in members if d.pinned is not None] or members
        choices = [_activation_range(d, stats, method, cache) for d in deciding]
        low, high = min(c.low for c in choices), max(c.high for c in choices)
        for number, decision in enumerate(members):
            qparams[decision.key] = choose_qparams(decision.spec, low, high)
            ranges[decision.key] = choices[min(number, len(choices) - 1)]
    _align_concats(graph, groups, qparams)
    tensors = graph.tensors()
    for decision in plan.weights():
        values = array_of(tensors[decision.tensor])
        searched = round_method not in ("rtn", "auto") or (
            round_method == "auto" and decision.spec.bits < WIDE_BITS
        )
        if decision.kind == "weight" and searched:
            low_array, high_array = solve_weight_range(values, decision.spec)
        else:
            low_array, high_array = weight_range(values, decision.spec)
        qparams[decision.key] = choose_qparams(decision.spec, low_array, high_array)
    _leave_room_for_biases(graph, plan, qparams)
    return QTable(qparams=qparams, ranges=ranges)


def _check_pinned(members: list[Decision]) -> None:
    pinned = {decision.pinned: decision.tensor for decision in members if decision.pinned}
    if len(pinned) > 1:
        first, second = list(pinned.values())[:2]
        raise RecipeError(
            f"{first} and {second} share one scale, but are fixed to different ranges",
            fix="fix one of them; `qpass plan` shows which tensors are tied",
        )


def _align_concats(
    graph: Graph, groups: Mapping[str, list[Decision]], qparams: dict[str, QParams]
) -> None:
    """Give the output of a quantized Concat the numbers of its widest input.

    Its values are those of the inputs, so nothing is lost, and the engine copies the inputs that
    have the same numbers instead of requantizing them. Measured on squeezenet1_1 (onnxruntime
    1.31.1, one thread): eight QLinearConcat of 1,550 us take 272 us with numbers of their own.
    """
    resident = {
        decision.tensor: members
        for members in groups.values()
        for decision in members
        if decision.edges is None
    }
    for node in graph.nodes:
        if node.op != "Concat" or node.outputs[0].name not in resident:
            continue
        inputs = [resident.get(tensor.name) for tensor in node.inputs]
        if any(members is None for members in inputs):
            continue
        if any(decision.pinned is not None for decision in resident[node.outputs[0].name]):
            continue
        numbers = [qparams[members[0].key] for members in inputs if members is not None]
        if any(one.scale.ndim or one.storage != numbers[0].storage for one in numbers):
            continue
        low = min((one.qmin - int(one.zero_point)) * float(one.scale) for one in numbers)
        high = max((one.qmax - int(one.zero_point)) * float(one.scale) for one in numbers)
        for decision in resident[node.outputs[0].name]:
            spec = decision.spec
            made = choose_qparams(spec, low, high)
            # The ends of an input lie half a step off its range: take its own numbers where it is
            # the widest on both sides.
            for one in numbers:
                step = float(one.scale)
                ends = ((q - int(one.zero_point)) * step for q in (one.qmin, one.qmax))
                if all(abs(a - b) <= step / 2 for a, b in zip(ends, (low, high), strict=True)):
                    made = one
                    break
            if made.storage == spec.storage and (made.qmin, made.qmax) == (spec.qmin, spec.qmax):
                qparams[decision.key] = made


def _activation_range(
    decision: Decision, stats: Mapping[str, TensorStats], method: str, cache: RangeCache
) -> RangeChoice:
    if decision.pinned is not None:
        return RangeChoice(low=decision.pinned[0], high=decision.pinned[1], method="user", mse=0.0)
    if decision.tensor not in stats:
        raise InternalError(f"no statistics of {decision.tensor}")
    return cache.solve(stats[decision.tensor], decision.spec, method)


def weight_range(values: Array, spec: TensorSpec) -> tuple[Array, Array]:
    """Return the minimum and maximum of a weight for each of its scales, float64."""
    if spec.granularity != "per_block":
        return channel_range(values, spec.axis)
    assert spec.axis is not None
    assert spec.block_size is not None
    axis = spec.axis % values.ndim
    starts = np.arange(0, values.shape[axis], spec.block_size)
    low = np.minimum.reduceat(values, starts, axis=axis).astype(np.float64)
    return low, np.maximum.reduceat(values, starts, axis=axis).astype(np.float64)


def solve_weight_range(values: Array, spec: TensorSpec) -> tuple[Array, Array]:
    """Return the per-scale range with the smallest squared rounding and clipping error, float64.

    Tries `WEIGHT_SHARES` of the min/max range (the search that QDrop and BRECQ begin with).
    """
    low, high = weight_range(values, spec)
    rows = _rows_of_scales(values, spec)
    # One row for each scale, whatever the scales lie along.
    row_spec = replace(spec, granularity="per_channel", axis=0, block_size=None)
    best, share = np.full(len(rows), np.inf), np.ones(len(rows))
    for candidate in WEIGHT_SHARES[::-1]:
        trial = choose_qparams(row_spec, np.ravel(low) * candidate, np.ravel(high) * candidate)
        scale = trial.scale.astype(np.float64)[:, None]
        zero = trial.zero_point.astype(np.float64)[:, None]
        q = np.clip(np.rint(rows / scale) + zero, trial.qmin, trial.qmax)
        error = np.square((q - zero) * scale - rows).sum(axis=1)
        better = error < best
        best, share = np.where(better, error, best), np.where(better, candidate, share)
    return low * share.reshape(low.shape), high * share.reshape(high.shape)


def _rows_of_scales(values: Array, spec: TensorSpec) -> Array:
    """Return the values that share a scale as rows, float64, in the order of the scales.

    The last block of an axis may be shorter than the others: its row ends in zeros, which are exact
    with every scale.
    """
    values = values.astype(np.float64)
    if spec.granularity == "per_tensor":
        return values.reshape(1, -1)
    assert spec.axis is not None
    axis = spec.axis % values.ndim
    if spec.granularity == "per_channel":
        return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    assert spec.block_size is not None
    short = -values.shape[axis] % spec.block_size
    padded = np.pad(values, [(0, short if i == axis else 0) for i in range(values.ndim)])
    shape = (*values.shape[:axis], -1, spec.block_size, *values.shape[axis + 1 :])
    return np.moveaxis(padded.reshape(shape), axis + 1, -1).reshape(-1, spec.block_size)


def _leave_room_for_biases(graph: Graph, plan: Plan, qparams: dict[str, QParams]) -> None:
    """Raise the weight scale of channels whose int32 bias would not fit.

    The bias is stored as round(b / (x_scale * w_scale)). A channel with tiny weights and a large
    bias would overflow; onnxruntime then changes the weights by itself (microsoft/onnxruntime
    pull request 21645), so the choice is made here.
    """
    inputs = {
        (edge.node, edge.index): decision.key
        for decision in plan.decisions
        for edge in decision.edges or ()
    }
    resident = {d.tensor: d.key for d in plan.activations() if d.edges is None}
    for node in graph.nodes:
        if node.op not in ("Conv", "Gemm") or len(node.inputs) < 3 or not node.inputs[2].name:
            continue
        weight_key = inputs.get((node.name, 1))
        input_key = inputs.get((node.name, 0), resident.get(node.inputs[0].name))
        bias = node.inputs[2]
        if weight_key is None or input_key is None or not hasattr(bias, "_values"):
            continue
        weight, x_scale = qparams[weight_key], float(qparams[input_key].scale)
        floor = np.abs(array_of(bias).astype(np.float64)) / (x_scale * BIAS_LIMIT)
        if weight.scale.ndim == 0:
            floor = np.asarray(floor.max(initial=0.0))
        scale = np.maximum(weight.scale, np.nextafter(floor.astype(np.float32), np.float32(np.inf)))
        if weight.scale.shape == scale.shape and (scale > weight.scale).any():
            qparams[weight_key] = replace(weight, scale=scale)
