"""Divide each row of a softmax by its largest probability, and multiply the product by it again.

What it does
    ``softmax(A) V`` becomes ``(softmax(A) / m) V * m``, with `m` the largest element of each row:
    a ReduceMax, a Div and a Mul at run time.
Why it is correct
    A factor of a row of the left operand is one of the same row of the product. `m` is at least one
    over the length of the row, so nothing is divided by zero. In float nothing changes but
    roundings.
What it is good for
    One range serves all rows of a tensor, but the largest probability of a row may be 1 or 0.01.
    With sixteen levels either the sharp rows are clipped or the flat ones are rounded to zero; what
    is divided reaches from 0 to 1 in every row, and its range needs no calibration.
Preconditions
    Shapes are inferred.

Sources: SageAttention (Zhang et al., ICLR 2025) and INT-FlashAttention (Chen et al., 2024) round
``exp(A - max)`` with a fixed step, which is the same tensor; UQ-ViT's DeMax keeps maxima apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Graph, Node, Tensor
from qpass.passes.equalize.gate import Gain, gain_numbers
from qpass.passes.equalize.linear import rows_sum_to_one
from qpass.passes.equalize.linear_error import TINY, corrected_error
from qpass.passes.equalize.measure import COARSE_SHARES, Specs
from qpass.passes.equalize.rows import ProductRows
from qpass.passes.equalize.site import Product
from qpass.passes.normalize.folding import sole_reader
from qpass.qparams import TensorSpec, choose_qparams, fake_quantize

Array = NDArray[Any]

AXES_OPSET: Final = 18  # from here on ReduceMax takes its axes as an input
RANGE: Final = (0.0, 1.0)
# Where no range of the whole tensor is good, the best one may clip nearly everything.
SHARES: Final = (*COARSE_SHARES, 0.18, 0.12, 0.08, 0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMaxima:
    """A product whose left operand is a softmax over its rows that nothing else reads.

    tensor, output
        Names of the softmax and of the product.
    """

    product: Product
    tensor: str
    output: str

    @property
    def divided(self) -> str:
        """Name of the tensor that will be rounded in place of the softmax."""
        return f"{self.tensor}_by_row"

    @property
    def undone(self) -> str:
        """Name of the product before its rows are multiplied."""
        return f"{self.output}_by_row"

    def of(self, nodes: Mapping[str, Node]) -> RowMaxima:
        """Return the same of a copy of the graph, whose nodes are given by name."""
        return replace(self, product=replace(self.product, node=nodes[self.product.node.name]))


def find_row_maxima(graph: Graph, quantized: Sequence[str], specs: Specs) -> Iterator[RowMaxima]:
    """Yield the products that it can be done at.

    Args:
        graph: is not changed; what is yielded refers to its nodes.
        quantized: names of the linear ops that read integers.
        specs: of the plan.
    """
    wanted, names = set(quantized), set(graph.tensors())
    for node in graph.nodes:
        if node.op != "MatMul" or node.name not in wanted or isinstance(node.inputs[1], Constant):
            continue
        labels = np.zeros([1] * len(node.inputs[1].shape or ()), np.int64)
        place = RowMaxima(
            product=Product(node=node, both=False, labels=labels, power=-1),
            tensor=node.inputs[0].name,
            output=node.outputs[0].name,
        )
        spec = specs.activations.get((node.name, 0))
        if (
            rows_sum_to_one(graph, node)
            and sole_reader(graph, node.inputs[0]) is node
            and spec is not None
            and spec.granularity == "per_tensor"
            and spec.fixed is None
            and not specs.obstacle((), (place.product,))
            and not {place.divided, place.undone} & names
        ):
            yield place


def judge_row_maxima(rows: ProductRows, spec: TensorSpec) -> Gain:
    """Return what it does to the error of the product on samples that chose no range.

    The best gain and offset of each column are free, as in `qpass.output_ranges`: what later passes
    can mend is no reason to buy anything.

    Args:
        rows: what was kept of at least two samples.
        spec: what becomes of the left operand.
    """
    pairs = list(zip(rows.left, rows.right, strict=True))
    fit, held = pairs[::2], pairs[1::2]
    whole = max(float(left.max()) for left, _ in pairs)

    def plain(pair: tuple[Array, Array], share: float) -> float:
        numbers = choose_qparams(spec, 0.0, share * whole)
        return _error(pair, fake_quantize(pair[0], numbers))

    def divided(pair: tuple[Array, Array]) -> float:
        top = pair[0].max(axis=-1, keepdims=True)
        rounded = fake_quantize(pair[0] / top, choose_qparams(spec, *RANGE))
        return _error(pair, rounded * top)

    share = min(SHARES, key=lambda one: sum(plain(pair, one) for pair in fit))
    before = np.array([plain(pair, share) for pair in held])
    after = np.array([divided(pair) for pair in held])
    return Gain(method="rows", **gain_numbers(before, after))


def _error(pair: tuple[Array, Array], rounded: Array) -> float:
    """Return the error of a product as a share of its power."""
    left, right = pair
    exact = left @ right
    power = max(float(np.square(exact, dtype=np.float64).sum()), TINY)
    return float(corrected_error(rounded @ right, exact).sum()) / power


def divide_rows(graph: Graph, place: RowMaxima) -> None:
    """Put the three ops around the product; its output keeps its name."""
    node = place.product.node
    softmax, product = node.inputs[0], node.outputs[0]
    rows = [*(softmax.shape or ())[:-1], 1]
    top = graph.variable(f"{place.tensor}_top", softmax.dtype, rows)
    divided = graph.variable(place.divided, softmax.dtype, softmax.shape)
    undone = graph.variable(place.undone, product.dtype, product.shape)
    inputs: list[Tensor] = [softmax]
    attrs: dict[str, Any] = {"keepdims": 1}
    if graph.opset >= AXES_OPSET:
        inputs.append(graph.constant(f"{place.tensor}_top_axes", np.array([-1], np.int64)))
    else:
        attrs["axes"] = [-1]
    largest = graph.make("ReduceMax", inputs, [top], name=f"{node.name}_top", attrs=attrs)
    divide = graph.make("Div", [softmax, top], [divided], name=f"{node.name}_by_row")
    graph.add(largest, before=node)
    graph.add(divide, before=node)
    graph.set_input(node, 0, divided)
    graph.set_output(node, 0, undone)
    multiply = graph.make("Mul", [undone, top], [product], name=f"{node.name}_rows")
    graph.add(multiply, after=node)
