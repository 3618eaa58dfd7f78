"""Turn a plan and its statistics into numbers: scale and zero point of every decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.observers import TensorStats
from qpass.calibrate.ranges import RangeChoice, solve_range
from qpass.errors import InternalError, RecipeError
from qpass.graph import Constant, Graph, array_of
from qpass.matching import channel_axis
from qpass.options import WeightRange
from qpass.plan import Decision, Plan
from qpass.qparams import QParams, TensorSpec, channel_range, choose_qparams
from qpass.weight_windows import has_windows, parts_of, solve_windows

Array = NDArray[Any]

BIASED: Final = ("Conv", "ConvTranspose", "Gemm")  # their third input is a bias
# int32 biases keep a factor of two to the end of the range: the accumulator needs room as well.
BIAS_LIMIT: Final = 2.0**30
# Weight ranges that `mse` tries, as shares of the largest magnitude.
WIDE_BITS: Final = 7  # from here on weights have levels enough to keep their largest magnitude
WEIGHT_SHARES: Final = np.linspace(0.6, 1.0, 41)
KEPT: Final = 0.9999  # of the weights of a scale that `percentile` does not clip


# By tensor and what it becomes.
GivenRanges = Mapping[tuple[str, TensorSpec], RangeChoice]


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
    channel c adds v * importance[c] to the summed squared error of their outputs. None where
    linear ops sum up along different axes (a Conv and a MatMul), or their channels do not line up.
    """
    tensor = graph.tensors()[decision.tensor]
    total: Array | None = None
    for node, index in graph.consumers(tensor):
        if index != 0 or node.op not in ("Conv", "Gemm", "MatMul"):
            continue
        weight = node.inputs[1]
        if not isinstance(weight, Constant) or len(weight.shape) < 2:
            continue
        rank = len(tensor.shape or weight.shape)
        if decision.channel_axis is None or (channel_axis(node) - decision.channel_axis) % rank:
            return None
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
    weight_method: WeightRange = "auto",
    cache: RangeCache | None = None,
    given: GivenRanges | None = None,
) -> QTable:
    """Choose the numbers of every decision.

    Args:
        graph: the float graph that was calibrated.
        plan: decisions.
        stats: statistics by tensor name.
        method: minmax, percentile, entropy, mse or auto, for activations.
        round_method: how weights are rounded. It decides their ranges where `weight_method` is
            auto: `rtn` takes the largest magnitude, `auto` does so from 7 bits on, where clipping
            saves nothing; all others search the range.
        weight_method: minmax, mse (`solve_weight_range`), percentile (`percentile_weight_range`)
            or auto, for weights. Other constants keep their largest magnitude.
        cache: of ranges, where the same statistics serve several calls.
        given: ranges of activations that take the place of the method's.
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
        choices = [_activation_range(d, stats, method, cache, given or {}) for d in deciding]
        low, high = min(c.low for c in choices), max(c.high for c in choices)
        for number, decision in enumerate(members):
            qparams[decision.key] = choose_qparams(decision.spec, low, high)
            ranges[decision.key] = choices[min(number, len(choices) - 1)]
    _align_concats(graph, groups, qparams)
    tensors = graph.tensors()
    for decision in plan.weights():
        values = array_of(tensors[decision.tensor])
        range_of = _range_of_weights(decision, round_method, weight_method)
        low_array, high_array = range_of(values, decision.spec)
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
    decision: Decision,
    stats: Mapping[str, TensorStats],
    method: str,
    cache: RangeCache,
    given: GivenRanges,
) -> RangeChoice:
    if decision.pinned is not None:
        low, high = decision.pinned
        return RangeChoice(low=low, high=high, method="pinned", mse=0.0)
    if (decision.tensor, decision.spec) in given:
        return given[decision.tensor, decision.spec]
    if decision.tensor not in stats:
        raise InternalError(f"no statistics of {decision.tensor}")
    return cache.solve(stats[decision.tensor], decision.spec, method)


def _range_of_weights(
    decision: Decision, round_method: str, weight_method: WeightRange
) -> Callable[[Array, TensorSpec], tuple[Array, Array]]:
    """Return the function that gives the ranges of one constant."""
    if decision.kind != "weight" or weight_method == "minmax":
        return weight_range
    if weight_method == "percentile":
        return percentile_weight_range
    narrow = round_method == "auto" and decision.spec.bits < WIDE_BITS
    if weight_method == "mse" or narrow or round_method not in ("rtn", "auto"):
        return solve_weight_range
    return weight_range


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

    Tries `WEIGHT_SHARES` of the min/max range (the search that QDrop and BRECQ begin with), and
    every zero point where there are few (`weight_windows`).
    """
    low, high = weight_range(values, spec)
    rows = _rows_of_scales(values, spec)
    if has_windows(spec):
        first, last = solve_windows(rows, spec)
        return first.reshape(low.shape), last.reshape(high.shape)
    # One row for each scale, whatever the scales lie along.
    row_spec = replace(spec, granularity="per_channel", axis=0, block_size=None)
    ends = np.ravel(low), np.ravel(high)
    share = np.concatenate(
        [_share(rows[part], row_spec, *(end[part] for end in ends)) for part in parts_of(rows)]
    )
    return low * share.reshape(low.shape), high * share.reshape(high.shape)


