"""How many bits each linear op gets: the precision of the run, the ends at 8 bits, the user's own.

The stem (linear ops without a layer before them) and the head (linear ops without one behind them)
stay at 8 bits when the rest goes lower. Their errors are the dearest and their bits the cheapest: a
stem sees the only copy of the input and a head's error is the output's, while together they hold
few of the weights; published results below 8 bits are counted the same way (BRECQ, QDrop, RepQ-ViT
and their successors keep the first and the last layer at 8 bits).

An embedding (Gather from a constant matrix) is a layer, so the projections behind the embedding of
a language model are no stem. Recurrent cells are layers, too. With integer weights alone, an
embedding has the bits of the run; one that is tied to a head has the head's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from qpass.embeddings import is_lookup, tied_tables
from qpass.graph import Graph, Node
from qpass.program import Policy, Precision
from qpass.targets.schema import Target
from qpass.units import is_weighted, reads

End = Literal["stem", "head"]
EDGE_BITS: Final = 8
RECURRENT: Final = frozenset({"GRU", "LSTM", "RNN"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeBits:
    """The precision of one linear op; `reason` says why it is not that of the run ("": it is)."""

    precision: Precision
    reason: str = ""

    def with_weights(self, bits: int) -> NodeBits:
        """Return the same with weights of at least `bits` bits."""
        weight = max(bits, self.precision.weight)
        return replace(self, precision=replace(self.precision, weight=weight))


def stem_and_head(graph: Graph) -> dict[str, End]:
    """Return the linear ops with constant weights at the ends of `graph`, by node name.

    An op that is both (a model of one layer) counts as head.
    """
    ends: dict[str, End] = {}
    behind: set[str] = set()  # tensors that a layer had a part in
    for node in graph.nodes:
        read = reads(node)
        follows = any(name in behind for name in read)
        if is_weighted(node) and not follows:
            ends[node.name] = "stem"
        if follows or _is_layer(node):
            behind |= {tensor.name for tensor in node.outputs}
    ahead: set[str] = set()  # tensors that a layer makes something of
    for node in reversed(graph.nodes):
        leads = any(tensor.name in ahead for tensor in node.outputs)
        if is_weighted(node) and not leads:
            ends[node.name] = "head"
        if leads or _is_layer(node):
            ahead.update(reads(node))
    return ends


def _is_layer(node: Node) -> bool:
    return is_weighted(node) or is_lookup(node) or node.op in RECURRENT


def tied_heads(graph: Graph, ends: Mapping[str, End]) -> dict[str, str]:
    """Return the embeddings whose table is the weight of a head, with the name of the head."""
    return tied_tables(graph, {name for name, end in ends.items() if end == "head"})


def bits_of_nodes(graph: Graph, policy: Policy, target: Target) -> dict[str, NodeBits]:
    """Return the precision of every node, by name; it matters for linear ops and embeddings.

    The strongest comes first: the narrowest that the target takes, `policy.node_bits`, the ends of
    the model, the precision of the run. Where the user's entry says what would hold anyway, the
    reason stays what it is.
    """
    low = raised(policy.precision) != policy.precision and not policy.low_bit_edges
    ends: Mapping[str, End] = stem_and_head(graph) if low else {}
    tied: Mapping[str, str] = {}
    if low and policy.precision.activation is None:
        tied = {**tied_heads(graph, ends), **policy.tied}
    found: dict[str, NodeBits] = {}
    for node in graph.nodes:
        usual = NodeBits(precision=policy.precision)
        if node.name in ends:
            reason = f"{ends[node.name]} of the model: {EDGE_BITS} bits (--low-bit-edges: fewer)"
            usual = NodeBits(precision=raised(policy.precision), reason=reason)
        elif ends.get(tied.get(node.name, "")) == "head":
            reason = f"tied to the head {tied[node.name]}: {EDGE_BITS} bits as the head"
            usual = NodeBits(precision=raised(policy.precision), reason=reason)
        usual = _at_least(usual, node, target)
        own = policy.own_bits(node.name)
        if own is not None and own[0] != usual.precision:
            usual = _at_least(NodeBits(precision=own[0], reason=own[1]), node, target)
        found[node.name] = usual
    return found


def raised(precision: Precision, bits: int = EDGE_BITS) -> Precision:
    """Return `precision` with at least `bits` bits."""
    activation = precision.activation
    return replace(
        precision,
        weight=max(precision.weight, bits),
        activation=None if activation is None else max(activation, bits),
    )


def taken_by(target: Target, precision: Precision) -> Precision:
    """Return what `target` makes of a precision that is narrower than its integer products."""
    return precision if precision.activation is None else raised(precision, target.narrowest)


def _at_least(wanted: NodeBits, node: Node, target: Target) -> NodeBits:
    """Return what a target makes of `wanted` that has no integer products so narrow."""
    rule = target.rule_for(node.op)
    if rule is None or wanted.precision.activation is None:
        return wanted
    precision = raised(wanted.precision, rule.min_bits)
    if precision == wanted.precision:
        return wanted
    reason = f"{wanted.precision} is narrower than target {target.name} takes: {precision}"
    return NodeBits(precision=precision, reason=reason)
