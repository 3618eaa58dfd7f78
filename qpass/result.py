"""The end of a run: gates, the task metric, and the report."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime

from qpass.calibrate import estimated_sqnr_db, histogram_view
from qpass.callables import score_file
from qpass.compare import compare_layers
from qpass.errors import InternalError, UserError
from qpass.graph import Constant
from qpass.modelfile import model_bytes
from qpass.report.model import (
    NOT_CHECKED,
    Cost,
    EngineReport,
    FileSizes,
    Gate,
    LayerReport,
    MapNode,
    Metric,
    NodeCounts,
    Report,
    TensorHistogram,
)
from qpass.run import Run
from qpass.saturation import saturates
from qpass.verify import peak_rss_bytes
from qpass.version import __version__

WORST_HISTOGRAMS: Final = 12
# Optimizations round differently, which in a deep network is as much as the quantization error;
# a fusion that miscomputes costs more than this against the float model.
OPTIMIZER_LOSS_DB: Final = 3.0
# Above this both are so good that the difference between them means nothing. As well if they are
# this close to each other: activations rounded to 8 bits, as MatMulNBits was told to, do that.
OPTIMIZER_ENOUGH_DB: Final = 40.0
# Nodes with integer weights compute in float: the map shows where integers are multiplied.
MAP_CLASS: Final = {
    "integer": "integer", "weights": "float", "stored": "float", "passthrough": "passthrough",
    "float": "float",
}  # fmt: skip
QDQ: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})


def score_float(run: Run) -> None:
    """Run the user's --eval function on the float model, before the work: its mistakes show now.

    Raises:
        RecipeError: it fails, or returns no finite number.
    """
    if run.options.eval is not None:
        with run.stages.stage("eval"):
            run.float_score = score_file(run.options.eval, run.source)


def evaluate_metric(run: Run, path: Path) -> Metric | None:
    """Run the user's --eval function on the result; where it fails, a gate says so."""
    if run.options.eval is None or run.float_score is None:
        return None
    name, before = run.float_score
    try:
        with run.stages.stage("eval"):
            _, after = score_file(run.options.eval, path)
    except UserError as error:
        run.eval_failure = " ".join(filter(None, (error.what, error.where)))
        return None
    return Metric(name=name, float=before, quantized=after, drop=before - after)


def gates_of(run: Run, metric: Metric | None) -> tuple[Gate, ...]:
    """Judge the result."""
    options, gates = run.options, []
    own = run.engines[0] if run.engines else None
    if own is not None:
        gates += _engine_gates(run, own)
    primary = run.target.own_engine
    if primary in run.failures:
        gates.append(
            Gate(
                name=f"{primary}: loads and runs",
                wanted="yes",
                got=run.failures[primary],
                passed=False,
            )
        )
    for engine in run.engines:
        ran = engine.sqnr_db is not None
        gates.append(
            Gate(
                name=f"{engine.name}: finite",
                wanted="finite outputs",
                got=engine.sqnr_db if ran else f"{NOT_CHECKED}: no samples",
                passed=engine.sqnr_db is None or engine.sqnr_db > -math.inf,
            )
        )
    if options.min_sqnr is not None:
        got = own.sqnr_db if own else None
        passed = got is not None and got >= options.min_sqnr
        gates.append(Gate(name="min-sqnr", wanted=options.min_sqnr, got=got, passed=passed))
    if options.min_speedup is not None:
        got = own.speedup if own else None
        passed = got is not None and got >= options.min_speedup
        gates.append(Gate(name="min-speedup", wanted=options.min_speedup, got=got, passed=passed))
    if run.eval_failure:
        gates.append(Gate(name="eval", wanted="a number", got=run.eval_failure, passed=False))
    if options.max_drop is not None and metric is not None:
        passed = metric.drop <= options.max_drop
        gates.append(Gate(name="max-drop", wanted=options.max_drop, got=metric.drop, passed=passed))
    return tuple(gates)


def _engine_gates(run: Run, own: EngineReport) -> list[Gate]:
    left = sum(op.planned for op in own.float_ops)
    gates = []
    if run.target.engine != "none" and not run.is_simulated:
        gates.append(
            Gate(
                name=f"{own.name}: planned ops in integers",
                wanted="all",
                got=f"{left} in float" if left else "all",
                passed=left == 0,
            )
        )
    loss = own.optimizer_loss_db
    exact = own.name == "ort" or not (run.target.needs_vnni and saturates())
    if loss is not None and own.sqnr_db is not None and exact:
        apart = own.optimizer_diff_db
        close = own.sqnr_db if apart is None else max(own.sqnr_db, apart)
        few = loss <= OPTIMIZER_LOSS_DB
        wanted = f"{OPTIMIZER_LOSS_DB:g}, or {OPTIMIZER_ENOUGH_DB:g} dB to float or as written"
        gates.append(
            Gate(
                name=f"{own.name}: SQNR lost to optimizations (dB)",
                wanted=OPTIMIZER_LOSS_DB if few else wanted,
                got=loss,
                passed=few or close >= OPTIMIZER_ENOUGH_DB,
            )
        )
    return gates


