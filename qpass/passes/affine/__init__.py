"""Fold constant gains and offsets of channels forward into the linear ops that read them.

What it does
    A chain y = a * x + c of Mul, Div, Add, Sub and BatchNormalization with constant operands (the
    inference form of Unified Normalization is one) disappears into every Conv, Gemm and MatMul that
    reads y: W' = W diag(a), b' = b + W c. Ops that move, select or average whole channels may stand
    between. Readers that are not linear keep y; so does the residual edge of a post-norm block.
Why it is correct
    W (a * x + c) + b = (W diag(a)) x + (b + W c). A Conv with zero padding would see 0 where it
    should see c, so it takes the gain alone and reads x + c / a.
Preconditions
    The graph is normalized. What lies directly behind linear ops is folded there already, backward.
Reference
    Yang et al., Unified Normalization for Accelerating and Stabilizing Transformers, 2022, 3.4.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qpass.errors import InternalError
from qpass.graph import Constant, Graph, Node, Variable
from qpass.passes.affine.absorb import LinearReader, absorb, overflow, write_affine
from qpass.passes.affine.chains import Chain, chains
from qpass.passes.affine.region import Branch, Region
from qpass.passes.normalize.folding import Array, FoldResult, rank_of
from qpass.passes.normalize.linear_folding import Affine
from qpass.report.model import PassReport

__all__ = ["fold_channel_affines"]

RULE: Final = "fold channel affine"
MAX_ROUNDS: Final = 20  # a fold may put two chains together: each round ends one level of these


def fold_channel_affines(graph: Graph) -> PassReport:
    """Fold every chain that linear ops can take; `changed` counts the ops that took one."""
    changed = 0
    for _ in range(MAX_ROUNDS):
        result = FoldResult()
        for chain in chains(graph):
            _fold(graph, chain, result)
        graph.remove_unused()
        changed += result.changed
        if not result.changed:
            break
    else:
        raise InternalError(f"folding affines does not come to an end in {MAX_ROUNDS} rounds")
    if changed:
        graph.sort()
        graph.infer_shapes()
    return PassReport(name="affine", changed=changed, refusals=tuple(result.refusals))


def _fold(graph: Graph, chain: Chain, result: FoldResult) -> None:
    if _is_norm_gain(graph, chain):
        reason = "it is the gain of a norm: engines compute both as one op"
        result.refuse(RULE, chain.nodes[0], reason)
        return
    reasons: list[str] = []
    for axis in _axes(chain):
        channels = chain.output.shape[axis]
        affine = chain.along(axis, channels) if isinstance(channels, int) else None
        if affine is None:
            reasons.append("the number of its channels is not known")
            continue
        branches = Region(graph, chain.output, axis, channels).branches()
        done, reason = _apply(graph, chain, axis, affine, branches)
        result.changed += done
        reasons.append(reason)
        if done:  # the other axis was only a guess
            break
    if reasons and reasons[-1] and _is_normalization(chain):
        result.refuse(RULE, chain.nodes[0], reasons[-1])


def _is_norm_gain(graph: Graph, chain: Chain) -> bool:
    """True behind a product or quotient with one computed number for each row of channels.

    That is how an RMSNorm is written out; without its gain engines do not know it again.
    """
    maker, axis = graph.producer(chain.source), chain.axis
    if maker is None or maker.op not in ("Div", "Mul") or axis is None:
        return False
    shapes = [t.shape for t in maker.inputs if not isinstance(t, Constant)]
    wide = all(s is not None and len(s) > axis for s in shapes) and len(shapes) == 2
    return wide and sorted(s[axis] == 1 for s in shapes) == [False, True]


def _axes(chain: Chain) -> list[int]:
    """Return where the channels may be: last for MatMul and Gemm, second for Conv."""
    if chain.axis is not None:
        return [chain.axis]
    rank = rank_of(chain.output) or 0
    return sorted({rank - 1, 1} & set(range(rank)), reverse=True)


def _is_normalization(chain: Chain) -> bool:
    """True for a gain by channel: biases and scaled logits are nothing that needs a reason."""
    return chain.axis is not None and any(node.op not in ("Add", "Sub") for node in chain.nodes)


def _apply(
    graph: Graph, chain: Chain, axis: int, affine: Affine, branches: list[Branch]
) -> tuple[int, str]:
    """Fold into the branches that can take it; return how many ops did, and why not all."""
    whole = [b for b in branches if b.readers and not _obstacle(b, affine)]
    rest = [b for b in branches if b not in whole]
    kept = graph.is_output(chain.output) or chain.output.name in graph.captured
    reason = "it is an output of the model" if kept else ""
    if rest and not reason:
        reason = rest[0].reason or _obstacle(rest[0], affine)
    done = 0
    if whole:
        _absorb_all(graph, whole, affine)
        for branch in whole:
            graph.set_input(*branch.edge, chain.source)
        done += sum(len(branch.readers) for branch in whole)
    if rest and not kept:
        done += _take_gain(graph, chain, axis, affine, rest)
    return done, reason


def _obstacle(branch: Branch, affine: Affine) -> str:
    """Return why a branch does not take gain and offset whole."""
    if branch.reason:
        return branch.reason
    if affine.offset.any():
        blocked = next((r for r in branch.readers if r.obstacle), None)
        if blocked is not None:
            return f"{blocked.node.name} takes the gain alone: {blocked.obstacle}"
    return next((text for r in branch.readers if (text := overflow(r, affine))), "")


def _absorb_all(graph: Graph, branches: list[Branch], affine: Affine) -> None:
    readers: dict[int, LinearReader] = {id(r.node): r for b in branches for r in b.readers}
    for reader in readers.values():
        absorb(graph, reader, affine)


def _take_gain(graph: Graph, chain: Chain, axis: int, affine: Affine, rest: list[Branch]) -> int:
    """Where only the offset is in the way: leave x + c / a, and fold the gain. Return how many."""
    gain_only = Affine(gain=affine.gain, offset=np.zeros_like(affine.offset))
    if any(branch.reason or _obstacle(branch, gain_only) for branch in rest):
        return 0  # something needs y as it is: an offset of its own for the others would cost
    if not _changes(affine) or not (affine.gain != 0).all():
        return 0
    shift = affine.offset / affine.gain
    if not np.isfinite(shift.astype(np.float32)).all():
        return 0
    _absorb_all(graph, rest, gain_only)
    _leave_offset(graph, chain, axis, shift)
    return sum(len(branch.readers) for branch in rest)


def _changes(affine: Affine) -> bool:
    return bool((affine.gain != 1.0).any())


def _leave_offset(graph: Graph, chain: Chain, axis: int, shift: Array) -> None:
    """Let the last node of the chain be all of it: the Add of `shift`."""
    assert isinstance(chain.source, Variable)
    last: Node = chain.nodes[-1]
    affine = Affine(gain=np.ones_like(shift), offset=shift)
    write_affine(graph, chain.source, affine, axis, last)
