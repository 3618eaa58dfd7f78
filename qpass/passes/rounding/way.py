"""Choose on held-out rows how a layer is rounded; then round it that way with more rows.

What it does
    A few ridges (of the refit), dampings, shares of a simpler Hessian (`prior`) and the sweeps
    compete: each is solved on the rows to fit to and judged on those that are held out. The way
    that has won is then solved again with held-out rows in its sums: they have told what they had
    to. Whichever integers are better on all of these rows stay.
What the second solution is worth
    A hundred samples are few, however many rows each has. It is not judged by itself; that is left
    to batches that no sum has seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.passes.rounding.descend import descend
from qpass.passes.rounding.erq import solve_erq
from qpass.passes.rounding.gptq import SWEEPS, Factor, damped, factorize, solve_gptq
from qpass.passes.rounding.grid import Grid
from qpass.passes.rounding.hessian import InputSums
from qpass.passes.rounding.output_metric import metric_error, solve_together
from qpass.passes.rounding.prior import DAMPING, SHARES, has_product, toward_product
from qpass.passes.rounding.refit import HeldRows, choose_refit, solve_refit
from qpass.passes.rounding.scales import solve_shares

Array = NDArray[Any]
# With few rows the Hessian says more than the samples know: stronger dampings compete then.
DAMPINGS: Final = (0.01, 0.1, 1.0)
ENOUGH_ROWS: Final = 8  # for each input


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a layer may cost.

    rows
        That enter the sums, for each input: they have to span its space well.
    sweeps
        Of coordinate descent behind the rounding, at most.
    inputs
        Layers with more of them stay as they are; None: no limit.
    """

    rows: int
    sweeps: int
    inputs: int | None = None


