"""Nonlinear bipolar compensation (NBC): the map of QwT between logarithms, for heavy tails.

Input and error go through a bipolar logarithm, which compresses outliers and keeps the sign::

    phi(v) = sign(v) log(1 + |v| / tau)        inverse(u) = tau sign(u) (exp(|u|) - 1)
    z = gain * inverse(clip(phi(x) W + b, -limit, limit)) + offset

W and b are least squares between the transformed rows (`block_linear`). `limit` is the largest
transformed error of the samples of the fit, so that an unseen input cannot blow the exponential
up. Least squares between logarithms fit relative errors and are biased after the inverse: a gain
and an offset per channel, fitted to the errors themselves, repair that. The two taus are multiples
of the mean magnitudes; which ones, samples that were left out of the fit decide.

The transform is not affine, so all of it runs in float. After the abstract of "Nonlinear bipolar
compensation"; the formulation (natural logarithm, one tau for a tensor, refit) is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

import numpy as np

from qpass.errors import InternalError
from qpass.graph import Graph, Node, Tensor
from qpass.passes.block_linear import Array, CrossMoments, LinearMap, merge_all, solve_linear
from qpass.passes.channel_affine import ChannelAffine, PairMoments, solve_channel_affine
from qpass.passes.fold_affine import Site
from qpass.passes.qwt import laid_out, offset_behind

TAUS: Final = (0.5, 1.0, 3.0)  # times the mean magnitude
GAINS: Final = (0.0, 8.0)  # of the refit; 0 leaves a channel out


@dataclass(frozen=True, slots=True, kw_only=True)
class NbcMap:
    """Everything that the graph computes; `refit` is the gain and offset behind the inverse."""

    linear: LinearMap
    tau_x: float
    tau_e: float
    limit: float
    refit: ChannelAffine
    strides: tuple[int, ...]
    maps: bool

    def __call__(self, rows: Array) -> Array:
        """Return what is added to the output, [rows, channels], for rows of the input."""
        raised = self.raised(log_bipolar(rows, self.tau_x))
        out: Array = self.refit.gain * raised + self.refit.offset
        return out

    def raised(self, logs: Array) -> Array:
        """Return the map back from logarithms, before the refit."""
        inner = self.linear(logs)
        return exp_bipolar(np.clip(inner, -self.limit, self.limit), self.tau_e)

    def parameters(self, *, free_offset: bool) -> int:
        """Return how many numbers the graph holds more; a bias may have taken the offset."""
        channels = self.linear.offset.size
        return int(self.linear.weight.size) + (2 if free_offset else 3) * channels

    @property
    def macs_per_row(self) -> int:
        """Multiplications for each token or position of the output, those of the map."""
        return int(self.linear.weight.size)

    def build(self, graph: Graph, x: Tensor, add: Node, site: Site | None) -> Tensor:
        """Add the ops that compute the map from `x`; see `QwtMap.build`."""
        out, name = add.outputs[0], f"{add.name}_nbc"
        ops = _Ops(graph, name, out)
        inner = self._linear(ops, ops.log(x, self.tau_x))
        limits = [ops.scalar("low", -self.limit), ops.scalar("high", self.limit)]
        raised = ops.exp(ops.op("Clip", inner, *limits))
        gain = self.tau_e * self.refit.gain
        scaled = ops.op("Mul", raised, ops.channels("gain", gain, self._lies))
        offset = self.refit.offset
        if self.maps:
            return ops.op("Add", scaled, ops.channels("offset", offset, self._lies))
        return offset_behind(graph, scaled, offset, name=name, site=site)

    @property
    def _lies(self) -> tuple[int, ...]:
        return (1, -1, *(1 for _ in self.strides)) if self.maps else (-1,)

    def _linear(self, ops: _Ops, u: Tensor) -> Tensor:
        weight = ops.graph.constant(
            f"{ops.name}_weight", laid_out(self.linear.weight, self.strides if self.maps else None)
        )
        if not self.maps:
            inner = ops.op("MatMul", u, weight)
            return ops.op("Add", inner, ops.channels("bias", self.linear.offset, (-1,)))
        bias = ops.channels("bias", self.linear.offset, (-1,))
        return ops.op(
            "Conv",
            u,
            weight,
            bias,
            group=self.linear.weight.shape[0],
            kernel_shape=[1] * len(self.strides),
            strides=list(self.strides),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedNbc:
    """A map and the share of the squared error that it removes on rows it was not fitted to."""

    mapped: NbcMap
    gain: float


def log_bipolar(values: Array, tau: float) -> Array:
    """Return ``sign(v) log(1 + |v| / tau)`` in the dtype of `values`, as the graph computes it."""
    result: Array = np.copysign(np.log1p(np.abs(values) / values.dtype.type(tau)), values)
    return result


def exp_bipolar(values: Array, tau: float) -> Array:
    """Return the inverse of `log_bipolar`."""
    result: Array = np.copysign(tau * np.expm1(np.abs(values)), values)
    return result


def solve_nbc(
    parts: Sequence[tuple[Array, Array]],
    *,
    groups: int,
    strides: tuple[int, ...],
    maps: bool,
    ridge: float = 1e-4,
) -> GatedNbc:
    """Choose the taus on one part of the samples, judge by leaving out each, and fit to all.

    Args:
        parts: (inputs, errors) as [rows, channels], of disjoint sets of samples; at least two.
        groups: of neighbouring channels.
        strides: of the 1x1 convolution.
        maps: the channels lie on axis 1.
        ridge: see `solve_linear`.

    Raises:
        InternalError: fewer than two parts.
    """
    if len(parts) < 2:
        raise InternalError("a fit needs one part of the samples to judge by")
    channels = parts[0][1].shape[1]
    shape = (groups, parts[0][0].shape[1] // groups, channels // groups)
    scale_x, scale_e = (
        float(np.mean([np.abs(part[i]).mean(dtype=np.float64) for part in parts])) for i in (0, 1)
    )
    if scale_x == 0.0 or scale_e == 0.0:  # nothing comes in, or nothing is wrong
        nothing = NbcMap(
            linear=LinearMap.nothing(shape),
            tau_x=1.0,
            tau_e=1.0,
            limit=0.0,
            refit=ChannelAffine(gain=np.zeros(channels), offset=np.zeros(channels)),
            strides=strides,
            maps=maps,
        )
        return GatedNbc(mapped=nothing, gain=0.0)
    layout = _Layout(groups=groups, strides=strides, maps=maps, ridge=ridge)
    inputs = {tau: [log_bipolar(x, tau) for x, _ in parts] for tau in _taus(scale_x)}
    errors = {tau: [log_bipolar(t, tau) for _, t in parts] for tau in _taus(scale_e)}
    candidates = [
        _Logs(tau_x=a, tau_e=b, x=inputs[a], e=errors[b], plain=[t for _, t in parts])
        for a, b in product(inputs, errors)
    ]
    everything = range(len(parts))
    rest = everything[1:]
    best = min(candidates, key=lambda logs: logs.error(layout.fit(logs, rest), 0))
    after = 0.0
    for i in everything:
        after += best.error(layout.fit(best, [k for k in everything if k != i]), i)
    before = sum(float(np.square(t, dtype=np.float64).sum()) for _, t in parts)
    return GatedNbc(mapped=layout.fit(best, everything), gain=1.0 - after / before)


def _taus(scale: float) -> list[float]:
    return [factor * scale for factor in TAUS]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Logs:
    """The parts of the samples between logarithms, and their errors as they are (`plain`)."""

    tau_x: float
    tau_e: float
    x: list[Array]
    e: list[Array]
    plain: list[Array]

    def error(self, mapped: NbcMap, part: int) -> float:
        """Return the squared error that `mapped` leaves in one part."""
        raised = mapped.raised(self.x[part])
        left = mapped.refit.gain * raised + mapped.refit.offset - self.plain[part]
        return float(np.square(left).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """What all fits of one block share."""

    groups: int
    strides: tuple[int, ...]
    maps: bool
    ridge: float

    def fit(self, logs: _Logs, parts: Sequence[int]) -> NbcMap:
        """Fit to some parts: the map between logarithms, its limit, and the refit behind it."""
        moments = merge_all(
            [CrossMoments.of(logs.x[i], logs.e[i], groups=self.groups) for i in parts]
        )
        channels = logs.plain[0].shape[1]
        mapped = NbcMap(
            linear=solve_linear(moments, ridge=self.ridge),
            tau_x=logs.tau_x,
            tau_e=logs.tau_e,
            limit=float(np.float32(max(np.abs(logs.e[i]).max(initial=0.0) for i in parts))),
            refit=ChannelAffine.identity(channels),
            strides=self.strides,
            maps=self.maps,
        )
        pairs = PairMoments.empty(channels)
        for i in parts:
            wanted = logs.plain[i].astype(np.float64)
            pairs = pairs.merge(PairMoments.of(mapped.raised(logs.x[i]), wanted, axis=-1))
        return replace(mapped, refit=solve_channel_affine(pairs, ridge=0.0, clip=GAINS))


class _Ops:
    """Makes the nodes of one map, named alike."""

    def __init__(self, graph: Graph, name: str, like: Tensor) -> None:
        self.graph, self.name, self._like = graph, name, like

    def op(self, op: str, *inputs: Tensor, **attrs: Any) -> Tensor:
        """Add one node and return its output."""
        name = f"{self.name}_{op.lower()}"
        out: Tensor = self.graph.variable(name, self._like.dtype)
        self.graph.add(self.graph.make(op, list(inputs), [out], name=name, attrs=attrs))
        return out

    def scalar(self, name: str, value: float) -> Tensor:
        """Make a float32 constant."""
        return self.graph.constant(f"{self.name}_{name}", np.array(value, np.float32))

    def channels(self, name: str, values: Array, shape: tuple[int, ...]) -> Tensor:
        """Make a float32 constant of one value a channel."""
        return self.graph.constant(f"{self.name}_{name}", values.astype(np.float32).reshape(shape))

    def log(self, x: Tensor, tau: float) -> Tensor:
        """Compute `log_bipolar`."""
        scaled = self.op("Mul", self.op("Abs", x), self.scalar("inverse_tau", 1.0 / tau))
        log = self.op("Log", self.op("Add", scaled, self.scalar("one", 1.0)))
        return self.op("Mul", self.op("Sign", x), log)

    def exp(self, u: Tensor) -> Tensor:
        """Compute `exp_bipolar` with tau 1."""
        raised = self.op("Exp", self.op("Abs", u))
        magnitude = self.op("Sub", raised, self.scalar("one_less", 1.0))
        return self.op("Mul", self.op("Sign", u), magnitude)
