"""Candidates for the scales of a site: pure numpy, float64.

The families, with a and w the largest magnitudes of a channel in the activation and in what takes
the inverse (weights, or the other operand of a product):
    smooth  s = a^alpha / w^(1 - alpha)    SmoothQuant (Xiao et al., 2022); 1/2 is the equalization
                                           across layers of Nagel et al. (2019)
    power   s = a^beta                     NormQuant of UQ-ViT (2026) without the weights
    cap     s = max(1, a / t)              only channels that stand out are touched
    repq    s = span^gamma, shift = middle of the range      RepQ-ViT (Li et al., 2023)
    bound   s = (a / b)^beta, b an end of the Clip in front: with beta 1 each channel fills the
            range (what one scale for each channel would do)
Which one is best differs from site to site; the gate finds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ALPHAS: Final = tuple(round(0.1 * i, 1) for i in range(11))
BETAS: Final = (0.25, 0.4, 0.5, 0.6, 0.75)
GAMMAS: Final = (0.0, 0.5, 1.0)
BOUND_BETAS: Final = (0.25, 0.5, 0.75, 1.0)
CAPS: Final = 6
# Scales stay within 2^+-12 of their mean: float32 weights and gains keep all of their digits, and
# what is smaller than that beside the largest channel is lost in 8 bits anyway.
LIMIT: Final = 2.0**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Scale and shift of each group of a site, float64; entry 0 belongs to label 0: 1 and 0.

    The activation becomes ``(x - shift) / scale``. Scales are float32 numbers, so that everything
    that takes one takes the same.
    """

    method: str
    scale: Array
    shift: Array

    @classmethod
    def identity(cls, groups: int) -> Scales:
        """Change nothing."""
        return cls(method="none", scale=np.ones(groups + 1), shift=np.zeros(groups + 1))


def solve_candidates(
    low: Array, high: Array, weight: Array, *, shift: bool = False
) -> Iterator[Scales]:
    """Yield the scales worth trying.

    Args:
        low: smallest value of each group in the activation, float64 [groups].
        high: largest value.
        weight: largest magnitude of what takes the inverse, float64 [groups].
        shift: an offset is possible too.
    """
    size = np.maximum(np.abs(low), np.abs(high))
    for alpha in ALPHAS:
        yield _scales(f"smooth {alpha}", size, weight, alpha)
    for beta in BETAS:
        yield _finish(f"power {beta}", _positive(size) ** beta)
    top, middle = float(size.max(initial=0.0)), float(np.median(size)) if size.size else 0.0
    if 0.0 < middle < top:
        for cap in np.geomspace(middle, top, CAPS + 1)[:-1]:
            yield _finish(f"cap {cap / top:.2g}", np.maximum(1.0, size / cap), normalize=False)
    if shift:
        center, half = (low + high) / 2, (high - low) / 2
        for gamma in GAMMAS:
            yield _finish(f"repq {gamma}", _positive(half) ** gamma, center)
        for alpha in (0.5, 0.7, 0.8):
            yield _scales(f"repq smooth {alpha}", half, weight, alpha, center)


def bound_candidates(candidates: Iterable[Scales], floor: Array) -> Iterator[Scales]:
    """Yield scales that stay within bounds, and those that the bounds themselves suggest.

    Args:
        candidates: scales that know nothing of bounds. They count as ratios: the largest of the
            bounded groups becomes 1.
        floor: smallest scale that each group may have, float64 [groups]; 1 fixes it, 0 leaves it
            free. The largest is 1.
    """
    bounded = floor > 0.0
    for beta in BOUND_BETAS:
        yield _finish(f"bound {beta}", np.where(bounded, floor, 1.0) ** beta, normalize=False)
    for candidate in candidates:
        scale = candidate.scale[1:]
        scale = scale / scale[bounded].max()
        scale = np.where(bounded, np.clip(scale, floor, 1.0), scale)
        yield _finish(candidate.method, scale, candidate.shift[1:], normalize=False)


def solve_shifts(
    scales: Sequence[Scales], low: Array, high: Array, mean: Array
) -> Iterator[Scales]:
    """Yield scales with offsets: the mean of each group, and the middle of its range.

    The mean is best where the rounding of another operand multiplies the tensor (the softmax in
    front of V): what is left of V is as small as it can be.
    """
    for one in scales:
        for name, shift in (("mean", mean), ("middle", (low + high) / 2)):
            offset = shift.astype(np.float32).astype(np.float64)
            method = f"{one.method}, {name} subtracted"
            yield Scales(method=method, scale=one.scale, shift=np.concatenate([[0.0], offset]))


def _scales(
    method: str, size: Array, weight: Array, alpha: float, shift: Array | None = None
) -> Scales:
    return _finish(method, _positive(size) ** alpha / _positive(weight) ** (1 - alpha), shift)


def _positive(values: Array) -> Array:
    """Give channels that are always 0 the smallest size of the others: they have none."""
    found = values[values > 0]
    return np.where(values > 0, values, found.min() if found.size else 1.0)


def _finish(
    method: str, scale: Array, shift: Array | None = None, *, normalize: bool = True
) -> Scales:
    """Bring scales to a geometric mean of 1 (the tensor keeps its size) and round to float32."""
    logs = np.log(scale)
    if normalize and logs.size:
        logs = logs - logs.mean()
    bounded = np.exp(np.clip(logs, -np.log(LIMIT), np.log(LIMIT))).astype(np.float32)
    offset = np.zeros(scale.size) if shift is None else shift.astype(np.float32).astype(np.float64)
    return Scales(
        method=method,
        scale=np.concatenate([[1.0], bounded.astype(np.float64)]),
        shift=np.concatenate([[0.0], offset]),
    )
