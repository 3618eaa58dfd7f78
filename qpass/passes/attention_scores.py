"""Fit the gains of queries to the scores that they make with the keys, all channels at once.

What it does
    The fit at the outputs of the projections brings each channel of queries and keys close to its
    own float values. What matters is ``sum_c q_c k_c``, in which the errors of channels make up for
    each other or add up. One gain for each channel of a head, on one of the two sides, minimizes
    the squared error of the scores; it is folded where the gains of that projection are.
How it is solved
    With ``A = q^T q`` and ``B = k k^T`` of one sample and head, ``A * B`` (by elements) holds the
    sums of ``q_c k_c q_e k_e`` over all pairs of positions. So the normal equations come from
    matrices of the size of a head, and no scores are made. Keys count without their mean over the
    positions, which Softmax cancels. A ridge pulls the gains to 1, and held-out samples decide for
    each head.
What it costs
    Nothing at run time, and no run of an op here: the operands of the product are fetched where
    the output of the projection is. They are those before its own correction, whose effect on them
    is known.
Preconditions
    Between the projections and the product values are only moved, shifted by one bias and
    multiplied by one number. Positions (RoPE), norms of queries, groups of queries that share a
    key, and heads that lie on the first axis are not taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.attention import (
    Shapes,
    channel_numbers,
    feeds_softmax,
    moved,
    passes,
    sources,
)
from qpass.passes.channel_affine import CLIP, ChannelAffine
from qpass.passes.channel_gate import GatedAffine
from qpass.passes.fold_affine import Site
from qpass.report.model import Refusal
from qpass.stream import Pair

Array = NDArray[Any]
Role = Literal["query", "key"]
RULE: Final = "compensate scores"
RIDGE: Final = 1e-2  # in units of the mean of the diagonal
CONFIDENCE: Final = 1.0  # standard errors by which the error of a head has to fall


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One operand of the product: its linear op, the channels [heads, size] in it, its factor."""

    linear: str
    channels: Array
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One product of queries and keys; `taker` is the side that gets the gains."""

    product: Node
    query: Side
    key: Side
    taker: Role

    @property
    def linear(self) -> str:
        """The linear op that gets the gains: of the two the one that runs last."""
        return (self.query if self.taker == "query" else self.key).linear

    def sums(self, nodes: Mapping[str, Node], aims: Mapping[str, Node]) -> ScoreSums:
        """Return sums of nothing yet.

        Args:
            nodes: those of the quantized graph by name.
            aims: those of the graph that is aimed at.
        """
        wanted, twin = aims[self.product.name], nodes[self.product.name]
        left, right = (
            Pair(float_name=wanted.inputs[i].name, quantized_name=twin.inputs[i].name)
            for i in (0, 1)
        )
        return ScoreSums(scores=self, pairs=(left, right))


def find_scores(graph: Graph, shapes: Shapes) -> dict[str, tuple[Scores, ...]]:
    """Return the products whose queries and keys both are known, by the op that gets the gains.

    Args:
        graph: the float graph.
        shapes: of its tensors.
    """
    products = {id(node): node for node in graph.nodes if feeds_softmax(graph, node)}
    if not products:
        return {}
    found: dict[tuple[int, int], Side] = {}  # by product and operand
    places = {node.name: i for i, node in enumerate(graph.nodes)}
    for node in sources(graph, products, shapes, operands=(0, 1)):
        numbers = channel_numbers(node, shapes)
        if numbers is None:
            continue
        ends = list(_ends(graph, node, node.outputs[0], numbers, 1.0, products, shapes))
        uses = Counter(number for end in ends for number in end.numbers)
        for end in ends:
            if end.place is not None and all(uses[number] == 1 for number in end.numbers):
                found[end.place] = Side(linear=node.name, channels=end.channels, factor=end.factor)
    result: dict[str, tuple[Scores, ...]] = {}
    for number, product in products.items():
        query, key = found.get((number, 0)), found.get((number, 1))
        if query is None or key is None or query.channels.shape != key.channels.shape:
            continue
        later: Role = "key" if places[key.linear] > places[query.linear] else "query"
        scores = Scores(product=product, query=query, key=key, taker=later)
        result[scores.linear] = (*result.get(scores.linear, ()), scores)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """Where channels arrive: an operand of a product, or elsewhere (`place` is None)."""

    place: tuple[int, int] | None
    numbers: set[int]
    channels: Array
    factor: float


def _ends(
    graph: Graph,
    linear: Node,
    tensor: Tensor,
    ids: Array,
    factor: float,
    products: Mapping[int, Node],
    shapes: Shapes,
) -> Iterator[_End]:
    numbers = set(np.unique(ids).tolist())
    elsewhere = _End(place=None, numbers=numbers, channels=ids, factor=factor)
    if graph.is_output(tensor) or tensor.name in graph.captured:
        yield elsewhere
    for reader, index in graph.consumers(tensor):
        if id(reader) in products and index in (0, 1):
            channels = _heads(ids if index == 0 else ids.swapaxes(-1, -2))
            if channels is None:
                yield elsewhere
            else:
                yield _End(
                    place=(id(reader), index), numbers=numbers, channels=channels, factor=factor
                )
        elif _keeps(reader, index, tensor, linear):
            step = _factor(reader)
            for out, there in moved(reader, ids, shapes):
                yield from _ends(graph, linear, out, there, factor * step, products, shapes)
        else:
            yield elsewhere


def _keeps(node: Node, index: int, tensor: Tensor, linear: Node) -> bool:
    """True for ops that move, scale by a number, or are the bias of `linear` itself."""
    if node.op in ("Add", "Sub"):
        return node.op == "Add" and linear.op == "MatMul" and tensor is linear.outputs[0]
    return passes(node, index)


def _factor(node: Node) -> float:
    if node.op not in ("Mul", "Div"):
        return 1.0
    number = next(float(array_of(t).item()) for t in node.inputs if isinstance(t, Constant))
    return number if node.op == "Mul" else 1.0 / number


def _heads(ids: Array) -> Array | None:
    """Return the channels [heads, size] of [samples, ..., positions, size], None if they differ."""
    if ids.ndim < 3 or not (ids == ids[:1, ..., :1, :]).all():
        return None
    heads: Array = ids[0, ..., 0, :].reshape(-1, ids.shape[-1])
    return heads


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Sums over the positions of one batch: [samples, heads, size(, size)], float64.

    `qq` are products of quantized queries, `qf` of quantized with float ones, `q` and `f` sums of
    the two; `kk` and `kf` likewise for keys without their means.
    """

    count: int
    qq: Array
    qf: Array
    q: Array
    f: Array
    kk: Array
    kf: Array


