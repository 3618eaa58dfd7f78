"""Replace LayerNormalization of a pretrained model by a fitted gain and offset per channel.

What it does
    Regresses what a norm makes on what it reads, channel by channel, on samples. A norm whose fit
    explains at least `threshold` of the variance (R2, mean over channels) becomes Mul and Add, and
    the linear ops behind it are refitted by ridge regression. It stays only when the outputs of the
    model on other samples are still close to those of the float model.
Why it is not exact
    A LayerNormalization divides each token by a number of its own. The fit is good where all tokens
    have about the same size, which training with Unified Normalization sees to and ordinary
    training does not: on most pretrained transformers every norm is refused, with its R2.
Preconditions
    The graph is normalized. The first and the last norm are left alone: the first sees tokens of
    all kinds, and the error of the last goes straight to the outputs.
Sources
    The fit is the channel-wise affine of QwT-v2 (Fu et al., 2025) applied to a norm; the ridge step
    is that of ERQ (Zhong et al., 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.errors import PreconditionError
from qpass.graph import Graph, Variable
from qpass.passes.affine import fold_channel_affines
from qpass.passes.affine.absorb import LinearReader, absorb, linear_reader, write_affine
from qpass.passes.norm_gain import NORMS, Norm, read_norm
from qpass.passes.normalize.folding import FoldResult, rank_of
from qpass.passes.normalize.linear_folding import Affine
from qpass.passes.rotation.basis import Slot, change_basis
from qpass.passes.static_norm.solve import (
    Array,
    ChannelMoments,
    CrossMoments,
    StaticFit,
    solve_refit,
    solve_static_norm,
)
from qpass.report.model import PassReport
from qpass.submodel import Submodel
from qpass.verify.metrics import ErrorMeter

Feeds = Mapping[str, NDArray[Any]]
Outputs = dict[str, NDArray[Any]]

RULE: Final = "static norm"
# Eight-bit networks keep 20 to 30 dB: a norm that is worse would be the larger error.
OUTPUT_DB: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Batches to fit on, and others to judge the outputs of the model on."""

    fit: Sequence[Feeds]
    check: Sequence[Feeds]


def replace_norms(
    graph: Graph,
    batches: Batches,
    *,
    threshold: float,
    edges: bool = False,
    threads: int | None = None,
) -> tuple[Graph, PassReport]:
    """Make norms static where that is good enough.

    Args:
        graph: a normalized float graph; it is not changed.
        batches: samples.
        threshold: smallest R2 of a norm, from 0 to 1.
        edges: the first and the last norm may become static, too.
        threads: of the engine.

    Returns:
        The graph with static norms (`graph` itself when there are none), and what was done.

    Raises:
        PreconditionError: there are no batches to fit on or to check with.
    """
    if not batches.fit or not batches.check:
        raise PreconditionError("static norms need samples to fit on and others to check with")
    result = FoldResult()
    norms = _candidates(graph, result, edges=edges)
    fits = _fit_all(graph, norms, batches.fit, threads) if norms else {}
    for norm in norms:
        r2 = fits[norm.node.name].r2
        if r2 < threshold:
            reason = f"a gain and an offset explain R2 = {r2:.3f} of it, less than {threshold:g}"
            result.refuse(RULE, norm.node, reason)
    good = [n.node.name for n in norms if fits[n.node.name].r2 >= threshold]
    wanted = _outputs(graph, batches.check, threads) if good else []
    current = graph
    for name in sorted(good, key=lambda name: -fits[name].r2):
        trial = current.copy()
        _make_static(graph, trial, name, fits[name], batches.fit, threads)
        db = _worst_db(wanted, _outputs(trial, batches.check, threads))
        if db < OUTPUT_DB:
            reason = f"R2 = {fits[name].r2:.3f}, but the outputs of the model keep {db:.1f} dB"
            result.refuse(RULE, graph.node(name), f"{reason} only, less than {OUTPUT_DB:g}")
            continue
        current = trial
        result.changed += 1
    refusals = tuple(result.refusals)
    return current, PassReport(name="static-norm", changed=result.changed, refusals=refusals)


