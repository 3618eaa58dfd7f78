"""Migrate scales of channels so that weights of few bits lose less: before anything is calibrated.

What it does
    Where constants in front can take the scales of a tensor's channels (`find_sites`), channels
    that carry much get finer steps in the weights behind: `solve_weight_scales`.
Why it is safe
    In float nothing changes but roundings. A site takes its scales only where they lower the
    predicted error of rounding on samples that did not choose them.
Where it is refused
    Where a product of two activations or a Clip is in between: their scales are those of
    `equalize`, which measures. Where a weight in front has one step for all of its channels, or one
    behind is no matrix.
Source
    Ours; the goal is that of AWQ (Lin et al., 2023), see `rounding_noise`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate import TapRequest, TensorStats
from qpass.choose import WIDE_BITS
from qpass.graph import Graph, Node, array_of
from qpass.passes.equalize.apply import apply_scales
from qpass.passes.equalize.measure import Specs
from qpass.passes.equalize.rounding_noise import POWER, TINY, Noise, noise_of, solve_weight_scales
from qpass.passes.equalize.site import Reader, Site
from qpass.passes.equalize.sites import find_sites
from qpass.passes.equalize.solve import Scales
from qpass.passes.fold_affine import Site as BiasSite
from qpass.passes.fold_affine import find_site
from qpass.passes.rounding.layout import Layout, layout_of
from qpass.qparams import TensorSpec
from qpass.report.model import Refusal

Array = NDArray[Any]

NAME: Final = "suit_weights"
MIN_GAIN_DB: Final = 0.2  # an error that falls by less is not worth an edit, as in `gate`


@dataclass(frozen=True, slots=True, kw_only=True)
class SuitedSites:
    """Sites whose scales may be chosen for the weights behind, and why others may not."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]

    def taps(self) -> list[TapRequest]:
        """Return what calibration has to look at."""
        found = {}
        for reader in (reader for site in self.sites for reader in site.readers):
            tensor = reader.linear.node.inputs[0]
            axis = 1 if reader.linear.node.op == "Conv" else len(tensor.shape) - 1
            found[tensor.name] = TapRequest(tensor=tensor.name, axis=axis)
        return list(found.values())


def find_suited(graph: Graph, specs: Specs, pinned: Collection[str] = ()) -> SuitedSites:
    """Return the sites in front of weights of few bits.

    Args:
        graph: normalized, with shapes; the sites refer to its nodes.
        specs: what the plan makes of weights and activations.
        pinned: tensors whose ranges are given.
    """
    low = [name for name, spec in specs.weights.items() if spec.bits < WIDE_BITS]
    found, _ = find_sites(graph, low)
    sites, refusals = [], []
    for site in found:
        fixed = sorted(site.tensors & set(pinned))
        given = f"the range of {fixed[0]} is fixed by the plan" if fixed else ""
        reason = given or _obstacle(site, specs)
        if reason:
            refusals.append(Refusal(rule=NAME, where=site.tensor, reason=reason))
        else:
            sites.append(site)
    return SuitedSites(sites=tuple(sites), refusals=tuple(refusals))


def _obstacle(site: Site, specs: Specs) -> str:
    if site.products:
        return f"{site.products[0].node.name} multiplies two activations"
    if site.bounds:
        return f"{site.bounds[0].tensor} is clipped, which bounds its scales"
    for slot in site.slots:
        spec = specs.weights.get(slot.node.name) if slot.index == 1 else None
        if spec is not None and spec.granularity == "per_tensor":
            return f"the weight of {slot.node.name} in front has one scale for all channels"
    for reader in site.readers:
        node = reader.linear.node
        layout = layout_of(node)
        if isinstance(layout, str):
            return f"{node.name}: {layout.split(':')[0]}"
        if node.inputs[0].shape is None:
            return f"the shape of {node.inputs[0].name} is not known"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suited:
    """A site with new scales, and by how much less rounding should lose there, in dB."""

    site: Site
    scales: Scales
    gain_db: float


def suit_weights(
    graph: Graph,
    sites: Sequence[Site],
    specs: Specs,
    halves: tuple[Mapping[str, TensorStats], Mapping[str, TensorStats]],
) -> tuple[list[Suited], list[Refusal]]:
    """Scale the channels of `graph` at `sites` where it surely helps.

    Args:
        graph: the one that the sites refer to; it is changed.
        sites: of `find_suited`.
        specs: as there.
        halves: statistics of the tensors that the sites' linear ops read, over two sets of samples.

    Returns:
        What was done where, and why nothing was done elsewhere.
    """
    nodes = {node.name: node for node in graph.nodes}
    done, refusals = [], []
    for site in sites:
        first, second, both = (
            [_noise(graph, nodes, reader, specs, stats) for reader in site.readers]
            for stats in (halves[:1], halves[1:], halves)
        )
        plain = np.ones(site.groups + 1)
        tried = solve_weight_scales(first, site.groups)
        gain = _decibels(noise_of(second, plain)) - _decibels(noise_of(second, tried))
        reason = f"rounding would lose {gain:.2f} dB less, {MIN_GAIN_DB} are asked for"
        if gain >= MIN_GAIN_DB:
            scale = solve_weight_scales(both, site.groups)
            scales = Scales(method=NAME, scale=scale, shift=np.zeros_like(scale))
            reason = apply_scales(graph, site, scales)
            if not reason:
                done.append(Suited(site=site, scales=scales, gain_db=gain))
        if reason:
            refusals.append(Refusal(rule=NAME, where=site.tensor, reason=reason))
    return done, refusals


