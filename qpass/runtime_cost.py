"""What compensation costs when the result runs: nodes, parameters, multiplications, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpass.errors import InternalError
from qpass.graph import Constant, array_of
from qpass.modelfile import save_model
from qpass.passes.model_gate import Verdict
from qpass.report.model import RuntimeCost
from qpass.run import Run, metadata_of
from qpass.verify.engines import EngineError, open_engine
from qpass.verify.host import config_for
from qpass.verify.latency import measure_interleaved


def runtime_costs(
    run: Run, result: Path, samples: Sequence[Mapping[str, Any]], *, seconds: float
) -> list[RuntimeCost]:
    """Return the cost of each compensation that was kept, the free one first.

    Args:
        run: a run whose result has been written and verified.
        result: the file of the result; the uncompensated one is written beside it for the timing.
        samples: the first one is what is timed.
        seconds: budget for the timing.
    """
    costs = []
    folded, added = run.compensation, run.block_compensation
    if folded is not None and folded.method != "none":
        nodes, parameters = _kept_as_nodes(run)
        costs.append(
            RuntimeCost(
                method=folded.method,
                nodes=nodes,
                parameters=parameters,
                macs=0,
                places=folded.report.changed,
                sqnr_db=_sqnr(folded.verdict),
            )
        )
    if added is not None and added.method == "none":
        reasons = [refusal.reason for refusal in added.report.refusals if refusal.where == "model"]
        why = reasons[-1] if reasons else "no block gained on samples left out"
        run.notes.append(f"--compensate {run.options.compensate} added nothing: {why}")
    if added is not None and added.method != "none":
        engine, times = _time(run, result, samples, seconds)
        costs.append(
            RuntimeCost(
                method=added.method,
                nodes=added.added_nodes,
                parameters=added.added_parameters,
                macs=added.added_macs,
                places=sum(block.kind == "linear" for block in added.blocks),
                engine=engine,
                latency_ms=None if times is None else times[:2],
                latency_ratio=None if times is None else times[2],
                sqnr_db=_sqnr(added.verdict),
            )
        )
    return costs


def _kept_as_nodes(run: Run) -> tuple[int, int]:
    """Return the nodes and numbers of channel-wise corrections that no constant could take."""
    if run.graph is None or run.quantized is None:
        raise InternalError("costs are those of a finished run")
    known = {node.name for node in run.graph.nodes}
    if run.block_compensation is not None:
        known |= {name for block in run.block_compensation.blocks for name in block.nodes}
    added = [
        node
        for node in run.quantized.nodes
        if node.name not in known and node.op not in ("QuantizeLinear", "DequantizeLinear")
    ]
    constants = [t for node in added for t in node.inputs if isinstance(t, Constant)]
    return len(added), sum(array_of(constant).size for constant in constants)


def _sqnr(verdict: Verdict | None) -> tuple[float, float] | None:
    return None if verdict is None else (verdict.before_db, verdict.after_db)


def _time(
    run: Run, result: Path, samples: Sequence[Mapping[str, Any]], seconds: float
) -> tuple[str, tuple[float, float, float] | None]:
    """Return the engine, and the milliseconds without and with compensation and their ratio."""
    assert run.plan is not None
    engine = run.target.own_engine
    if run.plain is None or not samples or engine not in {own.name for own in run.engines}:
        return "", None
    plain = result.with_name(f"{result.stem}.plain{result.suffix}")
    save_model(run.plain, plain, metadata=metadata_of(run))
    config = config_for(run.plan, run.target, engine, run.options.accuracy_level)
    try:
        with run.stages.stage("verify"):
            pair = [open_engine(engine, file, session_config=config) for file in (plain, result)]
            without, with_it = measure_interleaved(pair, samples[0], seconds=seconds)
    except EngineError as error:
        run.notes.append(f"the time of compensation was not measured: {error}")
        return "", None
    return engine, (without.median_ms, with_it.median_ms, with_it.ratio)
