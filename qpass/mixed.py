"""Spend bits where they matter: the smallest plan that meets a budget of accuracy.

Every layer has levels: the precision of the run, 8 bits, and float. One pass over a few samples
says what each level of each layer costs at the outputs (`qpass.sensitivity`), a knapsack says which
combinations are worth having at each size (`qpass.knapsack`), and the smallest of them that meets
the budget is found by building and measuring it. The estimate only says where to look: the sum of
powers is off where errors are large, so the answer is always a measured one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.bits import raised
from qpass.choose import QTable, choose_qtable
from qpass.dtypes import storage_for
from qpass.errors import ModelError, RecipeError
from qpass.graph import Node, array_of
from qpass.knapsack import Point, solve_front
from qpass.modelfile import save_model
from qpass.pipeline import quantize
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.program import Precision
from qpass.qparams import fake_quantize
from qpass.report.model import MixedChoice, MixedPoint, MixedReport
from qpass.result import score_file
from qpass.run import Run, metadata_of
from qpass.sensitivity import LayerError, measure
from qpass.units import is_weighted
from qpass.verify.check import Reference
from qpass.verify.engines import EngineName, open_engine
from qpass.verify.host import session_entries
from qpass.verify.metrics import ErrorMeter
from qpass.verify.session import entries_for

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Score = Callable[[Path], float]  # larger is better

MOST_POINTS: Final = 33  # of the front that are looked at
MOST_TRIALS: Final = 7
SAMPLES: Final = 8  # to measure sensitivities with
FLOAT_BITS: Final = 32
WHY: Final = "mixed precision: float, for the budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a plan has to reach: `score` of the built file, at least `wanted`.

    error: the share of error power at the outputs that should just meet it, None when unknown.
    """

    name: str
    wanted: float
    score: Score
    error: float | None = None


def choose_bits(run: Run, batches: Sequence[Feeds], budget: Budget) -> MixedReport:
    """Set the plan of `run` to the smallest one that meets `budget`, or to the best one there is.

    Args:
        run: planned and calibrated; its policy, plan and graphs are set.
        batches: samples to measure sensitivities with.
        budget: the condition.
    """
    assert run.graph is not None
    assert run.plan is not None
    levels = levels_of(run)
    with run.stages.stage("sensitivity"):
        errors = measure(
            run.graph,
            levels,
            _rounder(run, levels),
            batches,
            threads=run.options.jobs or None,
            progress=run.progress,
        )
        sizes = [_sizes(run.graph.node(layer.name), layer) for layer in errors]
        front = solve_front(sizes, [np.array(layer.errors) for layer in errors])
        front = thinned([point for point in front if _quantizes(point, errors)])
    with run.stages.stage("mixed precision"):
        measured = _search(run, errors, front, budget)
    passing = [i for i, value in measured.items() if value >= budget.wanted]
    chosen = min(passing) if passing else max(measured, key=lambda i: (measured[i], -i))
    _apply(run, errors, front[chosen])
    if not passing:
        run.notes.append(
            f"NO PLAN MEETS THE BUDGET: {budget.name} {budget.wanted:g} was not reached; the best "
            f"of {len(measured)} plans that were measured has {measured[chosen]:.4g}."
        )
    float_bytes = sum(4.0 * array_of(run.graph.node(e.name).inputs[1]).size for e in errors)
    return _report(errors, front, measured, chosen, budget, float_bytes)


def levels_of(run: Run) -> dict[str, list[Precision | None]]:
    """Return the levels of every layer that the plan quantizes, lowest first.

    Layers whose bits the user has set keep them.
    """
    assert run.graph is not None
    assert run.plan is not None
    planned = {node.name: node for node in run.plan.nodes}
    found: dict[str, list[Precision | None]] = {}
    for node in run.graph.nodes:
        bits = planned[node.name].bits
        if not bits or not is_weighted(node):
            continue
        lowest = Precision.parse(bits)
        if run.policy.own_bits(node.name) is not None:
            found[node.name] = [lowest]
            continue
        found[node.name] = list(dict.fromkeys([lowest, raised(lowest), None]))
    return found


def _rounder(
    run: Run, levels: Mapping[str, Sequence[Precision | None]]
) -> Callable[[Node, Precision], tuple[Array, Callable[[Array], Array]]]:
    """Return a function that rounds a layer as a plan with this level would do it."""
    assert run.graph is not None
    graph = run.graph
    tables: dict[int, tuple[Plan, QTable]] = {}
    for number in range(max((len(own) for own in levels.values()), default=0)):
        bits = {name: own[min(number, len(own) - 1)] for name, own in levels.items()}
        given = {name: level for name, level in bits.items() if level is not None}
        if not given:
            continue
        plan = make_plan(graph, run.target, replace(run.policy, node_bits=given))
        method = run.method or run.options.calibrate
        weight_method = run.options.weight_range
        tables[number] = (
            plan,
            choose_qtable(graph, plan, run.stats, method=method, weight_method=weight_method),
        )
    keys = {number: _keys(plan) for number, (plan, _) in tables.items()}
    resident = {
        number: {d.tensor: d.key for d in plan.activations() if d.edges is None}
        for number, (plan, _) in tables.items()
    }

    def rounded(node: Node, level: Precision) -> tuple[Array, Callable[[Array], Array]]:
        number = levels[node.name].index(level)
        table = tables[number][1].qparams
        weight = fake_quantize(array_of(node.inputs[1]), table[keys[number][node.name, 1]])
        key = keys[number].get((node.name, 0), resident[number].get(node.inputs[0].name))
        if key is None or level.activation is None:
            return weight, lambda x: x
        return weight, lambda x: fake_quantize(x, table[key])

    return rounded