@dataclass(slots=True)
class ScoreSums:
    """What the fit needs of one product: sums by batch, to fit and held out.

    `pairs` are queries and keys as the two graphs name them.
    """

    scores: Scores
    pairs: tuple[Pair, Pair]
    fit: list[_Sample] = field(default_factory=list)
    held: list[_Sample] = field(default_factory=list)

    def update(self, query: tuple[Array, Array], key: tuple[Array, Array], *, held: bool) -> None:
        """Add one batch: (float, quantized) queries [.., positions, size] and keys [.., size, ..].

        Values that are not finite leave the batch out.
        """
        floating, quantized = (self._split(x) for x in query)
        wanted, got = (self._split(x.swapaxes(-1, -2)) for x in key)
        wanted, got = (k - k.mean(axis=2, keepdims=True) for k in (wanted, got))
        turned, turned_keys = quantized.swapaxes(-1, -2), got.swapaxes(-1, -2)
        sums = _Sample(
            count=quantized.shape[2],
            qq=turned @ quantized,
            qf=turned @ floating,
            q=quantized.sum(axis=2),
            f=floating.sum(axis=2),
            kk=turned_keys @ got,
            kf=turned_keys @ wanted,
        )
        parts = (sums.qq, sums.qf, sums.kk, sums.kf)
        if all(np.isfinite(part).all() for part in parts):
            (self.held if held else self.fit).append(sums)

    def _split(self, x: Array) -> Array:
        heads = len(self.scores.query.channels)
        return x.reshape(len(x), heads, *x.shape[-2:]).astype(np.float64)


