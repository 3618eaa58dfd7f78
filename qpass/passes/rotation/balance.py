"""Write what lies between linear ops in the basis in which their weights round best.

What it does
    A bottleneck has no activation function: the projections of a stage write to a stream, alone or
    in sums, and the expansions behind it read it. With any B that has an inverse, the stream may be
    x' = x B: what writes it takes ``W B``, what reads it ``B^-1 V``, and all of it goes into
    constants.
Why it helps
    Rounding each channel of ``W`` with its own scale leaves an error in proportion to the energy of
    the channel, and what reads it multiplies that by the energy of its row of ``V``; an error of
    ``V`` is multiplied by the energy of the stream. With ``P = sum W^T W``, ``S = sum V V^T`` and
    ``X = B B^T`` both come to ``tr(P X) tr(S X^-1)`` once every channel has its share of them. The
    smallest value is where ``X P X = S``: then channels are as large as they matter. What is left
    free, ``B = X^(1/2) R``, is a rotation that gives each channel its share; it makes outliers rare
    among weights and in the stream, too.
Why it is correct
    Sums and moves of channels commute with any B. The precondition is that of `find_streams`:
    nothing else makes or reads the stream. A stream with norms is left to `rotate_streams`.
Where it is refused
    Where rounding to nearest at 4 bits loses no less in the new basis, by the formula above with
    the rounded weights in it; and where weights are sparse, which a rotation would undo.
Sources
    Ours. That scales of channels may move between such layers is cross-layer equalization (Nagel et
    al., 2019), which this does for whole matrices; rotations are those of QuaRot (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Graph, array_of
from qpass.matching import weight_axis
from qpass.passes.normalize.folding import FoldResult
from qpass.passes.rotation.basis import Slot, Stream, change_basis, find_streams
from qpass.passes.rotation.hadamard import Matrix, solve_rotation
from qpass.report.model import PassReport
from qpass.units import is_weighted

RULE: Final = "balance stream"
LEVELS: Final = 7  # on each side of zero: 4 bits
GAIN_DB: Final = 0.2  # that rounding has to gain
FLOOR: Final = 1e-3  # of the mean: no channel is taken for less than that
SPARSE: Final = 0.25  # share of zeros among the weights


def balance_streams(graph: Graph, seed: int) -> PassReport:
    """Balance every stream that only linear ops make and read; `changed` counts constants."""
    result = FoldResult()
    for stream in find_streams(graph, norms="none"):
        found = _balanced(stream, seed)
        if isinstance(found, str):
            result.refuse(RULE, stream.where, found)
            continue
        change_basis(graph, stream.writers, found, stream.channels)
        change_basis(graph, stream.readers, _inverse(found), stream.channels)
        result.changed += len(stream.writers) + len(stream.readers)
    return PassReport(name="balance", changed=result.changed, refusals=tuple(result.refusals))


def solve_balance(writers: Matrix, readers: Matrix, seed: int) -> Matrix:
    """Return B of ``x' = x B``, float64 [channels, channels], with a determinant of size one.

    Args:
        writers: ``P``, symmetric and not negative, float64 [channels, channels].
        readers: ``S``, of the same kind.
        seed: of the rotation.

    Returns:
        ``X^(1/2) R`` with ``X = P^(-1/2) (P^(1/2) S P^(1/2))^(1/2) P^(-1/2)``, the geometric mean
        of ``P^-1`` and ``S``.
    """
    root, inverse = _power(writers, 0.5), _power(writers, -0.5)
    mean = inverse @ _power(root @ readers @ root, 0.5) @ inverse
    half = _power(mean, 0.5)
    _, log_size = np.linalg.slogdet(half)
    size = len(half)
    result: Matrix = half @ solve_rotation(size, seed) / math.exp(log_size / size)
    return result


def _inverse(basis: Matrix) -> Matrix:
    """Return what readers are multiplied by: the transposed inverse."""
    return np.asarray(np.linalg.inv(basis).T, np.float64)


def _power(matrix: Matrix, exponent: float) -> Matrix:
    """Return the power of a symmetric matrix whose eigenvalues are kept away from zero."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, FLOOR * values.mean())
    powers: Matrix = (vectors * values**exponent) @ vectors.T
    return powers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A weight, float64, the axis of its output channels, and that of the stream."""

    values: Matrix
    outputs: int
    axis: int

    def in_basis(self, matrix: Matrix) -> _Weight:
        turned = np.moveaxis(np.moveaxis(self.values, self.axis, -1) @ matrix, -1, self.axis)
        return _Weight(values=turned, outputs=self.outputs, axis=self.axis)

    def gram(self) -> Matrix:
        """Return its energies along the stream, float64 [channels, channels]."""
        return _gram(self.values, self.axis)

    def lost(self) -> Matrix:
        """Return the same of what rounding to nearest takes from it."""
        others = tuple(i for i in range(self.values.ndim) if i != self.outputs)
        scale = np.abs(self.values).max(axis=others, keepdims=True) / LEVELS
        scale = np.where(scale > 0.0, scale, 1.0)
        return _gram(self.values - np.rint(self.values / scale) * scale, self.axis)


def _gram(values: Matrix, axis: int) -> Matrix:
    rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    return np.asarray(rows.T @ rows)


def _balanced(stream: Stream, seed: int) -> Matrix | str:
    """Return the new basis of a stream, or why it stays as it is."""
    if stream.refusal:
        return stream.refusal
    writers = [_weight(slot) for slot in stream.writers if _is_weight(slot)]
    readers = [_weight(slot) for slot in stream.readers]
    for weight in (*writers, *readers):
        if not np.isfinite(weight.values).all():
            return "a weight of it is not finite"
        if (weight.values == 0.0).mean() >= SPARSE:
            return "a weight of it is sparse, and would not be in another basis"
    made, read = sum(w.gram() for w in writers), sum(w.gram() for w in readers)
    if not (np.any(made) and np.any(read)):
        return "no linear op writes to it"
    basis = solve_balance(np.asarray(made), np.asarray(read), seed)
    before = _error(writers, readers)
    after = _error(
        [weight.in_basis(basis) for weight in writers],
        [weight.in_basis(_inverse(basis)) for weight in readers],
    )
    if not after * 10.0 ** (GAIN_DB / 10.0) <= before:
        return f"rounding to 4 bits loses {before:.3g}, in another basis {after:.3g}"
    return basis


def _error(writers: list[_Weight], readers: list[_Weight]) -> float:
    """Return what rounding costs behind the readers, for inputs of the writers of one size."""
    made, read = sum(w.gram() for w in writers), sum(w.gram() for w in readers)
    by_writers = sum(np.sum(w.lost() * read) for w in writers)
    by_readers = sum(np.sum(w.lost() * made) for w in readers)
    return float(by_writers + by_readers)


def _is_weight(slot: Slot) -> bool:
    return slot.index == 1 and is_weighted(slot.node)


def _weight(slot: Slot) -> _Weight:
    values = array_of(slot.node.inputs[slot.index]).astype(np.float64)
    rank = values.ndim
    outputs = weight_axis(slot.node, rank) % rank
    return _Weight(values=values, outputs=outputs, axis=slot.axis % rank)
