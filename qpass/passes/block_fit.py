"""Fit the compensation of one block and decide, on samples left out, whether it is worth running.

A map is kept where it removes more of the squared error than the best offset does, and more than
nothing does; what its own rounding adds counts against it. Where only an offset helps it is kept
if a bias can take it, for then it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from qpass.passes.block_graph import Place
from qpass.passes.block_linear import (
    Array,
    GatedLinear,
    Kind,
    LinearMap,
    solve_gated_linear,
    with_best_offset,
)
from qpass.passes.block_rows import BlockRows
from qpass.passes.nbc import NbcMap, solve_nbc
from qpass.passes.qwt import QwtMap, solve_qwt
from qpass.qparams import QParams, TensorSpec, choose_qparams

Method = Literal["qwt", "nbc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerSpecs:
    """The kinds of integers that a target computes with; None: it runs that op in float."""

    activation: TensorSpec
    matmul: TensorSpec | None
    conv: TensorSpec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFit:
    """What one block gets.

    `mapped` is None where `kind` is offset. `numbers` are those of the uncorrected sum and of the
    compensation where the sum runs on integers. `r2` and `gain` are shares of the squared error
    that the map removes on samples left out: beyond the best offset, and in all.
    """

    kind: Kind
    mapped: QwtMap | NbcMap | None
    offset: Array
    numbers: tuple[QParams, QParams] | None
    r2: float
    gain: float

    @property
    def integer(self) -> bool:
        """True when the map multiplies integers."""
        return isinstance(self.mapped, QwtMap) and self.mapped.numbers is not None

    @property
    def macs_per_row(self) -> int:
        """Multiplications for each token or position of the output."""
        return 0 if self.mapped is None else self.mapped.macs_per_row


def fit_block(
    method: Method,
    place: Place,
    rows: BlockRows,
    *,
    integer: IntegerSpecs | None,
    ridges: Sequence[float],
    has_bias: bool,
) -> BlockFit | str:
    """Fit one block; return the reason with its number where nothing helps.

    Args:
        method: ``qwt`` or ``nbc``.
        place: where the block is compensated.
        rows: what was seen of it.
        integer: the integers of the target, None: everything in float.
        ridges: see `solve_gated_linear`.
        has_bias: an offset alone would be free.
    """
    if place.integer_sum and integer is None:
        return "its sum runs in integers, a map in float would take it out of them"
    extra = _rounding(rows, integer.activation) if place.integer_sum and integer else 0.0
    gated = solve_gated_linear(rows.parts, ridges=ridges, extra=extra)
    r2, gain = gated.r2, gated.gain
    mapped: QwtMap | NbcMap | None = None
    if method == "nbc":
        r2, gain, mapped = _fit_nbc(place, rows, gated, extra=extra)
    elif gated.kind == "linear":
        mapped = _fit_qwt(place, rows, gated, integer)
    if mapped is not None:
        numbers = None
        if place.integer_sum and integer:
            added = np.concatenate([mapped(x) for x, _ in rows.rows_of_parts()])
            numbers = (
                choose_qparams(integer.activation, rows.low, rows.high),
                choose_qparams(integer.activation, added.min(), added.max()),
            )
        return BlockFit(
            kind="linear", mapped=mapped, offset=np.zeros(0), numbers=numbers, r2=r2, gain=gain
        )
    if gated.r2_offset > 0.0 and has_bias:
        whole = rows.whole
        offset = with_best_offset(whole, np.zeros(whole.shape)).offset
        return BlockFit(
            kind="offset", mapped=None, offset=offset, numbers=None, r2=r2, gain=gated.r2_offset
        )
    return (
        f"no map helps on samples left out: R2 {r2:.4f}, "
        f"{gain:.4f} of the squared error would go, {gated.r2_offset:.4f} by an offset"
    )


def _fit_qwt(
    place: Place, rows: BlockRows, gated: GatedLinear, integer: IntegerSpecs | None
) -> QwtMap:
    maps = place.block.axis == 1
    weight = None
    if integer is not None and place.stored:
        weight = integer.conv if maps else integer.matmul
    if weight is not None and weight.granularity == "per_channel":
        weight = replace(weight, axis=0 if maps else 1)
    return solve_qwt(gated.linear, rows.whole, strides=rows.strides, maps=maps, weight=weight)


def _fit_nbc(
    place: Place, rows: BlockRows, gated: GatedLinear, *, extra: float
) -> tuple[float, float, NbcMap | None]:
    """Return r2, gain and the map, None where it does not help."""
    found = solve_nbc(
        rows.rows_of_parts(),
        groups=rows.whole.shape[0],
        strides=rows.strides,
        maps=place.block.axis == 1,
        ridge=gated.ridge,
    )
    whole = rows.whole
    error = whole.error(LinearMap.nothing(whole.shape))
    gain = found.gain - (extra * whole.count * whole.mean_t.size / error if error > 0.0 else 0.0)
    left = 1.0 - gated.r2_offset  # of the error, behind the best offset
    r2 = 1.0 - (1.0 - gain) / left if left > 0.0 else -math.inf
    return r2, gain, found.mapped if r2 > 0.0 and gain > 0.0 else None


def _rounding(rows: BlockRows, spec: TensorSpec) -> float:
    """Return the mean squared error that two more Q add: of the sum and of the compensation."""
    errors = [t for _, t in rows.rows_of_parts()]
    low, high = min(t.min() for t in errors), max(t.max() for t in errors)
    steps = [
        float(choose_qparams(spec, *ends).scale) for ends in ((rows.low, rows.high), (low, high))
    ]
    return sum(step * step for step in steps) / 12.0
