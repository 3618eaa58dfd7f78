"""Spend bits where they matter: the cheapest plan that meets a budget of accuracy.

Every layer has levels (`qpass.mixed_levels`): the precision of the run, the same with activations
of 8 bits, 8 bits, and float (products of activations: not float). One pass over a few samples says
what each level of each layer costs at the outputs (`qpass.sensitivity`), a knapsack says which
combinations are worth having at each cost (`qpass.knapsack`), and the cheapest of them that meets
the budget is found by building and measuring it. The estimate only says where to look: the sum of
powers is off where errors are large, so the accuracy of the answer is always a measured one.

The cost is the bytes of the weights, or the time of the layers (`qpass.layer_latency`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.budgets import Budget, metric_budget, sqnr_budget
from qpass.errors import ModelError, RecipeError, UserError
from qpass.knapsack import Point, solve_front
from qpass.layer_latency import NOISE, Variant, engine_of, time_layers, time_models
from qpass.mixed_levels import Draft, drafts_of, elements_of, levels_of, rounder_of, sizes_of
from qpass.mixed_report import Costs, report_of
from qpass.modelfile import save_model
from qpass.pipeline import quantize
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.program import Precision
from qpass.quantize import build_quantized
from qpass.report.model import MixedReport
from qpass.run import Run, metadata_of
from qpass.sensitivity import LayerError, measure
from qpass.verify.host import config_for, config_of

Array = NDArray[Any]
Feeds = Mapping[str, Array]

MOST_POINTS: Final = 33  # of the front that are looked at
MOST_TRIALS: Final = 7
SAMPLES: Final = 8  # to measure sensitivities with
WHY: Final = "mixed precision: float, for the budget"


def choose_bits(run: Run, batches: Sequence[Feeds], budget: Budget) -> MixedReport:
    """Set the plan of `run` to the cheapest one that meets `budget`, or to the best one there is.

    Args:
        run: planned and calibrated; its policy, plan and graphs are set.
        batches: samples to measure sensitivities with.
        budget: the condition.

    Raises:
        RecipeError: there is no layer whose bits could be chosen.
        EngineError: the cost is time, and the engine refused a layer or a plan.
    """
    assert run.graph is not None
    assert run.plan is not None
    levels = levels_of(run)
    if not levels:
        raise RecipeError(
            "--mixed chooses the bits of weights, and this plan quantizes none",
            fix="leave --mixed out; `qpass plan` says what becomes of each node",
        )
    with run.stages.stage("sensitivity"):
        drafts = drafts_of(run, levels)
        errors = measure(
            run.graph,
            levels,
            rounder_of(levels, drafts),
            batches,
            threads=run.options.jobs or None,
            progress=run.progress,
        )
    sizes = [sizes_of(run.graph.node(layer.name), layer) for layer in errors]
    times = None
    if run.options.mixed_cost == "latency":
        with run.stages.stage("layer latency"):
            by_name = _times(run, levels, drafts, batches[0])
        times = [by_name[layer.name] for layer in errors]
    front = solve_front(times or sizes, [np.array(layer.errors) for layer in errors])
    front = thinned([point for point in front if _quantizes(point, errors)])
    with (
        run.stages.stage("mixed precision"),
        tempfile.TemporaryDirectory(prefix="qpass-mixed-") as folder,
    ):
        measured = _search(run, errors, front, budget, Path(folder))
        if times is None and 0 not in measured:
            # Accuracy need not grow with bits, so what a plain run would give competes.
            measured[0] = _measured(run, errors, front[0], budget, _file(Path(folder), 0))
        if times is not None:
            number = _add_uniform(front, errors, times)
            if number not in measured:
                path = _file(Path(folder), number)
                measured[number] = _measured(run, errors, front[number], budget, path)
            if max(measured.values()) < budget.wanted:
                first = len(front)
                front += _by_size(front, errors, sizes, times)
                measured |= _search(run, errors, front, budget, Path(folder), first)
        passing = [i for i, value in measured.items() if value >= budget.wanted]
        model_ms = {} if times is None else _model_times(run, passing, Path(folder), batches[0])
    chosen = max(measured, key=lambda i: (measured[i], -i))
    if passing:
        chosen = min(passing, key=lambda i: (model_ms.get(i, 0.0), i))
    _apply(run, errors, front[chosen])
    if not passing:
        run.notes.append(
            f"NO PLAN MEETS THE BUDGET: {budget.name} {budget.wanted:g} was not reached; the best "
            f"of {len(measured)} plans that were measured has {measured[chosen]:.4g}."
        )
    float_bytes = sum(4.0 * elements_of(run.graph.node(layer.name)) for layer in errors)
    costs = Costs(sizes=sizes, times=times, float_bytes=float_bytes, model_ms=model_ms)
    return report_of(errors, costs, front, measured, chosen, budget)


def _times(
    run: Run,
    levels: Mapping[str, Sequence[Precision | None]],
    drafts: Sequence[Draft],
    sample: Feeds,
) -> Mapping[str, Array]:
    """Return the milliseconds of each layer at each level, in the target's own engine."""
    assert run.graph is not None
    engine = engine_of(run.target)
    variants = [
        Variant(
            graph=build_quantized(run.graph, d.plan, d.qtable, run.target, d.policy)[0],
            plan=d.plan,
            qparams=d.qtable.qparams,
            config=config_for(d.plan, run.target, engine, run.options.accuracy_level),
        )
        for d in drafts
    ]
    found = time_layers(
        run.graph,
        levels,
        variants,
        sample,
        engine,
        threads=run.options.jobs or 1,
        progress=run.progress,
    )
    if found.noisy:
        run.notes.append(
            f"NOISY TIMES: the runs of {len(found.noisy)} of {len(levels)} layers differ by more "
            f"than a factor of {NOISE}. Something else uses this machine; the plan may not be the "
            "fastest."
        )
    return found.milliseconds


