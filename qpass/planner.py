"""Decide, from a target's rules and the user's policy, what each tensor of a graph becomes.

Integer regions grow from the linear ops: where a target fuses only with a Q behind the op
(convolutions on onnxruntime) the output becomes *resident*: every reader takes integers. Ops that
merely follow (Add, Concat, pooling) join when all their inputs are resident and something behind
them wants integers. Ops that produce float by themselves (MatMul on onnxruntime) get a Q only on
the edges into the next linear op, so that the residual path of a transformer stays float. One model
can hold both kinds of region; nothing is decided by the name of the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from qpass.errors import ModelError, RecipeError
from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.plan import Decision, DecisionKind, Edge, NodeDecision, NodePrecision, Plan
from qpass.program import Policy
from qpass.qparams import TensorSpec
from qpass.targets.schema import OpRule, Target, with_bits

MASK_VALUE: Final = -1e4  # attention masks add this or less (or -inf)
NONNEGATIVE_OPS: Final = frozenset({"Softmax", "Relu", "Sigmoid", "HardSigmoid"})


def plan(graph: Graph, target: Target, policy: Policy) -> Plan:
    """Decide for every node and tensor of `graph`; the graph is not changed.

    Raises:
        ModelError: no op of the graph can be quantized for this target.
        RecipeError: a `--keep` pattern matches no node, a pinned tensor does not exist.
    """
    _check_policy(graph, policy)
    planner = _Planner(graph, target, policy)
    planner.decide()
    result = planner.result()
    if not any(d.kind != "constant" for d in result.decisions):
        reasons = sorted({n.because for n in result.nodes if target.rule_for(n.op)})
        raise ModelError(
            f"no op of the model can be quantized for target {target.name}",
            where="; ".join(reasons[:5]) or "the model has no Conv, Gemm or MatMul with weights",
            fix="`qpass plan` shows the reason for each node",
        )
    return result


def _check_policy(graph: Graph, policy: Policy) -> None:
    names = [node.name for node in graph.nodes]
    for pattern in policy.keep:
        single = replace(policy, keep=(pattern,), float_nodes={})
        if not any(single.reason_to_keep(name) for name in names):
            raise RecipeError(
                f"--keep {pattern!r} matches no node",
                fix="`qpass plan` lists the node names; patterns use *, ? and [ ]",
            )
    missing = [name for name in policy.ranges if name not in graph.tensors()]
    if missing:
        raise RecipeError(f"the plan pins the range of {missing[0]}, which is not in the model")


def weight_axis(node: Node, rank: int) -> int:
    """Return the axis of the output channels in the weight of a linear op (ONNX operators)."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return rank - 1


def is_float32(tensor: Tensor) -> bool:
    """True when the dtype of `tensor` is float32, or unknown."""
    return tensor.dtype is None or tensor.dtype == np.float32