def layers_of(run: Run, samples: Sequence[Mapping[str, Any]]) -> list[LayerReport]:
    """Compare the layers of the result with the float model, before and after compensation.

    What a layer runs in is what the first engine that took the file made of it.
    """
    if not samples:
        return []
    assert run.graph is not None
    assert run.quantized is not None
    assert run.plan is not None
    left = {op.node for engine in run.engines[:1] for op in engine.float_ops}
    kinds = {
        node.name: node.precision
        for node in run.plan.nodes
        if node.precision in ("integer", "weights") and node.name not in left
    }
    reference = run.graph.to_model(inline=True)
    rows = compare_layers(reference, run.quantized.to_model(inline=True), samples)
    before = rows
    if run.plain is not None and run.plain is not run.quantized:
        before = compare_layers(reference, run.plain.to_model(inline=True), samples)
    fitted = {layer.name: layer for layer in run.compensation.layers} if run.compensation else {}
    return [
        LayerReport(
            name=row.name,
            op=row.op,
            sqnr_db_before=plain.sqnr_db,
            sqnr_db_after=row.sqnr_db,
            cosine=row.cosine,
            precision=kinds.get(row.name, "float"),
            corrected_channels=fitted[row.name].corrected if row.name in fitted else 0,
            refused_channels=fitted[row.name].refused if row.name in fitted else (),
        )
        for row, plain in zip(rows, before, strict=True)
    ]


def build_report(run: Run, output: Path, metric: Metric | None, gates: tuple[Gate, ...]) -> Report:
    """Put everything that `run` found out into a report."""
    if run.graph is None or run.plan is None or run.quantized is None:
        raise InternalError("a report needs a finished run")
    before = {node.name for node in run.graph.nodes}
    compute = [node for node in run.quantized.nodes if node.op not in QDQ]
    return Report(
        model=str(run.source),
        output=str(output),
        target=run.target.name,
        precision=str(run.precision),
        passes=tuple(run.passes),
        nodes=NodeCounts(
            float=len(run.graph.nodes),
            quantized=len(run.quantized.nodes),
            added_at_runtime=sum(
                node.name not in before and not all(isinstance(t, Constant) for t in node.inputs)
                for node in compute
            ),
        ),
        engines=tuple(run.engines),
        layers=tuple(run.layers),
        cost=Cost(
            seconds_total=run.stages.total,
            seconds_by_stage=dict(run.stages.seconds),
            float_forward_seconds=run.forward_seconds,
            peak_rss_bytes=peak_rss_bytes(),
            samples=run.samples,
            peak_rss_by_stage=dict(run.stages.peak),
        ),
        gates=gates,
        sizes=FileSizes(float_bytes=model_bytes(run.source), quantized_bytes=model_bytes(output)),
        metric=metric,
        histograms=_histograms(run),
        graph_map=tuple(
            MapNode(name=n.name, op=n.op, precision=MAP_CLASS[n.precision], because=n.because)
            for n in run.plan.nodes
        ),
        rounds=tuple(run.rounds),
        runtime_costs=tuple(run.runtime_costs),
        notes=(
            *run.notes,
            *_added(run),
            *_zero_points(run),
            *(f"not verified: {text}" for text in run.failures.values()),
        ),
        mixed=run.mixed,
        options=asdict(run.options),
        versions=versions(),
    )


def _added(run: Run) -> tuple[str, ...]:
    """Say which corrections run as nodes."""
    if run.compensation is None:
        return ()
    if run.options.allow_runtime_ops and run.target.scheme == "full":
        reason = f"{run.target.name} wants every op between Q and DQ"
        return (f"nothing was added at run time: {reason}",)
    return tuple(f"added at run time: {text}" for text in run.compensation.runtime_ops)


def _zero_points(run: Run) -> tuple[str, ...]:
    """Say that weights have zero points that nobody asked for: other engines may refuse them."""
    assert run.plan is not None
    if run.options.asymmetric_weights:
        return ()
    bits = [d.spec.bits for d in run.plan.weights() if not d.spec.symmetric]
    few = [number for number in bits if number < run.target.zero_points_below]
    if not few:
        return ()
    return (
        f"weights of at most {max(few)} bits have zero points ({len(few)} of them), which "
        f"{run.target.name} computes in float; hardware that wants symmetric weights has targets "
        "of its own",
    )


def _histograms(run: Run) -> tuple[TensorHistogram, ...]:
    """Return the histograms of the tensors that lose most, worst first."""
    assert run.plan is not None
    assert run.qtable is not None
    rows = []
    for decision in run.plan.activations():
        stats = run.stats.get(decision.tensor)
        if stats is None:
            continue
        numbers, choice = run.qtable.qparams[decision.key], run.qtable.ranges[decision.key]
        scale, zero = float(numbers.scale), int(numbers.zero_point)
        low, high = (numbers.qmin - zero) * scale, (numbers.qmax - zero) * scale
        edges, counts = histogram_view(stats)
        rows.append(
            TensorHistogram(
                name=decision.key,
                edges=tuple(float(edge) for edge in edges),
                counts=tuple(int(count) for count in counts),
                low=low,
                high=high,
                method=choice.method,
                spec=decision.spec.describe(),
                sqnr_db=float(estimated_sqnr_db(stats, low, high, decision.spec)),
            )
        )
    rows.sort(key=lambda row: (row.sqnr_db if row.sqnr_db is not None else np.inf, row.name))
    return tuple(rows[:WORST_HISTOGRAMS])


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "qpass": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
    }