def _keys(plan: Plan) -> dict[tuple[str, int], str]:
    return {(e.node, e.index): d.key for d in plan.decisions for e in d.edges or ()}


def _sizes(node: Node, layer: LayerError) -> Array:
    """Return the bytes of a layer's weight at each level, scales not counted."""
    elements = int(np.prod(node.inputs[1].shape))
    bits = [
        FLOAT_BITS if level is None else storage_for(level.weight, signed=True).bits
        for level in layer.levels
    ]
    return np.array(bits, np.float64) * elements / 8.0


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
    run: Run, errors: list[LayerError], front: list[Point], budget: Budget
) -> dict[int, float]:
    """Measure points of the front, by bisection; return the score of each that was measured."""
    measured: dict[int, float] = {}
    low, high = 0, len(front) - 1
    guess = (low + high) // 2
    if budget.error is not None:
        error = budget.error
        guess = next((i for i, point in enumerate(front) if point.error <= error), high)
    while low <= high and len(measured) < MOST_TRIALS:
        measured[guess] = _measured(run, errors, front[guess], budget)
        if measured[guess] >= budget.wanted:
            high = guess - 1
        else:
            low = guess + 1
        guess = (low + high) // 2
    return measured


def _measured(run: Run, errors: list[LayerError], point: Point, budget: Budget) -> float:
    try:
        _apply(run, errors, point)
    except ModelError:  # nothing is left to quantize
        return float("-inf")
    quantize(run)
    assert run.quantized is not None
    with tempfile.TemporaryDirectory(prefix="qpass-mixed-") as folder:
        path = Path(folder, "trial.onnx")
        save_model(run.quantized, path, metadata=metadata_of(run))
        return budget.score(path)


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


def sqnr_budget(run: Run, wanted: float, held: Sequence[Feeds]) -> Budget:
    """Return the budget of `--min-sqnr`: the worst output on held-out samples, in dB."""
    reference = Reference.run(run.source, held, threads=run.options.jobs)
    engine: EngineName = "openvino" if run.target.engine == "openvino" else "ort"

    def score(path: Path) -> float:
        assert run.plan is not None
        entries = entries_for(run.plan, run.target, run.options.accuracy_level)
        config = {**session_entries(run.target), **entries} if engine == "ort" else {}
        runner = open_engine(engine, path, session_config=config, threads=run.options.jobs)
        meters = [ErrorMeter() for _ in runner.output_names]
        for feeds, expected in zip(reference.feeds, reference.outputs, strict=True):
            for meter, a, b in zip(meters, expected, runner.run(dict(feeds)), strict=True):
                meter.update(a, b)
        return min(meter.sqnr_db for meter in meters)

    return Budget(name="SQNR in dB", wanted=wanted, score=score, error=10.0 ** (-wanted / 10.0))


def metric_budget(function: str, wanted_drop: float, source: Path) -> Budget:
    """Return the budget of `--max-drop`: the user's metric `function`, larger is better."""
    name, float_value = score_file(function, source)
    return Budget(
        name=name,
        wanted=float_value - wanted_drop,
        score=lambda path: score_file(function, path)[1],
    )


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
        budget = metric_budget(options.eval, options.max_drop, run.source)
    else:
        assert options.min_sqnr is not None
        budget = sqnr_budget(run, options.min_sqnr, held)
    run.mixed = choose_bits(run, list(held[:SAMPLES]), budget)


def _report(
    errors: list[LayerError],
    front: list[Point],
    measured: Mapping[int, float],
    chosen: int,
    budget: Budget,
    float_bytes: float,
) -> MixedReport:
    best = front[chosen]
    return MixedReport(
        budget=budget.name,
        wanted=budget.wanted,
        met=measured[chosen] >= budget.wanted,
        points=tuple(
            MixedPoint(
                weight_bytes=int(point.size),
                share_of_float=point.size / max(float_bytes, 1.0),
                predicted_db=-10.0 * float(np.log10(max(point.error, 1e-20))),
                measured=measured.get(number),
                chosen=number == chosen,
            )
            for number, point in enumerate(front)
        ),
        layers=tuple(
            MixedChoice(
                name=layer.name,
                bits=_text(layer.levels[number]),
                error_db=tuple(
                    (_text(level), -10.0 * float(np.log10(max(error, 1e-20))))
                    for level, error in zip(layer.levels, layer.errors, strict=True)
                    if level is not None
                ),
            )
            for layer, number in zip(errors, best.levels, strict=True)
        ),
    )


def _text(level: Precision | None) -> str:
    return "float" if level is None else str(level)
