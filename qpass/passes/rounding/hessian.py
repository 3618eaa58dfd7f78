"""Sums over the rows of a linear op's input and wanted output: all that rounding has to know.

The squared error of a weight matrix ``w`` with the best offset is, for each group and output::

    E(w) = w^T H w - 2 w^T G + T      H = sum (x - mx)(x - mx)^T   G = sum (x - mx)(t - mt)
                                      T = sum (t - mt)^2           offset = mt - mx w

`x` are the rows of the *quantized* graph's input, `t` those of the wanted output. Where the op can
take no offset the means are those of nothing: zero. Sums are taken about the mean of each chunk and
merged with the formula of Chan, Golub and LeVeque (1979); everything is float64.
"""

from __future__ import annotations

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
    mean_x, mean_t
        [groups, inputs] and [groups, outputs].
    xx, xt, tt
        [groups, inputs, inputs], [groups, inputs, outputs] and [groups, outputs]; sums, not means.
    """

    layout: Layout
    centered: bool
    count: int = 0
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

    def update(self, inputs: Array, wanted: Array, picked: Array) -> None:
        """Add the `picked` rows of one batch; see `Layout` for the arrays."""
        for piece in self.layout.chunks(picked):
            self._add(self.layout.input_rows(inputs, piece), self.layout.output_rows(wanted, piece))

    def _add(self, x: Array, t: Array) -> None:
        rows = x.shape[1]
        if self.centered:
            mean_x, mean_t = x.mean(axis=1), t.mean(axis=1)
            x -= mean_x[:, None]
            t -= mean_t[:, None]
        for group in range(len(x)):  # one by one: numpy uses the symmetry of x^T x only in 2-D
            self.xx[group] += x[group].T @ x[group]
            self.xt[group] += x[group].T @ t[group]
        self.tt += np.einsum("gno,gno->go", t, t)
        count = self.count + rows
        if self.centered:
            share = rows / count
            dx, dt = mean_x - self.mean_x, mean_t - self.mean_t
            between = self.count * share
            if between:
                self.xx += between * dx[:, :, None] * dx[:, None, :]
                self.xt += between * dx[:, :, None] * dt[:, None, :]
                self.tt += between * dt * dt
            self.mean_x += share * dx
            self.mean_t += share * dt
        self.count = count

    def error(self, weight: Array) -> Array:
        """Return the mean squared error of each output with weights [groups, inputs, outputs]."""
        product = np.einsum("gio,gio->go", weight, self.xx @ weight - 2.0 * self.xt)
        error: Array = np.maximum(product + self.tt, 0.0) / max(self.count, 1)
        return error

    def offset(self, weight: Array) -> Array:
        """Return what has to be added to ``x w`` for equal means, [groups, outputs]."""
        offset: Array = self.mean_t - np.einsum("gi,gio->go", self.mean_x, weight)
        return offset
