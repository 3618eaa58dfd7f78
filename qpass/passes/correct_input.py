"""Fit a correction to what a linear op reads, and fold it where the op's output gets better by it.

What it does
    Compares what the op reads in both graphs, channel by channel, and fits gain and offset as for
    any output. Then it computes on rows that nothing was fitted to what the op would make of its
    input with the new weight, integers and all, and keeps the correction only if the error of the
    *output* falls, each output having its own best gain and offset with and without.
Why it can help
    The fit at the output sees one number for each output channel. An error that differs between
    input channels reaches it as a mixture that no such number undoes. It comes from GELU, gates and
    sums, whose own output nothing corrects; a linear op or a norm in front has corrected its own,
    and is not looked behind. Rounding the weight again costs something too: with noise that is the
    same in all channels the gain brings no more than that, and the gate leaves the op alone.
What it costs
    No run of a linear op: a few thousand rows of its inputs are enough, and their products with a
    part of the output channels are taken in numpy, only where the input promises enough. The ops in
    front, which are cheap, run once more for a few batches, and where they promise something for
    half of them.
Preconditions
    The walk stands at the unit, in front of the fit of the op's output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import LINEAR_OPS, Constant, Graph, Node, Tensor
from qpass.passes.attention import MOVERS
from qpass.passes.channel_affine import Array, ChannelAffine, PairMoments, merge_all, solve_shrunk
from qpass.passes.channel_gate import solve_gated
from qpass.passes.fold_consumer import NORMS
from qpass.passes.fold_linear import InputSite, find_input_site, fold_into_input
from qpass.passes.unit_moments import thinned
from qpass.report.model import Refusal
from qpass.stream import Pair, Step

RULE: Final = "compensate input"
ROWS: Final = 4096  # of all batches together
BYTES: Final = 1 << 26  # of the rows, as float64
OUTPUTS: Final = 64  # channels that the gate looks at
GROUPS: Final = 4  # groups of samples a batch
CONFIDENCE: Final = 2.0  # standard errors, of a channel and of the whole
SCREENED: Final = 16  # samples that tell whether an input promises anything
LEAST_DB: Final = 0.5  # by which the error has to fall, as for nodes that would be added
# What these make of a corrected tensor is corrected.
_PASSED: Final = MOVERS | {"Clip", "DequantizeLinear", "MaxPool", "QuantizeLinear", "Relu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputChange:
    """A correction of what one linear op reads; `apply` folds it into any copy of the graph."""

    original: Node
    affine: ChannelAffine

    def apply(self, graph: Graph) -> None:
        """Change weight and bias."""
        name = str(self.original.name)
        site = find_input_site(graph, {name: graph.node(name)}, self.original)
        assert isinstance(site, InputSite)
        fold_into_input(graph, site, self.affine)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows of one group of samples.

    `inputs` are what the op reads, float32 [groups, rows, inputs]; `wanted` is what it should make
    of them, [groups, rows, some outputs]; `moments` are those of its input channels.
    """

    held: bool
    inputs: Array
    wanted: Array
    moments: PairMoments


def correct_input(
    step: Step,
    graph: Graph,
    nodes: Mapping[str, Node],
    original: Node,
    *,
    first_held: int,
    ridge: float,
) -> tuple[list[InputChange], list[Refusal]]:
    """Correct the input of one linear op; `graph` is changed where that helps.

    Inputs that a corrected op makes are left alone.

    Args:
        step: the unit that ends in the op.
        graph: the quantized graph of the walk.
        nodes: its nodes by name.
        original: the op in the float graph, or in the one that is aimed at.
        first_held: number of the first batch that nothing is fitted to.
        ridge: pull of the gains towards 1.

    Returns:
        The change, if one was made, and why it is none or less than a gain and an offset.
    """
    if original.name in nodes and is_corrected(graph, nodes[original.name].inputs[0]):
        return [], []
    site = find_input_site(graph, nodes, original)
    found = site if isinstance(site, str) else _solve(step, site, first_held, ridge)
    if isinstance(found, str):
        return [], [Refusal(rule=RULE, where=original.name, reason=found)]
    assert isinstance(site, InputSite)
    change = InputChange(original=original, affine=found)
    change.apply(graph)
    left = [site.no_offset] if site.no_offset else []
    return [change], [Refusal(rule=RULE, where=original.name, reason=reason) for reason in left]


def is_corrected(graph: Graph, tensor: Tensor) -> bool:
    """True when `tensor` is what a linear op or a norm makes, moved, clipped or shifted at most.

    That op has taken the correction of its output.
    """
    maker = graph.producer(tensor)
    while maker is not None and maker.op not in NORMS:
        data = [t for t in maker.inputs if not isinstance(t, Constant)]
        if maker.op in LINEAR_OPS:
            return len(data) < 2 or _is_weight(graph, maker.inputs[1])
        moves = maker.op in _PASSED or (maker.op in ("Add", "Mul") and len(data) == 1)
        if not moves:
            return False
        maker = graph.producer(maker.inputs[0] if maker.op in _PASSED else data[0])
    return maker is not None


def _is_weight(graph: Graph, tensor: Tensor) -> bool:
    maker = graph.producer(tensor)
    return maker is not None and all(isinstance(t, Constant) for t in maker.inputs)


