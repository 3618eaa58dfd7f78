"""Decide, from a target's rules and the user's policy, what each tensor of a graph becomes.

Integer regions grow from the linear ops: where a target fuses only with a Q behind the op
(convolutions on onnxruntime) the output becomes *resident*: every reader takes integers. Ops that
merely follow (Add, Concat, pooling) join when all their inputs are resident and something behind
them wants integers. Ops that produce float by themselves (MatMul on onnxruntime) get a Q only on
the edges into the next linear op, so that the residual path of a transformer stays float.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from qpass.bits import EDGE_BITS, NodeBits, bits_of_nodes
from qpass.embeddings import embeddings
from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.masks import MASK_VALUE, holds_mask, masked_tensors
from qpass.matching import (
    NOT_FINITE,
    channel_axis,
    data_inputs,
    data_outputs,
    is_absorbable,
    is_dynamic,
    is_float32,
    match_rule,
)
from qpass.plan import Decision, Edge, NodeDecision, NodePrecision, Plan
from qpass.planner_weights import ConstantDecisions, Keys, embedding, weight_only, weight_spec
from qpass.policy_check import check_policy, check_result
from qpass.program import Policy
from qpass.qparams import TensorSpec
from qpass.targets.schema import OpRule, Target, with_bits

NONNEGATIVE_OPS: Final = frozenset({"Softmax", "Relu", "Sigmoid", "HardSigmoid"})


def plan(graph: Graph, target: Target, policy: Policy) -> Plan:
    """Decide for every node and tensor of `graph`; the graph is not changed.

    Raises:
        ModelError: no op of the graph can be quantized for this target.
        RecipeError: the policy speaks of a node or tensor that the model does not have.
    """
    check_policy(graph, policy, target)
    planner = _Planner(graph, target, policy)
    planner.decide()
    result = planner.result()
    check_result(result, target)
    return result


@dataclass(slots=True)
class _Planner:
    graph: Graph
    target: Target
    policy: Policy
    full: bool = field(init=False)  # every op that can, inputs and outputs included
    masked: frozenset[str] = field(init=False)  # tensors with attention masks
    rules: dict[int, OpRule] = field(default_factory=dict)  # id(node) -> rule that applies
    reasons: dict[int, str] = field(default_factory=dict)  # id(node) -> because
    precision: dict[int, NodePrecision] = field(default_factory=dict)
    absorbed: dict[int, Node] = field(default_factory=dict)  # id(node) -> activation in its Q
    resident: dict[str, str] = field(default_factory=dict)  # tensor -> because
    requests: dict[tuple[str, TensorSpec], list[Edge]] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)  # inputs and outputs of integer followers
    because: dict[str, str] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    keys: Keys = field(default_factory=Keys)
    constants: ConstantDecisions = field(init=False)
    bits: dict[str, NodeBits] = field(init=False)  # node -> its precision
    parents: dict[str, str] = field(default_factory=dict)  # union-find over tied tensors

    def __post_init__(self) -> None:
        self.full = self.target.scheme == "full" and self.policy.precision.activation is not None
        self.masked = masked_tensors(self.graph)
        self.constants = ConstantDecisions(self.keys)
        self.bits = bits_of_nodes(self.graph, self.policy, self.target)

    # ------------------------------------------------------------------ decisions

    def decide(self) -> None:
        for node in self.graph.nodes:
            rule, reason = match_rule(node, self.target, self.policy)
            if rule is None:
                self.reasons[id(node)] = reason
            else:
                self.rules[id(node)] = rule
        for node in self.graph.nodes:
            rule = self.rules.get(id(node))
            if rule is not None and rule.role == "linear":
                self._take_linear(node, rule)
        self._take_embeddings()
        if self.policy.precision.activation is None:
            for node in self.graph.nodes:
                if id(node) not in self.precision:
                    self.reasons.setdefault(id(node), "weights only: activations stay float")
            return
        joined = self._join()
        if self.full:
            for tensor, _ in self.requests:
                self.resident.setdefault(tensor, self.because[tensor])
        for node in self.graph.nodes:
            if id(node) in joined:
                self._take_follower(node, self.rules[id(node)])
            elif id(node) in self.rules and self.rules[id(node)].skip_input_only:
                self._take_skip_input(node, self.rules[id(node)])

    def _usual(self, spec: TensorSpec | None) -> TensorSpec:
        """Return a spec for what is not the input of a linear op: at least 8 bits.

        Sums and pools hold what several layers made; only the products gain from fewer bits.
        """
        spec, bits = spec or self.target.activation, self.policy.precision.activation
        return spec if bits is None else with_bits(spec, max(bits, EDGE_BITS))

    def _take_linear(self, node: Node, rule: OpRule) -> None:
        bits = self.bits[node.name]
        because = f"rule {self.target.name}/{node.op}"
        if bits.reason:
            because += f"; {bits.reason}"
            self.reasons[id(node)] = because
        self.precision[id(node)] = "integer"
        weight = node.inputs[1]
        if bits.precision.activation is None and isinstance(weight, Constant):
            own = weight_only(node, weight, rule, self.target, self.policy, bits.precision.weight)
            reason = f"weight of {node.name}"
            self.constants.add(node, 1, weight, own.spec, "weight", reason, shared=False)
            self.precision[id(node)] = own.precision
            self.reasons[id(node)] = f"{because}: {own.because}"
            self.bits[node.name] = bits.with_weights(own.spec.bits)
            return
        dynamic = is_dynamic(node, bits.precision, self.policy)
        if isinstance(weight, Constant):
            spec = weight_spec(
                node, weight, rule, self.target, bits.precision.weight, static=not dynamic
            )
            self.constants.add_weight(node, weight, spec)
        if dynamic:
            self.reasons[id(node)] = f"{because}: range of the input at run time"
            return
        if isinstance(weight, Constant):
            self._request(node, 0, rule.activation)
        else:
            left, maker = rule.lhs, self.graph.producer(node.inputs[0])
            if rule.lhs_nonnegative is not None and maker and maker.op in NONNEGATIVE_OPS:
                left = rule.lhs_nonnegative
            self._request(node, 0, left or rule.activation)
            self._request(node, 1, rule.rhs or rule.activation)
        if rule.output != "float":
            out = self._fused_output(node, rule)
            self.resident[out.name] = f"{because}: output {rule.output}"
            self.axes[out.name] = channel_axis(node)

    def _take_embeddings(self) -> None:
        for node in embeddings(self.graph).values():
            bits = self.bits[node.name]
            alone = bits.precision.activation is None
            if not alone or self.target.weight_rule_for(node.op) is None:
                continue
            because = f"rule {self.target.name}/{node.op}"
            kept, table = self.policy.reason_to_keep(node.name), node.inputs[0]
            if kept is not None or not np.isfinite(array_of(table)).all():
                self.reasons[id(node)] = kept or f"{because}: {NOT_FINITE}"
                continue
            own = embedding(node, table, self.target, self.policy, bits.precision.weight)
            self.constants.add(
                node, 0, table, own.spec, "weight", f"rows of {node.name}", shared=False
            )
            self.precision[id(node)] = own.precision
            reason = f"; {bits.reason}" if bits.reason else ""
            self.reasons[id(node)] = f"{because}{reason}: {own.because}"

    def _request(self, node: Node, index: int, spec: TensorSpec | None) -> None:
        tensor, wanted = node.inputs[index], self._usual(spec)
        bits = self.bits[node.name].precision.activation
        if bits is not None and self.rules[id(node)].role == "linear":
            wanted = with_bits(wanted, bits)
        edge = Edge(node=node.name, index=index)
        self.requests.setdefault((tensor.name, wanted), []).append(edge)
        self.because.setdefault(tensor.name, f"input {index} of {node.name} ({node.op})")
        self.axes.setdefault(tensor.name, channel_axis(node))

    def _fused_output(self, node: Node, rule: OpRule) -> Tensor:
        """Return the tensor behind `node` and the activation that fuses with its Q."""
        out = node.outputs[0]
        if len(out.outputs) != 1 or self.graph.is_output(out):
            return out
        if out.name in self.graph.captured:  # a body of control flow reads it as well
            return out
        follower: Node = out.outputs[0]
        kept = self.policy.reason_to_keep(follower.name) is not None
        if follower.op not in rule.absorbs or kept or not is_absorbable(follower):
            return out
        self.absorbed[id(node)] = follower
        self.precision[id(follower)] = "passthrough"
        self.reasons[id(follower)] = f"absorbed by the Q behind {node.name}"
        fused: Tensor = follower.outputs[0]
        return fused

    # ------------------------------------------------------------------ followers

    def _obstacle(self, node: Node, rule: OpRule, alive: set[str]) -> str:
        inputs, outputs = data_inputs(node, rule), data_outputs(node)
        if not all(is_float32(t) for t in (*(t for _, t in inputs), *outputs)):
            return "does not carry float32"
        if all(isinstance(t, Constant) for _, t in inputs):
            return "all inputs are constants"
        for index, tensor in inputs:
            if holds_mask(tensor) or tensor.name in self.masked:
                return f"input {index} ({tensor.name}) holds an attention mask"
            if isinstance(tensor, Constant):
                if not np.isfinite(array_of(tensor)).all():
                    return f"constant input {index} holds NaN or infinity"
            elif tensor.name not in alive and not self.full:
                return f"input {index} ({tensor.name}) is float"
        return ""

    def _behind(self, node: Node, rule: OpRule) -> list[Tensor]:
        return [self._fused_output(node, rule)] if rule.absorbs else data_outputs(node)

    def _join(self) -> set[int]:
        """Return the ids of the nodes that follow their inputs into integers."""
        alive = set(self.resident)
        candidates: dict[int, list[Tensor]] = {}
        for node in self.graph.nodes:
            rule = self.rules.get(id(node))
            if rule is not None and (rule.role, rule.output) == ("linear", "follow"):
                candidates[id(node)] = [self.absorbed.get(id(node), node).outputs[0]]
            if rule is None or rule.role == "linear" or rule.skip_input_only:
                continue
            if id(node) in self.precision:  # absorbed by the op before it
                continue
            obstacle = self._obstacle(node, rule, alive)
            if obstacle:
                self.reasons[id(node)] = f"rule {self.target.name}/{node.op}: {obstacle}"
                continue
            candidates[id(node)] = self._behind(node, rule)
            alive |= {t.name for t in candidates[id(node)]}
        wanted = {tensor for tensor, _ in self.requests}
        kept: set[int] = set()
        for node in reversed(self.graph.nodes):
            if id(node) not in candidates:
                continue
            rule = self.rules[id(node)]
            needed = self.full or rule.shrinks
            if needed or any(t.name in wanted for t in candidates[id(node)]):
                if rule.role != "linear":
                    kept.add(id(node))
                    wanted |= {t.name for _, t in data_inputs(node, rule)}
                continue
            if rule.role == "linear":  # integers with a float output
                self.resident.pop(candidates[id(node)][0].name, None)
            else:
                self.reasons[id(node)] = "nothing behind it runs in integers"
            follower = self.absorbed.pop(id(node), None)
            if follower is not None:
                del self.precision[id(follower)]
                self.reasons[id(follower)] = "nothing behind it runs in integers"
        return kept

    def _take_follower(self, node: Node, rule: OpRule) -> None:
        self.precision[id(node)] = "integer" if rule.role == "follow" else "passthrough"
        because = f"rule {self.target.name}/{node.op}"
        self.reasons.setdefault(id(node), because)
        spec = self._usual(rule.activation)
        tied: list[str] = []
        for index, tensor in data_inputs(node, rule):
            if isinstance(tensor, Constant):
                constant_spec = replace(spec, granularity="per_tensor", axis=None)
                reason = f"constant input {index} of {node.name}"
                self.constants.add(node, index, tensor, constant_spec, "constant", reason)
                continue
            tied.append(tensor.name)
            if self.full:
                self.resident.setdefault(tensor.name, because)
        for out in self._behind(node, rule):
            self.resident.setdefault(out.name, because)
            self.axes.setdefault(out.name, self.axes.get(tied[0], 1))
            tied.append(out.name)
        if rule.role == "follow":
            self.computed.update(tied)
        if rule.tie:
            for name in tied[1:]:
                self._tie(tied[0], name)

    def _take_skip_input(self, node: Node, rule: OpRule) -> None:
        """Quantize only the input of a residual Add that no linear op computes."""
        direct = [self._is_direct(tensor) for tensor in node.inputs]
        if sorted(direct) != [False, True] or any(isinstance(t, Constant) for t in node.inputs):
            self.reasons[id(node)] = f"rule {self.target.name}/{node.op}: not a residual Add"
            return
        skip = direct.index(False)
        if node.inputs[skip].name in self.masked:
            self.reasons[id(node)] = f"rule {self.target.name}/{node.op}: adds an attention mask"
            return
        self._request(node, skip, rule.activation)
        self.precision[id(node)] = "passthrough"
        self.reasons[id(node)] = f"rule {self.target.name}/{node.op}: Q on the skip input"

    def _is_direct(self, tensor: Tensor) -> bool:
        maker = self.graph.producer(tensor)
        rule = self.rules.get(id(maker)) if maker is not None else None
        return rule is not None and rule.role == "linear" and len(tensor.outputs) == 1

    # ------------------------------------------------------------------ ties and result

    def _find(self, name: str) -> str:
        while self.parents.get(name, name) != name:
            name = self.parents[name]
        return name

    def _tie(self, a: str, b: str) -> None:
        self.parents[self._find(b)] = self._find(a)
        self.parents.setdefault(self._find(a), self._find(a))

    def result(self) -> Plan:
        order = {name: i for i, name in enumerate(self.graph.tensors())}
        # A pair of its own for some readers comes before the one for all: its Q is a reader, too.
        activations = sorted(
            self._activation_decisions(), key=lambda d: (order[d.tensor], d.edges is None)
        )
        return Plan(
            target=self.target.name,
            precision=str(self.policy.precision),
            decisions=(*activations, *self.constants.all()),
            nodes=tuple(self._node_decision(node) for node in self.graph.nodes),
            settings=self.policy.settings,
        )

    def _resident_specs(self) -> dict[str, TensorSpec]:
        """Return the spec of each resident tensor; tied tensors have one.

        The kind is what the readers ask for, and the target's usual one when they ask for several;
        the width is the widest that a reader wants. Narrower readers get a pair of their own.
        """
        usual = self._usual(None)
        asked: dict[str, list[TensorSpec]] = {}
        for tensor, spec in self.requests:
            if tensor in self.resident:
                asked.setdefault(self._find(tensor), []).append(spec)
        computed = {self._find(tensor) for tensor in self.computed}
        specs: dict[str, TensorSpec] = {}
        for root, found in asked.items():
            bits = max(spec.bits for spec in found)
            if root in computed:
                bits = max(bits, usual.bits)
            wide = [with_bits(spec, bits) for spec in found]
            kind = with_bits(usual, bits)
            specs[root] = kind if kind in wide else wide[0]
        return {tensor: specs.get(self._find(tensor), usual) for tensor in self.resident}

    def _activation_decisions(self) -> Iterator[Decision]:
        resident = self._resident_specs()
        for tensor, because in self.resident.items():
            yield self._decision(tensor, resident[tensor], because, None)
        for (tensor, spec), edges in self.requests.items():
            if resident.get(tensor) != spec:
                yield self._decision(tensor, spec, self.because[tensor], tuple(edges))

    def _decision(
        self, tensor: str, spec: TensorSpec, because: str, edges: tuple[Edge, ...] | None
    ) -> Decision:
        tied = edges is None and tensor in self.parents
        return Decision(
            key=self.keys.free(tensor),
            tensor=tensor,
            kind="activation",
            spec=spec,
            because=because,
            edges=edges,
            group=self._find(tensor) if tied else None,
            channel_axis=self.axes.get(tensor),
            mask_below=MASK_VALUE if tensor in self.masked else None,
            pinned=self.policy.ranges.get(tensor),
        )

    def _node_decision(self, node: Node) -> NodeDecision:
        precision = self.precision.get(id(node), "float")
        rule = f"{self.target.name}/{node.op}" if id(node) in self.rules else ""
        default = f"rule {rule}" if rule else f"target {self.target.name} has no integer {node.op}"
        reason = self.reasons.get(id(node), default)
        linear = precision in ("weights", "stored") or (
            bool(rule) and self.rules[id(node)].role == "linear"
        )
        return NodeDecision(
            name=node.name,
            op=node.op,
            precision=precision,
            because=reason,
            rule=rule,
            bits=str(self.bits[node.name].precision) if linear else "",
        )