@dataclass(slots=True)
class _Planner:
    graph: Graph
    target: Target
    policy: Policy
    rules: dict[int, OpRule] = field(default_factory=dict)  # id(node) -> rule that applies
    reasons: dict[int, str] = field(default_factory=dict)  # id(node) -> why it stays float
    precision: dict[int, NodePrecision] = field(default_factory=dict)
    resident: dict[str, str] = field(default_factory=dict)  # tensor -> because
    requests: dict[tuple[str, TensorSpec], list[Edge]] = field(default_factory=dict)
    because: dict[str, str] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    constants: dict[tuple[str, TensorSpec], Decision] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)  # specs per constant
    parents: dict[str, str] = field(default_factory=dict)  # union-find over tied tensors

    # ------------------------------------------------------------------ decisions

    def decide(self) -> None:
        for node in self.graph.nodes:
            rule, reason = self._match(node)
            if rule is None:
                self.reasons[id(node)] = reason
            else:
                self.rules[id(node)] = rule
        full = self.target.scheme == "full" and self.policy.precision.activation is not None
        for node in self.graph.nodes:
            rule = self.rules.get(id(node))
            if rule is not None and rule.role == "linear":
                self._take_linear(node, rule)
        if self.policy.precision.activation is None:
            for node in self.graph.nodes:
                if id(node) not in self.precision:
                    self.reasons.setdefault(id(node), "weights only: activations stay float")
            return
        joined = self._join(full=full)
        if full:
            for tensor, _ in self.requests:
                self.resident.setdefault(tensor, self.because[tensor])
        for node in self.graph.nodes:
            if id(node) in joined:
                self._take_follower(node, self.rules[id(node)], full=full)
            elif id(node) in self.rules and self.rules[id(node)].skip_input_only:
                self._take_skip_input(node, self.rules[id(node)])

    def _match(self, node: Node) -> tuple[OpRule | None, str]:
        """Return the rule that may apply to `node`, or the reason why none does."""
        kept = self.policy.reason_to_keep(node.name)
        if kept is not None:
            return None, kept
        rules = [rule for rule in self.target.rules if node.op in rule.ops]
        if node.domain not in (None, "", "ai.onnx") or not rules:
            return None, f"target {self.target.name} has no integer {node.op}"
        for rule in rules:
            wrong = [
                f"{k} is {node.attrs.get(k)!r}"
                for k, v in rule.attributes
                if node.attrs.get(k) != v
            ]
            if wrong:
                reason = f"rule {self.target.name}/{node.op}: {', '.join(wrong)}"
                continue
            reason = self._linear_obstacle(node, rule) if rule.role == "linear" else ""
            if not reason:
                return rule, ""
        return None, reason

    def _linear_obstacle(self, node: Node, rule: OpRule) -> str:
        data, weight = node.inputs[0], node.inputs[1]
        if not (is_float32(data) and is_float32(weight)):
            return f"computes in {data.dtype}, not in float32"
        if isinstance(data, Constant):
            return "its left operand is a constant"
        if not isinstance(weight, Constant):
            if rule.constant_weight:
                return f"rule {self.target.name}/{node.op}: the weights are not constant"
            if self.policy.precision.activation is None:
                return "weights only: there are no weights"
            return ""
        if rule.min_channels and min(weight.shape[:2]) < rule.min_channels:
            return f"fewer than {rule.min_channels} channels: no gain in integers"
        if node.op == "Gemm" and (node.attrs.get("alpha", 1.0), node.attrs.get("transA", 0)) != (
            1.0,
            0,
        ):
            return "Gemm with alpha or transA"
        if len(weight.shape) < 2:
            return "its weight is a vector"
        if not np.isfinite(array_of(weight)).all():
            return "its weight holds NaN or infinity"
        return ""

    def _activation(self, spec: TensorSpec) -> TensorSpec:
        bits = self.policy.precision.activation
        return spec if bits is None else with_bits(spec, bits)

    def _take_linear(self, node: Node, rule: OpRule) -> None:
        because = f"rule {self.target.name}/{node.op}"
        self.precision[id(node)] = "integer"
        weight = node.inputs[1]
        if isinstance(weight, Constant):
            self._take_weight(node, weight, rule)
        if self.policy.precision.activation is None:
            return
        axis = 1 if node.op in ("Conv", "ConvTranspose") else -1
        if isinstance(weight, Constant):
            assert rule.activation is not None
            self._request(node, 0, rule.activation, axis)
        else:
            left = rule.lhs
            maker = self.graph.producer(node.inputs[0])
            if rule.lhs_nonnegative is not None and maker and maker.op in NONNEGATIVE_OPS:
                left = rule.lhs_nonnegative
            assert left is not None
            assert rule.rhs is not None
            self._request(node, 0, left, axis)
            self._request(node, 1, rule.rhs, axis)
        if rule.output == "required":
            out = self._fused_output(node, rule)
            self.resident[out.name] = f"{because}: fuses only with a Q behind it"
            self.axes[out.name] = axis

    def _take_weight(self, node: Node, weight: Constant, rule: OpRule) -> None:
        assert rule.weight is not None
        spec, rank = with_bits(rule.weight, self.policy.precision.weight), len(weight.shape)
        per_channel = spec.granularity == "per_channel" and (rank == 2 or node.op != "MatMul")
        if node.op == "MatMul" and not self.target.per_channel_matmul:
            per_channel = False
        spec = (
            replace(spec, axis=weight_axis(node, rank))
            if per_channel
            else replace(spec, granularity="per_tensor", axis=None)
        )
        self._add_constant(node, 1, weight, spec, "weight", f"weight of {node.name}")

    def _add_constant(
        self,
        node: Node,
        index: int,
        tensor: Constant,
        spec: TensorSpec,
        kind: DecisionKind,
        because: str,
    ) -> None:
        edge, known = Edge(node=node.name, index=index), self.constants.get((tensor.name, spec))
        if known is not None:
            self.constants[tensor.name, spec] = replace(known, edges=(*(known.edges or ()), edge))
            return
        number = self.copies.get(tensor.name, 0)
        self.copies[tensor.name] = number + 1
        self.constants[tensor.name, spec] = Decision(
            key=tensor.name if number == 0 else f"{tensor.name}#{number}",
            tensor=tensor.name,
            kind=kind,
            spec=spec,
            edges=(edge,),
            because=because,
        )

    def _request(self, node: Node, index: int, spec: TensorSpec, axis: int) -> None:
        tensor = node.inputs[index]
        edge = Edge(node=node.name, index=index)
        self.requests.setdefault((tensor.name, self._activation(spec)), []).append(edge)
        self.because.setdefault(tensor.name, f"input {index} of {node.name} ({node.op})")
        self.axes.setdefault(tensor.name, axis)

    def _fused_output(self, node: Node, rule: OpRule) -> Tensor:
        """Return the tensor behind `node` and the activation that fuses with its Q."""
        out = node.outputs[0]
        readers = out.outputs
        if len(readers) == 1 and not self.graph.is_output(out) and readers[0].op in rule.absorbs:
            follower = readers[0]
            if self.policy.reason_to_keep(follower.name) is None and _clips_at_constants(follower):
                self.precision[id(follower)] = "passthrough"
                self.reasons[id(follower)] = f"absorbed by the Q behind {node.name}"
                return follower.outputs[0]
        return out

    # ------------------------------------------------------------------ followers

    def _data_inputs(self, node: Node, rule: OpRule) -> list[tuple[int, Tensor]]:
        """Return the inputs that carry data; movers have shapes and indices behind the first."""
        inputs = [(i, t) for i, t in enumerate(node.inputs) if t.name]
        return inputs[:1] if rule.role == "passthrough" or rule.tie else inputs

    def _obstacle(self, node: Node, rule: OpRule, alive: set[str], *, full: bool) -> str:
        inputs = self._data_inputs(node, rule)
        if not all(is_float32(t) for _, t in inputs) or not is_float32(node.outputs[0]):
            return "does not carry float32"
        if not any(not isinstance(t, Constant) for _, t in inputs):
            return "all inputs are constants"
        for index, tensor in inputs:
            if isinstance(tensor, Constant):
                values = array_of(tensor)
                if not np.isfinite(values).all() or (values <= MASK_VALUE).any():
                    return f"constant input {index} is an attention mask, which has no range"
            elif tensor.name not in alive and not full:
                return f"input {index} ({tensor.name}) is float"
        return ""

    def _join(self, *, full: bool) -> set[int]:
        """Return the ids of the nodes that follow their inputs into integers."""
        alive = set(self.resident)
        candidates: dict[int, Tensor] = {}
        for node in self.graph.nodes:
            rule = self.rules.get(id(node))
            if rule is None or rule.role == "linear" or rule.skip_input_only:
                continue
            obstacle = self._obstacle(node, rule, alive, full=full)
            if obstacle:
                self.reasons[id(node)] = f"rule {self.target.name}/{node.op}: {obstacle}"
                continue
            out = self._fused_output(node, rule) if rule.absorbs else node.outputs[0]
            candidates[id(node)] = out
            alive.add(out.name)
        wanted = {tensor for tensor, _ in self.requests}
        kept: set[int] = set()
        for node in reversed(self.graph.nodes):
            if id(node) not in candidates:
                continue
            if full or candidates[id(node)].name in wanted:
                kept.add(id(node))
                wanted |= {t.name for _, t in self._data_inputs(node, self.rules[id(node)])}
                continue
            self.reasons[id(node)] = "nothing behind it runs in integers"
            for follower in node.outputs[0].outputs:  # give back what was absorbed
                if self.precision.get(id(follower)) == "passthrough":
                    del self.precision[id(follower)]
                    self.reasons[id(follower)] = self.reasons[id(node)]
        return kept

    def _take_follower(self, node: Node, rule: OpRule, *, full: bool) -> None:
        spec = rule.activation or self.target.activation
        self.precision[id(node)] = "integer" if rule.role == "follow" else "passthrough"
        out = self._fused_output(node, rule) if rule.absorbs else node.outputs[0]
        because = f"rule {self.target.name}/{node.op}"
        inputs = self._data_inputs(node, rule)
        for index, tensor in inputs:
            if isinstance(tensor, Constant):
                constant_spec = replace(self._activation(spec), granularity="per_tensor", axis=None)
                reason = f"constant input {index} of {node.name}"
                self._add_constant(node, index, tensor, constant_spec, "constant", reason)
            elif full:
                self.resident.setdefault(tensor.name, because)
        self.resident.setdefault(out.name, because)
        self.axes.setdefault(out.name, self.axes.get(inputs[0][1].name, 1))
        self.reasons.setdefault(id(node), because)
        if rule.tie:
            self._tie(inputs[0][1].name, out.name)

    def _take_skip_input(self, node: Node, rule: OpRule) -> None:
        """TensorRT: quantize only the input of a residual Add that no linear op computes."""
        direct = [self._is_direct(tensor) for tensor in node.inputs]
        if sorted(direct) != [False, True] or any(isinstance(t, Constant) for t in node.inputs):
            self.reasons[id(node)] = f"rule {self.target.name}/{node.op}: not a residual Add"
            return
        assert rule.activation is not None
        self._request(node, direct.index(False), rule.activation, 1)
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

    def _masked(self) -> set[str]:
        """Return the tensors that carry attention masks, through ops that only move them."""
        masked: set[str] = set()
        for node in self.graph.nodes:
            if node.op in ("Add", "Where", "Sub", "Mul"):
                found = any(_holds_mask(t) for t in node.inputs)
            else:
                found = node.op in ("Reshape", "Transpose", "Unsqueeze", "Squeeze") and (
                    node.inputs[0].name in masked
                )
            if found:
                masked |= {t.name for t in node.outputs}
        return masked

    def result(self) -> Plan:
        order = {name: i for i, name in enumerate(self.graph.tensors())}
        decisions = sorted(self._activation_decisions(), key=lambda d: (order[d.tensor], d.key))
        nodes = tuple(self._node_decision(node) for node in self.graph.nodes)
        return Plan(
            target=self.target.name,
            precision=str(self.policy.precision),
            decisions=(*decisions, *self.constants.values()),
            nodes=nodes,
        )

    def _activation_decisions(self) -> Iterator[Decision]:
        masked = self._masked()
        common = dict[str, TensorSpec]()
        for tensor, spec in self.requests:
            common.setdefault(tensor, spec)
        for tensor, because in self.resident.items():
            spec = common.get(tensor, self._activation(self.target.activation))
            root = self._find(tensor)
            yield self._decision(tensor, tensor, spec, because, None, root, masked)
        numbers: dict[str, int] = {}
        for (tensor, spec), edges in self.requests.items():
            if tensor in self.resident:
                continue
            number = numbers.get(tensor, 0)
            numbers[tensor] = number + 1
            key = tensor if number == 0 else f"{tensor}#{number}"
            yield self._decision(
                key, tensor, spec, self.because[tensor], tuple(edges), None, masked
            )

    def _decision(
        self,
        key: str,
        tensor: str,
        spec: TensorSpec,
        because: str,
        edges: tuple[Edge, ...] | None,
        root: str | None,
        masked: set[str],
    ) -> Decision:
        return Decision(
            key=key,
            tensor=tensor,
            kind="activation",
            spec=spec,
            because=because,
            edges=edges,
            group=root if root in self.parents else None,
            channel_axis=self.axes.get(tensor),
            mask_below=MASK_VALUE if tensor in masked else None,
            pinned=self.policy.ranges.get(tensor),
        )

    def _node_decision(self, node: Node) -> NodeDecision:
        precision = self.precision.get(id(node), "float")
        rule = f"{self.target.name}/{node.op}" if id(node) in self.rules else ""
        default = f"rule {rule}" if rule else f"target {self.target.name} has no integer {node.op}"
        reason = self.reasons.get(id(node), default)
        return NodeDecision(
            name=node.name, op=node.op, precision=precision, because=reason, rule=rule
        )


def _clips_at_constants(node: Node) -> bool:
    return node.op != "Clip" or all(isinstance(t, Constant) for t in node.inputs[1:] if t.name)


def _holds_mask(tensor: Tensor) -> bool:
    if not isinstance(tensor, Constant) or tensor.dtype != np.float32:
        return False
    values = array_of(tensor)
    return bool((values <= MASK_VALUE).any())
