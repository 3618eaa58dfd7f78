"""The plan: what each tensor and node becomes, and why. Frozen, printable, editable as a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from qpass.errors import RecipeError
from qpass.program import Precision
from qpass.qparams import TensorSpec

SCHEMA: Final = 1
BYTE: Final = 8  # bits

# weights: float activations, and a kernel that reads the integer weights. stored: the weights are
# integers in the file only. passthrough: integers move, nothing is computed.
NodePrecision = Literal["integer", "weights", "stored", "passthrough", "float"]
DecisionKind = Literal["activation", "weight", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Input `index` of node `node`."""

    node: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one tensor becomes.

    edges
        The consumers that read integers. ``None``: all of them, the Q stands right behind the
        producer (and before a graph output).
    group
        Tensors with the same group share one scale and zero point.
    channel_axis
        Axis of the channels of an activation, for its statistics.
    mask_below
        Values at or below this are attention masks: they never enter a range.
    """

    key: str
    tensor: str
    kind: DecisionKind
    spec: TensorSpec
    because: str
    edges: tuple[Edge, ...] | None = None
    group: str | None = None
    channel_axis: int | None = None
    mask_below: float | None = None
    pinned: tuple[float, float] | None = None  # range that the user, or a rewrite, fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDecision:
    """How one node is to run, and the rule or reason behind it.

    bits
        Precision of a linear op, ``wNaM`` or ``wN``; empty for every other op and where no rule of
        the target applies. The width of what follows it comes from the precision of the run.
    """

    name: str
    op: str
    precision: NodePrecision
    because: str
    rule: str = ""
    bits: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All decisions for one graph and target, in topological order."""

    target: str
    precision: str
    decisions: tuple[Decision, ...]
    nodes: tuple[NodeDecision, ...]

    def activations(self) -> Iterator[Decision]:
        """Iterate over the decisions that need statistics."""
        return (d for d in self.decisions if d.kind == "activation")

    def weights(self) -> Iterator[Decision]:
        """Iterate over the decisions for constants."""
        return (d for d in self.decisions if d.kind != "activation")

    def integer_nodes(self) -> dict[str, NodeDecision]:
        """Return the nodes that are to compute in integers, by name."""
        return {n.name: n for n in self.nodes if n.precision == "integer"}

    @property
    def has_narrow_activations(self) -> bool:
        """True where activations are stored in less than a byte.

        No CPU engine has such integers, and what it needs to load them at all keeps every op of the
        file in float.
        """
        return any(decision.spec.storage.bits < BYTE for decision in self.activations())

    def engine_nodes(self) -> dict[str, NodeDecision]:
        """Return the nodes for which a CPU engine has a kernel that reads integers, by name.

        These are the ones that verification can hold an engine to: products of 8-bit integers, and
        integer weights behind float activations. What is narrower is simulated in float.
        """
        return {
            n.name: n
            for n in self.nodes
            if n.precision == "weights"
            or (n.precision == "integer" and not (n.bits and Precision.parse(n.bits).simulated))
        }

    def to_json(self) -> str:
        """Return the editable form.

        `nodes[].precision`, `nodes[].bits` and `tensors[].range` are read back.
        """
        nodes = [asdict(node) for node in self.nodes]
        tensors = [
            {
                "tensor": d.tensor,
                "kind": d.kind,
                "spec": d.spec.describe(),
                "group": d.group,
                "readers": "all" if d.edges is None else [f"{e.node}[{e.index}]" for e in d.edges],
                "range": None if d.pinned is None else list(d.pinned),
                "because": d.because,
            }
            for d in self.decisions
        ]
        head = {"schema": SCHEMA, "target": self.target, "precision": self.precision}
        return json.dumps({**head, "nodes": nodes, "tensors": tensors}, indent=1) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """What is read back from an edited plan: nodes made float, bits of nodes, pinned ranges."""

    target: str
    precision: str
    float_nodes: Mapping[str, str]
    node_bits: Mapping[str, Precision]
    node_names: frozenset[str]
    ranges: Mapping[str, tuple[float, float]]


def read_plan(path: Path) -> PlanFile:
    """Read an edited plan file.

    Raises:
        RecipeError: not a plan file, or an entry that makes no sense.
    """
    try:
        data: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the plan: {error}", where=str(path)) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise RecipeError(
            "this is not a plan file of schema 1",
            where=str(path),
            fix="make one with `qpass plan -o`",
        )
    float_nodes: dict[str, str] = {}
    node_bits: dict[str, Precision] = {}
    ranges: dict[str, tuple[float, float]] = {}
    try:
        for node in data["nodes"]:
            if node["precision"] == "float":
                float_nodes[node["name"]] = node["because"]
            elif node["precision"] not in get_args(NodePrecision):
                raise RecipeError(
                    f"precision {node['precision']!r} of node {node['name']}",
                    where=str(path),
                    fix="write integer or float",
                )
            if node.get("bits"):
                node_bits[node["name"]] = Precision.parse(str(node["bits"]))
        for tensor in data["tensors"]:
            if tensor.get("range") is not None:
                low, high = (float(value) for value in tensor["range"])
                ranges[tensor["tensor"]] = (low, high)
        names = frozenset(node["name"] for node in data["nodes"])
        target, precision = str(data["target"]), str(data["precision"])
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"damaged plan entry: {error!r}", where=str(path)) from error
    return PlanFile(
        target=target,
        precision=precision,
        float_nodes=float_nodes,
        node_bits=node_bits,
        node_names=names,
        ranges=ranges,
    )
