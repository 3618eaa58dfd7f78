"""What one float pass keeps of each site: a bounded number of rows, and exact extremes.

A row is what one output position of a linear op reads: a token, or a patch of an image. Rows are
drawn evenly at random; those with the largest values of each sample are kept in any case, since a
few tokens decide ranges and clipping. Each row knows how many it stands for, so that sums over the
rows estimate sums over all. Of a product of activations some rows and columns are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.collect import open_session
from qpass.errors import SampleError
from qpass.graph import Graph, Node
from qpass.passes.equalize.labels import Labels, varying
from qpass.passes.equalize.site import Product, Reader

Array = NDArray[Any]
Feeds = Mapping[str, Array]

ROWS: Final = 16  # of one sample, the extreme ones included
EXTREMES: Final = 4
ELEMENTS: Final = 1 << 21  # kept of one op over all samples: 8 MiB of float32
PRODUCT_SAMPLES: Final = 16
PRODUCT_ROWS: Final = 24


@dataclass(slots=True, kw_only=True)
class LinearRows:
    """Inputs [rows, channels, taps] float32 of a linear op by sample, and what each row counts."""

    inputs: list[Array] = field(default_factory=list)
    counts: list[Array] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class ProductRows:
    """Operands of a product of activations by sample: some rows of the left, and the right."""

    samples: list[int] = field(default_factory=list)
    left: list[Array] = field(default_factory=list)
    right: list[Array] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Extremes:
    """Extremes of each label of a tensor, by sample: [samples][labels] float64."""

    labels: Labels
    low: list[Array] = field(default_factory=list)
    high: list[Array] = field(default_factory=list)
    mean: list[Array] = field(default_factory=list)

    def add(self, array: Array, groups: int) -> None:
        """Look at one sample."""
        axes = tuple(i for i in range(array.ndim) if i not in varying(self.labels))
        low, high = array.min(axis=axes, keepdims=True), array.max(axis=axes, keepdims=True)
        flat = np.broadcast_to(self.labels, low.shape).ravel()
        lows, highs = np.full(groups + 1, np.inf), np.full(groups + 1, -np.inf)
        np.minimum.at(lows, flat, low.ravel().astype(np.float64))
        np.maximum.at(highs, flat, high.ravel().astype(np.float64))
        self.low.append(lows)
        self.high.append(highs)
        means = array.mean(axis=axes, keepdims=True, dtype=np.float64).ravel()
        sums = np.bincount(flat, means, minlength=groups + 1)
        self.mean.append(sums / np.maximum(np.bincount(flat, minlength=groups + 1), 1))

    def over(self, samples: Sequence[int]) -> tuple[Array, Array]:
        """Return the extremes over some samples."""
        low = np.min([self.low[i] for i in samples], axis=0)
        return low, np.max([self.high[i] for i in samples], axis=0)


@dataclass(slots=True, kw_only=True)
class SiteRows:
    """Everything that is known of one site; keys are names of nodes and (node, operand)."""

    groups: int
    linear: dict[str, LinearRows] = field(default_factory=dict)
    products: dict[str, ProductRows] = field(default_factory=dict)
    extremes: dict[tuple[str, int], Extremes] = field(default_factory=dict)
    samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to keep for one site."""

    groups: int
    readers: Sequence[Reader]
    products: Sequence[Product] = ()

    def tensors(self) -> list[str]:
        """Return the names of the tensors to look at."""
        names = [r.linear.node.inputs[0].name for r in self.readers]
        return names + [t.name for p in self.products for t in p.node.inputs]


def collect_rows(
    graph: Graph,
    wanted: Sequence[Wanted],
    samples: Iterable[Feeds],
    count: int,
    *,
    threads: int = 0,
    seed: int = 0,
) -> list[SiteRows]:
    """Run the float graph once over `count` samples, one at a time, and keep rows of each site.

    Raises:
        SampleError: a tensor of a site is not finite.
    """
    names = list(dict.fromkeys(name for one in wanted for name in one.tensors()))
    inputs = {tensor.name for tensor in graph.inputs}
    model = graph.to_model(taps=[n for n in names if n not in inputs], inline=True)
    kept = [SiteRows(groups=one.groups) for one in wanted]
    session = open_session(model.SerializeToString(), threads)
    fetched = [name for name in names if name not in inputs]
    for number, feeds in enumerate(samples):
        # An empty list would mean all outputs of the model.
        results = session.run(fetched, dict(feeds)) if fetched else []
        values = dict(zip(fetched, results, strict=True))
        arrays = {**{n: np.asarray(feeds[n]) for n in names if n in inputs}, **values}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise SampleError(f"tensor {name} is not finite on sample {number}")
        rng = np.random.default_rng([seed, number])
        for one, site in zip(wanted, kept, strict=True):
            _look(one, site, arrays, number, count, rng)
    return kept


