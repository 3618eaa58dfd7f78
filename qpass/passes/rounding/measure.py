"""Look at one layer with the activations of both graphs: sums to fit to, and rows to choose by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.passes.rounding.hessian import InputSums
from qpass.passes.rounding.layer import Layer
from qpass.passes.rounding.refit import HeldRows
from qpass.passes.row_weights import Weights
from qpass.stream import Pair, Step, Stream

Array = NDArray[Any]
LEAST_ROWS: Final = 4096
HELD_ROWS: Final = 2048


def measure(
    stream: Stream,
    step: Step,
    layer: Layer,
    *,
    first_held: int,
    first_judge: int,
    rows_per_input: int,
    with_skips: bool,
    random: np.random.Generator,
) -> tuple[InputSums, HeldRows, InputSums | None]:
    """Run the unit up to the layer; sum up its rows and keep those that are held out.

    Those in front of the judges are also summed up, by themselves.

    Args:
        stream: stands in the unit.
        step: the unit.
        layer: a linear op of it.
        first_held: number of the first batch that is held out.
        first_judge: number of the first one that no sum may see.
        rows_per_input: that enter the sums, but at least `LEAST_ROWS` in all.
        with_skips: the aim is the float residual sum less the quantized skip, where there is one.
            Only units aim at it; the methods that they are compared with know nothing of it.
        random: picks the rows.
    """
    layout, batches = layer.layout, len(stream.batches)
    sums = InputSums(layout=layout, centered=layer.site.offset)
    held: list[tuple[Array, Array, Array]] = []
    fit_rows = -(-max(LEAST_ROWS, rows_per_input * layout.inputs) // first_held)
    held_rows = HELD_ROWS // (batches - first_held)
    pairs = _pairs(step, layer, with_skips=with_skips)
    sums.update_all(
        (inputs, wanted, _pick(layout.positions(wanted), fit_rows, random, live), weights)
        for inputs, wanted, weights, live in islice(pairs, first_held)
    )
    more = None
    if first_judge > first_held:
        more = InputSums(layout=layout, centered=layer.site.offset)
    for number, (inputs, wanted, weights, live) in enumerate(pairs, start=first_held):
        if more is not None and number < first_judge:
            rows = _pick(layout.positions(wanted), fit_rows, random, live)
            more.update(inputs, wanted, rows, weights)
        picked = _pick(layout.positions(wanted), held_rows, random, live)
        counts = np.ones(len(picked)) if weights is None else weights[picked]
        held.append((layout.input_rows(inputs, picked), layout.output_rows(wanted, picked), counts))
    rows_held = HeldRows(
        inputs=np.concatenate([x for x, _, _ in held], axis=1),
        wanted=np.concatenate([t for _, t, _ in held], axis=1),
        weights=np.concatenate([w for _, _, w in held]),
    )
    return sums, rows_held, more


def _pairs(
    step: Step, layer: Layer, *, with_skips: bool
) -> Iterator[tuple[Array, Array, Array | None, Array | None]]:
    """Yield for each batch the quantized input, what the product should give, weights, live rows.

    By what a norm divides the sum behind a layer is how much the rows of the layer count.
    """
    weighted = None if layer.normed_sum is None else Weights(layer.normed_sum)
    pairs = [Pair(float_name=layer.output, quantized_name=layer.node.inputs[0].name)]
    if layer.skip is not None and (with_skips or weighted is not None):
        pairs.append(layer.skip)
    bias = layer.layout.along_channels(layer.bias().astype(np.float32))
    for number, ((wanted, inputs), *others) in enumerate(step.look(pairs)):
        aim, normed = wanted - bias, None
        for floating, quantized in others:
            if weighted is not None:
                normed = weighted.of(wanted, floating)
            if with_skips:
                aim = aim + (floating - quantized)
        weights = layer.guided(number, normed)
        live = layer.live[number] if layer.live else None
        yield inputs, aim, None if weights is None else weights.ravel(), live


def _pick(rows: int, quota: int, random: np.random.Generator, live: Array | None) -> Array:
    """Return the numbers of at most `quota` rows, sorted; live ones come first."""
    quota = max(1, quota)
    if rows <= quota:
        return np.arange(rows)
    if live is None or live.size != rows:
        return np.sort(random.choice(rows, quota, replace=False))
    order = random.permutation(rows)
    return np.sort(order[np.argsort(~live.ravel()[order], kind="stable")][:quota])