def _quantizes(point: Point, errors: list[LayerError]) -> bool:
    """True when a point leaves anything in integers."""
    pairs = zip(point.levels, errors, strict=True)
    return any(layer.levels[number] is not None for number, layer in pairs)


def thinned(front: list[Point]) -> list[Point]:
    """Return at most `MOST_POINTS` points, both ends included, evenly along the front."""
    if len(front) <= MOST_POINTS:
        return front
    picks = np.unique(np.rint(np.linspace(0, len(front) - 1, MOST_POINTS)).astype(int))
    return [front[i] for i in picks]


def _search(
    run: Run,
    errors: list[LayerError],
    front: list[Point],
    budget: Budget,
    folder: Path,
    first: int = 0,
) -> dict[int, float]:
    """Measure points of the front from `first` on, by bisection; return scores by number."""
    measured: dict[int, float] = {}
    low, high = first, len(front) - 1
    guess = (low + high) // 2
    if budget.error is not None:
        error = budget.error
        guess = next((i for i in range(low, high) if front[i].error <= error), high)
    while low <= high and len(measured) < MOST_TRIALS:
        measured[guess] = _measured(run, errors, front[guess], budget, _file(folder, guess))
        if measured[guess] >= budget.wanted:
            high = guess - 1
        else:
            low = guess + 1
        guess = (low + high) // 2
    return measured


def _file(folder: Path, number: int) -> Path:
    return folder / f"plan{number}" / "plan.onnx"


def _measured(
    run: Run, errors: list[LayerError], point: Point, budget: Budget, path: Path
) -> float:
    """Build the plan of a point as `path`, and return its score; -inf where nothing is left."""
    try:
        _apply(run, errors, point)
    except ModelError:  # nothing is left to quantize
        return float("-inf")
    quantize(run)
    assert run.quantized is not None
    path.parent.mkdir()
    save_model(run.quantized, path, metadata=metadata_of(run))
    try:
        score = budget.score(path)
    except UserError as error:  # the user's metric fails for this one
        run.notes.append(f"one of the plans that were looked at has no score: {error.what}")
        score = float("-inf")
    if run.options.mixed_cost == "size":  # whole models are timed later, others are done with
        shutil.rmtree(path.parent)
    return score


