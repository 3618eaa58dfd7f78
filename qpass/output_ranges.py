"""Ranges of activations with few levels, by the error behind the ops that read them.

What it does
    With sixteen levels the range with the smallest squared error of a tensor is not the one with
    the smallest error behind it. A softmax of one large and many small probabilities is served
    best, as a tensor, by a range that holds the large ones and rounds all others to zero; its
    product with the values is served better by a smaller range. So each candidate range is applied
    to rows of the float network's tensor, and the products with the weights, or with the other
    operand, are compared with those of the exact rows.
    Gain and offset by output channel are free there: compensation and rounding find them later, and
    what they can mend is no reason for another range. Rows count by `row_weights`, so that a few
    massive tokens do not decide for all.
What it does not do
    Errors of different tensors do not know of each other. `qpass.trial` lets these ranges compete
    with the others in the whole model.
Preconditions
    The plan belongs to the graph, whose shapes are inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate import TensorStats
from qpass.calibrate.ranges import RangeChoice, rated_range
from qpass.choose import WIDE_BITS
from qpass.graph import Constant, Graph, Node
from qpass.passes.equalize.linear import rows_sum_to_one
from qpass.passes.equalize.linear_error import (
    TINY,
    apply_linear,
    corrected_error,
    row_weights,
    some_outputs,
)
from qpass.passes.equalize.measure import Specs
from qpass.passes.equalize.rows import Feeds, SiteRows, Wanted, collect_rows
from qpass.passes.equalize.site import Product
from qpass.passes.equalize.sites import direct_readers
from qpass.plan import Decision, Plan
from qpass.qparams import TensorSpec, choose_qparams, fake_quantize

Array = NDArray[Any]
Error = Callable[[TensorSpec, float, float], float]

METHOD: Final = "output"
ELEMENTS: Final = 1 << 19  # of each weight that are looked at
# Shares of the full range: what massive tokens leave to others may be a hundredth of it.
SHARES: Final = tuple(float(share) for share in np.geomspace(1 / 128, 1.0, 29))
ROUNDS: Final = 2  # of moving one end with the other fixed
# Factors around the best share, up to the next ones.
FINER: Final = tuple(float(SHARES[-2] ** (step / 4)) for step in range(-3, 4))


def solve_output_ranges(
    graph: Graph,
    plan: Plan,
    stats: Mapping[str, TensorStats],
    samples: Sequence[Feeds],
    *,
    threads: int = 0,
    seed: int = 0,
) -> dict[tuple[str, TensorSpec], RangeChoice]:
    """Return ranges by tensor and spec; what is not in it is left to the other methods.

    Args:
        graph: the float graph that was calibrated.
        plan: of that graph.
        stats: of its activations; their extremes are the full range.
        samples: calibration samples; rows of each are kept.
        threads: of the engine; 0: all.
        seed: of the choice of rows.

    Raises:
        SampleError: a tensor is not finite.
    """
    specs = Specs.of(plan, graph.nodes)
    places = [
        place
        for place in _places(graph, plan)
        if place.decision.tensor in stats
        and not specs.obstacle(place.wanted.readers, place.wanted.products)
    ]
    if not places:
        return {}
    rows = collect_rows(
        graph, [place.wanted for place in places], samples, len(samples), threads=threads, seed=seed
    )
    found = {}
    for place, kept in zip(places, rows, strict=True):
        decision = place.decision
        known, errors = stats[decision.tensor], list(_errors(graph, place, kept, specs))
        low, high = min(known.low, 0.0), max(known.high, 0.0)
        if low == high:
            continue
        ends = _Search(spec=decision.spec, low=low, high=high, errors=errors).best()
        found[decision.tensor, decision.spec] = rated_range(known, decision.spec, METHOD, ends)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A decision to solve, and the ops that read what it rounds."""

    decision: Decision
    wanted: Wanted


def _places(graph: Graph, plan: Plan) -> Iterator[_Place]:
    tensors, integer = graph.tensors(), set(plan.integer_nodes())
    own = {(e.node, e.index) for d in plan.activations() for e in d.edges or ()}
    for decision in plan.activations():
        spec = decision.spec
        free = decision.pinned is None and spec.fixed is None and decision.group is None
        if not free or spec.bits >= WIDE_BITS or spec.granularity != "per_tensor":
            continue
        tensor = tensors[decision.tensor]
        reads = (
            {(node.name, index) for node, index in graph.consumers(tensor)} - own
            if decision.edges is None
            else {(edge.node, edge.index) for edge in decision.edges}
        )
        names = {name for name, _ in reads if name in integer}
        readers = direct_readers(graph, tensor, names)
        products = tuple(
            _product(node)
            for node, _ in graph.consumers(tensor)
            if node.name in names and _is_product(node)
        )
        if readers or products:
            groups = max((reader.labels.size for reader in readers), default=0)
            yield _Place(
                decision=decision,
                wanted=Wanted(groups=groups, readers=readers, products=products),
            )


def _is_product(node: Node) -> bool:
    left, right = node.inputs[:2]
    activations = not any(isinstance(tensor, Constant) for tensor in (left, right))
    ranks = [None if t.shape is None else len(t.shape) for t in (left, right)]
    return node.op == "MatMul" and activations and left is not right and ranks[0] == ranks[1]