def _candidates(graph: Graph, result: FoldResult, *, edges: bool) -> list[Norm]:
    nodes = [node for node in graph.nodes if node.op in NORMS]
    if not edges:
        for node in {id(n): n for n in (*nodes[:1], *nodes[-1:])}.values():
            result.refuse(RULE, node, "it is the first or the last norm of the model")
        nodes = nodes[1:-1]
    found = []
    for node in nodes:
        norm = read_norm(node)
        if isinstance(norm, str):
            result.refuse(RULE, node, norm)
        else:
            found.append(norm)
    return found


def _rows(
    graph: Graph, names: Sequence[str], batches: Sequence[Feeds], threads: int | None
) -> Iterator[tuple[str, Array, Array]]:
    """Yield (norm, its input, its output) for each batch and norm, as rows in float64."""
    nodes = [graph.node(name) for name in names]
    tensors = dict.fromkeys(t.name for n in nodes for t in (n.inputs[0], n.outputs[0]))
    session = Submodel(graph, batches[0], list(tensors), threads=threads)
    for feeds in batches:
        values = {**feeds, **session.run(feeds)}
        for node in nodes:
            pair = (values[node.inputs[0].name], values[node.outputs[0].name])
            x, y = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in pair)
            yield node.name, x, y


def _fit_all(
    graph: Graph, norms: Sequence[Norm], batches: Sequence[Feeds], threads: int | None
) -> dict[str, StaticFit]:
    moments: dict[str, ChannelMoments] = {}
    for name, x, y in _rows(graph, [norm.node.name for norm in norms], batches, threads):
        if name not in moments:
            moments[name] = ChannelMoments(x, y)
        moments[name].add(x, y)
    return {name: solve_static_norm(found) for name, found in moments.items()}


def _make_static(
    reference: Graph,
    graph: Graph,
    name: str,
    fit: StaticFit,
    batches: Sequence[Feeds],
    threads: int | None,
) -> None:
    """Refit the linear ops that read norm `name` of `graph`, then write the fit in its place.

    What the norm reads and makes is taken from the float graph `reference`.
    """
    node = graph.node(name)
    source = node.inputs[0]
    axis = (rank_of(source) or 1) - 1
    readers = [
        reader
        for consumer, index in graph.consumers(node.outputs[0])
        if isinstance(reader := linear_reader(consumer, index, axis, fit.gain.size), LinearReader)
    ]
    if readers:
        moments = CrossMoments(fit)
        for _, x, y in _rows(reference, [name], batches, threads):
            moments.add(x, y)
        _refit(graph, readers, solve_refit(moments.own, moments.cross), fit.mean)
    assert isinstance(source, Variable)
    affine = Affine(gain=fit.gain, offset=fit.offset)
    write_affine(graph, source, affine, axis, node)
    fold_channel_affines(graph)


def _refit(graph: Graph, readers: Sequence[LinearReader], change: Array, mean: Array) -> None:
    """Give each reader W' = W + K W, and the bias that keeps its mean: b' = b - mean (K W)."""
    size = mean.size
    for reader in readers:
        if not reader.obstacle and int(reader.node.attrs.get("group", 1)) == 1:
            absorb(graph, reader, Affine(gain=np.ones(size), offset=-(mean @ change)))
            slot = Slot(node=reader.node, index=1, axis=reader.axis)
            change_basis(graph, [slot], (np.eye(size) + change).T, size)


def _outputs(graph: Graph, batches: Sequence[Feeds], threads: int | None) -> list[Outputs]:
    names = [tensor.name for tensor in graph.outputs if tensor.inputs]
    session = Submodel(graph, batches[0], names, threads=threads)
    return [session.run(feeds) for feeds in batches]


def _worst_db(wanted: Sequence[Outputs], got: Sequence[Outputs]) -> float:
    meters: dict[str, ErrorMeter] = {}
    for left, right in zip(wanted, got, strict=True):
        for name, value in left.items():
            meters.setdefault(name, ErrorMeter()).update(value, right[name])
    return min(meter.sqnr_db for meter in meters.values())