def solve_scores(sums: ScoreSums, site: Site, done: ChannelAffine) -> ChannelAffine | str:
    """Return the correction of the op that takes the gains, with them, or why there are none.

    Args:
        sums: of the operands of the product, as they are without `done`.
        site: of the op.
        done: what the fit at its output has found; identity for nothing.
    """
    scores = sums.scores
    if site.gain != "channel" or site.rounding is not None:
        return "its scales take no gain for each channel"
    if scores.taker == "query" and not site.offset:
        return "its bias would not follow its gains"
    if not sums.fit or sum(len(part.q) for part in sums.held) < 2:
        return "its scores are not finite, or there are too few samples"
    bias = _bias_behind(site)
    if bias is None:
        return "its bias differs from row to row"
    left, right = (x.sum(axis=0) for x in _equations(sums.fit, scores, done, bias))
    size = left.shape[-1]
    prior = RIDGE * np.trace(left, axis1=1, axis2=2)[:, None] / size
    if not (prior > 0.0).all():
        return "its scores are constant"
    matrix = left + prior[:, :, None] * np.eye(size)
    gains = np.clip(np.linalg.solve(matrix, (right + prior)[..., None])[..., 0], *CLIP)
    drops = _drops(*_equations(sums.held, scores, done, bias), gains)
    error = drops.std(axis=0, ddof=1) / np.sqrt(len(drops))
    better = drops.mean(axis=0) > CONFIDENCE * error
    if not better.any():
        return "its scores would not surely get better"
    side = scores.query if scores.taker == "query" else scores.key
    gain = np.ones(site.channels)
    gain[side.channels[better]] = gains[better]
    # A bias behind the op has to be multiplied too; that of keys cancels.
    shift = (gain - 1.0) * bias if scores.taker == "query" else np.zeros(site.channels)
    offset = gain * done.offset + shift if site.offset else done.offset
    return ChannelAffine(gain=gain * done.gain, offset=offset)


def with_scores(
    scores: Sequence[ScoreSums], site: Site, solved: GatedAffine
) -> tuple[GatedAffine, list[Refusal]]:
    """Return a correction with the gains of all products that the op takes part in."""
    refusals = []
    for sums in scores:
        found = solve_scores(sums, site, solved.affine)
        if isinstance(found, str):
            refusals.append(Refusal(rule=RULE, where=sums.scores.product.name, reason=found))
            continue
        scaled = found.gain != 1.0
        shifted = ~scaled & (found.offset != 0.0)
        solved = replace(
            solved,
            affine=found,
            gain_and_offset=int(scaled.sum()),
            offset_only=int(shifted.sum()),
            unchanged=int((~scaled & ~shifted).sum()) - solved.unusable,
        )
    return solved, refusals


def _bias_behind(site: Site) -> Array | None:
    """Return what is added behind the op, one number for each channel; 0 where it is inside."""
    bias = np.zeros(site.channels)
    if site.bias_inside or site.bias_slot is None:
        return bias
    values = array_of(site.bias_slot.constant)
    return bias + values.ravel() if values.size in (1, site.channels) else None


def _equations(
    parts: Sequence[_Sample], scores: Scores, done: ChannelAffine, bias: Array
) -> tuple[Array, Array]:
    """Return the normal equations of each sample and head, with `done` at work.

    Returns:
        The matrices [samples, heads, size, size] and right sides [samples, heads, size].
    """
    shape = scores.query.channels.shape
    gain, shift, key_gain = np.ones(shape), np.zeros(shape), np.ones(shape)
    if scores.taker == "query":
        channels = scores.query.channels
        gain = done.gain[channels]
        shift = scores.query.factor * (done.offset[channels] + (1.0 - gain) * bias[channels])
    if scores.key.linear == scores.linear:
        key_gain = done.gain[scores.key.channels]
    matrices, sides = [], []
    for part in parts:
        moved_sums = (gain * part.q)[..., :, None] * shift[:, None, :]
        qq = _outer(gain, gain) * part.qq + moved_sums + moved_sums.swapaxes(-1, -2)
        qq += part.count * _outer(shift, shift)
        qf = gain[:, :, None] * part.qf + shift[:, :, None] * part.f[..., None, :]
        matrices.append(qq * (_outer(key_gain, key_gain) * part.kk))
        sides.append((qf * (key_gain[:, :, None] * part.kf)).sum(axis=-1))
    return np.concatenate(matrices), np.concatenate(sides)


def _outer(left: Array, right: Array) -> Array:
    product: Array = left[:, :, None] * right[:, None, :]
    return product


def _drops(matrix: Array, right: Array, gains: Array) -> Array:
    """Return how far the squared error of each sample and head falls, [samples, heads]."""

    def error(x: Array) -> Array:
        found: Array = np.einsum("shce,hc,he->sh", matrix, x, x)
        found -= 2.0 * np.einsum("shc,hc->sh", right, x)
        return found

    drops: Array = error(np.ones(gains.shape)) - error(gains)
    return drops