def _product(node: Node) -> Product:
    labels = np.zeros([1] * len(node.inputs[1].shape), np.int64)
    return Product(node=node, both=False, labels=labels, power=-1)


def _errors(graph: Graph, place: _Place, rows: SiteRows, specs: Specs) -> Iterator[Error]:
    for reader in place.wanted.readers:
        node = reader.linear.node
        yield _LinearError.of(node, rows, specs)
    for product in place.wanted.products:
        node = product.node
        kept = rows.products[node.name]
        yield _ProductError(
            left=kept.left,
            right=kept.right,
            index=0 if node.inputs[0].name == place.decision.tensor else 1,
            corrected=rows_sum_to_one(graph, node),
        )


@dataclass(slots=True, kw_only=True)
class _LinearError:
    """Error of an op with constant weights, as a share of what its rows count."""

    node: Node
    inputs: Array  # float32 [rows, channels, taps]
    weight: Array
    outputs: Array  # float32 [rows, channels]
    counts: Array  # float64 [rows]

    @classmethod
    def of(cls, node: Node, rows: SiteRows, specs: Specs) -> _LinearError:
        """Take the rows of `node`."""
        kept = rows.linear[node.name]
        inputs = np.concatenate(kept.inputs)
        weight = some_outputs(node, specs.weights[node.name], ELEMENTS)
        outputs = apply_linear(node, inputs, weight)
        power = np.square(outputs, dtype=np.float64).sum(axis=1)
        counts = np.concatenate(kept.counts)
        return cls(
            node=node,
            inputs=inputs,
            weight=weight,
            outputs=outputs,
            counts=counts * row_weights(power, counts),
        )

    def __call__(self, spec: TensorSpec, low: float, high: float) -> float:
        """Return the error with a range."""
        rounded = fake_quantize(self.inputs, choose_qparams(spec, low, high))
        got = apply_linear(self.node, rounded, self.weight)
        return float(corrected_error(got, self.outputs, self.counts))


@dataclass(slots=True, kw_only=True)
class _ProductError:
    """Error of a product of activations, one operand of which is rounded."""

    left: Sequence[Array]  # by sample, float32 [.., rows, inner]
    right: Sequence[Array]  # by sample, float32 [.., inner, columns]
    index: int
    corrected: bool  # gain and offset of its columns find constants
    power: float = field(init=False)

    def __post_init__(self) -> None:
        """Take the power of the exact product."""
        squares = [np.square(a @ b, dtype=np.float64).sum() for a, b in self._pairs()]
        self.power = max(float(np.sum(squares)), TINY)

    def _pairs(self) -> Iterator[tuple[Array, Array]]:
        return zip(self.left, self.right, strict=True)

    def __call__(self, spec: TensorSpec, low: float, high: float) -> float:
        """Return the error with a range."""
        numbers = choose_qparams(spec, low, high)
        got, wanted, total = [], [], 0.0
        for left, right in self._pairs():
            pair = [left, right]
            pair[self.index] = fake_quantize(pair[self.index], numbers)
            found, exact = pair[0] @ pair[1], left @ right
            if self.corrected:
                got.append(found)
                wanted.append(exact)
            else:  # columns of scores are tokens: samples may have different numbers of them
                total += float(np.square(found - exact, dtype=np.float64).sum())
        # One gain and offset for all samples, but where they come in batches of unlike sizes.
        if len({array.shape[:-2] for array in got}) == 1:
            got, wanted = ([np.concatenate(parts, axis=-2)] for parts in (got, wanted))
        total += sum(float(corrected_error(*pair).sum()) for pair in zip(got, wanted, strict=True))
        return total / self.power


@dataclass(slots=True, kw_only=True)
class _Search:
    """Finds the range of the smallest sum of errors, ends as shares of the full range."""

    spec: TensorSpec
    low: float
    high: float
    errors: Sequence[Error]
    known: dict[tuple[float, float], float] = field(default_factory=dict)

    def best(self) -> tuple[float, float]:
        """Move both ends together, then one at a time where they may differ."""
        together = [(share, share) for share in SHARES]
        below, above = self._least(together)
        below, above = self._least([(f * below, f * above) for f in FINER])
        if not (self.spec.symmetric or self.low == 0.0 or self.high == 0.0):
            for _ in range(ROUNDS):
                below, above = self._least([(one, above) for one in (below, *SHARES[::2])])
                below, above = self._least([(below, one) for one in (above, *SHARES[::2])])
            below, above = self._least([(f * below, above) for f in FINER])
            below, above = self._least([(below, f * above) for f in FINER])
        return self.low * below, self.high * above

    def _least(self, pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        pairs = [pair for pair in pairs if max(pair) <= 1.0]
        for pair in pairs:
            if pair not in self.known:
                low, high = self.low * pair[0], self.high * pair[1]
                self.known[pair] = sum(error(self.spec, low, high) for error in self.errors)
        return min(reversed(pairs), key=lambda pair: self.known[pair])  # the widest of equals
