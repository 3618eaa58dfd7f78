"""Fold gain and bias of LayerNormalization and RMSNormalization into the linear ops behind.

What it does
    y = g * norm(x) + c is read by linear ops only: W' = W diag(g), b' = b + W c; the norm keeps a
    gain of 1 and a bias of 0. The node stays, so nothing becomes faster: it is what rotations and
    LayerNorm -> RMSNorm stand on, for a rotation does not commute with a gain by channel.
Why it is correct
    (W diag(g)) z + (W c + b) = W (g * z + c) + b, as for any affine map of channels.
Preconditions
    The graph is normalized. Norms over more than the last axis are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Constant, Graph, Node
from qpass.passes.affine.absorb import LinearReader, absorb, overflow
from qpass.passes.affine.region import Region
from qpass.passes.normalize.folding import (
    FoldResult,
    constant_of,
    given_input,
    rank_of,
    write_constant,
)
from qpass.passes.normalize.linear_folding import Affine
from qpass.report.model import PassReport

RULE: Final = "fold norm gain"
NORMS: Final = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A normalization over the last axis with constant gain and bias, of `channels` channels."""

    node: Node
    channels: int
    affine: Affine

    @property
    def plain(self) -> bool:
        """True when gain is 1 and bias 0."""
        return bool((self.affine.gain == 1.0).all() and not self.affine.offset.any())


def read_norm(node: Node) -> Norm | str:
    """Return the numbers of a LayerNormalization or RMSNormalization, or why they are not known."""
    rank, shape = rank_of(node.inputs[0]), node.inputs[0].shape
    if node.op not in NORMS or node.domain not in (None, "", "ai.onnx"):
        return f"{node.op} is no LayerNormalization"
    if rank is None or int(node.attrs.get("axis", -1)) % rank != rank - 1:
        return "it goes over more than the last axis"
    if any(tensor.name for tensor in node.outputs[1:]):
        return "its mean or deviation is read"
    channels, bias = shape[-1], given_input(node, 2)
    gain = constant_of(node.inputs[1])
    offset = np.zeros(1) if bias is None else constant_of(bias)
    if gain is None or offset is None or not isinstance(channels, int):
        return "its gain or bias is not constant"
    if gain.size not in (1, channels) or offset.size not in (1, channels):
        return "its gain or bias is not one value for each channel"
    wide = [np.array(np.broadcast_to(v.ravel(), (channels,))) for v in (gain, offset)]
    if not all(np.isfinite(v).all() for v in wide):
        return "its gain or bias is not finite"
    return Norm(node=node, channels=channels, affine=Affine(gain=wide[0], offset=wide[1]))


def fold_norm_gains(graph: Graph) -> PassReport:
    """Fold every gain and bias whose readers are all linear; `changed` counts the norms."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op not in NORMS:
            continue
        norm = read_norm(node)
        if isinstance(norm, str):
            result.refuse(RULE, node, norm)
        elif not norm.plain:
            _fold(graph, norm, result)
    if result.changed:
        graph.sort()
        graph.infer_shapes()
    return PassReport(name="norm-gain", changed=result.changed, refusals=tuple(result.refusals))


def _fold(graph: Graph, norm: Norm, result: FoldResult) -> None:
    out = norm.node.outputs[0]
    branches = Region(graph, out, len(norm.node.inputs[0].shape) - 1, norm.channels).branches()
    readers: dict[int, LinearReader] = {id(r.node): r for b in branches for r in b.readers}
    reason = next((b.reason for b in branches if b.reason), "")
    if graph.is_output(out) or out.name in graph.captured:
        reason = "it is an output of the model"
    for reader in readers.values():
        if norm.affine.offset.any() and reader.obstacle:
            reason = reason or f"{reader.node.name}: {reader.obstacle}"
        reason = reason or overflow(reader, norm.affine)
    if reason:
        result.refuse(RULE, norm.node, reason)
        return
    for reader in readers.values():
        absorb(graph, reader, norm.affine)
    make_plain(graph, norm)
    result.changed += 1


def make_plain(graph: Graph, norm: Norm) -> None:
    """Give a norm a gain of 1 and a bias of 0."""
    node = norm.node
    for index, fill in ((1, 1.0), (2, 0.0)):
        tensor = given_input(node, index)
        if isinstance(tensor, Constant):
            write_constant(graph, node, index, np.full(tensor.shape, fill, tensor.dtype))
