"""Orthogonal matrices with entries of one size: they spread an outlier over all channels.

A Sylvester-Hadamard matrix exists for every power of two, and one of size 12; their Kronecker
products cover 12 * 2^k, the widths of most transformers (192, 384, 768). What is left of other
sizes, an odd factor, gets a seeded random orthogonal factor. Signs are drawn by row: without them a
constant vector would become a single spike.

Sources: Hadamard matrices as in QuaRot (Ashkboos et al., 2024); size 12 by Paley's construction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def solve_rotation(size: int, seed: int) -> Matrix:
    """Return an orthogonal matrix, float64 [size, size], that depends on `size` and `seed` alone.

    For `size` = 2^k and 12 * 2^k all entries are +-1 / sqrt(size).
    """
    random = np.random.default_rng([seed, size])
    base, doublings = _factors(size)
    matrix = _base(base, random)
    for _ in range(doublings):
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2.0), matrix)
    signs = random.choice([-1.0, 1.0], size)
    return np.asarray(signs[:, None] * matrix, np.float64)


def solve_mean_keeping_rotation(size: int, seed: int) -> Matrix:
    """Return an orthogonal matrix that maps the vector of ones to itself, float64 [size, size].

    Then R commutes with taking the mean off: x R - mean(x R) = (x - mean(x)) R. With |x R| = |x|
    it follows that LayerNormalization, without gain, commutes with R.

    It is the rotation of `solve_rotation` and a Householder reflection behind it that takes the
    image of the ones back to the ones; the reflection changes entries by O(1 / size) only.
    """
    rotation = solve_rotation(size, seed)
    ones = np.full(size, 1.0 / np.sqrt(size))
    image = ones @ rotation
    normal = image - ones
    length = float(normal @ normal)
    if length == 0.0:
        return rotation
    reflected: Matrix = rotation - np.outer(rotation @ normal, normal) * (2.0 / length)
    return reflected


def _factors(size: int) -> tuple[int, int]:
    """Split `size` into base * 2^doublings; the base is 1, 12 or odd."""
    doublings = (size & -size).bit_length() - 1
    odd = size >> doublings
    return (12, doublings - 2) if odd == 3 and doublings >= 2 else (odd, doublings)


def _base(size: int, random: Any) -> Matrix:
    if size == 12:
        return np.asarray(_paley(11) / np.sqrt(12.0), np.float64)
    if size == 1:
        return np.ones((1, 1))
    q, r = np.linalg.qr(random.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)), np.float64)


def _paley(prime: int) -> Matrix:
    """Return the Hadamard matrix of size prime + 1, for a prime that is 3 modulo 4."""
    squares = {(i * i) % prime for i in range(1, prime)}
    jacobsthal = np.array(
        [[0 if i == j else 1 if (i - j) % prime in squares else -1 for j in range(prime)]
         for i in range(prime)]
    )  # fmt: skip
    skew = np.zeros((prime + 1, prime + 1))
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, -1.0, jacobsthal
    return np.asarray(skew + np.eye(prime + 1), np.float64)
