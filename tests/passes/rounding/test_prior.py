"""Hessians of convolutions between the sum over few rows and a product of channels and places."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qpass.passes.rounding import way
from qpass.passes.rounding.gptq import Factor
from qpass.passes.rounding.grid import Grid
from qpass.passes.rounding.hessian import InputSums
from qpass.passes.rounding.layout import Layout
from qpass.passes.rounding.prior import has_product, toward_product
from qpass.passes.rounding.refit import HeldRows
from qpass.passes.rounding.way import FULL, Rounded, Solver, choose_way, solve_again

Array = NDArray[Any]
CHANNELS, TAPS, OUTPUTS = 16, 9, 12
INPUTS = CHANNELS * TAPS
SOLVER = Solver(effort=FULL, halves=False, refits=False, rescales=False)


def layout(channels: int = CHANNELS, kernel: int = 3, groups: int = 1) -> Layout:
    shape = (OUTPUTS, channels // groups, kernel, kernel)
    return Layout(
        op="Conv",
        shape=shape,
        groups=groups,
        inputs=int(np.prod(shape[1:])),
        outputs=OUTPUTS // groups,
        strides=(1, 1),
        dilations=(1, 1),
        pads=(0, 0, 0, 0),
    )


def energies(random: np.random.Generator, groups: int, size: int) -> Array:
    rows = random.standard_normal((groups, 2 * size, size))
    return np.asarray(rows.swapaxes(1, 2) @ rows)


def test_a_product_is_what_it_was() -> None:
    random = np.random.default_rng(0)
    channels, places = energies(random, 2, 4), energies(random, 2, 9)
    product = np.stack([np.kron(c, p) for c, p in zip(channels, places, strict=True)])
    for share in (0.0, 0.3, 1.0):
        # Products and sums of 36 float64 numbers.
        np.testing.assert_allclose(toward_product(product, 9, share), product, rtol=1e-12)


def test_the_target_has_the_means_of_channels_and_of_places() -> None:
    random = np.random.default_rng(1)
    hessian = energies(random, 1, 4 * 9)
    target = toward_product(hessian, 9, 1.0)
    four = [array.reshape(4, 9, 4, 9) for array in (hessian[0], target[0])]
    for pattern in ("atbt->ab", "atau->tu"):
        wanted, got = (np.einsum(pattern, array) for array in four)
        np.testing.assert_allclose(got, wanted, rtol=1e-11)
    assert np.linalg.matrix_rank(_rearranged(target[0], 4, 9), tol=1e-9 * np.trace(target[0])) == 1


def _rearranged(matrix: Array, channels: int, taps: int) -> Array:
    """A Kronecker product is of rank one when its blocks are laid out as rows."""
    four = matrix.reshape(channels, taps, channels, taps)
    return four.transpose(0, 2, 1, 3).reshape(channels**2, taps**2)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_it_stays_symmetric_not_negative_and_of_one_trace(share: float) -> None:
    random = np.random.default_rng(2)
    few = random.standard_normal((2, 5, 18))
    few[0] = 0.0  # a group without energy
    hessian = few.swapaxes(1, 2) @ few
    kept = hessian.copy()
    found = toward_product(hessian, 9, share)
    np.testing.assert_array_equal(hessian, kept)
    assert not found[0].any()
    np.testing.assert_allclose(found, found.swapaxes(1, 2), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.trace(found[1]), np.trace(hessian[1]), rtol=1e-12)
    assert np.linalg.eigvalsh(found[1]).min() > -1e-12 * np.trace(hessian[1])


def test_only_kernels_over_several_channels_have_one() -> None:
    assert has_product(layout())
    assert not has_product(layout(kernel=1))
    assert not has_product(layout(channels=OUTPUTS, groups=OUTPUTS))  # depthwise
    assert not has_product(Layout(op="MatMul", shape=(8, 4), groups=1, inputs=8, outputs=4))


class Images:
    """Patches of noise that was smoothed over places and mixed over channels."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.mixing = self.random.standard_normal((CHANNELS, CHANNELS)) / np.sqrt(CHANNELS)
        places = np.arange(3)
        far = np.abs(places[:, None] - places[None])
        self.smooth = np.linalg.cholesky(np.kron(0.8**far, 0.8**far))
        self.weight = self.random.standard_normal((1, CHANNELS * TAPS, OUTPUTS))
        step = np.abs(self.weight).max(axis=1, keepdims=True) / 7.5
        self.grid = Grid(scale=step, zero_point=np.zeros_like(step), qmin=-8, qmax=7)

    def rows(self, count: int) -> Array:
        noise = self.random.standard_normal((count, CHANNELS, TAPS))
        return np.einsum("ab,nbt,ut->nau", self.mixing, noise, self.smooth).reshape(count, -1)

    def sums(self, count: int) -> InputSums:
        sums = InputSums(layout=layout(), centered=True)
        x = self.rows(count)
        wanted = (x @ self.weight[0]).reshape(count, OUTPUTS, 1, 1)
        sums.update(x.reshape(count, CHANNELS, 3, 3), wanted, np.arange(count))
        return sums

    def held(self, count: int) -> HeldRows:
        x = self.rows(count)
        return HeldRows(inputs=x[None], wanted=(x @ self.weight[0])[None], weights=np.ones(count))


