"""Verify and repair: run the result in its engines, edit the plan, and go round again."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx

from qpass.choose import QTable
from qpass.errors import ModelError, RecipeError
from qpass.graph import Constant, Graph
from qpass.modelfile import save_model
from qpass.passes.compensate_blocks import BlockCompensation
from qpass.passes.compensation import Compensation
from qpass.pipeline import quantize
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.program import Policy
from qpass.report.model import EngineReport, PassReport
from qpass.run import Run, metadata_of
from qpass.verify import available_engines, profile_ort, read_back
from qpass.verify.check import Reference, check_engine
from qpass.verify.engines import EngineError, EngineName
from qpass.verify.host import config_for, saturation_note, shows_speed
from qpass.verify.profile_openvino import profile_openvino, time_of
from qpass.verify.repair import (
    MAX_ROUNDS,
    SLOWER,
    Repair,
    repair_leftovers,
    repair_slow,
    worth_repairing,
)
from qpass.verify.trace import trace

TIMING_SECONDS: Final = 0.6  # per engine
DIALECT_LOSS_DB: Final = 3.0  # a file of another engine's dialect that loses more is warned of
FAR_DB: Final = 10.0  # a tenth of the power of the outputs is error
VERIFYING: Final[tuple[EngineName, ...]] = ("ort", "openvino")


def engines_for(run: Run) -> list[EngineName]:
    """Return the engines to verify in, the target's own first.

    Raises:
        RecipeError: the user asked for an engine that is not there.
    """
    own = run.target.own_engine
    installed = available_engines()
    for name in run.options.engines:
        if name not in VERIFYING:
            raise RecipeError(f"there is no engine {name}", fix=f"known: {', '.join(VERIFYING)}")
        if name not in installed:
            raise RecipeError(f"engine {name} is not installed", fix=f"pip install qpass[{name}]")
    chosen = run.options.engines or installed
    return sorted((name for name in VERIFYING if name in chosen), key=lambda name: name != own)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What a round changes, to go back to when the round did not help."""

    policy: Policy
    plan: Plan | None
    qtable: QTable | None
    plain: Graph | None
    quantized: Graph | None
    compensation: Compensation | None
    block_compensation: BlockCompensation | None
    passes: list[PassReport]
    engines: list[EngineReport]
    notes: list[str]

    @classmethod
    def of(cls, run: Run) -> _State:
        return cls(
            policy=run.policy,
            plan=run.plan,
            qtable=run.qtable,
            plain=run.plain,
            quantized=run.quantized,
            compensation=run.compensation,
            block_compensation=run.block_compensation,
            passes=run.passes,
            engines=run.engines,
            notes=list(run.notes),
        )

    def restore(self, run: Run) -> None:
        run.policy, run.plan, run.qtable = self.policy, self.plan, self.qtable
        run.plain, run.quantized = self.plain, self.quantized
        run.compensation, run.block_compensation = self.compensation, self.block_compensation
        run.passes, run.engines, run.notes = self.passes, self.engines, self.notes


def verify_and_repair(run: Run, path: Path, held_out: list[Mapping[str, Any]]) -> None:
    """Check the file in its engines; edit the plan and go round again while that helps.

    A round that was to make the result faster and did not is taken back.
    """
    engines = engines_for(run)
    with run.stages.stage("verify"):
        reference = Reference.run(run.source, held_out, threads=run.options.jobs)
    before: _State | None = None  # the state before a round that was about speed
    for number in range(1, MAX_ROUNDS + 2):
        with run.stages.stage("verify"), tempfile.TemporaryDirectory() as folder:
            run.engines, run.failures = _check_all(run, engines, path, reference, Path(folder))
        if not run.engines or run.engines[0].name != engines[0]:
            return  # the target's own engine refuses the file: a gate says so
        own = run.engines[0]
        if before is not None and not _faster(own, before.engines[0]):
            before.restore(run)
            _write(run, path)
            run.rounds.append("the last round did not make it faster and was taken back")
            return
        if not may_repair(run) or number > MAX_ROUNDS:
            return
        repair, before = repair_leftovers(own), None
        if repair is None and worth_repairing(own) and shows_speed(run.target):
            with run.stages.stage("verify"):
                repair = _give_up_products(run, own) or repair_slow(
                    own, _slower_nodes(run, path, reference, own)
                )
            before = _State.of(run)
        if repair is None:
            return
        if not _apply(run, repair, path):
            run.rounds.append(f"round {number}: {repair.sentence} Given up: nothing would be left.")
            return
        run.rounds.append(f"round {number}: {repair.sentence}")


def _faster(new: EngineReport, old: EngineReport) -> bool:
    if new.speedup is None or old.speedup is None:
        return False
    return new.speedup > old.speedup * SLOWER


def may_repair(run: Run) -> bool:
    """Return True when the engine was meant to run the result in integers."""
    precision = run.policy.precision
    if run.is_simulated or run.target.engine == "none" or not run.options.repair:
        return False
    return precision.activation is not None


