"""What rounding costs a linear op, by the scales of its input channels: pure numpy, float64.

An input divided by ``d`` meets weights times ``d``. With ``E`` the energy of each input channel and
uniform rounding errors, an output loses, next to ``1/12`` of squared steps,

    sum over its scales of  (largest |w d| / levels)^2 * sum E / d^2        by the weights
    (largest |x / d| / levels)^2 * sum |w d|^2                        by the activation

The first part is least where channels that carry much have finer steps, which is what AWQ (Lin et
al., 2023) searches for with one exponent; here each channel has a scale of its own. Rounding by the
Hessian leaves a share of this error, and the scales that suit one suit the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# The largest of many is taken for a norm of this power: smooth, and as close as ranges of weights
# of few bits are to the largest magnitude (they clip).
POWER: Final = 12.0
# Channels without energy are not free: samples are few, and roundings have to go somewhere.
LEAST_ENERGY: Final = 0.05  # of the mean
# Scales stay within a factor of 4 about their mean: the model says little of extremes.
LIMIT: Final = 4.0
STEPS: Final = 200
# Of the logarithm of what speaks for more over what speaks for less. The largest weight of a row
# answers with `POWER`, so 2 / (POWER + 4) is where steps begin to swing.
RATE: Final = 0.1
STILL: Final = 1e-4
TINY: Final = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What the rounding of one linear op depends on.

    labels, power
        The group of each input channel, from 1 (0: its scale is 1); the input is times
        ``s[labels] ** power``.
    cells
        Numbers of the input channels that share a step within an output, int [cells, size]: all of
        them, those of a group of a convolution, or a block. Those past the end have zero weights.
    peaks, shares
        Largest magnitude of the weights of each row (an output, or all that share a step),
        float64 [cells, rows], and `POWER` of each weight beside it, summed over the taps of a
        kernel, float64 [cells, rows, size].
    outputs
        How many outputs each row stands for.
    energy
        Of each input channel: its variance where a bias makes up for the mean, else its second
        moment, times the taps; float64 [channels].
    squares
        Sum of the squared weights of each input channel, float64 [channels].
    largest
        Largest magnitude of each input channel, float64 [channels].
    signal
        Power of the output, summed over its channels.
    weight_levels, input_levels
        The largest magnitude of a row, and of the input, in steps; 0: it stays float.
    """

    labels: Array
    power: int
    cells: Array
    peaks: Array
    shares: Array
    outputs: int
    energy: Array
    squares: Array
    largest: Array
    signal: float
    weight_levels: float
    input_levels: float

    def forces(self, scale: Array) -> tuple[float, Array, Array]:
        """Return the error as a share of the output, and what of it rises and falls with `scale`.

        Args:
            scale: of each group, float64 [groups + 1].

        Returns:
            The error, and how fast it changes with the logarithms of the scales: by what grows with
            them and by what shrinks, float64 [groups + 1] each.
        """
        gain = scale[self.labels] ** -self.power
        energy = np.maximum(self.energy, LEAST_ENERGY * self.energy.mean()) / gain**2
        total, up, down = 0.0, np.zeros_like(gain), np.zeros_like(gain)
        if self.weight_levels:
            grown = gain[self.cells] ** POWER
            row = np.maximum(np.einsum("crs,cs->cr", self.shares, grown), TINY)
            step = self.peaks**2 * row ** (2.0 / POWER) * self.outputs / self.weight_levels**2
            carried = np.where(self._real, energy[self.cells], 0.0)
            total += float(step.sum(axis=1) @ carried.sum(axis=1))
            pull = np.einsum("cr,crs->cs", step / row, self.shares) * grown
            pull *= carried.sum(axis=1)[:, None]
            push = step.sum(axis=1)[:, None] * carried
            np.add.at(up, self.cells, np.where(self._real, pull, 0.0))
            np.add.at(down, self.cells, push)
        if self.input_levels:
            reach = (self.largest / gain) ** POWER
            whole = max(float(reach.sum()), TINY)
            step = whole ** (2.0 / POWER) / self.input_levels**2
            seen = self.squares * gain**2
            total += step * float(seen.sum())
            up += step * seen
            down += step * seen.sum() * reach / whole
        size = max(self.signal, TINY)
        if self.power > 0:
            up, down = down, up
        groups = scale.size
        return (
            total / size,
            np.bincount(self.labels, up / size, minlength=groups),
            np.bincount(self.labels, down / size, minlength=groups),
        )

    @property
    def _real(self) -> Array:
        """True for the cells' channels that exist."""
        size = self.cells.shape[1]
        numbers = np.arange(self.cells.size).reshape(-1, size)
        result: Array = numbers < self.labels.size
        return result


def noise_of(parts: Sequence[Noise], scale: Array) -> float:
    """Return the sum of the errors of some ops, each as a share of its output."""
    return sum(part.forces(scale)[0] for part in parts)


def solve_weight_scales(parts: Sequence[Noise], groups: int) -> Array:
    """Return the scales with the least error.

    At a minimum, what grows with the scale of a group and what shrinks with it are in balance; each
    step moves the scales by a power of their ratio.

    Args:
        parts: the linear ops that read the site.
        groups: how many scales there are, without number 0.

    Returns:
        float64 [groups + 1], rounded to float32; entry 0 is 1. Their geometric mean is 1 where no
        channel is fixed.
    """
    free = all((part.labels > 0).all() for part in parts)
    logs, best = np.zeros(groups + 1), np.zeros(groups + 1)
    least = np.inf
    for _ in range(STEPS):
        errors, ups, downs = zip(*(part.forces(np.exp(logs)) for part in parts), strict=True)
        if sum(errors) < least:
            least, best = sum(errors), logs
        up, down = np.sum(ups, axis=0), np.sum(downs, axis=0)
        known = (up > 0.0) & (down > 0.0)
        ratio = np.where(known, np.maximum(down, TINY) / np.maximum(up, TINY), 1.0)
        step = RATE * np.clip(np.log(ratio), -np.log(LIMIT), np.log(LIMIT))
        moved = logs + step
        if free:
            moved[1:] -= moved[1:].mean()
        moved = np.clip(moved, -np.log(LIMIT), np.log(LIMIT))
        moved[0] = 0.0
        if np.abs(moved - logs).max() < STILL:
            break
        logs = moved
    return np.exp(best).astype(np.float32).astype(np.float64)
