"""Tune gains and offsets of all linear ops by gradients of the model's output error (torch).

What it does
    Learns them in `qpass.torch.tune`, from the quantized graph as it is after every closed form and
    on views of the samples where the inputs have any (`qpass.torch.views`), and folds them, or a
    part of them, into scales and biases. Nothing is added at run time.
Why it never makes a model worse
    Some batches are held out. The model has to be better there, as onnxruntime runs it,
    by one standard error (`model_gate`) after views, which are hard to learn by heart, and by two
    after the samples themselves. Otherwise nothing changes.
Preconditions
    `insert_qdq` has run and biases are still float; the names of the two graphs agree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from numpy.typing import NDArray

from qpass.graph import Graph
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.fold_affine import Site, find_site, fold
from qpass.passes.held_out import count_held
from qpass.passes.model_gate import CONFIDENCE, GATED_CONFIDENCE, Verdict, judge, outputs_of
from qpass.passes.rounding.gradient import check_torch
from qpass.report.model import PassReport, Refusal
from qpass.submodel import Feeds
from qpass.units import is_weighted

Array = NDArray[Any]
RULE: Final = "tune"
# What is learned fits the samples a little too well: a part of the way is often the better half.
SHARES: Final = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Result of `tune`; `verdict` compares the model with what it was, if it came to that."""

    report: PassReport
    verdict: Verdict | None = None


def tune(
    reference: Graph,
    quantized: Graph,
    batches: Sequence[Feeds],
    *,
    steps: int,
    holdout: float = 0.25,
    seed: int = 0,
    threads: int | None = None,
    aim: Graph | None = None,
    judges: Sequence[Feeds] = (),
) -> Tuning:
    """Fold learned gains and offsets into `quantized` where the model gets better.

    Args:
        reference: the float graph; not changed.
        quantized: the same graph after `insert_qdq`; changed in place.
        batches: calibration inputs by name; the last ones are held out unless there are `judges`.
        steps: of the optimizer, one batch each.
        holdout: share of the batches that judge; at least one.
        seed: of the order of the batches.
        threads: of torch and of each session.
        aim: graph to come close to, as for rounding and compensation; None: `reference`.
        judges: batches that no pass was fitted to; without them those held out judge.

    Raises:
        RecipeError: torch is not there.
    """
    check_torch("--tune")
    from qpass.torch.tune import TunedLayer, UnsupportedOpError, tune_channels
    from qpass.torch.views import has_views

    begin = time.perf_counter()

    def result(changed: int, refusals: Sequence[Refusal], verdict: Verdict | None) -> Tuning:
        seconds = time.perf_counter() - begin
        report = PassReport(name="tune", changed=changed, refusals=tuple(refusals), seconds=seconds)
        return Tuning(report=report, verdict=verdict)

    def refuse(reason: str, verdict: Verdict | None = None) -> Tuning:
        return result(0, [Refusal(rule=RULE, where="model", reason=reason)], verdict)

    if not judges:
        held = count_held(batches, holdout)
        if held < 1:
            return refuse("there is only one batch: nothing could be held out to judge by")
        batches, judges = batches[:-held], batches[-held:]
    sites, refusals = _sites(reference, quantized)
    if not sites:
        nothing = "no linear op can take a gain or an offset"
        return result(0, [*refusals, Refusal(rule=RULE, where="model", reason=nothing)], None)
    layers = [
        TunedLayer(
            name=site.linear,
            weight=site.node.inputs[1].name,
            output=site.tap,
            axis=site.axis,
            channels=site.channels,
            gain=_takes_gain(site),
            offset=site.offset,
            shifted=site.shifted,
        )
        for site in sites
    ]
    names = [tensor.name for tensor in quantized.outputs]
    right = partial(
        outputs_of, aim or reference, names=names, threads=threads, qdq_in_float=aim is not None
    )
    wanted, ours = right(judges), partial(outputs_of, names=names, threads=threads)
    before = ours(quantized, judges)
    views = has_views(batches)
    try:
        found = tune_channels(
            list(quantized.nodes),
            layers,
            batches,
            right(batches),
            steps=steps,
            teacher=list((aim or reference).nodes) if views else (),
            divisible=not any(t.shape and isinstance(t.shape[0], int) for t in reference.inputs),
            seed=seed,
            threads=threads,
        )
    except UnsupportedOpError as error:
        return refuse(f"{error.what} ({error.where})")
    best: dict[str, ChannelAffine] = {}
    verdict: Verdict | None = None
    for share in SHARES:
        trial, affines = quantized.copy(), _part(found, share)
        _fold(reference, trial, affines)
        found_here = judge(wanted, before, ours(trial, judges))
        if verdict is None or found_here.gain_db > verdict.gain_db:
            verdict, best = found_here, affines
    assert verdict is not None
    if not verdict.helps_by(GATED_CONFIDENCE if views else CONFIDENCE):
        return refuse(f"no sure improvement: {verdict.sentence}", verdict)
    _fold(reference, quantized, best)
    return result(len(best), refusals, verdict)


def _sites(reference: Graph, quantized: Graph) -> tuple[list[Site], list[Refusal]]:
    """Return the linear ops that can take something, and why others cannot."""
    nodes = {node.name: node for node in quantized.nodes}
    sites, refusals = [], []
    for original in reference.nodes:
        if not is_weighted(original):
            continue
        weight = quantized.producer(nodes[original.name].inputs[1])
        if weight is None or weight.op != "DequantizeLinear":
            reason = "it stays float, and as it is"
            refusals.append(Refusal(rule=RULE, where=original.name, reason=reason))
            continue
        site = find_site(quantized, nodes, original)
        if isinstance(site, str):
            refusals.append(Refusal(rule=RULE, where=original.name, reason=site))
        elif _takes_gain(site) or site.offset:
            sites.append(site)
    return sites, refusals


def _takes_gain(site: Site) -> bool:
    """True when a gain for each channel changes scales alone."""
    return site.gain == "channel" and site.rounding is None and not site.shared


def _part(found: dict[str, tuple[Array, Array]], share: float) -> dict[str, ChannelAffine]:
    """Go a share of the way: the logarithms of gains, and offsets, times `share`."""
    return {
        name: ChannelAffine(gain=gain**share, offset=offset * share)
        for name, (gain, offset) in found.items()
    }


def _fold(reference: Graph, graph: Graph, affines: dict[str, ChannelAffine]) -> None:
    nodes = {node.name: node for node in graph.nodes}
    for original in reference.nodes:
        if original.name in affines:
            site = find_site(graph, nodes, original)
            assert isinstance(site, Site)
            fold(graph, site, affines[original.name])
