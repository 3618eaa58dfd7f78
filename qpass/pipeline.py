"""The steps that make the graph: load, normalize, rewrite, plan, then quantize and compensate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from qpass.bits import stem_and_head, tied_heads
from qpass.block_stage import build_compensated
from qpass.calibrate import (
    Samples,
    batches,
    input_specs,
)
from qpass.calibrate.ranges import RangeChoice
from qpass.choose import WIDE_BITS, QTable
from qpass.errors import RecipeError
from qpass.evidence import broken_notes
from qpass.frozen import check_names, meant_decisions, read_scales, solve_ranges
from qpass.graph import Graph
from qpass.layer_latency import engine_of
from qpass.modelfile import load_model
from qpass.options import ROUND_WITH_DATA
from qpass.passes.absorb_scales import absorb_scales
from qpass.passes.compensate import compensate
from qpass.passes.equalize.measure import Specs
from qpass.passes.normalize import normalize
from qpass.passes.norms import rewrite_norms
from qpass.passes.patch_matmul import patches_to_matmul
from qpass.passes.rotation.balance import balance_streams
from qpass.passes.round_weights import round_weights
from qpass.passes.rounding.gradient import check_torch
from qpass.passes.rounding.replay import replay, write_offsets
from qpass.passes.static_norm import Batches, replace_norms
from qpass.passes.tune import tune
from qpass.passes.weight_only import straighten_gemms
from qpass.plan import Plan, read_plan
from qpass.plan_edits import take_edits
from qpass.planner import plan as make_plan
from qpass.program import Policy
from qpass.qparams import QParams
from qpass.quantize import build_quantized, timed
from qpass.range_stage import qtable_of
from qpass.report.model import PassReport
from qpass.run import Run
from qpass.weights_float import weights_float

STATIC_SAMPLES: Final = 64  # a gain, an offset and a ridge regression for each norm
LAYER_SAMPLES: Final = 2
UNLEARNED: Final = "NOTHING WAS LEARNED by --round adaround: -v names the reason of each layer"
TUNED: Final = "tuned by gradients:"  # begins the note on that


def prepare(run: Run, *, for_target: bool = True) -> Graph:
    """Load and normalize the model, and plan it.

    Args:
        run: its graph, plan and policy are set.
        for_target: False leaves out rewrites that only some targets want, as for statistics that
            serve all of them.
    """
    if run.options.round == "adaround":
        check_torch("--round adaround")
    if run.options.guides:
        check_torch("--row-weights gradient")
    if run.options.tune_steps:
        check_torch("--tune")
    if run.options.mixed_cost == "latency":
        engine_of(run.target)  # an error now, not after the calibration
    with run.stages.stage("load"):
        run.graph = load_model(run.source, opset=run.target.opset)
    with run.stages.stage("normalize"):
        report = normalize(run.graph)
    run.passes.append(timed(report, run.stages.seconds["normalize"]))
    run.policy = replace(run.policy, tied=tied_heads(run.graph, stem_and_head(run.graph)))
    with run.stages.stage("norms"):
        run.passes += rewrite_norms(
            run.graph,
            unified=run.options.unified_norm == "auto" and not run.options.activation_scales,
            rotate=run.options.rotate,
            rms=run.options.rms_norm,
            seed=run.options.seed,
        )
        if run.options.rotate != "none" and not run.options.activation_scales:
            _balance(run, run.graph)
    if run.target.straight_gemms and (names := _weights_alone(run, run.graph)):
        _move_values(run, run.graph, partial(straighten_gemms, names=names))
    if for_target and _patches_as_products(run):
        _move_values(run, run.graph, patches_to_matmul)
    with run.stages.stage("plan"):
        if run.options.plan:
            take_edits(run, Path(run.options.plan))
        run.plan = make_plan(run.graph, run.target, run.policy)
        run.notes += broken_notes(run.plan)
        if run.options.activation_scales:
            _freeze_scales(run, Path(run.options.activation_scales))
    if run.options.mixed:
        run.planned = run.graph, run.policy
    return run.graph


def _balance(run: Run, graph: Graph) -> None:
    """Balance streams, and keep what their statistics are known by."""
    before = graph.fingerprint() if run.is_rewritten else ""
    report = balance_streams(graph, run.options.seed)
    run.passes.append(report)
    if report.changed:
        run.known = f"{before}-balanced-{run.options.seed}"


def _weights_alone(run: Run, graph: Graph) -> set[str]:
    """Return the Gemms that keep float activations, by the user's options or a plan file."""
    in_file = read_plan(Path(run.options.plan)).node_bits if run.options.plan else {}
    found: set[str] = set()
    for node in graph.nodes:
        own = run.policy.own_bits(node.name)
        bits = own[0] if own else in_file.get(node.name, run.policy.precision)
        if node.op == "Gemm" and bits.activation is None:
            found.add(node.name)
    return found


def _patches_as_products(run: Run) -> bool:
    """Return whether patch embeddings are to be rewritten.

    Scales that a file brings belong to tensors of the model as it was trained.
    """
    static = run.policy.precision.activation is not None and run.policy.activations == "static"
    return static and not run.options.activation_scales and run.target.rounds_convolutions


