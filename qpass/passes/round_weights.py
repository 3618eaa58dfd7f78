"""Round weights by what they do to the outputs, not one by one to nearest.

What it does
    Walks the linear ops in execution order with the activations of both graphs at hand, and writes
    new integers (and the offset that goes with them) into the quantized graph:
    ``gptq`` rounds the float weight against the Hessian of the quantized input;
    ``auto`` is gptq behind a refit of the float weight to the quantized input (see `_refits`); with
    less effort, and no refit, where all weights and inputs have many levels (see `QUICK`);
    ``erq`` refits the float weight to the quantized input, then rounds by halves;
    ``unit`` refits the layers of a basic unit that have rows enough, the last one of a branch
    towards the float sum minus the quantized skip, rounds each as gptq does, and sweeps back over
    the layers whose elements the last one reads;
    ``adaround`` goes on where ``unit`` ends: it learns the roundings of the unit by gradients, and
    scales of channels and steps of activations with few levels along with them.
    Where a sample has one row that the outputs see, all but adaround round channels together, by
    what the outputs see of them (`output_metric`).
Why it never makes things worse
    A quarter of the batches is held out. The new integers of a layer have to give a smaller error
    there than rounding to nearest, otherwise those stay. Where there are other batches to judge the
    model by, the quarter then joins the sums (see `way`). Nearest integers stay everywhere unless
    the model's own outputs get better by a standard error.
    Before rows had weights, a post-norm transformer (kwt1) lost 3.7 dB with 70 layers that were
    better one by one.
What stays
    Zero points, types, nodes and edges. Integers and biases change, so do scales of weights below 7
    bits (see `scales`) and learned steps: nothing costs more at run time.
Preconditions
    `insert_qdq` has run, biases are still float, names of the two graphs agree.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Graph, array_of
from qpass.passes.held_out import count_held
from qpass.passes.live_rows import LiveRows
from qpass.passes.model_gate import GATED_CONFIDENCE
from qpass.passes.model_verdict import model_verdict
from qpass.passes.rounding.basic_units import find_basic_units
from qpass.passes.rounding.gradient import check_torch, reconstruct_unit, why_not
from qpass.passes.rounding.guide import guide_rows
from qpass.passes.rounding.layer import Layer, find_layers
from qpass.passes.rounding.measure import measure
from qpass.passes.rounding.output_metric import find_metric
from qpass.passes.rounding.replay import RoundedLayer, Rounding, replay
from qpass.passes.rounding.scales import can_rescale
from qpass.passes.rounding.unit import sweep_back
from qpass.passes.rounding.way import (
    ENOUGH_ROWS,
    FULL,
    QUICK,
    Effort,
    Solver,
    choose_way,
    solve_again,
    solve_for_outputs,
)
from qpass.program import Progress
from qpass.qparams import QParams
from qpass.report.model import PassReport, Refusal
from qpass.stream import Step, Stream
from qpass.submodel import Feeds
from qpass.units import split_into_units

Array = NDArray[Any]
Method = Literal["auto", "gptq", "erq", "unit", "adaround"]
UNITWISE: Final = ("unit", "adaround")
# Rows for each input from which a refit pays in a unit, instead of `ENOUGH_ROWS`: its layers are
# there to make up for one another.
LEAST_ROWS: Final = 2
WIDE_LEVELS: Final = 100  # 7 bits and more


@dataclass(slots=True, kw_only=True)
class _Walk:
    method: Method
    batches: int
    first_held: int  # number of the first batch that is held out
    judged_apart: bool  # there are judges beside the batches
    random: np.random.Generator
    rounded: dict[str, Layer] = field(default_factory=dict)
    coarse: Collection[str] = ()  # layers whose input has few levels
    few_bits: bool = False  # some weights or inputs have few levels
    rescale: bool = True  # scales of channels may change
    learns: bool = False  # gradients follow in this unit
    alone: bool = False  # one layer of it has roundings to learn
    learned: int = 0  # layers that they gave new integers
    steps: dict[str, float] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def effort(self) -> Effort:
        """What a layer may cost: little, unless few bits leave errors to make up for."""
        return QUICK if self.method == "auto" and not self.few_bits else FULL

    @property
    def first_judge(self) -> int:
        """Number of the first batch that no sum sees.

        The other held-out ones enter the sums once they have chosen how a layer is rounded. Without
        judges all of them judge the model; adaround has units to judge by some of them.
        """
        if self.effort is QUICK or not self.judged_apart:
            return self.first_held
        left = self.batches - self.first_held
        return self.first_held + (left // 2 if self.method == "adaround" else left)

    def refuse(self, name: str, reason: str) -> None:
        """Leave a layer as it is."""
        self.refusals.append(Refusal(rule=f"round {self.method}", where=name, reason=reason))

    def result(self, begin: float) -> Rounding:
        """Return what the walk did; `begin` is when it began."""
        report = PassReport(
            name="round_weights",
            changed=len(self.rounded),
            refusals=tuple(self.refusals),
            seconds=time.perf_counter() - begin,
        )
        layers = {
            name: RoundedLayer(
                integers=array_of(layer.stored.constant),
                scale=layer.numbers.scale if layer.rescaled else None,
                offsets=tuple(layer.offsets),
            )
            for name, layer in self.rounded.items()
        }
        return Rounding(report=report, layers=layers, steps=dict(self.steps), learned=self.learned)


def round_weights(
    reference: Graph,
    quantized: Graph,
    batches: Sequence[Feeds],
    numbers: Mapping[str, QParams],
    *,
    method: Method,
    memory_bytes: int = 1 << 30,
    holdout: float = 0.25,
    threads: int | None = None,
    seed: int = 0,
    iterations: int = 300,
    coarse: Collection[str] = (),
    free_steps: Collection[str] = (),
    rescale: bool = True,
    guided: bool = False,
    progress: Progress | None = None,
    aim: Graph | None = None,
    judges: Sequence[Feeds] = (),
) -> Rounding:
    """Replace the integers of `quantized` by better ones, layer by layer.

    Args:
        reference: the float graph; not changed.
        quantized: the same graph after `insert_qdq`; changed in place.
        batches: calibration inputs by name; the last ones are held out.
        numbers: scale and zero point of each weight, by name of the linear op.
        method: see the docstring of the module.
        memory_bytes: activations above this go to files.
        holdout: share of the batches that judge; at least one.
        threads: threads of each session.
        seed: of the choice of rows, and of what adaround mixes.
        iterations: of adaround, for each unit; a quarter of them where samples are too few.
        coarse: names of linear ops whose input has few levels (below 7 bits).
        free_steps: keys of activations whose step adaround may learn.
        rescale: scales of weights below 7 bits follow from the rounding (see `scales`).
        guided: rows count by what the outputs see of their errors as well (see `guide`).
        progress: told after each unit.
        aim: graph to come close to, see `Stream`; None: `reference`.
        judges: batches that no pass was fitted to, which judge the model; with them those held out
            of `batches` enter the sums in the end.

    Raises:
        RecipeError: adaround, or a guide, without torch.
    """
    begin = time.perf_counter()
    if method == "adaround":
        check_torch("--round adaround")
    if guided:
        check_torch("--row-weights gradient")
    held = count_held(batches, holdout)
    random, first_held = np.random.default_rng(seed), len(batches) - held
    walk = _Walk(
        method=method,
        batches=len(batches),
        first_held=first_held,
        judged_apart=bool(judges),
        random=random,
        coarse=coarse,
        rescale=rescale,
    )
    if held < 1:
        walk.refuse("model", "there is only one batch: nothing could be held out to judge by")
        return walk.result(begin)
    ends = [unit[-1] for unit in find_basic_units(reference)] if method in UNITWISE else None
    names = iter([node.name for node in reference.nodes])
    with Stream(
        reference,
        quantized.copy(),
        batches,
        memory_bytes=memory_bytes,
        threads=threads,
        stage=f"round ({method})",
        progress=progress,
        units=split_into_units(reference, ends),
        aim=aim,
    ) as stream:
        layers, refused = find_layers(reference, stream.quantized, numbers, stream.aims)
        for name, reason in refused.items():
            walk.refuse(name, f"{reason}: the nearest integers stay")
        walk.few_bits = bool(coarse) or any(not _is_wide(layer) for layer in layers.values())
        live = LiveRows(reference)
        alive = [live.of(batch) for batch in batches]
        for name, layer in layers.items():
            layer.live = [found.get(name) for found in alive]
        if guided:
            guide = guide_rows(reference, list(layers), batches, seed=seed, threads=threads)
            if isinstance(guide, str):
                walk.refuse("model", f"no gradient of its outputs, rows count by norms: {guide}")
            else:
                for name, rows in guide.items():
                    layers[name].guide = rows
        for step in stream:
            inside = [layers[name] for name in islice(names, step.unit.nodes) if name in layers]
            why = why_not(stream, inside) if method == "adaround" else ""
            walk.learns = method == "adaround" and not why
            walk.alone = walk.learns and sum(not _is_wide(layer) for layer in inside) == 1
            rounded = [layer for layer in inside if _round(stream, step, layer, walk)]
            if method in UNITWISE:
                for name, reason in sweep_back(stream, rounded, walk.first_held):
                    walk.refuse(name, reason)
            for layer in inside if why else ():
                walk.refuse(layer.name, f"{why}: the integers of unit stay")
            if walk.learns:
                settings = {"iterations": iterations, "seed": seed, "threads": threads}
                learned = reconstruct_unit(
                    stream,
                    inside,
                    first_held=walk.first_judge,
                    settings=settings,
                    rescaled=[layer.name for layer in inside if _rescales(layer, walk)],
                    free_steps=free_steps,
                )
                changed = {layer.name: layer for layer in learned.layers}
                walk.rounded |= changed
                walk.learned += len(changed)
                for layer in inside:
                    if layer.name not in changed:
                        layer.take_spare(stream.quantized)
                walk.steps |= learned.steps
                for name, reason in learned.refused:
                    walk.refuse(name, reason)
        if walk.rounded:
            verdict = model_verdict(
                stream,
                quantized,
                first_held=walk.first_judge,
                judges=() if walk.effort is QUICK else judges,
                threads=threads,
            )
            if not verdict.helps_by(GATED_CONFIDENCE):
                walk.rounded.clear()
                walk.steps.clear()
                walk.refuse("model", f"no sure improvement, nearest stays: {verdict.sentence}")
    rounding = walk.result(begin)
    replay(rounding, reference, quantized, numbers)
    return rounding


def _is_wide(layer: Layer) -> bool:
    return layer.numbers.qmax - layer.numbers.qmin >= WIDE_LEVELS


def _rescales(layer: Layer, walk: _Walk) -> bool:
    return walk.rescale and not _is_wide(layer) and can_rescale(layer.site, layer.numbers)


def _refits(layer: Layer, walk: _Walk, rows: int) -> bool:
    """True where the float weight is to follow the quantized input.

    It makes up for the layers in front (mobilenet_v2 W4A8 5.45 -> 7.74 dB), but asks more of the
    rows than a rounding does (resnet18 W4A8: 14.87 dB with it in all layers, 15.99 in those with
    rows enough). Inputs of few levels leave so much to make up for that it is worth it always.
    """
    if walk.method == "gptq" or walk.effort is QUICK:
        return False
    needed = LEAST_ROWS if walk.method in UNITWISE else ENOUGH_ROWS
    enough = rows >= needed * layer.layout.inputs
    return enough or walk.method == "erq" or bool(walk.coarse)


def _round(stream: Stream, step: Step, layer: Layer, walk: _Walk) -> bool:
    """Round one layer; True when that is better on the held-out rows and was written."""
    effort, inputs = walk.effort, layer.layout.inputs
    if effort.inputs is not None and inputs > effort.inputs:
        reason = f"{inputs} inputs, `auto` ends at {effort.inputs} (--round gptq does not)"
        walk.refuse(layer.name, f"{reason}: the nearest integers stay")
        return False
    sums, held, more = measure(
        stream,
        step,
        layer,
        first_held=walk.first_held,
        first_judge=walk.first_judge,
        rows_per_input=effort.rows,
        with_skips=walk.method in UNITWISE,
        random=walk.random,
    )
    solver = Solver(
        effort=effort,
        halves=walk.method == "erq",
        refits=_refits(layer, walk, sums.count),
        rescales=_rescales(layer, walk),
    )
    weight = layer.weight()
    found = choose_way(weight, layer.grid(), sums, held, solver)
    if isinstance(found, str):
        walk.refuse(layer.name, f"{found}: the nearest integers stay")
        return False
    if more is not None:
        sums.merge(more)
        found = solve_again(weight, found, sums, solver)
    # Gradients go on by the error at the end of a unit, channel by channel. Where that may come to
    # nothing, a layer whose neighbours do not build on it has something to fall back on.
    if walk.effort is not QUICK and (walk.alone or not walk.learns) and not _is_wide(layer):
        metric = find_metric(stream, layer, walk.first_judge)
        if metric is not None:
            other = solve_for_outputs(found, sums, metric)
            new, old = (sums.offset(one.grid.values(one.integers)) for one in (other, found))
            if walk.learns:
                layer.spare = other.integers, new - old
            else:
                found, layer.together = other, True
    layer.wanted = found.wanted
    if found.shares is not None:
        layer.rescale(stream.quantized, found.shares)
    layer.write(stream.quantized, found.integers)
    if layer.site.offset:
        layer.write_offset(stream.quantized, sums.offset(found.grid.values(found.integers)))
    walk.rounded[layer.name] = layer
    return True
