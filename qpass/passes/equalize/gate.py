"""Choose the scales of a site on some samples, and accept them on others, or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.passes.equalize.linear_error import QUICK_ELEMENTS, TINY
from qpass.passes.equalize.measure import Measure, Specs, largest_weights, weight_power
from qpass.passes.equalize.rows import SiteRows
from qpass.passes.equalize.site import Product, Reader
from qpass.passes.equalize.solve import Scales, bound_candidates, solve_candidates, solve_shifts
from qpass.passes.model_gate import CONFIDENCE

Array = NDArray[Any]

FINALISTS: Final = 5  # candidates that are tried with clipped ranges as well
# An error that falls by less is not worth an edit: two range methods differ by as much.
MIN_GAIN_DB: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What an edit does to the error of a site on samples that did not choose it.

    method: what is done.
    before, after: error as a share of the output power, summed over the ops of the site.
    gain_db, gain_error_db: mean over the samples of how much the error falls, and its standard
    error.
    """

    method: str
    before: float
    after: float
    gain_db: float
    gain_error_db: float

    @property
    def sure(self) -> bool:
        """True when the error falls beyond doubt."""
        sure = self.gain_db > max(CONFIDENCE * self.gain_error_db, MIN_GAIN_DB)
        return sure and self.after < self.before

    @property
    def sentence(self) -> str:
        """The numbers, for a report."""
        return (
            f"{self.method}: {_db(self.before):.1f} dB -> {_db(self.after):.1f} dB at its "
            f"outputs, {self.gain_db:+.1f} +- {self.gain_error_db:.1f} dB a sample"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Gain):
    """The best scales of a site, and what they do."""

    scales: Scales


def choose_scales(
    readers: tuple[Reader, ...],
    products: tuple[Product, ...],
    rows: SiteRows,
    specs: Specs,
    *,
    shift: bool = False,
    floor: Array | None = None,
) -> Choice:
    """Return the best candidate by the even samples, judged by the odd ones.

    Args:
        readers: linear ops of the site.
        products: products of activations of the site.
        rows: what was kept of at least four samples.
        specs: what their operands become.
        shift: offsets are possible.
        floor: smallest scale of each group, float64 [groups], see `bound_candidates`; None: any.
    """
    measure = Measure(readers=readers, products=products, rows=rows, specs=specs)
    quick = replace(measure, elements=QUICK_ELEMENTS, ops={})
    fit, held = range(0, rows.samples, 2), range(1, rows.samples, 2)
    plain = Scales.identity(rows.groups)
    low, high, mean, other = _sizes(measure, fit)
    candidates = list(solve_candidates(low, high, other, shift=shift))
    if floor is not None:
        candidates = list(bound_candidates(candidates, floor))
    finals = _best(quick, candidates, fit)
    if shift:
        moved = solve_shifts([plain, *finals], low, high, mean)
        finals = _best(quick, [*finals, *moved], fit)
    trials = [(c, share) for c in finals for share in measure.shares]
    best, share = min(trials, key=lambda t: float(measure.errors(t[0], fit, t[1]).sum()))
    plain_share = min(measure.shares, key=lambda s: float(measure.errors(plain, fit, s).sum()))
    before = measure.errors(plain, held, plain_share)
    after = measure.errors(best, held, share)
    return Choice(method=best.method, scales=best, **gain_numbers(before, after))


def gain_numbers(before: Array, after: Array) -> dict[str, float]:
    """Return what `Gain` says of the errors of some samples, float64 [samples] each."""
    gains = 10 * np.log10(np.maximum(before, TINY) / np.maximum(after, TINY))
    error = float(gains.std(ddof=1)) / math.sqrt(gains.size) if gains.size > 1 else math.inf
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "gain_db": float(gains.mean()),
        "gain_error_db": error,
    }


def ideal_gain_db(reader: Reader, low: Array, high: Array, specs: Specs) -> float:
    """Return the most that any scales could gain: each channel with a range of its own, in dB.

    Rounding noise of a channel is as its range squared, and shows in the outputs as the squares of
    its weights. What the weights lose is left out, so this is a bound.

    Args:
        reader: linear op whose input has one label for each channel, from 1.
        low: smallest value of each channel, float64.
        high: largest value.
        specs: what the operands become.
    """
    used = np.isfinite(low)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if specs.activations[reader.linear.node.name, 0].symmetric:
        low, high = -np.maximum(-low, high), np.maximum(-low, high)
    power = weight_power(reader, low.size)[1:]
    span = np.where(used, high - low, 0.0)
    own = float((span * span) @ power)
    whole = float(high[used].max() - low[used].min()) ** 2 * float(power[used].sum())
    return 10 * math.log10(max(whole, TINY) / max(own, TINY))


def _best(measure: Measure, candidates: Sequence[Scales], fit: range) -> list[Scales]:
    scores = [float(measure.errors(candidate, fit).sum()) for candidate in candidates]
    return [candidates[i] for i in np.argsort(scores, kind="stable")[:FINALISTS]]


def _sizes(measure: Measure, fit: range) -> tuple[Array, Array, Array, Array]:
    """Return low, high and mean of each group, and the size of what takes the inverse."""
    groups = measure.rows.groups
    low, high, mean, other = (np.zeros(groups + 1) for _ in range(4))
    for reader in measure.readers:
        other = np.maximum(other, largest_weights(reader, groups))
    for key, power in _sides(measure):
        extremes = measure.rows.extremes[key]
        below, above = extremes.over(fit)
        used = np.isfinite(below)
        if power == -1:
            low = np.where(used, np.minimum(low, below), low)
            high = np.where(used, np.maximum(high, above), high)
            mean = np.where(used, np.mean([extremes.mean[i] for i in fit], axis=0), mean)
        else:
            size = np.maximum(np.abs(below), np.abs(above))
            other = np.maximum(other, np.where(used, size, 0.0))
    return low[1:], high[1:], mean[1:], other[1:]


def _sides(measure: Measure) -> Iterator[tuple[tuple[str, int], int]]:
    for reader in measure.readers:
        yield (reader.linear.node.name, 0), reader.power
    for product in measure.products:
        yield (product.node.name, 1), product.power
        if product.both:
            yield (product.node.name, 0), -product.power


def _db(share: float) -> float:
    return -10 * math.log10(max(share, TINY))
