"""Recognize Unified Normalization at inference, and write it as one Mul and one Add.

What it does
    UN divides by the root of a frozen second moment of each channel: y = gamma * x / sqrt(var +
    epsilon) + beta. It comes as a call of the local function `qpass::UnifiedNorm` (X, gamma, beta,
    var; attribute epsilon, channels last), or as the chain that exporters make of it: Div or Mul by
    the root, Mul by gamma, Add of beta. Either becomes Mul and Add with a = gamma / sqrt(var +
    epsilon) in float64, rounded once.
Why it is correct
    All operands are constant, and a chain of affine maps of channels is one.
Preconditions
    The graph is normalized: roots and quotients of constants are constants.
Reference
    Yang et al., Unified Normalization for Accelerating and Stabilizing Transformers, 2022, 3.4.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qpass.graph import Graph, Node, Variable
from qpass.passes.affine.absorb import write_affine
from qpass.passes.affine.chains import Chain, chains
from qpass.passes.normalize.folding import FoldResult, constant_of, rank_of
from qpass.passes.normalize.linear_folding import Affine
from qpass.report.model import PassReport

DOMAIN: Final = "qpass"
FUNCTION: Final = "UnifiedNorm"
RULE: Final = "recognize UnifiedNorm"
EPSILON: Final = 1e-5


def recognize_unified_norms(graph: Graph) -> PassReport:
    """Write each UN as one Mul and one Add; `changed` counts them, canonical ones too."""
    result = FoldResult()
    for node in list(graph.nodes):
        if node.op == FUNCTION and node.domain == DOMAIN:
            _expand(graph, node, result)
    for chain in chains(graph):
        if _is_long(chain):
            assert isinstance(chain.source, Variable)
            assert chain.axis is not None
            last = chain.nodes[-1]
            write_affine(graph, chain.source, chain.affine, chain.axis, last)
            result.changed += 1
    graph.remove_unused()
    if result.changed:
        graph.sort()
        graph.infer_shapes()
    return PassReport(name="unified-norm", changed=result.changed, refusals=tuple(result.refusals))


def _expand(graph: Graph, node: Node, result: FoldResult) -> None:
    values = [constant_of(tensor) for tensor in node.inputs[1:4]]
    rank = rank_of(node.inputs[0])
    if len(values) != 3 or any(value is None for value in values) or rank is None:
        result.refuse(RULE, node, "gamma, beta or var is not constant, or the rank is not known")
        return
    gamma, beta, variance = (np.asarray(value).ravel() for value in values)
    with np.errstate(divide="ignore", invalid="ignore"):  # looked at below
        gain = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", EPSILON)))
    if not (np.isfinite(gain).all() and np.isfinite(beta).all()):
        result.refuse(RULE, node, "gamma, beta or var is not finite")
        return
    channels = max(gain.size, beta.size)
    affine = Affine(
        gain=np.broadcast_to(gain, (channels,)), offset=np.broadcast_to(beta, (channels,))
    )
    source = node.inputs[0]
    assert isinstance(source, Variable)
    write_affine(graph, source, affine, rank - 1, node)
    result.changed += 1


def _is_long(chain: Chain) -> bool:
    """True for a chain along the last axis that Mul and Add say in fewer nodes."""
    if chain.axis is None or chain.axis != (rank_of(chain.source) or 0) - 1:
        return False
    needed = bool((chain.affine.gain != 1.0).any()) + bool(chain.affine.offset.any())
    return len(chain.nodes) > max(1, needed)