FULL: Final = Effort(rows=32, sweeps=SWEEPS)
# What `auto` spends where nothing has few levels. The cost grows with the cube of the inputs, and
# the more inputs add up, the less their rounding errors weigh against those of the activations.
# Half of the rows pays for twice the inputs; numbers are in DESIGN.md.
QUICK: Final = Effort(rows=ENOUGH_ROWS // 2, sweeps=0, inputs=2304)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """What is the same for all ways to round one layer.

    halves
        As ERQ does it, instead of one input after the other.
    refits
        The float weight follows the quantized input.
    rescales
        Scales of channels follow from the rounding.
    """

    effort: Effort
    halves: bool
    refits: bool
    rescales: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A rounded weight and how it was found.

    wanted
        The float weight that was rounded, refitted or not, float64 [groups, inputs, outputs].
    integers
        float64, of the same shape.
    shares
        By how much scales changed, float64 [groups, 1, outputs]; None: they did not.
    grid
        With the new scales.
    ridge, damping, product, sweeps
        The way; `ridge` None: no refit. `product` is the share of `toward_product`.
    """

    wanted: Array
    integers: Array
    shares: Array | None
    grid: Grid
    ridge: float | None
    damping: float
    product: float
    sweeps: int


def choose_way(
    weight: Array, grid: Grid, sums: InputSums, held: HeldRows, solver: Solver
) -> Rounded | str:
    """Return the weight rounded in the way that is best on the held rows, or why none is.

    Args:
        weight: float64 [groups, inputs, outputs].
        grid: its scales and bounds.
        sums: of the rows to fit to.
        held: rows to judge by.
        solver: what may be done.

    Returns:
        A reason where nothing beats rounding to nearest.
    """
    plain = float(held.error(grid.values(grid.nearest(weight)), sums).sum())
    wanted, ridge = choose_refit(weight, sums, held) if solver.refits else (weight, None)
    effort = solver.effort
    few = sums.count < min(ENOUGH_ROWS, effort.rows) * sums.layout.inputs
    best, error, reason = None, plain, ""
    shares: Array | None = None
    scaled = grid
    for family in _families(sums, few=few):
        for product, damping in family:
            factor = factorize(_hessian(sums, product), damping=damping)
            if isinstance(factor, str):
                reason = factor
                break
            if shares is None and solver.rescales:
                shares = solve_shares(wanted, factor, grid)
                scale = (grid.scale * shares).astype(np.float32)  # as it will be stored
                scaled = replace(grid, scale=scale.astype(np.float64))
            solve = solve_erq if solver.halves else _without_sweeps
            integers = solve(wanted, factor, scaled)
            found = float(held.error(scaled.values(integers), sums).sum())
            if found < error:
                error = found
                best = Rounded(
                    wanted=wanted,
                    integers=integers,
                    shares=None if shares is None or (shares == 1.0).all() else shares,
                    grid=scaled,
                    ridge=ridge,
                    damping=factor.damping,
                    product=product,
                    sweeps=0,
                )
            elif best is not None:
                break
            else:
                reason = f"squared error {found:.3g} on held-out rows, {plain:.3g} with those"
            if best is not None and not few:
                break
    if best is None:
        return reason
    if effort.sweeps and not solver.halves:  # those have sweeps of their own
        # Sweeps fit what the rows happen to hold, too, and cost more than a damping does.
        swept = replace(best, integers=_swept(best, sums, effort.sweeps), sweeps=effort.sweeps)
        if float(held.error(best.grid.values(swept.integers), sums).sum()) < error:
            best = swept
    return best


def solve_again(weight: Array, found: Rounded, sums: InputSums, solver: Solver) -> Rounded:
    """Return the weight rounded in the way of `found`, with its scales and other sums."""
    factor = factorize(_hessian(sums, found.product), damping=found.damping)
    if isinstance(factor, str):
        return found
    wanted = weight if found.ridge is None else solve_refit(weight, sums, found.ridge)
    solve = solve_erq if solver.halves else _without_sweeps
    again = replace(found, wanted=wanted, integers=solve(wanted, factor, found.grid))
    if found.sweeps:
        again = replace(again, integers=_swept(again, sums, found.sweeps))
    # The old integers were the best of several on rows that they were not fitted to.
    old, new = (float(sums.error(found.grid.values(o.integers)).sum()) for o in (found, again))
    return again if new < old else found


def solve_for_outputs(found: Rounded, sums: InputSums, metric: Array) -> Rounded:
    """Return the weight rounded in the way of `found`, all outputs together; see `output_metric`.

    The integers that are there stay where they cost no more.
    """
    factor = factorize(_hessian(sums, found.product), damping=found.damping)
    if isinstance(factor, str):
        return found
    integers = solve_together(found.wanted, factor, found.grid, metric)
    old, new = (
        metric_error(found.wanted - found.grid.values(i), factor.hessian, metric)
        for i in (found.integers, integers)
    )
    return replace(found, integers=integers) if new < old else found


def _families(sums: InputSums, *, few: bool) -> list[list[tuple[float, float]]]:
    """Return lists of shares of the product and dampings, to be tried in their order.

    With few rows all lists are, each until it gets worse; otherwise there is one, which ends with
    the first that beats rounding to nearest. The first of all also chooses the scales of channels:
    the Hessian of few rows misjudges those.
    """
    if few and has_product(sums.layout):
        return [[(share, DAMPING) for share in SHARES], [(0.0, DAMPINGS[1])]]
    return [[(0.0, damping) for damping in DAMPINGS]]


def _hessian(sums: InputSums, product: float) -> Array:
    if not product:
        return sums.xx
    return toward_product(sums.xx, sums.layout.columns_per_channel, product)


def _without_sweeps(weight: Array, factor: Factor, grid: Grid) -> Array:
    return solve_gptq(weight, factor, grid, sweeps=0)


def _swept(found: Rounded, sums: InputSums, sweeps: int) -> Array:
    integers = found.integers.copy()
    full = damped(_hessian(sums, found.product), found.damping)
    descend(found.wanted, full, integers, found.grid, sweeps=sweeps)
    return integers
