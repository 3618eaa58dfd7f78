"""Migrate scales of channels before quantization: exact in float, fewer errors in integers.

What it does
    One range for a whole tensor is as wide as its widest channel. Each site divides the channels of
    an activation by scales that constants in front take up and weights behind make up for:
    equalization across layers (Nagel et al., 2019), SmoothQuant (Xiao et al., 2022), RepQ-ViT
    (Li et al., 2023). Where no constant takes the scale, a Mul by channel can be bought.
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
from qpass.passes.equalize.gate import Choice, choose_scales, ideal_gain_db
from qpass.passes.equalize.measure import Specs
from qpass.passes.equalize.rows import SiteRows, Wanted, collect_rows
from qpass.passes.equalize.site import Refused, Site
from qpass.passes.equalize.sites import find_sites
from qpass.passes.model_gate import Verdict, judge
from qpass.report.model import PassReport, Refusal

__all__ = ["Equalization", "Job", "equalize"]

RULE: Final = "migrate scales"
RULE_MUL: Final = "buy a Mul"
# A Mul reads and writes the tensor once more. It is worth that when the linear op behind it gains
# one bit (6 dB), and the model as a whole 1 dB.
MUL_SITE_DB: Final = 6.0
MUL_MODEL_DB: Final = 1.0
MOST_MULS: Final = 8  # are tried in the whole model


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalization:
    """The migrated graph and what there is to say about it.

    `muls` lists what was added at run time. `scaled` names the linear ops whose outputs are not
    those of the model any more. `key` tells the graph from others with the same source: "" when
    nothing was migrated. `stats` are the statistics of the migrated graph over all samples.
    """

    graph: Graph
    report: PassReport
    notes: tuple[str, ...]
    muls: tuple[str, ...]
    key: str
    scaled: tuple[str, ...] = ()
    stats: Mapping[str, TensorStats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Migration:
    """A site, or a tensor that a Mul is bought for, by number, with its scales."""

    number: int
    place: Site | Refused
    choice: Choice

    @property
    def kind(self) -> str:
        return self.place.kind if isinstance(self.place, Site) else f"mul {self.number}"


def equalize(graph: Graph, job: Job) -> Equalization:
    """Return `graph` with scales migrated where that helps; `graph` is not changed.

    Args:
        graph: the normalized float graph.
        job: how it is going to be quantized.
    """
    plan = job.plan(graph)
    draft = graph.copy()
    specs = Specs.of(plan, draft.nodes)
    places, refusals = _places(draft, list(plan.integer_nodes()), specs, job)
    places, hopeless = _hopeful(places, specs, job)
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
        choice = _choose(place, kept, specs, job.stats)
        reason = choice if isinstance(choice, str) else _apply(draft, place, choice)
        if isinstance(choice, str) or reason:
            rule = RULE if isinstance(place, Site) else RULE_MUL
            refusals.append(Refusal(rule=rule, where=place.tensor, reason=reason))
        else:
            found.append(_Migration(number=number, place=place, choice=choice))
    found, dropped = _most(found)
    refusals += dropped
    if not found:
        return _nothing(graph, refusals, ())

    def make(chosen: frozenset[int]) -> tuple[Graph, frozenset[str]]:
        return _build(graph, [m for m in found if m.number in chosen])

    trials = Trials(job=job, make=make, everything=frozenset(m.number for m in found))
    trials.prepare()
    return _decide(graph, trials, found, refusals)


def _hopeful(
    places: Sequence[Site | Refused], specs: Specs, job: Job
) -> tuple[list[Site | Refused], list[Refusal]]:
    """Leave out what a Mul surely is not worth at, by the ranges that calibration saw."""
    kept: list[Site | Refused] = []
    refusals = []
    for place in places:
        if isinstance(place, Refused) and _ideal_gain(place, specs, job.stats) < MUL_SITE_DB:
            reason = f"{place.reason}; its channels are alike, so no Mul is worth it"
            refusals.append(Refusal(rule=RULE_MUL, where=place.tensor, reason=reason))
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


def _choose(
    place: Site | Refused, rows: SiteRows, specs: Specs, stats: Mapping[str, TensorStats]
) -> Choice | str:
    if isinstance(place, Site):
        shift, floor = place.shift is not None, smallest_scales(place, stats)
        if floor is not None and floor.min() == 1.0:
            return "all of its channels reach the ends of the Clip in front"
        choice = choose_scales(place.readers, place.products, rows, specs, shift=shift, floor=floor)
        return choice if choice.sure else f"no sure gain ({choice.sentence})"
    choice = choose_scales(place.readers, (), rows, specs)
    if choice.sure and choice.gain_db >= MUL_SITE_DB:
        return choice
    return f"{place.reason}; no Mul is worth it ({choice.sentence})"


def _places(
    graph: Graph, nodes: Sequence[str], specs: Specs, job: Job
) -> tuple[list[Site | Refused], list[Refusal]]:
    """Return sites in order, then the tensors that only a Mul could help, and refusals."""
    sites, without = find_sites(graph, nodes)
    candidates: list[Site | Refused] = [*sites, *without]
    places: list[Site | Refused] = []
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
    return places, refusals


def _scaled(place: Site | Refused) -> frozenset[str]:
    return place.tensors if isinstance(place, Site) else frozenset({place.tensor})


def _wanted(place: Site | Refused) -> Wanted:
    if isinstance(place, Site):
        return Wanted(groups=place.groups, readers=place.readers, products=place.products)
    return Wanted(groups=len(place.readers[0].labels), readers=place.readers)


def _apply(graph: Graph, place: Site | Refused, choice: Choice) -> str:
    if isinstance(place, Site):
        return apply_scales(graph, place, choice.scales)
    return buy_mul(graph, place.tensor, place.readers, choice.scales)


def _most(found: list[_Migration]) -> tuple[list[_Migration], list[Refusal]]:
    """Keep all sites and the `MOST_MULS` best Muls."""
    muls = [m for m in found if isinstance(m.place, Refused)]
    worst = sorted(muls, key=lambda m: -m.choice.gain_db)[MOST_MULS:]
    dropped = {m.number for m in worst}
    refusals = [
        Refusal(rule=RULE_MUL, where=m.place.tensor, reason=f"{MOST_MULS} others gain more")
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
        if isinstance(group[0].place, Refused):
            keep = verdict.helps and verdict.gain_db >= MUL_MODEL_DB
            gains[group[0].number] = verdict
        else:
            keep = verdict.gain_db > 0.0 or verdict.after_db > verdict.before_db
        trials.forget(chosen if not keep else rest)
        if not keep:
            chosen, current = rest, without
            reason = f"the model does not gain by it: {verdict.sentence}"
            refusals += [Refusal(rule=RULE, where=m.place.tensor, reason=reason) for m in group]
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
    sites = [m for m in kept if isinstance(m.place, Site)]
    muls = tuple(
        f"Mul in front of {m.place.readers[0].linear.node.name} ({m.place.reason}; "
        f"{m.choice.sentence}); the model {gains[m.number].sentence}"
        for m in kept
        if isinstance(m.place, Refused)
    )
    note = f"scales migrated at {len(sites)} sites and {len(muls)} bought Mul: {verdict.sentence}"
    digest = hashlib.sha256()
    for m in kept:
        digest.update(f"{m.number}".encode())
        digest.update(m.choice.scales.scale.tobytes() + m.choice.scales.shift.tobytes())
    return Equalization(
        graph=migrated,
        report=PassReport(name="equalize", changed=len(kept), refusals=tuple(refusals)),
        notes=(note,),
        muls=muls,
        key=digest.hexdigest(),
        scaled=_linear_ops(migrated, tensors),
        stats=trials.stats_of(chosen),
    )


def _linear_ops(graph: Graph, tensors: frozenset[str]) -> tuple[str, ...]:
    return tuple(
        node.name
        for node in graph.nodes
        if node.op in LINEAR_OPS and any(out.name in tensors for out in node.outputs)
    )


def _groups(found: Sequence[_Migration]) -> list[list[_Migration]]:
    """Return what is judged together: each Mul, the weakest first; then the sites of each kind."""
    groups: dict[str, list[_Migration]] = {}
    for migration in found:
        groups.setdefault(migration.kind, []).append(migration)
    muls = [g for g in groups.values() if isinstance(g[0].place, Refused)]
    kinds = [g for g in groups.values() if isinstance(g[0].place, Site)]
    return sorted(muls, key=lambda g: g[0].choice.gain_db) + sorted(kinds, key=len)


def _nothing(graph: Graph, refusals: Sequence[Refusal], notes: tuple[str, ...]) -> Equalization:
    report = PassReport(name="equalize", changed=0, refusals=tuple(refusals))
    return Equalization(graph=graph, report=report, notes=notes, muls=(), key="")
