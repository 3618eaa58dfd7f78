"""Migrate scales of channels before quantization: exact in float, fewer errors in integers.

What it does
    One range for a whole tensor is as wide as its widest channel. Each site divides the channels of
    an activation by scales that constants in front take up and weights behind make up for:
    equalization across layers (Nagel et al., 2019), SmoothQuant (Xiao et al., 2022), RepQ-ViT
    (Li et al., 2023). Where no constant takes the scale, a Mul by channel can be bought; with few
    levels, so can rows of a softmax in units of their largest probability (`row_maxima`).
Why it is safe
    In float nothing changes but roundings. In integers every site has to lower the error of its
    own linear ops on samples that did not choose its scales (`passes.equalize.gate`); then kinds of
    sites and each Mul have to prove themselves in the whole quantized model on further samples
    (`migration_trial`), and the result as a whole must surely be better than nothing.
Preconditions
    The graph is normalized, and its shapes are inferred.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from qpass.calibrate import TensorStats
from qpass.graph import LINEAR_OPS, Graph
from qpass.migration_trial import Job, Trials
from qpass.passes.equalize.apply import apply_scales, buy_mul
from qpass.passes.equalize.bounds import smallest_scales
from qpass.passes.equalize.gate import Choice, Gain, choose_scales, ideal_gain_db
from qpass.passes.equalize.measure import Specs
from qpass.passes.equalize.row_maxima import (
    RANGE,
    RowMaxima,
    divide_rows,
    find_row_maxima,
    judge_row_maxima,
)
from qpass.passes.equalize.rows import SiteRows, Wanted, collect_rows
from qpass.passes.equalize.site import Refused, Site
from qpass.passes.equalize.sites import find_sites
from qpass.passes.model_gate import Verdict, judge
from qpass.report.model import PassReport, Refusal

__all__ = ["Equalization", "Job", "equalize", "scaled_ops"]

RULE: Final = "migrate scales"
RULE_BUY: Final = "buy an op"
Place = Site | Refused | RowMaxima


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalization:
    """The migrated graph and what there is to say about it.

    `muls` lists what was added at run time. `scaled` names the linear ops whose outputs are not
    those of the model any more. `key` tells the graph from others with the same source: "" when
    nothing was migrated. `stats` are the statistics of the migrated graph over all samples;
    `ranges`, by tensor, are those that need none.
    """

    graph: Graph
    report: PassReport
    notes: tuple[str, ...]
    muls: tuple[str, ...]
    key: str
    scaled: tuple[str, ...] = ()
    stats: Mapping[str, TensorStats] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Migration:
    """A place by number, and what is done there: scales, but for rows of a softmax."""

    number: int
    place: Place
    choice: Gain

    @property
    def kind(self) -> str:
        return self.place.kind if isinstance(self.place, Site) else f"bought {self.number}"

    @property
    def bought(self) -> bool:
        """True when something runs that did not run before."""
        return not isinstance(self.place, Site)

    @property
    def scales(self) -> bytes:
        """What the choice was, for a digest."""
        if isinstance(self.choice, Choice):
            return self.choice.scales.scale.tobytes() + self.choice.scales.shift.tobytes()
        return self.choice.method.encode()

    def purchase(self, verdict: Verdict) -> str:
        """Say what was bought, why, and what the model gains by it."""
        if isinstance(self.place, RowMaxima):
            what = f"rows of {self.place.tensor} by their largest (ReduceMax, Div, Mul"
        else:
            assert isinstance(self.place, Refused)
            what = f"Mul in front of {self.place.readers[0].linear.node.name} ({self.place.reason}"
        return f"{what}; {self.choice.sentence}); the model {verdict.sentence}"


def equalize(graph: Graph, job: Job) -> Equalization:
    """Return `graph` with scales migrated where that helps; `graph` is not changed.

    Args:
        graph: the normalized float graph.
        job: how it is going to be quantized.
    """
    plan = job.plan(graph)
    draft = graph.copy()
    specs = Specs.of(plan, draft.nodes)
    # Weights of few bits to nearest, as they are here, hide what an op that is bought does for the
    # activations; rounding by outputs leaves a fraction of that error.
    wide = Specs.of(job.wide_plan(graph), draft.nodes)
    places, refusals = _places(draft, list(plan.integer_nodes()), specs, job)
    places, hopeless = _hopeful(places, wide, job)
    refusals += hopeless
    rows = collect_rows(
        draft,
        [_wanted(place) for place in places],
        islice(iter(job.samples), job.rows),
        job.rows,
        threads=job.threads,
        seed=job.seed,
    )
    found: list[_Migration] = []
    for number, (place, kept) in enumerate(zip(places, rows, strict=True)):
        choice = _choose(place, kept, specs if isinstance(place, Site) else wide, job)
        reason = choice if isinstance(choice, str) else _apply(draft, place, choice)
        if isinstance(choice, str) or reason:
            rule = RULE if isinstance(place, Site) else RULE_BUY
            refusals.append(Refusal(rule=rule, where=place.tensor, reason=reason))
        else:
            found.append(_Migration(number=number, place=place, choice=choice))
    found, dropped = _most(found, job.most_bought)
    refusals += dropped
    if not found:
        return _nothing(graph, refusals, ())

    def make(chosen: frozenset[int]) -> tuple[Graph, frozenset[str]]:
        return _build(graph, [m for m in found if m.number in chosen])

    pinned = {m.place.divided: RANGE for m in found if isinstance(m.place, RowMaxima)}
    everything = frozenset(m.number for m in found)
    trials = Trials(job=job, make=make, everything=everything, pinned=pinned)
    trials.prepare()
    return _decide(graph, trials, found, refusals)


def _hopeful(places: Sequence[Place], specs: Specs, job: Job) -> tuple[list[Place], list[Refusal]]:
    """Leave out what a Mul surely is not worth at, by the ranges that calibration saw."""
    kept: list[Place] = []
    refusals = []
    for place in places:
        if isinstance(place, Refused) and _ideal_gain(place, specs, job.stats) < job.site_db:
            reason = f"{place.reason}; its channels are alike, so no Mul is worth it"
            refusals.append(Refusal(rule=RULE_BUY, where=place.tensor, reason=reason))
        else:
            kept.append(place)
    return kept, refusals


def _ideal_gain(place: Refused, specs: Specs, stats: Mapping[str, TensorStats]) -> float:
    """Return the most that a Mul can gain in dB; infinite where the channels are not known."""
    known = stats.get(place.tensor)
    if known is None or known.channel_low is None or known.channel_high is None:
        return math.inf
    low, high = known.channel_low, known.channel_high
    if any(low.size != reader.labels.size for reader in place.readers):
        return math.inf
    return max(ideal_gain_db(reader, low, high, specs) for reader in place.readers)


def _choose(place: Place, rows: SiteRows, specs: Specs, job: Job) -> Gain | str:
    if isinstance(place, Site):
        shift, floor = place.shift is not None, smallest_scales(place, job.stats)
        if floor is not None and floor.min() == 1.0:
            return "all of its channels reach the ends of the Clip in front"
        choice = choose_scales(place.readers, place.products, rows, specs, shift=shift, floor=floor)
        return choice if choice.sure else f"no sure gain ({choice.sentence})"
    if isinstance(place, RowMaxima):
        name = place.product.node.name
        gain = judge_row_maxima(rows.products[name], specs.activations[name, 0])
        reason = "a step for each of its rows is not worth three ops"
    else:
        gain = choose_scales(place.readers, (), rows, specs)
        reason = f"{place.reason}; no Mul is worth it"
    worth = gain.sure and gain.gain_db >= job.site_db
    return gain if worth else f"{reason} ({gain.sentence})"


def _places(
    graph: Graph, nodes: Sequence[str], specs: Specs, job: Job
) -> tuple[list[Place], list[Refusal]]:
    """Return sites in order, then the tensors that only bought ops could help, and refusals."""
    sites, without = find_sites(graph, nodes)
    candidates: list[Site | Refused] = [*sites, *without]
    places: list[Place] = []
    refusals = []
    for place in candidates:
        site = place if isinstance(place, Site) else None
        products, slots = (site.products, site.slots) if site else ((), ())
        reason = specs.obstacle(place.readers, products, slots)
        pinned = sorted(_scaled(place) & set(job.policy.ranges))
        if pinned:
            reason = f"the range of {pinned[0]} is fixed by the plan"
        if isinstance(place, Refused) and not place.readers:
            reason = reason or place.reason
        if reason:
            refusals.append(Refusal(rule=RULE, where=place.tensor, reason=reason))
        else:
            places.append(place)
    for row in find_row_maxima(graph, nodes, specs) if job.divides_rows else ():
        if row.tensor in job.policy.ranges:
            reason = f"the range of {row.tensor} is fixed by the plan"
            refusals.append(Refusal(rule=RULE_BUY, where=row.tensor, reason=reason))
        else:
            places.append(row)
    return places, refusals


def _scaled(place: Site | Refused) -> frozenset[str]:
    return place.tensors if isinstance(place, Site) else frozenset({place.tensor})


def _wanted(place: Place) -> Wanted:
    if isinstance(place, Site):
        return Wanted(groups=place.groups, readers=place.readers, products=place.products)
    if isinstance(place, RowMaxima):
        return Wanted(groups=0, readers=(), products=(place.product,))
    return Wanted(groups=len(place.readers[0].labels), readers=place.readers)


def _apply(graph: Graph, place: Place, choice: Gain) -> str:
    if isinstance(place, RowMaxima):
        divide_rows(graph, place)
        return ""
    assert isinstance(choice, Choice)
    if isinstance(place, Site):
        return apply_scales(graph, place, choice.scales)
    return buy_mul(graph, place.tensor, place.readers, choice.scales)


def _most(found: list[_Migration], most: int) -> tuple[list[_Migration], list[Refusal]]:
    """Keep all sites and the best `most` of what is bought."""
    muls = [m for m in found if m.bought]
    worst = sorted(muls, key=lambda m: -m.choice.gain_db)[most:]
    dropped = {m.number for m in worst}
    refusals = [
        Refusal(rule=RULE_BUY, where=m.place.tensor, reason=f"{most} others gain more")
        for m in worst
    ]
    return [m for m in found if m.number not in dropped], refusals


def _build(graph: Graph, chosen: Sequence[_Migration]) -> tuple[Graph, frozenset[str]]:
    fresh = graph.copy()
    if not chosen:
        return fresh, frozenset()
    nodes = {node.name: node for node in fresh.nodes}
    scaled: set[str] = set()
    for migration in chosen:
        place = migration.place.of(nodes)
        _apply(fresh, place, migration.choice)
        if isinstance(place, Site):
            scaled |= place.tensors
        elif isinstance(place, RowMaxima):
            scaled.add(place.undone)
    fresh.infer_shapes()
    return fresh, frozenset(scaled)


def _decide(
    graph: Graph, trials: Trials, found: list[_Migration], refusals: list[Refusal]
) -> Equalization:
    """Take out what does not help the whole model, then accept the rest or nothing."""
    chosen = trials.everything
    method = trials.best_method(chosen)
    current = trials.outputs(chosen, method)
    gains: dict[int, Verdict] = {}
    for group in _groups(found):
        numbers = frozenset(m.number for m in group)
        rest = chosen - numbers
        without = trials.outputs(rest, method)
        verdict = judge(trials.wanted, without, current)
        if group[0].bought:
            sure = verdict.helps_by(trials.job.confidence)
            keep = sure and verdict.gain_db >= trials.job.model_db
            gains[group[0].number] = verdict
        else:
            keep = verdict.gain_db > 0.0 or verdict.after_db > verdict.before_db
        trials.forget(chosen if not keep else rest)
        if not keep:
            chosen, current = rest, without
            reason = f"the model does not gain by it: {verdict.sentence}"
            rule = RULE_BUY if group[0].bought else RULE
            refusals += [Refusal(rule=rule, where=m.place.tensor, reason=reason) for m in group]
    if not chosen:
        return _nothing(graph, refusals, ())
    before, after = (trials.best_outputs(c) for c in (frozenset[int](), chosen))
    verdict = judge(trials.wanted, before, after)
    migrated, tensors = trials.build(chosen).graph, trials.build(chosen).scaled
    exact = trials.is_exact(migrated)
    if not verdict.helps or not exact:
        why = verdict.sentence if exact else "the float outputs would change by their rounding"
        return _nothing(graph, refusals, (f"scales stay where they are: {why}",))
    kept = [m for m in found if m.number in chosen]
    bought = [m for m in kept if m.bought]
    muls = sum(isinstance(m.place, Refused) for m in bought)
    rows = [m.place for m in bought if isinstance(m.place, RowMaxima)]
    note = f"scales migrated at {len(kept) - len(bought)} sites and {muls} bought Mul"
    if rows:
        note += f", rows of {len(rows)} softmaxes divided by their largest"
    digest = hashlib.sha256()
    for m in kept:
        digest.update(f"{m.number}".encode() + m.scales)
    return Equalization(
        graph=migrated,
        report=PassReport(name="equalize", changed=len(kept), refusals=tuple(refusals)),
        notes=(f"{note}: {verdict.sentence}",),
        muls=tuple(m.purchase(gains[m.number]) for m in bought),
        key=digest.hexdigest(),
        scaled=scaled_ops(migrated, tensors),
        stats=trials.stats_of(chosen),
        ranges={place.divided: RANGE for place in rows},
    )


def scaled_ops(graph: Graph, tensors: frozenset[str]) -> tuple[str, ...]:
    """Return the names of the linear ops that write one of `tensors`."""
    return tuple(
        node.name
        for node in graph.nodes
        if node.op in LINEAR_OPS and any(out.name in tensors for out in node.outputs)
    )


def _groups(found: Sequence[_Migration]) -> list[list[_Migration]]:
    """Return what is judged together: each purchase, the weakest first; then kinds of sites."""
    groups: dict[str, list[_Migration]] = {}
    for migration in found:
        groups.setdefault(migration.kind, []).append(migration)
    muls = [g for g in groups.values() if g[0].bought]
    kinds = [g for g in groups.values() if not g[0].bought]
    return sorted(muls, key=lambda g: g[0].choice.gain_db) + sorted(kinds, key=len)


def _nothing(graph: Graph, refusals: Sequence[Refusal], notes: tuple[str, ...]) -> Equalization:
    report = PassReport(name="equalize", changed=0, refusals=tuple(refusals))
    return Equalization(graph=graph, report=report, notes=notes, muls=(), key="")