def _add_uniform(front: list[Point], errors: list[LayerError], times: Sequence[Array]) -> int:
    """Put the plan that leaves no layer in float behind the front; return its number.

    The times of layers alone do not see what float layers between integer ones cost, so this plan
    competes with those of the front, whatever its sum.
    """
    levels = tuple(
        max(number for number, level in enumerate(layer.levels) if level is not None)
        for layer in errors
    )
    uniform = Point(
        size=sum(float(own[i]) for own, i in zip(times, levels, strict=True)),
        error=sum(layer.errors[i] for layer, i in zip(errors, levels, strict=True)),
        levels=levels,
    )
    known = [point.levels for point in front]
    if levels in known:
        return known.index(levels)
    front.append(uniform)
    return len(front) - 1


def _by_size(
    front: Sequence[Point],
    errors: list[LayerError],
    sizes: Sequence[Array],
    times: Sequence[Array],
) -> list[Point]:
    """Return the points that are worth having by the bytes of their weights, and are new.

    Where float is as fast as integers, the plan without integers beats all others by time, and the
    front by time has next to nothing left that could meet a budget.
    """
    known = {point.levels for point in front}
    points = solve_front(sizes, [np.array(layer.errors) for layer in errors])
    return [
        replace(point, size=sum(float(own[i]) for own, i in zip(times, point.levels, strict=True)))
        for point in thinned([point for point in points if _quantizes(point, errors)])
        if point.levels not in known
    ]


def _model_times(run: Run, numbers: Sequence[int], folder: Path, sample: Feeds) -> dict[int, float]:
    """Return the milliseconds of whole plans that were built, interleaved."""
    engine = engine_of(run.target)
    paths = [_file(folder, number) for number in numbers]
    configs = [config_of(path, engine) for path in paths]
    found = time_models(engine, paths, configs, sample, threads=run.options.jobs or 1)
    return dict(zip(numbers, found, strict=True))


def _apply(run: Run, errors: list[LayerError], point: Point) -> None:
    assert run.graph is not None
    bits: dict[str, Precision] = {}
    floats: dict[str, str] = {}
    for layer, number in zip(errors, point.levels, strict=True):
        level = layer.levels[number]
        if level is None:
            floats[layer.name] = WHY
        else:
            bits[layer.name] = level
    given = {name: why for name, why in run.policy.float_nodes.items() if why != WHY}
    policy = replace(
        run.policy,
        node_bits={**run.policy.node_bits, **bits},
        float_nodes={**given, **floats},
    )
    run.plan, run.policy = make_plan(run.graph, run.target, policy), policy


def plan_to_edit(run: Run) -> Plan:
    """Return the plan with the bits that were found, of the graph that `--plan` will meet.

    Migrated scales, norms made static and ops that were bought come behind it in every run, and add
    nodes that a plan file cannot know.

    Args:
        run: with `--mixed`, as it is when all is done: repairs may have left more in float.
    """
    assert run.planned is not None
    graph, policy = run.planned
    there = {node.name for node in graph.nodes}
    policy = replace(
        policy,
        node_bits={name: own for name, own in run.policy.node_bits.items() if name in there},
        float_nodes={name: why for name, why in run.policy.float_nodes.items() if name in there},
    )
    return make_plan(graph, run.target, policy)


def search(run: Run, held: Sequence[Feeds]) -> None:
    """With `--mixed`: plan the bits of `run` so that its gates hold.

    With both `--max-drop` and `--min-sqnr` the first decides, and the second stays a gate.

    Args:
        run: planned and calibrated.
        held: samples to judge by; some of them measure the sensitivities as well.

    Raises:
        RecipeError: there are no samples.
    """
    options = run.options
    if not options.mixed:
        return
    if not held:
        raise RecipeError("--mixed needs samples to measure on", fix="give --data")
    if options.max_drop is not None and options.eval is not None:
        assert run.float_score is not None
        budget = metric_budget(options.eval, options.max_drop, run.float_score)
    else:
        assert options.min_sqnr is not None
        budget = sqnr_budget(run, options.min_sqnr, held)
    run.mixed = choose_bits(run, list(held[:SAMPLES]), budget)
    assert run.plan is not None