def _solve(step: Step, site: InputSite, first_held: int, ridge: float) -> ChannelAffine | str:
    """Return the correction of the input, or why it gets none."""
    hoped = _hoped_db(step, site, first_held, ridge)
    if isinstance(hoped, str):
        return hoped
    if not hoped >= LEAST_DB:
        return f"the error of its input would fall by {hoped:.2f} dB, not {LEAST_DB}"
    outputs = _some(site.layout.outputs, max(1, OUTPUTS // site.layout.groups))
    rows = _gather(step, site, outputs, first_held)
    fit = [part.moments for part in rows if not part.held]
    solved = solve_gated(fit, ridge=ridge, offset=site.output.offset, confidence=CONFIDENCE)
    offset = np.zeros(site.channels) if site.no_offset else solved.affine.offset
    affine = ChannelAffine(gain=solved.affine.gain, offset=offset)
    before = _errors(site, rows, site.weight(), outputs, ridge)
    after = _errors(site, rows, site.scaled(affine.gain).stands_for, outputs, ridge)
    if before.size < 2:
        return "one group of samples is held out: nothing to judge by"
    drops = before - after
    sure = drops.mean() > CONFIDENCE * drops.std(ddof=1) / math.sqrt(drops.size)
    change = (
        10.0 * math.log10(before.mean() / after.mean()) if before.all() and after.all() else 0.0
    )
    if sure and change >= LEAST_DB:
        return affine
    return f"the error of its output would fall by {change:.2f} dB on held-out rows, not surely"


def _hoped_db(step: Step, site: InputSite, first_held: int, ridge: float) -> float | str:
    """Return how far the error falls that the input brings to the output, were it white.

    Looks at a few samples: most inputs promise nothing, and this is all that they cost.
    """
    axis = 1 if site.original.op == "Conv" else -1
    pair = Pair(float_name=site.float_tap, quantized_name=site.tap)
    batches = np.random.default_rng(0).permutation(first_held).tolist()
    fit: list[PairMoments] = []
    samples = 0
    for ((floating, got),) in step.look([pair], batches):
        pairs = (thinned(array, axis=axis) for array in (got, floating))
        fit += PairMoments.of_groups(*pairs, axis=axis, most=GROUPS)
        samples += len(got)
        if samples >= SCREENED:
            break
    solved = solve_gated(fit, ridge=ridge, offset=site.output.offset, confidence=CONFIDENCE)
    if not solved.gain_and_offset:
        return "no channel of its input would surely get better by a gain"
    moments = merge_all(fit)
    identity = ChannelAffine.identity(site.channels)
    # What is constant is the offset of the output, which takes it anyway.
    free = ChannelAffine(gain=identity.gain, offset=moments.mean_t - moments.mean_a)
    squares = np.square(site.float_weight()).sum(axis=2).reshape(site.channels, -1).sum(axis=1)
    before, after = (float(squares @ moments.error(a)) for a in (free, solved.affine))
    return 10.0 * math.log10(before / after) if before > 0.0 and after > 0.0 else 0.0


def _gather(step: Step, site: InputSite, outputs: Array, first_held: int) -> list[_Rows]:
    """Pick rows of every second batch."""
    layout = site.layout
    weight = site.float_weight()[:, :, outputs].astype(np.float32)
    pair = Pair(float_name=site.float_tap, quantized_name=site.tap)
    batches = [*range(0, first_held, 2), *range(first_held, step.batches, 2)]
    quota = min(ROWS, BYTES // (8 * layout.groups * layout.inputs)) // len(batches)
    rows: list[_Rows] = []
    for batch, ((floating, got),) in zip(batches, step.look([pair], batches), strict=True):
        count = layout.input_positions(got)
        picked = np.arange(count)
        if count > quota:
            picked = np.random.default_rng(batch).choice(count, max(1, quota), replace=False)
            picked.sort()
        parts = np.array_split(picked, min(GROUPS, len(picked)))
        rows += [_rows_of(site, floating, got, part, weight, batch >= first_held) for part in parts]
    return rows


def _rows_of(
    site: InputSite, floating: Array, got: Array, picked: Array, weight: Array, held: bool
) -> _Rows:
    wanted, inputs = (site.layout.input_rows(array, picked) for array in (floating, got))
    # Of the places under a kernel the middle one stands for all.
    width = site.layout.columns_per_channel
    a, t = (_flat(x[:, :, width // 2 :: width]) for x in (inputs, wanted))
    return _Rows(
        held=held,
        inputs=inputs.astype(np.float32),
        wanted=wanted.astype(np.float32) @ weight,
        moments=PairMoments.of(a, t, axis=-1),
    )


def _errors(
    site: InputSite, rows: Sequence[_Rows], weight: Array, outputs: Array, ridge: float
) -> Array:
    """Return the squared error of the output in each held group, with the best affine behind it."""
    some = weight[:, :, outputs].astype(np.float32)
    pairs = [
        (part.held, PairMoments.of(_flat(part.inputs @ some), _flat(part.wanted), axis=-1))
        for part in rows
    ]
    fit = [moments for held, moments in pairs if not held]
    affine = solve_shrunk(fit, ridge=ridge, gain=site.output.gain, offset=site.output.offset)
    return np.array([m.error(affine).sum() * m.count for held, m in pairs if held])


def _flat(x: Array) -> Array:
    """Return [groups, rows, some] as [rows, groups * some]."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def _some(count: int, most: int) -> Array:
    """Return at most `most` of the numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