def _share(rows: Array, spec: TensorSpec, low: Array, high: Array) -> Array:
    """Return for each row the share of its range with the smallest squared error, [rows]."""
    best, share = np.full(len(rows), np.inf), np.ones(len(rows))
    for candidate in WEIGHT_SHARES[::-1]:
        trial = choose_qparams(spec, low * candidate, high * candidate)
        scale = trial.scale.astype(np.float64)[:, None]
        zero = trial.zero_point.astype(np.float64)[:, None]
        values = np.rint(rows / scale)
        np.clip(values, trial.qmin - zero, trial.qmax - zero, out=values)
        values *= scale
        error = np.square(np.subtract(values, rows, out=values)).sum(axis=1)
        better = error < best
        best, share = np.where(better, error, best), np.where(better, candidate, share)
    return share


def percentile_weight_range(values: Array, spec: TensorSpec) -> tuple[Array, Array]:
    """Return the per-scale range that keeps `KEPT` of the weights, float64.

    A symmetric spec gets ``+-quantile(|w|, KEPT)``, an asymmetric one the quantiles that leave half
    of the rest out on either side. Both are `numpy.quantile` with linear interpolation: of n sorted
    values the one at place ``(n - 1) * KEPT``. With up to 10,000 values that lies between the two
    largest, ``(n - 1) * (1 - KEPT)`` of the gap below the largest: 9 values lose 0.08 % of it, 576
    lose 5.8 %. So a row of few weights is never cut at a whole weight, and min/max and percentile
    are close there; scales for whole tensors are where they differ. A short last block is a row of
    its own length. Where only zeros are kept (pruned weights) the range is that of min/max.
    """
    least, most = weight_range(values, spec)
    values = values.astype(np.float64)
    if spec.symmetric:
        high = _quantiles(np.abs(values), spec, KEPT)
        low = -high
    else:
        tail = (1.0 - KEPT) / 2.0
        low, high = _quantiles(values, spec, tail), _quantiles(values, spec, 1.0 - tail)
    nothing = (low == 0.0) & (high == 0.0)
    return np.where(nothing, least, low), np.where(nothing, most, high)


def _quantiles(values: Array, spec: TensorSpec, share: float) -> Array:
    """Return a quantile of the values of each scale, in the shape of the scales."""
    if spec.granularity == "per_tensor":
        return np.asarray(np.quantile(values, share))
    assert spec.axis is not None
    axis = spec.axis % values.ndim
    if spec.granularity == "per_channel":
        return np.quantile(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1), share, 1)
    assert spec.block_size is not None
    whole = values.shape[axis] // spec.block_size * spec.block_size
    parts = []
    for part in np.split(values, [whole], axis):
        size = min(spec.block_size, part.shape[axis])
        if size:
            shape = (*part.shape[:axis], -1, size, *part.shape[axis + 1 :])
            parts.append(np.quantile(part.reshape(shape), share, axis + 1))
    return np.concatenate(parts, axis)


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
        if node.op not in BIASED or len(node.inputs) < 3 or not node.inputs[2].name:
            continue
        weight_key = inputs.get((node.name, 1))
        input_key = inputs.get((node.name, 0), resident.get(node.inputs[0].name))
        bias = node.inputs[2]
        if weight_key is None or input_key is None or not isinstance(bias, Constant):
            continue
        weight, x_scale = qparams[weight_key], float(qparams[input_key].scale)
        floor = np.abs(array_of(bias).astype(np.float64)) / (x_scale * BIAS_LIMIT)
        if weight.scale.ndim == 0:
            floor = np.asarray(floor.max(initial=0.0))
        elif node.op == "ConvTranspose":  # its groups share the scales of their output channels
            floor = floor.reshape(-1, len(weight.scale)).max(axis=0)
        scale = np.maximum(weight.scale, np.nextafter(floor.astype(np.float32), np.float32(np.inf)))
        if weight.scale.shape == scale.shape and (scale > weight.scale).any():
            qparams[weight_key] = replace(weight, scale=scale)
