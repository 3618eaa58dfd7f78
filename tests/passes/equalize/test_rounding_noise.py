"""Scales of input channels that suit the rounding of weights: against closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qpass.passes.equalize.rounding_noise import (
    LIMIT,
    POWER,
    Noise,
    noise_of,
    solve_weight_scales,
)

Array = np.ndarray[Any, Any]
CHANNELS = 6
# Where a search by steps of at most `STILL` ends, times the steps that were left.
NEAR = 2e-3


def noise(**changes: Any) -> Noise:
    """An op with one output, weights of size 1 and 15 levels, behind a float input."""
    plain = Noise(
        labels=np.arange(1, CHANNELS + 1),
        power=-1,
        cells=np.arange(CHANNELS)[None],
        peaks=np.ones((1, 1)),
        shares=np.ones((1, 1, CHANNELS)),
        outputs=1,
        energy=np.ones(CHANNELS),
        squares=np.ones(CHANNELS),
        largest=np.ones(CHANNELS),
        signal=float(CHANNELS),
        weight_levels=7.5,
        input_levels=0.0,
    )
    return replace(plain, **changes)


def mean_one(scale: Array) -> Array:
    return scale / np.exp(np.log(scale).mean())


def test_weights_of_one_size_follow_the_energy() -> None:
    """(sum d^P)^(2/P) * sum E / d^2 is least where d^(P + 2) goes with E."""
    energy = np.array([8.0, 1.0, 1.0, 2.0, 0.5, 1.0])
    found = solve_weight_scales([noise(energy=energy)], CHANNELS)
    assert found[0] == 1.0
    np.testing.assert_allclose(found[1:], mean_one(energy ** (1 / (POWER + 2))), rtol=NEAR)


def test_inputs_alone_are_brought_to_one_range() -> None:
    """(sum (a / d)^P)^(2/P) * sum q d^2 is least where d^(P + 2) goes with a^P / q."""
    largest, squares = np.array([3.0, 1, 1, 2, 1, 0.5]), np.array([1.0, 4, 1, 1, 0.5, 2])
    part = noise(weight_levels=0.0, input_levels=255.0, largest=largest, squares=squares)
    found = solve_weight_scales([part], CHANNELS)
    wanted = mean_one((largest**POWER / squares) ** (1 / (POWER + 2)))
    np.testing.assert_allclose(found[1:], wanted, rtol=NEAR)


def test_the_slopes_are_those_of_the_error() -> None:
    random = np.random.default_rng(0)
    part = noise(
        labels=np.array([1, 2, 2, 0, 3, 4]),
        cells=np.arange(CHANNELS).reshape(2, 3),
        peaks=random.uniform(1, 2, (2, 5)),
        shares=random.uniform(0, 1, (2, 5, 3)),
        energy=random.uniform(0.5, 2, CHANNELS),
        largest=random.uniform(1, 2, CHANNELS),
        squares=random.uniform(1, 2, CHANNELS),
        input_levels=10.0,
    )
    for one in (part, replace(part, power=1)):
        scale = np.array([1.0, 0.8, 1.3, 1.1, 0.9])
        _, up, down = one.forces(scale)
        for label in range(1, 5):
            moved = [scale.copy(), scale.copy()]
            moved[0][label] *= np.exp(1e-5)
            moved[1][label] *= np.exp(-1e-5)
            slope = (one.forces(moved[0])[0] - one.forces(moved[1])[0]) / 2e-5
            # The error is made of squares: both forces count twice. Differences of 1e-5 leave 1e-9.
            assert slope == pytest.approx(2.0 * (up - down)[label], rel=1e-6)


def test_more_bits_make_the_other_side_count() -> None:
    """A channel that is wide and carries much: fine weights want it large, its range small."""
    energy, largest = np.ones(CHANNELS), np.ones(CHANNELS)
    energy[0], largest[0] = 8.0, 8.0
    both = noise(energy=energy, largest=largest, input_levels=127.0)
    few, many = (
        solve_weight_scales([replace(both, weight_levels=levels)], CHANNELS)[1]
        for levels in (3.5, 127.5)
    )
    assert 1.0 < few < many  # x / d: the wider it is, the more it is divided by
    least = replace(both, weight_levels=127.5)
    assert noise_of([least], np.ones(CHANNELS + 1)) > noise_of(
        [least], solve_weight_scales([least], CHANNELS)
    )


def test_blocks_have_steps_of_their_own() -> None:
    """A block of one channel has no trade-off: its scale cancels, and only the rest moves."""
    energy = np.array([4.0, 1.0, 1.0, 9.0, 9.0, 9.0])
    part = noise(
        cells=np.array([[0, 1, 2], [3, 4, 5]]),
        peaks=np.ones((2, 1)),
        shares=np.ones((2, 1, 3)),
        energy=energy,
    )
    found = solve_weight_scales([part], CHANNELS)[1:]
    wanted = energy ** (1 / (POWER + 2))
    for block in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(mean_one(found[block]), mean_one(wanted[block]), rtol=NEAR)


def test_a_channel_that_is_not_there_counts_nothing() -> None:
    """The last block is filled up with weights of zero at channel 0."""
    energy = np.array([4.0, 1.0, 1.0, 2.0, 1.0])
    shares = np.ones((2, 1, 3))
    shares[1, 0, 2] = 0.0
    short = noise(
        labels=np.arange(1, 6),
        cells=np.array([[0, 1, 2], [3, 4, 0]]),
        peaks=np.ones((2, 1)),
        shares=shares,
        energy=energy,
        squares=np.ones(5),
        largest=np.ones(5),
    )
    first = noise(
        labels=np.arange(1, 6),
        cells=np.array([[0, 1, 2]]),
        peaks=np.ones((1, 1)),
        shares=np.ones((1, 1, 3)),
        energy=energy,
        squares=np.ones(5),
        largest=np.ones(5),
    )
    scale = np.array([1.0, 0.7, 1.2, 1.1, 0.9, 1.3])
    _, up, down = short.forces(scale)
    _, wanted_up, wanted_down = first.forces(scale)
    np.testing.assert_array_equal(up[1:4], wanted_up[1:4])
    np.testing.assert_array_equal(down[1:4], wanted_down[1:4])


def test_scales_stay_within_limits_and_fixed_channels_at_one() -> None:
    energy = np.array([1e12, 1.0, 1.0, 1.0, 1.0, 1.0])
    shares = np.ones((1, 1, CHANNELS))
    shares[..., 0] = 1e-30  # its weights are small: nothing speaks against larger ones
    part = noise(energy=energy, shares=shares, labels=np.array([1, 2, 3, 0, 4, 5]))
    found = solve_weight_scales([part], CHANNELS - 1)
    assert found[0] == 1.0
    assert found.max() <= np.float32(LIMIT)
    assert found.min() >= np.float32(1 / LIMIT)
    np.testing.assert_array_equal(found, found.astype(np.float32))


def test_nothing_that_is_known_moves_nothing() -> None:
    dead = noise(energy=np.zeros(CHANNELS), signal=0.0)
    np.testing.assert_array_equal(solve_weight_scales([dead], CHANNELS), np.ones(CHANNELS + 1))