def _look(
    wanted: Wanted,
    site: SiteRows,
    arrays: Feeds,
    number: int,
    count: int,
    rng: np.random.Generator,
) -> None:
    for reader in wanted.readers:
        node = reader.linear.node
        array = arrays[node.inputs[0].name]
        inputs, counts = rows_of(node, array, count, rng)
        rows = site.linear.setdefault(node.name, LinearRows())
        rows.inputs.append(inputs)
        rows.counts.append(counts)
        axis = 1 if node.op in ("Conv", "ConvTranspose") else array.ndim - 1
        shape = [-1 if i == axis else 1 for i in range(array.ndim)]
        _extremes(site, (node.name, 0), reader.labels.reshape(shape), array)
    for product in wanted.products:
        node = product.node
        left, right = (arrays[tensor.name] for tensor in node.inputs)
        _extremes(site, (node.name, 1), product.labels, right)
        mirrored = product.labels.swapaxes(-1, -2)
        left_labels = mirrored if product.both else np.zeros([1] * left.ndim, np.int64)
        _extremes(site, (node.name, 0), left_labels, left)
        _keep_product(site, product, left, right, number, count, rng)
    site.samples += 1


def _extremes(site: SiteRows, key: tuple[str, int], labels: Labels, array: Array) -> None:
    site.extremes.setdefault(key, Extremes(labels=labels)).add(array, site.groups)


def _keep_product(
    site: SiteRows,
    product: Product,
    left: Array,
    right: Array,
    number: int,
    count: int,
    rng: np.random.Generator,
) -> None:
    rows = site.products.setdefault(product.node.name, ProductRows())
    picked = _some(left.shape[-2], PRODUCT_ROWS, rng)
    left = left.take(picked, axis=-2)
    if product.both:
        right = right.take(_some(right.shape[-1], PRODUCT_ROWS, rng), axis=-1)
    size = left.size + right.size
    every = max(count // max(min(PRODUCT_SAMPLES, ELEMENTS // max(size, 1)), 4), 1)
    # Both parities, because even samples make the scales and odd ones judge them.
    if (number // 2) % every == 0:
        rows.samples.append(number)
        rows.left.append(left)
        rows.right.append(right)


def _some(size: int, wanted: int, rng: np.random.Generator) -> Array:
    return np.sort(rng.choice(size, min(size, wanted), replace=False))


def rows_of(
    node: Node, array: Array, samples: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return some rows [n, channels, taps] that a linear op reads of one sample, and their counts.

    For ConvTranspose a row is one input position: its products are summed up by the op.
    """
    if node.op != "Conv":
        axis = 1 if node.op == "ConvTranspose" else array.ndim - 1
        flat = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
        limit = _row_limit(flat.shape[1], samples)
        size = np.abs(flat).max(axis=1)
        picked, counts = _pick(size.size, _largest(size, limit), limit, rng)
        return flat[picked][:, :, None].astype(np.float32), counts
    return _patches(node, array, samples, rng)


def _row_limit(elements: int, samples: int) -> int:
    return int(np.clip(ELEMENTS // max(elements * samples, 1), 2, ROWS))


def _largest(size: Array, limit: int) -> Array:
    extremes = min(EXTREMES, limit // 2, size.size)
    return np.argsort(-size, kind="stable")[:extremes]


def _pick(total: int, largest: Array, limit: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return row numbers and how many rows each stands for: the largest for themselves."""
    largest = np.unique(largest)
    rest = np.setdiff1d(np.arange(total), largest, assume_unique=True)
    drawn = rest[_some(rest.size, max(limit - largest.size, 1), rng)] if rest.size else rest
    counts = np.ones(largest.size + drawn.size)
    if drawn.size:
        counts[largest.size :] = rest.size / drawn.size
    return np.concatenate([largest, drawn]), counts


def _patches(
    node: Node, array: Array, samples: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    kernel = [int(k) for k in node.inputs[1].shape[2:]]
    space, rank = array.shape[2:], len(kernel)
    strides = list(node.attrs.get("strides", [1] * rank))
    dilations = list(node.attrs.get("dilations", [1] * rank))
    pads = _pads(node, space, kernel, strides, dilations)
    padded = np.pad(array, [(0, 0), (0, 0), *pads])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    outs = [
        (size - r) // s + 1 for size, r, s in zip(padded.shape[2:], reach, strides, strict=True)
    ]
    shape = (array.shape[0], *outs)
    limit = _row_limit(array.shape[1] * int(np.prod(kernel)), samples)
    size = np.abs(array).max(axis=1)
    places = np.unravel_index(_largest(size.ravel(), limit), size.shape)
    ends = [
        np.clip((p + pad[0]) // s, 0, out - 1)
        for p, pad, s, out in zip(places[1:], pads, strides, outs, strict=True)
    ]
    largest = np.ravel_multi_index((places[0], *ends), shape)
    picked, counts = _pick(int(np.prod(shape)), largest, limit, rng)
    rows = []
    for place in zip(*np.unravel_index(picked, shape), strict=True):
        window = tuple(
            slice(o * s, o * s + r, d)
            for o, s, r, d in zip(place[1:], strides, reach, dilations, strict=True)
        )
        rows.append(padded[(place[0], slice(None), *window)].reshape(array.shape[1], -1))
    return np.stack(rows).astype(np.float32), counts


def _pads(
    node: Node,
    space: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    kind = node.attrs.get("auto_pad", "NOTSET")
    if kind in ("SAME_UPPER", "SAME_LOWER"):
        found = []
        for size, k, s, d in zip(space, kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small = total // 2
            pair = (small, total - small) if kind == "SAME_UPPER" else (total - small, small)
            found.append(pair)
        return found
    pads = list(node.attrs.get("pads", [0] * (2 * len(kernel))))
    return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