@pytest.mark.parametrize("again", [False, True])
def test_with_few_rows_it_comes_closer_on_others(again: bool, monkeypatch) -> None:
    """One row for each input; the judges are rows that neither fitted nor chose."""
    gains = []
    for seed in range(4):
        images = Images(seed)
        sums, held, judges = images.sums(INPUTS), images.held(200), images.held(4000)
        more = images.sums(INPUTS // 3)
        errors = []
        for shares in ((), (0.4, 0.8)):
            monkeypatch.setattr("qpass.passes.rounding.way.SHARES", shares)
            found = choose_way(images.weight, images.grid, sums, held, SOLVER)
            assert isinstance(found, Rounded)
            assert (found.product > 0.0) is bool(shares)
            if again:
                both = images_merged(sums, more)
                found = solve_again(images.weight, found, both, SOLVER)
            errors.append(float(judges.error(found.grid.values(found.integers), sums).sum()))
        gains.append(10.0 * np.log10(errors[0] / errors[1]))
    assert min(gains) > 0.0
    assert np.mean(gains) > 0.5


def images_merged(first: InputSums, second: InputSums) -> InputSums:
    whole = InputSums(layout=first.layout, centered=True)
    whole.merge(first)
    whole.merge(second)
    return whole


def test_with_enough_rows_it_is_not_asked(monkeypatch) -> None:
    images = Images(0)
    monkeypatch.setattr("qpass.passes.rounding.way.toward_product", _never)
    found = choose_way(
        images.weight, images.grid, images.sums(8 * INPUTS), images.held(200), SOLVER
    )
    assert isinstance(found, Rounded)
    assert found.product == 0.0


def _never(*_: Any) -> Array:
    raise AssertionError


def test_the_halves_of_erq_have_it_too() -> None:
    images = Images(3)
    solver = replace(SOLVER, halves=True)
    found = choose_way(images.weight, images.grid, images.sums(INPUTS), images.held(200), solver)
    assert isinstance(found, Rounded)
    assert found.product > 0.0


def test_the_product_chooses_the_scales(monkeypatch) -> None:
    """What the rows say by chance about scales reaches none of the ways that compete."""
    images, asked = Images(4), []
    real = way.solve_shares

    def solve_shares(weight: Array, factor: Factor, grid: Grid) -> Array:
        asked.append((factor.hessian, grid.scale))
        return real(weight, factor, grid)

    monkeypatch.setattr(way, "solve_shares", solve_shares)
    sums, held = images.sums(INPUTS), images.held(200)
    found = choose_way(images.weight, images.grid, sums, held, replace(SOLVER, rescales=True))
    assert isinstance(found, Rounded)
    assert found.product > 0.0
    ((hessian, scale),) = asked
    drawn = toward_product(sums.xx, TAPS, way.SHARES[0])
    rest = hessian - drawn  # what damping added, to the diagonal alone
    np.testing.assert_array_equal(rest, np.stack([np.diag(np.diag(one)) for one in rest]))
    np.testing.assert_array_equal(scale, images.grid.scale)
    assert found.shares is not None
    np.testing.assert_array_equal(
        found.grid.scale, (images.grid.scale * found.shares).astype(np.float32)
    )
