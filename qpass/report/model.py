"""The report as frozen data, and its JSON form (schema 1, a stable contract).

Units are in the field names: `_db`, `_ms`, `_bytes`, `_seconds`. Keys of the contract are never
renamed; new keys may be added. Non-finite numbers become null in JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

SCHEMA: Final = 1
NOT_CHECKED: Final = "not checked"  # begins what a gate got that had nothing to judge by
Real: TypeAlias = float  # for classes with a field called `float`


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A rule that did not apply: which rule, at which node or tensor, and why."""

    rule: str
    where: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What one pass did: a count of changes, and what it refused with reasons."""

    name: str
    changed: int
    refusals: tuple[Refusal, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCounts:
    """Numbers of nodes; `added_at_runtime` are neither Q/DQ nor in the input model.

    Nodes that read nothing but constants are not among those: engines fold them at load.
    """

    float: int
    quantized: int
    added_at_runtime: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatOp:
    """A compute op that an engine runs in float, with the rule that stopped it."""

    node: str
    op: str
    rule: str
    reason: str
    planned: bool = False  # True: the plan wanted it in integers


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Median milliseconds per call of the interleaved runs, one thread."""

    float: Real
    quantized: Real


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What one engine made of the result, read back from its own optimized graph."""

    name: str
    version: str
    integer_ops: int
    planned_integer_ops: int = 0
    float_ops: tuple[FloatOp, ...] = ()
    op_counts: dict[str, int] = field(default_factory=dict)  # ops of the engine's own graph
    latency_ms: Latency | None = None
    speedup: float | None = None  # float latency / quantized latency
    sqnr_db: float | None = None
    cosine: float | None = None
    optimizer_diff_db: float | None = None  # SQNR of optimizations on against off
    optimizer_loss_db: float | None = None  # SQNR against float that optimizations cost
    outputs: tuple[tuple[str, float], ...] = ()  # (output name, SQNR in dB) of each output


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRefusal:
    """Channels of one layer that compensation left as they were, or gave less; ``0-3,7``."""

    reason: str
    count: int
    channels: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """SQNR of one layer's output against the float model, before and after compensation."""

    name: str
    op: str
    sqnr_db_before: float
    sqnr_db_after: float
    cosine: float | None = None
    precision: str = "integer"  # "integer", "weights" (integer ones, float activations), "float"
    corrected_channels: int = 0
    refused_channels: tuple[ChannelRefusal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHistogram:
    """Histogram of one calibrated tensor with the range that was chosen for it."""

    name: str
    edges: tuple[float, ...]  # len(counts) + 1
    counts: tuple[int, ...]
    low: float  # chosen range, clipped values lie outside
    high: float
    method: str  # minmax, percentile, entropy, mse, fixed, user, learned
    spec: str
    sqnr_db: float | None = None  # estimated from the histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class MapNode:
    """One node of the normalized graph, in execution order, for the integer/float map."""

    name: str
    op: str
    precision: str  # "integer", "float", "passthrough" (runs on integers without computing)
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A task metric from the user's --eval function, float beside quantized."""

    name: str
    float: Real
    quantized: Real
    drop: Real


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time and memory of the run."""

    seconds_total: float
    seconds_by_stage: dict[str, float]
    float_forward_seconds: float
    peak_rss_bytes: int
    samples: int
    peak_rss_by_stage: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A condition that the result had to meet."""

    name: str
    wanted: float | str
    got: float | str | None
    passed: bool  # what was not checked did not fail

    @property
    def checked(self) -> bool:
        """False where there was nothing to judge by."""
        return not (isinstance(self.got, str) and self.got.startswith(NOT_CHECKED))


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeCost:
    """What one method of compensation costs when the result runs.

    `places` are linear ops (cwac, bias) or blocks (qwt, nbc) that got a correction. `nodes` are
    ops that compute, without Q and DQ; `macs` are multiplications of a sample.
    `latency_ms` is the median without and with compensation in `engine`, interleaved, one thread;
    None where nothing was added or timed. `sqnr_db` is that of the outputs on the samples that
    judged the method, before and after it.
    """

    method: str
    nodes: int
    parameters: int
    macs: int
    places: int = 0
    engine: str = ""
    latency_ms: tuple[float, float] | None = None
    latency_ratio: float | None = None
    sqnr_db: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPoint:
    """One plan of the search for bits: its weights, and its accuracy as predicted and measured.

    `predicted_db` is 10 log10 of the output's power over the sum of the layers' errors; `measured`
    is in the unit of the budget, None where the plan was not built. `layers_ms` is the sum of its
    layers, each timed alone, where that is the cost, and `model_ms` the whole model as it was timed
    beside the others that met the budget. Weights count either way.
    """

    weight_bytes: int
    share_of_float: float
    predicted_db: float
    measured: float | None = None
    chosen: bool = False
    layers_ms: float | None = None
    model_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedChoice:
    """What one layer got, and what each of its levels costs at the outputs of the model, in dB.

    `level_ms` is the time of the layer alone at each level, float among them; () where the cost is
    size.
    """

    name: str
    bits: str
    error_db: tuple[tuple[str, float], ...]
    level_ms: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedReport:
    """The search for the cheapest plan that meets a budget of accuracy."""

    budget: str
    wanted: float
    met: bool
    # No other plan is cheaper and better; cheapest first. Where time is the cost, the plan without
    # float layers is among them in any case.
    points: tuple[MixedPoint, ...]
    layers: tuple[MixedChoice, ...]
    plan: str = ""  # file of the chosen plan
    cost: Literal["size", "latency"] = "size"  # bytes of weights, or `layers_ms`


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSizes:
    """Bytes on disk, external data included."""

    float_bytes: int
    quantized_bytes: int

    @property
    def ratio(self) -> float:
        """Quantized over float."""
        return self.quantized_bytes / max(self.float_bytes, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one run of `optimize` found out."""

    model: str
    output: str
    target: str
    precision: str
    passes: tuple[PassReport, ...]
    nodes: NodeCounts
    engines: tuple[EngineReport, ...]
    layers: tuple[LayerReport, ...]
    cost: Cost
    gates: tuple[Gate, ...]
    sizes: FileSizes
    metric: Metric | None = None
    histograms: tuple[TensorHistogram, ...] = ()
    graph_map: tuple[MapNode, ...] = ()
    rounds: tuple[str, ...] = ()  # what verify-and-repair did, one sentence a round
    notes: tuple[str, ...] = ()  # things the user must know: random data, what was not verified
    runtime_costs: tuple[RuntimeCost, ...] = ()  # of each compensation that was kept
    mixed: MixedReport | None = None
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when every gate passed."""
        return all(gate.passed for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: plain dicts, lists, numbers and text."""
        data = dataclasses.asdict(self)
        if self.metric is None:
            del data["metric"]
        if self.mixed is None:
            del data["mixed"]
        clean: dict[str, Any] = _finite({"schema": SCHEMA, **data, "ok": self.ok})
        return clean

    def to_json(self) -> str:
        """Return the JSON text, stable in key order."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