def _move_values(run: Run, graph: Graph, rewrite: Callable[[Graph], PassReport]) -> None:
    """Rewrite without changing a value, and keep what statistics of other rewrites are known by."""
    before = graph.copy() if run.is_rewritten and not run.known else None
    report = rewrite(graph)
    run.passes.append(report)
    if report.changed and before is not None:
        run.known = before.fingerprint()


def _freeze_scales(run: Run, path: Path) -> None:
    """Pin the ranges that give the activation scales of a file back, and aim at these scales."""
    options = run.options
    rotates = options.rotate not in ("auto", "none")
    if rotates or options.rms_norm or options.static_norm is not None:
        raise RecipeError(
            "--activation-scales needs the activations as they are",
            fix="leave out --rotate, --rms-norm and --static-norm, which change them",
        )
    assert run.graph is not None
    assert run.plan is not None
    frozen = read_scales(path)
    check_names(frozen, run.plan)
    frozen, report = absorb_scales(run.graph, frozen)
    run.passes.append(report)
    run.notes += [
        f"{path.name} gives {refusal.where} a scale for each channel, which has no place in "
        f"integers, and no constant takes them up ({refusal.reason}): its range was calibrated"
        for refusal in report.refusals
    ]
    ranges = solve_ranges(frozen, run.plan)
    own = {name: entry for name, entry in frozen.items() if name not in run.policy.ranges}
    run.policy = replace(run.policy, ranges={**ranges, **run.policy.ranges})
    run.plan = make_plan(run.graph, run.target, run.policy)
    # Made once: a repair may give up quantizers that the network was trained with all the same.
    if own:
        run.aim = weights_float(run.graph, run.plan, meant_decisions(own, run.plan))


def make_norms_static(run: Run, samples: Samples) -> None:
    """With `--static-norm`: fit norms on three quarters of a few samples, judge on the rest."""
    threshold = run.options.static_norm
    if threshold is None:
        return
    assert run.graph is not None
    inputs = input_specs(run.graph.to_model(stub_above=1024))
    some = list(islice(iter(samples), STATIC_SAMPLES))
    cut = len(some) - len(some) // 4
    if cut == len(some):
        raise RecipeError(
            f"--static-norm needs at least 4 calibration samples, there are {len(some)}",
            fix="give more samples, or leave --static-norm out",
        )
    with run.stages.stage("static norm"):
        run.graph, report = replace_norms(
            run.graph,
            Batches(
                fit=[feeds for _, feeds in batches(some[:cut], run.options.batch_size, inputs)],
                check=[feeds for _, feeds in batches(some[cut:], run.options.batch_size, inputs)],
            ),
            threshold=threshold,
            threads=run.options.jobs,
        )
    run.passes.append(report)
    if report.changed:
        run.known = ""
        run.plan = make_plan(run.graph, run.target, run.policy)


def quantize(run: Run) -> None:
    """Choose the numbers, build the integer graph and compensate it."""
    with run.stages.stage("quantize"):
        table, run.plain, reports = _build(run)
    method = run.options.compensate
    if method != "none" and run.batches:
        with run.stages.stage("compensate"):
            run.qtable, run.quantized, reports = build_compensated(
                run,
                lambda fold, add: _build(run, fold, add),
                lambda graph: _compensate(run, graph, table),
            )
    else:
        run.qtable, run.quantized = table, run.plain
    names = {report.name for report in reports}
    run.passes = [*(p for p in run.passes if p.name not in names), *reports]


def _leaves_offsets(run: Run) -> bool:
    """True where compensation fits the offsets of rounded weights anew, in place of the rounding.

    Its own are shrunk and gated by channel. `erq` and the units move weights with their offsets.
    """
    return run.rounding is not None and run.options.round in ("auto", "gptq")


def _compensate(run: Run, graph: Graph, table: QTable) -> PassReport:
    assert run.graph is not None
    left = _leaves_offsets(run)
    rounded = left and run.rounding is not None and run.rounding[1].report.changed > 0
    method = run.options.compensate
    result = compensate(
        run.graph,
        graph,
        run.batches,
        method="bias" if method == "bias" else "cwac",
        fit=run.options.fit,
        runtime_ops=run.options.allow_runtime_ops and run.target.scheme != "full",
        baseline=run.plain if rounded else None,
        aim=run.aim,
        judges=run.judges,
        memory_bytes=run.options.memory_bytes // 2,
        threads=run.options.jobs,
        progress=run.progress,
    )
    run.compensation = result
    if left and result.method == "none":
        assert run.rounding is not None
        write_offsets(run.rounding[1], run.graph, graph, _weight_numbers(run, table))
    return result.report


