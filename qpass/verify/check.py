"""Run a quantized file in its engines and say what really happened.

Each engine loads the file as a user would, its own optimized graph is read back, every op that the
plan wanted in integers is traced to the op that computes it, the outputs are compared with the
float file on held-out samples, and both files are timed in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
from numpy.typing import NDArray

from qpass.plan import Plan
from qpass.report.model import EngineReport, FloatOp, Latency
from qpass.verify.census import read_back
from qpass.verify.diagnose import Diagnosis
from qpass.verify.engines import EngineError, EngineName, open_engine
from qpass.verify.latency import measure_interleaved
from qpass.verify.metrics import ErrorMeter
from qpass.verify.trace import trace

Array = NDArray[Any]
Feeds = Mapping[str, Array]

OPTIMIZER_SAMPLES: Final = 4  # unoptimized graphs are slow: this many samples compare on with off
# Float ops that no engine here runs in integers to any gain are not worth a line in the report.
QUIET_OPS: Final = frozenset({
    "Cast", "Concat", "ConstantOfShape", "Equal", "Expand", "Flatten", "Gather", "GatherElements",
    "GatherND", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Not", "Range",
    "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    "Where", "And", "Or", "Constant",
})  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Reference:
    """Outputs of the float file on the held-out samples, computed once for all engines."""

    feeds: list[Feeds]
    names: tuple[str, ...]
    outputs: list[list[Array]] = field(default_factory=list)

    @classmethod
    def run(
        cls,
        model: Path,
        feeds: Iterable[Feeds],
        *,
        threads: int = 0,
        session_config: Mapping[str, str] | None = None,
    ) -> Reference:
        """Run the float file on every sample in onnxruntime.

        `session_config` is for a file that stands in for it, and may need some.
        """
        engine = open_engine("ort", model, threads=threads, session_config=session_config)
        kept = list(feeds)
        outputs = [engine.run(dict(sample)) for sample in kept]
        return cls(feeds=kept, names=engine.output_names, outputs=outputs)


def check_engine(
    engine: EngineName,
    *,
    float_model: Path,
    quantized: Path,
    plan: Plan | None,
    reference: Reference,
    workdir: Path,
    seconds: float,
    session_config: Mapping[str, str] | None = None,
) -> EngineReport:
    """Check one engine.

    Args:
        engine: ``ort`` or ``openvino``.
        float_model: the file that the user gave.
        quantized: the file to be judged.
        plan: what was wanted; None for a file of unknown origin.
        reference: outputs of the float file.
        workdir: a folder for the engine's optimized graph.
        seconds: budget for the timing.
        session_config: configuration of the engine for the quantized file.

    Raises:
        EngineError: the engine refuses to load or run one of the files.
    """
    runner = open_engine(engine, quantized, session_config=session_config)
    meters = [ErrorMeter() for _ in runner.output_names]
    for feeds, wanted in zip(reference.feeds, reference.outputs, strict=True):
        for meter, expected, got in zip(meters, wanted, runner.run(dict(feeds)), strict=True):
            meter.update(expected, got)
    diff, loss = _optimizer_effect(engine, quantized, runner, reference, session_config)
    census = read_back(engine, quantized, workdir, session_config=session_config)
    model = onnx.load(quantized, load_external_data=False)
    found = trace(model, census)
    counted = census.integer_compute + census.weight_only_compute
    latency, speedup = None, None
    if reference.feeds and seconds > 0:
        baseline = open_engine(engine, float_model)
        timing = measure_interleaved([baseline, runner], dict(reference.feeds[0]), seconds=seconds)
        latency = Latency(float=timing[0].median_ms, quantized=timing[1].median_ms)
        speedup = timing[1].speedup
    return EngineReport(
        name=engine,
        version=runner.version,
        integer_ops=len(counted),
        planned_integer_ops=_planned(plan, found),
        float_ops=_float_ops(engine, plan, found, Diagnosis(model, session_config)),
        op_counts=census.counts(),
        latency_ms=latency,
        speedup=speedup,
        sqnr_db=_worst(meter.sqnr_db for meter in meters) if reference.feeds else None,
        cosine=_worst(meter.cosine for meter in meters) if reference.feeds else None,
        optimizer_diff_db=diff,
        optimizer_loss_db=loss,
        outputs=tuple(
            (name, meter.sqnr_db)
            for name, meter in zip(runner.output_names, meters, strict=True)
            if reference.feeds
        ),
    )


def leftovers(report: EngineReport) -> Sequence[FloatOp]:
    """Return the ops that the plan wanted in integers and the engine kept in float."""
    return [op for op in report.float_ops if op.planned]


def _worst(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def _optimizer_effect(
    engine: EngineName,
    quantized: Path,
    runner: Any,
    reference: Reference,
    session_config: Mapping[str, str] | None,
) -> tuple[float | None, float | None]:
    """Compare the engine with onnxruntime without optimizations, on a few samples.

    Returns:
        (SQNR of the one against the other, SQNR against float that the engine loses), in dB. The
        first is finite through rounding alone; the second shows a fusion that miscomputes.
    """
    if not reference.feeds:
        return None, None
    config = session_config if engine == "ort" else None
    try:
        plain = open_engine("ort", quantized, optimize=False, session_config=config, threads=0)
    except EngineError:  # of a file that only the other engine takes
        if engine == "ort":
            raise
        return None, None
    names = runner.output_names
    apart, off, on = ([ErrorMeter() for _ in names] for _ in range(3))
    few = list(zip(reference.feeds, reference.outputs, strict=True))[:OPTIMIZER_SAMPLES]
    for feeds, wanted in few:
        unoptimized, optimized = plain.run(dict(feeds)), runner.run(dict(feeds))
        for i, expected in enumerate(wanted):
            apart[i].update(unoptimized[i], optimized[i])
            off[i].update(expected, unoptimized[i])
            on[i].update(expected, optimized[i])
    loss = max((a.sqnr_db - b.sqnr_db for a, b in zip(off, on, strict=True)), default=None)
    return _worst(meter.sqnr_db for meter in apart), loss


def _planned(plan: Plan | None, found: Mapping[str, Any]) -> int:
    if plan is None:
        return 0
    wanted = plan.engine_nodes()
    # A kernel may take integers that the plan does not count on, such as 4-bit weights.
    more = {node.name for node in plan.nodes if node.precision in ("integer", "stored")}
    return sum(
        name in wanted or (name in more and op is not None and op.precision == "integer")
        for name, op in found.items()
    )


def _float_ops(
    engine: str, plan: Plan | None, found: Mapping[str, Any], diagnosis: Diagnosis
) -> tuple[FloatOp, ...]:
    """Name each compute op in float, with the rule that stopped it."""
    rows = []
    wanted = plan.engine_nodes() if plan is not None else {}
    decided = {} if plan is None else {node.name: node for node in plan.nodes}
    for name, op in found.items():
        node = diagnosis.nodes.get(name)
        if node is None or (op is not None and op.precision == "integer"):
            continue
        if op is None and plan is not None and name not in wanted:
            continue
        own = decided.get(name)
        if plan is None or name in wanted or (own is not None and own.precision == "integer"):
            rule, reason = diagnosis.explain(engine, name)
        elif own is not None:
            rule, reason = own.rule or "plan", own.because
        else:
            continue
        rows.append(
            FloatOp(node=name, op=node.op_type, rule=rule, reason=reason, planned=name in wanted)
        )
    listed = {row.node for row in rows} | set(found)
    rows += [
        FloatOp(node=node.name, op=node.op, rule=node.rule or "plan", reason=node.because)
        for node in decided.values()
        if node.precision in ("float", "stored")
        and node.op not in QUIET_OPS
        and node.name not in listed
    ]
    return tuple(rows)
