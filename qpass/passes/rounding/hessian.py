"""Sums over the rows of a linear op's input and wanted output: all that rounding has to know.

The squared error of a weight matrix ``w`` with the best offset is, for each group and output::

    E(w) = w^T H w - 2 w^T G + T      H = sum (x - mx)(x - mx)^T   G = sum (x - mx)(t - mt)
                                      T = sum (t - mt)^2           offset = mt - mx w

`x` are the rows of the *quantized* graph's input, `t` those of the wanted output. Where the op can
take no offset the means are those of nothing: zero. Sums are taken about the mean of each chunk and
merged with the formula of Chan, Golub and LeVeque (1979); everything is float64. Rows may have
weights (`row_weights`), which enter all sums and means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.passes.rounding.layout import Layout

Array = NDArray[Any]


@dataclass(slots=True, kw_only=True)
class InputSums:
    """The sums of one linear op; `centered` says whether they are about the means.

    count
        Rows so far.
    total
        Of their weights; without weights it is `count`.
    mean_x, mean_t
        [groups, inputs] and [groups, outputs].
    xx, xt, tt
        [groups, inputs, inputs], [groups, inputs, outputs] and [groups, outputs]; sums, not means.
    """

    layout: Layout
    centered: bool
    count: int = 0
    total: float = 0.0
    mean_x: Array = field(init=False)
    mean_t: Array = field(init=False)
    xx: Array = field(init=False)
    xt: Array = field(init=False)
    tt: Array = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the sums of nothing."""
        groups, inputs, outputs = self.layout.groups, self.layout.inputs, self.layout.outputs
        self.mean_x, self.mean_t = np.zeros((groups, inputs)), np.zeros((groups, outputs))
        self.xx = np.zeros((groups, inputs, inputs))
        self.xt, self.tt = np.zeros((groups, inputs, outputs)), np.zeros((groups, outputs))

    def update(
        self, inputs: Array, wanted: Array, picked: Array, weights: Array | None = None
    ) -> None:
        """Add the `picked` rows of one batch; see `Layout` for the arrays.

        Args:
            inputs: of the op in the quantized graph.
            wanted: its output.
            picked: numbers of rows.
            weights: of all rows of the batch, float64; all 1 if None.
        """
        self.update_all([(inputs, wanted, picked, weights)])

    def update_all(self, parts: Iterable[tuple[Array, Array, Array, Array | None]]) -> None:
        """Add rows of many batches, each as for `update`.

        Rows of batches are put together first: with thousands of inputs the product of a few
        hundred rows takes less time than the sums it is added to.
        """
        for piece in _pieces(self.layout, parts):
            self._add(*piece)

    def _add(self, x: Array, t: Array, weights: Array | None) -> None:
        rows = x.shape[1]
        counts = np.ones(rows) if weights is None else weights
        total = float(counts.sum())
        if self.centered:
            mean_x, mean_t = (np.einsum("n,gni->gi", counts, v) / total for v in (x, t))
            x -= mean_x[:, None]
            t -= mean_t[:, None]
        if weights is not None:
            root = np.sqrt(weights)[None, :, None]
            x *= root
            t *= root
        if self.centered:
            share = total / (self.total + total)
            dx, dt = mean_x - self.mean_x, mean_t - self.mean_t
            between = np.sqrt(self.total * share)
            if between:  # what lies between the means counts as one more row
                x, t = (
                    np.concatenate([rest, between * apart[:, None]], axis=1)
                    for rest, apart in ((x, dx), (t, dt))
                )
            self.mean_x += share * dx
            self.mean_t += share * dt
        for group in range(len(x)):  # one by one: numpy uses the symmetry of x^T x only in 2-D
            self.xx[group] += x[group].T @ x[group]
            self.xt[group] += x[group].T @ t[group]
        self.tt += np.einsum("gno,gno->go", t, t)
        self.count += rows
        self.total += total

    def merge(self, other: InputSums) -> None:
        """Add the rows of other sums of the same op."""
        total = self.total + other.total
        if not total:
            return
        self.xx += other.xx
        self.xt += other.xt
        self.tt += other.tt
        if self.centered:
            share = other.total / total
            dx, dt = other.mean_x - self.mean_x, other.mean_t - self.mean_t
            weight = self.total * share
            self.xx += weight * dx[:, :, None] * dx[:, None, :]
            self.xt += weight * dx[:, :, None] * dt[:, None, :]
            self.tt += weight * np.square(dt)
            self.mean_x += share * dx
            self.mean_t += share * dt
        self.count += other.count
        self.total = total

    def error(self, weight: Array) -> Array:
        """Return the mean squared error of each output with weights [groups, inputs, outputs]."""
        product = np.einsum("gio,gio->go", weight, self.xx @ weight - 2.0 * self.xt)
        error: Array = np.maximum(product + self.tt, 0.0) / (self.total or 1.0)
        return error

    def offset(self, weight: Array) -> Array:
        """Return what has to be added to ``x w`` for equal means, [groups, outputs]."""
        offset: Array = self.mean_t - np.einsum("gi,gio->go", self.mean_x, weight)
        return offset


def _pieces(
    layout: Layout, parts: Iterable[tuple[Array, Array, Array, Array | None]]
) -> Iterator[tuple[Array, Array, Array | None]]:
    """Yield input rows, wanted rows and weights, in pieces of ``layout.chunk_rows`` rows."""
    pending: list[tuple[Array, Array, Array | None]] = []
    room = layout.chunk_rows
    for inputs, wanted, picked, weights in parts:
        begin = 0
        while begin < len(picked):
            piece = picked[begin : begin + room]
            begin, room = begin + len(piece), room - len(piece)
            pending.append(
                (
                    layout.input_rows(inputs, piece),
                    layout.output_rows(wanted, piece),
                    None if weights is None else weights[piece],
                )
            )
            if not room:
                yield _together(pending)
                pending, room = [], layout.chunk_rows
    if pending:
        yield _together(pending)


def _together(
    parts: Sequence[tuple[Array, Array, Array | None]],
) -> tuple[Array, Array, Array | None]:
    if len(parts) == 1:
        return parts[0]
    weights = [w for _, _, w in parts if w is not None]
    return (
        np.concatenate([x for x, _, _ in parts], axis=1),
        np.concatenate([t for _, t, _ in parts], axis=1),
        np.concatenate(weights) if weights else None,
    )
