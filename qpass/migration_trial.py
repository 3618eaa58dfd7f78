"""Judge sets of migrations by the outputs of the whole quantized model.

Every tensor belongs to one site at most, and a site does not change what other tensors hold. So two
sets of statistics serve all sets of migrations: each tensor has those of the untouched graph or
those of the graph with everything migrated. Only what a migration changes is calibrated again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final

import numpy as np

from qpass.calibrate import Samples, TapRequest, TensorStats, collect
from qpass.calibrate.ranges import RangeChoice
from qpass.choose import WIDE_BITS, RangeCache, choose_qtable
from qpass.graph import Graph
from qpass.options import WeightRange
from qpass.output_ranges import METHOD as OUTPUT
from qpass.output_ranges import solve_output_ranges
from qpass.passes.model_gate import CONFIDENCE, GATED_CONFIDENCE, total_sqnr_db
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.program import Policy
from qpass.qparams import TensorSpec
from qpass.quantize import build_quantized
from qpass.same_function import EXACT_SAMPLES, outputs_of, same_outputs
from qpass.submodel import Feeds
from qpass.targets.schema import Target

# The range methods that a set is judged with; the pipeline lets them compete as well.
METHODS: Final = ("minmax", "percentile", "auto")
RANGE_SAMPLES: Final = 16  # that ranges by outputs look at
# A Mul reads and writes the tensor once more. It is worth that when the linear op behind it gains
# one bit (6 dB), and the model as a whole 1 dB. With few levels half a bit is worth it, and as many
# tensors share the error, none of them is worth 1 dB by itself.
SITE_DB: Final = 6.0
MODEL_DB: Final = 1.0
MOST: Final = 8  # purchases that are tried in the whole model
FEW_SITE_DB: Final = 3.0
FEW_MODEL_DB: Final = 0.2
FEW_MOST: Final = 16

Stats = Mapping[str, TensorStats]
OutputRanges = dict[tuple[str, TensorSpec], RangeChoice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How the model is going to be quantized, and with which samples."""

    target: Target
    policy: Policy
    taps: Callable[[Graph, Plan], list[TapRequest]]
    samples: Samples  # to calibrate with
    held: Sequence[Feeds]  # to judge by
    rows: int = 32  # samples that rows are taken of, the first ones; `held` are others
    stats: Stats = field(default_factory=dict)  # of the graph as it is, over all samples
    method: str = "auto"  # of the ranges
    round_method: str = "rtn"
    weight_method: WeightRange = "auto"
    batch_size: int = 4
    memory_bytes: int = 1 << 30
    threads: int = 0
    seed: int = 0

    def plan(self, graph: Graph) -> Plan:
        """Plan a graph."""
        return make_plan(graph, self.target, self.policy)

    def wide_plan(self, graph: Graph) -> Plan:
        """Plan a graph as it is judged: see `judged`."""
        return make_plan(graph, self.target, self.judged)

    @property
    def few_levels(self) -> bool:
        """True below 7 bits for activations."""
        bits = self.policy.precision.activation
        return bits is not None and bits < WIDE_BITS

    @property
    def divides_rows(self) -> bool:
        """True where rows of a softmax may be divided by their largest probability.

        With more levels one range serves all rows. A target that wants integers everywhere would
        round the largest probabilities, too.
        """
        return self.few_levels and self.target.scheme != "full"

    @property
    def site_db(self) -> float:
        """What an op that is bought has to gain at the linear op behind it."""
        return FEW_SITE_DB if self.few_levels else SITE_DB

    @property
    def model_db(self) -> float:
        """What the whole model has to gain by it."""
        return FEW_MODEL_DB if self.few_levels else MODEL_DB

    @property
    def most_bought(self) -> int:
        """How many purchases are tried in the whole model."""
        return FEW_MOST if self.few_levels else MOST

    @property
    def judged(self) -> Policy:
        """The policy of the models that are compared: with weights of 8 bits where they have fewer.

        Weights of few bits to nearest, as they are before they are rounded by their outputs, drown
        what the activations gain: the verdict would be chance. What a migration does to weights of
        few bits, each site has measured by itself.
        """
        return self.policy.with_wide_weights()

    @property
    def confidence(self) -> float:
        """Standard errors that a purchase has to gain, see `model_gate`.

        With few levels the errors of a model are large and their estimates coarse, and each site
        has passed a gate of its own.
        """
        return GATED_CONFIDENCE if self.few_levels else CONFIDENCE

    def calibrate(self, graph: Graph, taps: Sequence[TapRequest]) -> dict[str, TensorStats]:
        """Gather the statistics that `taps` ask for."""
        if not taps:
            return {}
        return collect(
            graph.to_model(inline=True),
            taps,
            self.samples,
            batch_size=self.batch_size,
            memory_bytes=self.memory_bytes,
            threads=self.threads,
        ).stats

    def run(self, graph: Graph, held: Sequence[Feeds] | None = None) -> list[dict[str, Any]]:
        """Return the outputs of a graph on the held samples."""
        samples = self.held if held is None else held
        return outputs_of(graph, samples, self.target, threads=self.threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A float graph with a set of migrations, its plan, and the tensors that the set scales."""

    graph: Graph
    policy: Policy
    plan: Plan
    scaled: frozenset[str]


@dataclass(slots=True, kw_only=True)
class Trials:
    """Outputs of the quantized model with sets of migrations.

    make
        Makes the float graph that has a set, and the names of the tensors that the set scales.
    pinned
        Ranges of tensors that only some sets have.
    """

    job: Job
    make: Callable[[frozenset[int]], tuple[Graph, frozenset[str]]]
    everything: frozenset[int]
    pinned: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    wanted: list[dict[str, Any]] = field(default_factory=list)  # outputs of the float model
    before: dict[str, TensorStats] = field(default_factory=dict)
    after: dict[str, TensorStats] = field(default_factory=dict)
    _ranges_before: OutputRanges = field(default_factory=dict)  # by outputs, with few levels
    _ranges_after: OutputRanges = field(default_factory=dict)
    _taps: dict[str, TapRequest] = field(default_factory=dict)  # of the untouched graph
    _after_taps: dict[str, TapRequest] = field(default_factory=dict)
    _built: dict[frozenset[int], Built] = field(default_factory=dict)
    _outputs: dict[tuple[frozenset[int], str], list[dict[str, Any]]] = field(default_factory=dict)
    _best: dict[frozenset[int], str] = field(default_factory=dict)
    _ranges: RangeCache = field(default_factory=RangeCache)

    def prepare(self) -> None:
        """Calibrate what is not known without and with all migrations; run the float model."""
        plain, whole = self.build(frozenset()), self.build(self.everything)
        self.wanted = self.job.run(plain.graph)
        self._taps = _by_name(self.job.taps(plain.graph, plain.plan))
        missing = [tap for name, tap in self._taps.items() if name not in self.job.stats]
        self.before = {**self.job.stats, **self.job.calibrate(plain.graph, missing)}
        self._after_taps = _by_name(
            tap
            for tap in self.job.taps(whole.graph, whole.plan)
            if tap.tensor in whole.scaled or not _same(tap, self._taps.get(tap.tensor))
        )
        self.after = self.job.calibrate(whole.graph, list(self._after_taps.values()))
        if self.job.few_levels:
            self._ranges_before = self._output_ranges(plain, self.before)
            self._ranges_after = self._output_ranges(whole, {**self.before, **self.after})

    def _output_ranges(self, built: Built, stats: Stats) -> OutputRanges:
        job = self.job
        some = list(islice(iter(job.samples), RANGE_SAMPLES))
        return solve_output_ranges(
            built.graph, built.plan, stats, some, threads=job.threads, seed=job.seed
        )

    @property
    def _methods(self) -> tuple[str, ...]:
        if self.job.method != "auto":
            return (self.job.method,)
        return (*METHODS, OUTPUT) if self.job.few_levels else METHODS

    def build(self, chosen: frozenset[int]) -> Built:
        """Return the float graph with the migrations `chosen`."""
        if chosen not in self._built:
            graph, scaled = self.make(chosen)
            there = set(graph.tensors()) & set(self.pinned)
            ranges = {**self.job.judged.ranges, **{name: self.pinned[name] for name in there}}
            policy = replace(self.job.judged, ranges=ranges)
            plan = make_plan(graph, self.job.target, policy)
            self._built[chosen] = Built(graph=graph, policy=policy, plan=plan, scaled=scaled)
        return self._built[chosen]

    def forget(self, chosen: frozenset[int]) -> None:
        """Drop what is kept of a set that will not be asked for again."""
        if chosen:
            self._built.pop(chosen, None)
            for key in [key for key in self._outputs if key[0] == chosen]:
                del self._outputs[key]

    def outputs(self, chosen: frozenset[int], method: str) -> list[dict[str, Any]]:
        """Return the outputs of the quantized model with the migrations `chosen`."""
        key = (chosen, method)
        if key not in self._outputs:
            built = self.build(chosen)
            stats = {**self.after, **self.before}
            changed = self.after if chosen == self.everything else built.scaled & set(self.after)
            stats.update({name: self.after[name] for name in changed})
            given = {**self._ranges_after, **self._ranges_before}
            given.update({k: r for k, r in self._ranges_after.items() if k[0] in changed})
            table = choose_qtable(
                built.graph,
                built.plan,
                stats,
                method="auto" if method == OUTPUT else method,
                given=given if method == OUTPUT else None,
                round_method=self.job.round_method,
                weight_method=self.job.weight_method,
                cache=self._ranges,
            )
            quantized, _ = build_quantized(
                built.graph, built.plan, table, self.job.target, built.policy
            )
            self._outputs[key] = self.job.run(quantized)
        return self._outputs[key]

    def best_method(self, chosen: frozenset[int]) -> str:
        """Return the range method that suits the migrations `chosen` best."""
        if chosen not in self._best:
            methods = self._methods
            best = methods[0]
            score = total_sqnr_db(self.wanted, self.outputs(chosen, best))
            for method in methods[1:]:
                found, loser = total_sqnr_db(self.wanted, self.outputs(chosen, method)), method
                if found > score:
                    loser, best, score = best, method, found
                self._outputs.pop((chosen, loser), None)  # outputs may be large
            self._best[chosen] = best
        return self._best[chosen]

    def best_outputs(self, chosen: frozenset[int]) -> list[dict[str, Any]]:
        """Return the outputs with that method."""
        return self.outputs(chosen, self.best_method(chosen))

    def stats_of(self, chosen: frozenset[int]) -> dict[str, TensorStats]:
        """Return the statistics of the graph with `chosen`; what is not known is calibrated."""
        built = self.build(chosen)
        found: dict[str, TensorStats] = {}
        missing = []
        for tap in self.job.taps(built.graph, built.plan):
            name, scaled = tap.tensor, tap.tensor in built.scaled
            if not scaled and _same(tap, self._taps.get(name)):
                found[name] = self.before[name]
            elif name in self.after and _same(tap, self._after_taps.get(name)):
                found[name] = self.after[name]
            else:
                missing.append(tap)
        return {**found, **self.job.calibrate(built.graph, missing)}

    def is_exact(self, graph: Graph) -> bool:
        """True when the float graph computes what it did, but for rounding."""
        return same_outputs(self.wanted, self.job.run(graph, self.job.held[:EXACT_SAMPLES]))


def _by_name(taps: Any) -> dict[str, TapRequest]:
    return {tap.tensor: tap for tap in taps}


def _same(tap: TapRequest, other: TapRequest | None) -> bool:
    """True when two requests for one tensor ask for the same statistics."""
    if other is None or (tap.axis, tap.mask_below) != (other.axis, other.mask_below):
        return False
    if tap.importance is None or other.importance is None:
        return tap.importance is other.importance
    return np.array_equal(tap.importance, other.importance)