def _decibels(error: float) -> float:
    return 10.0 * math.log10(max(error, TINY))


def _noise(
    graph: Graph,
    nodes: Mapping[str, Node],
    reader: Reader,
    specs: Specs,
    parts: Sequence[Mapping[str, TensorStats]],
) -> Noise:
    """Return what one linear op loses, by the statistics of some parts of the samples."""
    node = reader.linear.node
    layout = layout_of(node)
    assert isinstance(layout, Layout)
    seen = [stats[node.inputs[0].name] for stats in parts]
    place = find_site(graph, nodes, node)
    centered = isinstance(place, BiasSite) and place.offset
    taps = layout.columns_per_channel
    weight = np.abs(layout.matrix(array_of(node.inputs[1]).astype(np.float64)))
    spec = specs.weights.get(node.name)
    block, rows, outputs = _rows(weight, spec)
    cells, peaks, shares = _cells(rows, block, taps)
    energy = np.mean([_energy(one, centered) for one in seen], axis=0)
    squares = np.square(weight).sum(axis=2).reshape(-1, taps).sum(axis=1)
    return Noise(
        labels=reader.labels,
        power=reader.power,
        cells=cells,
        peaks=peaks,
        shares=shares,
        outputs=outputs,
        energy=taps * energy,
        squares=squares,
        largest=np.max([_largest(one) for one in seen], axis=0),
        signal=float(energy @ squares),
        weight_levels=0.0 if spec is None else (spec.qmax - spec.qmin) / 2.0,
        input_levels=_input_levels(specs.activations.get((node.name, 0)), seen),
    )


def _rows(weight: Array, spec: TensorSpec | None) -> tuple[int, Array, int]:
    """Return the block size (0: none), weights [groups, rows, inputs], and outputs of a row."""
    rows = weight.transpose(0, 2, 1)
    if spec is not None and spec.granularity == "per_tensor":
        return 0, rows.max(axis=1, keepdims=True), rows.shape[1]
    if spec is not None and spec.granularity == "per_block":
        assert spec.block_size is not None
        return spec.block_size, rows, 1
    return 0, rows, 1


def _cells(rows: Array, block: int, taps: int) -> tuple[Array, Array, Array]:
    """Return `cells`, `peaks` and `shares` of `Noise`."""
    groups, outputs, inputs = rows.shape
    channels = inputs // taps
    numbers = np.arange(groups * channels).reshape(groups, channels)
    by_channel = rows.reshape(groups, outputs, channels, taps)
    if block:  # along the inputs of a matrix, the last one may be shorter
        count = -(-channels // block)
        rest = count * block - channels
        by_channel = np.pad(by_channel, ((0, 0), (0, 0), (0, rest), (0, 0)))
        by_channel = by_channel.reshape(outputs, count, block, taps).transpose(1, 0, 2, 3)
        numbers = np.pad(numbers[0], (0, rest)).reshape(count, block)
    peaks = by_channel.max(axis=(2, 3))
    safe = np.where(peaks > 0.0, peaks, 1.0)[:, :, None, None]
    return numbers, peaks, ((by_channel / safe) ** POWER).sum(axis=3)


def _energy(stats: TensorStats, centered: bool) -> Array:
    moment, mean = stats.channel_second_moment, stats.channel_mean
    assert moment is not None
    assert mean is not None
    return np.maximum(moment - np.square(mean), 0.0) if centered else moment


def _largest(stats: TensorStats) -> Array:
    assert stats.channel_low is not None
    assert stats.channel_high is not None
    size: Array = np.maximum(np.abs(stats.channel_low), np.abs(stats.channel_high))
    return np.where(np.isfinite(size), size, 0.0)


def _input_levels(spec: TensorSpec | None, seen: Sequence[TensorStats]) -> float:
    """Return how many steps the largest magnitude of an input has; 0: it stays float."""
    if spec is None:
        return 0.0
    low, high = min(0.0, *(one.low for one in seen)), max(0.0, *(one.high for one in seen))
    top = max(-low, high)
    if spec.symmetric or not 0.0 < top < math.inf:
        return (spec.qmax - spec.qmin) / 2.0
    return (spec.qmax - spec.qmin) * top / (high - low)