def compare_engines(run: Run) -> None:
    """Warn of a result far from float or slower, and of engines that compute the file worse."""
    own = run.engines[0] if run.engines else None
    if own is None:
        return
    note = saturation_note(run.target)
    if note and run.policy.precision.activation is not None:
        run.notes.append(note)
    if may_repair(run) and worth_repairing(own) and shows_speed(run.target):
        run.notes.append(
            f"SLOWER THAN FLOAT in {own.name}: {own.speedup:.2f}x. Repair found nothing more to "
            "give up; --min-speedup 1 makes it a gate."
        )
    if own.sqnr_db is not None and own.sqnr_db < FAR_DB:
        run.notes.append(
            f"FAR FROM FLOAT: {own.sqnr_db:.1f} dB. What the outputs are worth, only a metric can "
            "tell (--eval). The worst layers are listed: --keep PATTERN leaves some in float, "
            "--mixed --min-sqnr 20 looks for more bits."
        )
    for other in run.engines[1:]:
        if own.sqnr_db is None or other.sqnr_db is None:
            continue
        if other.sqnr_db < own.sqnr_db - DIALECT_LOSS_DB:
            run.notes.append(
                f"{other.name} computes this file with {other.sqnr_db:.1f} dB, {own.name} with "
                f"{own.sqnr_db:.1f} dB: it is for {own.name} only"
            )


def _check_all(
    run: Run, engines: list[EngineName], path: Path, reference: Reference, folder: Path
) -> tuple[list[EngineReport], dict[str, str]]:
    reports: list[EngineReport] = []
    failures: dict[str, str] = {}
    assert run.plan is not None
    level = run.options.accuracy_level
    for engine in engines:
        try:
            reports.append(
                check_engine(
                    engine,
                    float_model=run.source,
                    quantized=path,
                    plan=run.plan,
                    reference=reference,
                    workdir=folder,
                    seconds=TIMING_SECONDS,
                    session_config=config_for(run.plan, run.target, engine, level),
                )
            )
        except EngineError as error:
            failures[engine] = str(error)
            if engine != run.target.own_engine:
                failures[engine] = (
                    f"{engine} does not {error.action}, which is for {run.target.name}: "
                    f"{error.cause}"
                )
    return reports, failures


def _apply(run: Run, repair: Repair, path: Path) -> bool:
    """Plan again with the repair; False, and nothing changed, when nothing would be left."""
    assert run.graph is not None
    policy = replace(run.policy, float_nodes={**run.policy.float_nodes, **repair.float_nodes})
    try:
        run.plan = make_plan(run.graph, run.target, policy)
    except ModelError:
        return False
    run.policy = policy
    quantize(run)
    _write(run, path)
    return True


def _write(run: Run, path: Path) -> None:
    assert run.quantized is not None
    with run.stages.stage("write"):
        save_model(run.quantized, path, metadata=metadata_of(run))


def _slower_nodes(
    run: Run, path: Path, reference: Reference, own: EngineReport
) -> list[tuple[str, float, float]]:
    """Return the planned linear nodes that cost more in integers than in float, worst first."""
    if not reference.feeds:
        return []
    times: list[dict[str, float]] = []
    for file in (run.source, path):
        model = onnx.load(file, load_external_data=False)
        feeds = dict(reference.feeds[0])
        own_ort = own.name == "ort"
        profile = profile_ort(file, feeds) if own_ort else profile_openvino(file, feeds)
        with tempfile.TemporaryDirectory() as folder:
            found = trace(model, read_back("ort" if own_ort else "openvino", file, Path(folder)))
        times.append(
            {
                name: (profile.get(op.name) if own_ort else time_of(op, profile)) or 0.0
                for name, op in found.items()
                if op is not None
            }
        )
    plain, integer = times
    assert run.plan is not None
    rows = [
        (name, plain[name], integer[name])
        for name in run.plan.engine_nodes()
        if integer.get(name, 0.0) > plain.get(name, float("inf"))
    ]
    return sorted(rows, key=lambda row: row[1] - row[2])


def _give_up_products(run: Run, own: EngineReport) -> Repair | None:
    """Make the products of two activations float in OpenVINO, all at once.

    They need two Q of their own each, and the plugin runs what is around them (Softmax, Transpose,
    the products) as one op in float but in pieces in integers. None of that time is in the profile
    of the products. Measured on 2026.4.1, share of the float time with them and without: 98 rows
    and one head of 64 0.81 and 0.81 with warm caches, 1.05 and 0.95 with cold ones (five models in
    turn); 197 rows and three heads 0.48 and 0.54.
    """
    if own.name != "openvino" or run.plan is None or run.graph is None:
        return None
    planned = run.plan.integer_nodes()
    names = [
        node.name
        for node in run.graph.nodes
        if node.name in planned
        and node.op == "MatMul"
        and not any(isinstance(tensor, Constant) for tensor in node.inputs)
    ]
    if not names:
        return None
    return Repair(
        float_nodes=dict.fromkeys(names, "openvino: does not pay in a model slower than float"),
        sentence=f"openvino was slower than float ({own.speedup:.2f}x): {len(names)} products of "
        "two activations are float in the plan now.",
    )
