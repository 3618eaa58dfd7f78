"""Judge sets of migrations by the outputs of the whole quantized model.

Every tensor belongs to one site at most, and a site does not change what other tensors hold. So two
calibrations serve all sets: each tensor has the statistics of the untouched graph or those of the
graph with everything migrated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from qpass.calibrate import Samples, TapRequest, TensorStats, collect
from qpass.choose import choose_qtable
from qpass.graph import Graph
from qpass.passes.model_gate import total_sqnr_db
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.program import Policy
from qpass.quantize import build_quantized
from qpass.saturation import saturates
from qpass.submodel import Feeds
from qpass.targets.schema import Target
from qpass.verify.engines import KEEP_SIGNED, session_options

# The range methods that a set is judged with; the pipeline lets them compete as well.
METHODS: Final = ("minmax", "percentile", "auto")
QUICK: Final = "minmax"  # clips nothing: what is compared are the scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How the model is going to be quantized, and with which samples."""

    target: Target
    policy: Policy
    taps: Callable[[Graph, Plan], list[TapRequest]]
    samples: Samples  # to calibrate with and to take rows from
    held: Sequence[Feeds]  # other ones, to judge by
    method: str = "auto"  # of the ranges
    round_method: str = "rtn"
    batch_size: int = 4
    memory_bytes: int = 1 << 30
    threads: int = 0
    seed: int = 0

    def plan(self, graph: Graph) -> Plan:
        """Plan a graph."""
        return make_plan(graph, self.target, self.policy)

    def calibrate(self, graph: Graph, plan: Plan) -> dict[str, TensorStats]:
        """Gather the statistics of everything that `plan` asks for."""
        taps = self.taps(graph, plan)
        return collect(
            graph.to_model(inline=True),
            taps,
            self.samples,
            batch_size=self.batch_size,
            memory_bytes=self.memory_bytes,
            threads=self.threads,
        ).stats

    def run(self, graph: Graph, *, exact: bool = False) -> list[dict[str, Any]]:
        """Return the outputs of a graph on the held samples."""
        session = ort.InferenceSession(
            graph.to_model(inline=True).SerializeToString(),
            session_options(
                threads=self.threads, optimize=exact or not saturates(), config=KEEP_SIGNED
            ),
            providers=["CPUExecutionProvider"],
        )
        names = [value.name for value in session.get_outputs()]
        return [
            dict(zip(names, session.run(names, dict(feeds)), strict=True)) for feeds in self.held
        ]


@dataclass(slots=True, kw_only=True)
class Trials:
    """Outputs of the quantized model with sets of migrations.

    build
        Makes the float graph that has a set, and the names of the tensors that the set scales.
    """

    job: Job
    build: Callable[[frozenset[int]], tuple[Graph, frozenset[str]]]
    everything: frozenset[int]
    wanted: list[dict[str, Any]] = field(default_factory=list)  # outputs of the float model
    before: Mapping[str, TensorStats] = field(default_factory=dict)
    after: Mapping[str, TensorStats] = field(default_factory=dict)

    def prepare(self) -> None:
        """Calibrate without any and with all migrations, and run the float model."""
        plain, _ = self.build(frozenset())
        self.wanted = self.job.run(plain, exact=True)
        self.before = self.job.calibrate(plain, self.job.plan(plain))
        whole, _ = self.build(self.everything)
        self.after = self.job.calibrate(whole, self.job.plan(whole))

    def outputs(self, chosen: frozenset[int], method: str = QUICK) -> list[dict[str, Any]]:
        """Return the outputs of the quantized model with the migrations `chosen`."""
        graph, scaled = self.build(chosen)
        plan = self.job.plan(graph)
        stats = {
            name: self.after[name] if name in scaled or name not in self.before else old
            for name, old in {**self.after, **self.before}.items()
        }
        table = choose_qtable(graph, plan, stats, method=method, round_method=self.job.round_method)
        quantized, _ = build_quantized(graph, plan, table, self.job.target, self.job.policy)
        return self.job.run(quantized)

    def best_outputs(self, chosen: frozenset[int]) -> list[dict[str, Any]]:
        """Return the outputs with the range method that suits them best."""
        methods = METHODS if self.job.method == "auto" else (self.job.method,)
        found = [self.outputs(chosen, method) for method in methods]
        return max(found, key=lambda outputs: total_sqnr_db(self.wanted, outputs))

    def is_exact(self, graph: Graph) -> bool:
        """True when the float graph computes what it did, but for rounding."""
        return all(
            np.isfinite(got[name]).all() and _close(array, got[name])
            for one, got in zip(self.wanted, self.job.run(graph, exact=True), strict=True)
            for name, array in one.items()
        )


# Some hundred float32 roundings in a row differ by about 1e-5 of the largest output.
EXACT: Final = 1e-4


def _close(wanted: Any, got: Any) -> bool:
    left, right = np.asarray(wanted), np.asarray(got)
    if left.dtype.kind != "f":
        return bool((left == right).mean() > 1 - EXACT) if left.size else True
    size = float(np.abs(left).max(initial=0.0))
    return float(np.abs(left - right).max(initial=0.0)) <= EXACT * max(size, 1e-30)
