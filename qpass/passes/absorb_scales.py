"""Turn a scale for each channel of an activation into one scale, by moving the ratios elsewhere.

What it does
    With scales ``s_c`` and one number ``m`` the activation becomes ``x_c * m / s_c``: the constants
    that make it (gain and bias of a norm, output channels of a linear op) take ``m / s_c``, the
    weights of the linear ops that read it take ``s_c / m``.
Why it is correct
    The function of the model does not change (see `qpass.passes.equalize.sites`), and
    ``round(x_c * (m / s_c) / m)`` is ``round(x_c / s_c)``: the integers are the trained ones. No
    engine has a kernel for a scale along the axis that is summed over, so this is the only way to
    keep them (RepQ-ViT, Li et al., 2023, does it for norms).
Preconditions
    The graph is the normalized float graph. Zero points are equal for all channels. Where something
    between producer and readers does not commute with the ratios, or another frozen tensor lies
    there, the scales are refused and the tensor is calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qpass.errors import RecipeError
from qpass.frozen import FrozenScale
from qpass.graph import LINEAR_OPS, Graph, Node
from qpass.passes.equalize.apply import apply_scales
from qpass.passes.equalize.sites import Site, find_sites
from qpass.passes.equalize.solve import Scales
from qpass.report.model import PassReport, Refusal
from qpass.units import reads

RULE = "scale by channel"


def absorb_scales(
    graph: Graph, frozen: Mapping[str, FrozenScale]
) -> tuple[dict[str, FrozenScale], PassReport]:
    """Return `frozen` with one scale for each tensor; tensors that keep several are left out.

    Raises:
        RecipeError: a tensor has another number of channels than of scales.
    """
    kept: dict[str, FrozenScale] = {}
    refusals = []
    changed = 0
    for name, entry in frozen.items():
        if not entry.scale.ndim:
            kept[name] = entry
            continue
        found = _absorb(graph, name, entry, frozen)
        if isinstance(found, str):
            refusals.append(Refusal(rule=RULE, where=name, reason=found))
            continue
        kept[name] = replace(entry, scale=np.asarray(found))
        changed += 1
    report = PassReport(name="absorb_scales", changed=changed, refusals=tuple(refusals))
    return kept, report


def _absorb(
    graph: Graph, name: str, entry: FrozenScale, frozen: Mapping[str, FrozenScale]
) -> float | str:
    """Move the ratios of one tensor; return the scale that is left, or why they stay."""
    tensor = graph.tensors()[name]
    readers = [node.name for node, _ in graph.consumers(tensor) if node.op in LINEAR_OPS]
    if not readers:
        return "no linear op reads it"
    sites, refused = find_sites(graph, readers)
    site = next((site for site in sites if site.tensor == name), None)
    if site is None:
        reasons = [refusal.reason for refusal in refused if refusal.tensor == name]
        return reasons[0] if reasons else "nothing takes the ratios up"
    if site.bounds:
        return "a Clip in front would end elsewhere"
    reader = next((r for r in site.readers if r.linear.node.inputs[0] is tensor), None)
    if reader is None:
        return "a product of activations reads it"
    labels = np.asarray(reader.labels)
    if labels.size != entry.scale.size:
        raise RecipeError(
            f"{name} has {labels.size} channels, --activation-scales gives it {entry.scale.size}",
            fix="give one scale, or one for each channel",
        )
    inside = _between(graph, site) & (set(frozen) - {name})
    if inside:
        return f"{min(inside)}, which has a scale of its own, would change with it"
    scale = np.ones(site.groups + 1)
    fixed = np.unique(entry.scale[labels == 0])
    middle = float(fixed[0]) if fixed.size else float(np.exp(np.log(entry.scale).mean()))
    middle = float(np.float32(middle))
    for label in np.unique(labels):
        own = np.unique(entry.scale[labels == label])
        if own.size != 1:
            return "channels that must be scaled alike have different scales"
        scale[label] = np.float32(own[0] / middle) if label else 1.0
    ratios = Scales(method="frozen", scale=scale, shift=np.zeros(site.groups + 1))
    return apply_scales(graph, site, ratios) or middle


def _between(graph: Graph, site: Site) -> set[str]:
    """Return the tensors between the constants that take ratios and the ops that undo them."""
    sources = {id(slot.node) for slot in site.slots}
    ends: dict[int, Node] = {id(r.linear.node): r.linear.node for r in site.readers}
    ends |= {id(product.node): product.node for product in site.products}
    behind: set[str] = set()
    for node in graph.nodes:
        moves = id(node) not in ends and any(name in behind for name in reads(node))
        if id(node) in sources or moves:
            behind.update(tensor.name for tensor in node.outputs)
    ahead = {name for node in ends.values() for name in reads(node)}
    for node in reversed(graph.nodes):
        if id(node) not in ends and any(tensor.name in ahead for tensor in node.outputs):
            ahead.update(reads(node))
    return behind & ahead