def _build(
    run: Run,
    compensation: Callable[[Graph], PassReport] | None = None,
    block_compensation: Callable[[Graph], PassReport] | None = None,
) -> tuple[QTable, Graph, tuple[PassReport, ...]]:
    assert run.graph is not None
    assert run.plan is not None
    table = qtable_of(run, run.plan, round_method=run.options.round)
    data = run.options.round in ROUND_WITH_DATA and run.batches
    # The graph without compensation, which `verify` compares with, is not tuned either.
    compensated = compensation is not None or run.options.compensate == "none"
    tuned = run.options.tune_steps and run.batches and compensated
    fits_offsets = compensation is not None and _leaves_offsets(run)
    graph, reports = build_quantized(
        run.graph,
        run.plan,
        table,
        run.target,
        run.policy,
        rounding=(
            (lambda graph: _round_weights(run, graph, table, offsets=not fits_offsets))
            if data
            else None
        ),
        compensation=compensation,
        block_compensation=block_compensation,
        tuning=(lambda graph: _tune(run, graph)) if tuned else None,
    )
    return _with_steps(table, run), graph, reports


def _tune(run: Run, graph: Graph) -> PassReport:
    assert run.graph is not None
    tuning = tune(
        run.graph,
        graph,
        run.batches,
        steps=run.options.tune_steps,
        aim=run.aim,
        judges=run.judges,
        seed=run.options.seed,
        threads=run.options.jobs,
    )
    # A candidate or a result before a repair may have been tuned as well.
    run.notes = [note for note in run.notes if not note.startswith(TUNED)]
    if tuning.report.changed and tuning.verdict is not None:
        run.notes.append(f"{TUNED} {tuning.verdict.sentence}")
    return tuning.report


def _weight_numbers(run: Run, table: QTable) -> dict[str, QParams]:
    """Return scale and zero point of each weight, by name of the linear op."""
    assert run.plan is not None
    return {
        edge.node: table.qparams[decision.key]
        for decision in run.plan.weights()
        if decision.kind == "weight"
        for edge in decision.edges or ()
        if edge.index == 1
    }


def _coarse_inputs(graph: Graph, plan: Plan) -> frozenset[str]:
    """Return the linear ops whose first input has less than 7 bits."""
    specs = Specs.of(plan, graph.nodes).activations
    return frozenset(
        node for (node, index), spec in specs.items() if index == 0 and spec.bits < WIDE_BITS
    )


def _free_steps(plan: Plan, policy: Policy) -> frozenset[str]:
    """Return the keys of activations below 7 bits whose step belongs to nothing else.

    With more bits the error of a range is small beside that of weights. Where the storage type
    holds more bits than are wanted, a Clip has the same ends.
    """
    if policy.activations == "dynamic":
        return frozenset()
    groups = Counter(decision.group for decision in plan.activations())
    return frozenset(
        decision.key
        for decision in plan.activations()
        if decision.pinned is None
        and (decision.group is None or groups[decision.group] == 1)
        and decision.spec.granularity == "per_tensor"
        and decision.spec.fixed is None
        and not decision.spec.power_of_two
        and decision.spec.bits < WIDE_BITS
        and decision.spec.bits == decision.spec.storage.bits
    )


def _with_steps(table: QTable, run: Run) -> QTable:
    """Return the numbers that the graph has: with the steps that were learned."""
    if run.rounding is None or run.rounding[0] is not run.plan:
        return table
    steps = run.rounding[1].steps
    qparams, ranges = dict(table.qparams), dict(table.ranges)
    for key, step in steps.items():
        old = qparams[key]
        qparams[key] = replace(old, scale=np.array(step, np.float32))
        low, high = ((end - int(old.zero_point)) * step for end in (old.qmin, old.qmax))
        ranges[key] = RangeChoice(low=low, high=high, method="learned", mse=ranges[key].mse)
    return QTable(qparams=qparams, ranges=ranges)


def _round_weights(run: Run, graph: Graph, table: QTable, *, offsets: bool) -> PassReport:
    """Round the weights of `graph`; the other graphs of the same plan get the same integers."""
    assert run.graph is not None
    assert run.plan is not None
    numbers = _weight_numbers(run, table)
    if run.rounding is not None and run.rounding[0] is run.plan:
        return replay(run.rounding[1], run.graph, graph, numbers, offsets=offsets)
    method = run.options.round
    assert method in ROUND_WITH_DATA
    rounding = round_weights(
        run.graph,
        graph,
        run.batches,
        numbers,
        method=method,
        aim=run.aim,
        judges=run.judges,
        # adaround holds what a unit reads and gives beside the stream, and torch what it needs.
        memory_bytes=run.options.memory_bytes // (8 if method == "adaround" else 2),
        threads=run.options.jobs,
        seed=run.options.seed,
        iterations=run.options.iterations,
        coarse=_coarse_inputs(run.graph, run.plan),
        free_steps=_free_steps(run.plan, run.policy),
        rescale=run.options.weight_range == "auto",  # otherwise the user has chosen the ranges
        guided=run.options.guides,
        progress=run.progress,
    )
    run.rounding = (run.plan, rounding)
    run.notes = [note for note in run.notes if note != UNLEARNED]  # of a candidate, or a round
    if method == "adaround" and not rounding.learned:
        run.notes.append(UNLEARNED)
    return rounding.report
