"""The rows of a block that its compensation is fitted to: input beside error of the output.

A row is one token, or one position of a feature map: for maps the input is taken where the
output's stride puts it, and large maps are thinned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from qpass.errors import InternalError
from qpass.passes.block_linear import Array, CrossMoments, group_count, merge_all
from qpass.passes.unit_moments import thinned
from qpass.stream import Tap

FOLDS: Final = 4  # parts of the samples, each left out once


@dataclass(slots=True, kw_only=True)
class BlockRows:
    """What one walk has seen of one block.

    `parts` are the moments of disjoint sets of samples. `kept` holds (part, inputs, errors): every
    so-many-th row, within a limit of bytes. `low` and `high` are the extremes of the output as it
    is. `rows_per_sample` counts all positions of the output.
    """

    strides: tuple[int, ...]
    parts: list[CrossMoments]
    kept: list[tuple[int, Array, Array]] = field(default_factory=list)
    low: float = np.inf
    high: float = -np.inf
    rows_per_sample: int = 0

    @property
    def whole(self) -> CrossMoments:
        """The moments of all parts."""
        return merge_all(self.parts)

    def rows_of_parts(self) -> list[tuple[Array, Array]]:
        """Return the kept inputs and errors of each part that has some."""
        found = []
        for part in range(FOLDS):
            pieces = [(x, t) for number, x, t in self.kept if number == part]
            if pieces:
                inputs, errors = zip(*pieces, strict=True)
                found.append((np.concatenate(inputs), np.concatenate(errors)))
        return found


def collect_rows(
    taps: Iterable[Tap],
    *,
    axis: int,
    first_held: int,
    batches: int,
    keep_bytes: int,
    moments_bytes: int,
) -> BlockRows | str:
    """Read a block's batches; return what a fit needs, or why there can be none.

    Args:
        taps: the block's output in both graphs, its input as the extra pair.
        axis: of the channels, 1 or -1.
        first_held: batches from here on are only looked at for the extremes.
        batches: how many there are.
        keep_bytes: limit of the rows that are kept.
        moments_bytes: limit of the moments.
    """
    found: BlockRows | None = None
    step = 1
    for tap in taps:
        x, got = tap.also[0][1], tap.quantized
        strides = strides_of(x.shape, got.shape, axis)
        if strides is None or got.shape != tap.float.shape:
            return f"its input {list(x.shape)} does not lie on its output {list(got.shape)}"
        inputs, outputs = x.shape[axis], got.shape[axis]
        if found is None:
            groups = group_count(inputs, outputs) if axis == 1 else 1
            size = 8 * FOLDS * (inputs // groups) * (inputs + outputs)
            if size > moments_bytes:
                return f"a map of {inputs} x {outputs} channels takes {size >> 10} KiB to fit"
            empty = CrossMoments.empty(groups, inputs // groups, outputs // groups)
            found = BlockRows(strides=strides, parts=[empty] * FOLDS)
            found.rows_per_sample = got.size // (outputs * max(1, got.shape[0]))
            per_batch = 4 * (inputs + outputs) * (got.size // outputs)
            step = max(1, -(-per_batch * batches // keep_bytes))
        elif found.strides != strides:
            return "its stride changes from batch to batch"
        found.low = min(found.low, float(got.min()))
        found.high = max(found.high, float(got.max()))
        if tap.batch < first_held:
            _take(found, tap, axis=axis, step=step)
    if found is None:
        raise InternalError("a walk without batches")
    if sum(part.count > 0 for part in found.parts) < 2:
        return "there is one sample to fit to: none could be left out"
    if not found.whole.finite:
        return "its activations hold NaN or infinity"
    return found


def _take(found: BlockRows, tap: Tap, *, axis: int, step: int) -> None:
    """Add one batch, its samples dealt out to the parts."""
    x, error, strides = tap.also[0][1], tap.float - tap.quantized, found.strides
    groups = found.parts[0].shape[0]
    pieces = min(FOLDS, len(x))
    for k, (left, right) in enumerate(
        zip(np.array_split(x, pieces), np.array_split(error, pieces), strict=True)
    ):
        part = (tap.batch + k) % FOLDS
        rows = to_rows(left, axis, strides), to_rows(right, axis, (1,) * len(strides))
        found.parts[part] = found.parts[part].merge(CrossMoments.of(*rows, groups=groups))
        found.kept.append((part, rows[0][::step], rows[1][::step]))


def strides_of(
    before: tuple[int, ...], after: tuple[int, ...], axis: int
) -> tuple[int, ...] | None:
    """Return the strides of the 1x1 convolution from one shape to the other, () for tokens.

    None: there is no such convolution.
    """
    if len(before) != len(after) or len(before) < 2:
        return None
    if axis != 1:
        return () if before[:-1] == after[:-1] else None
    if before[0] != after[0]:
        return None
    strides = []
    for size, target in zip(before[2:], after[2:], strict=True):
        stride = -(-size // max(1, target))
        if (size - 1) // stride + 1 != target:
            return None
        strides.append(stride)
    return tuple(strides)


def to_rows(array: Array, axis: int, strides: tuple[int, ...]) -> Array:
    """Return [rows, channels] of tokens, or of a feature map taken with `strides` and thinned."""
    if axis != 1:
        return array.reshape(-1, array.shape[-1])
    array = array[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
    array = thinned(array, axis=1)
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])
