"""The plan: what each tensor and node becomes, and why. Frozen, printable, editable as a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from qpass.errors import RecipeError
from qpass.program import Activations, Precision
from qpass.qparams import MIN_SCALE, TensorSpec

SCHEMA: Final = 1
BYTE: Final = 8  # bits
# Of the entries of a plan file, what nobody can edit.
NODE_FIXED: Final = ("name", "op", "rule")
TENSOR_FIXED: Final = ("tensor", "kind", "spec", "group", "readers")
SETTINGS: Final = ("activations", "block_size", "asymmetric_weights")
SEARCHED: Final = "searched"  # in the head, see `PlanFile`
HEAD_KEYS: Final = (
    "schema", "target", "precision", "fingerprint", "nodes", "tensors",
)  # fmt: skip
EDITABLE: Final = (
    "only the precision of a node (integer or float), the bits of a node and the range of an "
    "activation can be edited; `qpass plan -o` makes the file again"
)
LEAST_RANGE: Final = MIN_SCALE * 2**16  # with 16 bits, the step of a narrower one is none

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
    """All decisions for one graph and target, in topological order.

    `settings` are the options besides the precision that shaped it, by name.
    """

    target: str
    precision: str
    decisions: tuple[Decision, ...]
    nodes: tuple[NodeDecision, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

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

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the entries of the editable form: of nodes, and of tensors."""
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
        return nodes, tensors

    def to_json(self, *, searched: bool = False) -> str:
        """Return the editable form, see `read_plan`; `searched` as in `PlanFile`."""
        nodes, tensors = self.rows()
        head: dict[str, Any] = {"schema": SCHEMA, "target": self.target}
        head |= {"precision": self.precision, **self.settings}
        if searched:
            head[SEARCHED] = True
        head["fingerprint"] = fingerprint_of(nodes, tensors)
        return json.dumps({**head, "nodes": nodes, "tensors": tensors}, indent=1) + "\n"


def fingerprint_of(nodes: Sequence[Mapping[str, Any]], tensors: Sequence[Mapping[str, Any]]) -> str:
    """Return the digest of what nobody can edit in the entries of a plan file."""
    fixed = [
        [[row.get(key) for key in keys] for row in rows]
        for rows, keys in ((nodes, NODE_FIXED), (tensors, TENSOR_FIXED))
    ]
    return hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """What is read back from an edited plan.

    settings
        The options that shape a plan, by their names in `Options`, precision included.
    float_nodes, node_bits, ranges
        What can be edited: nodes that are float, with the reason; bits of nodes; pinned ranges.
    nodes, tensors
        All entries as they stand in the file.
    intact
        True where nothing but what can be edited was changed.
    searched
        True where `--mixed` found the bits, with scales and ranges for all layers at `precision`.
    """

    target: str
    precision: str
    settings: Mapping[str, Any]
    float_nodes: Mapping[str, str]
    node_bits: Mapping[str, Precision]
    node_names: frozenset[str]
    ranges: Mapping[str, tuple[float, float]]
    nodes: tuple[Mapping[str, Any], ...]
    tensors: tuple[Mapping[str, Any], ...]
    intact: bool
    searched: bool = False


def read_plan(path: Path) -> PlanFile:
    """Read an edited plan file.

    Three things can be edited: the `precision` of a node, to ``integer`` or ``float``; the `bits`
    of a node; and the `range` of an activation, to ``[low, high]``, which holds for all entries of
    that tensor. Everything else follows from these, from the target and from the options in the
    head of the file; `qpass.plan_edits` refuses a file in which it was changed.

    Raises:
        RecipeError: not a plan file, or an entry that makes no sense.
    """
    try:
        data: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"cannot read the plan: {error}", where=str(path)) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise RecipeError(
            "this is not a plan file of schema 1",
            where=str(path),
            fix="make one with `qpass plan -o`",
        )
    try:
        return _plan_file(data)
    except RecipeError as error:
        raise RecipeError(error.what, where=str(path), fix=error.fix) from error
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"damaged plan entry: {error!r}", where=str(path)) from error


def _plan_file(data: Mapping[str, Any]) -> PlanFile:
    _check_keys("the head of the plan", data, HEAD_KEYS, (*SETTINGS, SEARCHED))
    float_nodes: dict[str, str] = {}
    node_bits: dict[str, Precision] = {}
    ranges: dict[str, tuple[float, float]] = {}
    names: set[str] = set()
    for node in data["nodes"]:
        name, precision = str(node["name"]), node["precision"]
        _check_keys(f"node {name}", node, (*NODE_FIXED, "precision", "bits", "because"))
        if precision == "float":
            float_nodes[name] = str(node["because"])
        elif precision not in get_args(NodePrecision):
            raise RecipeError(f"precision {precision!r} of node {name}", fix=EDITABLE)
        if name in names:
            raise RecipeError(f"node {name} is there twice", fix=EDITABLE)
        names.add(name)
        if node["bits"]:
            node_bits[name] = _bits(name, node["bits"])
    seen: set[str] = set()
    for tensor in data["tensors"]:
        name = str(tensor["tensor"])
        _check_keys(f"tensor {name}", tensor, (*TENSOR_FIXED, "range", "because"))
        if tensor["range"] is not None:
            found = _range(name, tensor["range"])
            if ranges.setdefault(name, found) != found:
                raise RecipeError(
                    f"tensor {name} has the ranges {list(ranges[name])} and {list(found)}",
                    fix="a range holds for all entries of a tensor: write the same, or null",
                )
        entry = json.dumps([tensor[key] for key in TENSOR_FIXED])
        if entry in seen:
            raise RecipeError(f"tensor {name} has the same entry twice", fix=EDITABLE)
        seen.add(entry)
    precision = str(Precision.parse(data["precision"]))
    settings = {key: data[key] for key in SETTINGS if key in data}
    searched = data.get(SEARCHED, False)
    if not isinstance(searched, bool):
        raise RecipeError(f"{SEARCHED} is {searched!r}", fix="write true or false")
    if settings.get("activations", "static") not in get_args(Activations):
        raise RecipeError(f"activations {settings['activations']!r}", fix="write static or dynamic")
    return PlanFile(
        target=str(data["target"]),
        precision=precision,
        settings={"precision": precision, **settings},
        float_nodes=float_nodes,
        node_bits=node_bits,
        node_names=frozenset(names),
        ranges=ranges,
        nodes=tuple(data["nodes"]),
        tensors=tuple(data["tensors"]),
        intact=data["fingerprint"] == fingerprint_of(data["nodes"], data["tensors"]),
        searched=searched,
    )


def _check_keys(
    where: str, entry: Mapping[str, Any], keys: Collection[str], optional: Collection[str] = ()
) -> None:
    for key in entry:
        if key not in keys and key not in optional:
            raise RecipeError(f"{where} has the key {key!r}, which no plan has", fix=EDITABLE)
    for key in keys:
        if key not in entry:
            raise RecipeError(f"{where} lacks the key {key!r}", fix=EDITABLE)


def _bits(name: str, bits: Any) -> Precision:
    try:
        return Precision.parse(str(bits))
    except RecipeError as error:
        raise RecipeError(f"bits of node {name}: {error.what}", fix=error.fix) from error


def _range(name: str, ends: Any) -> tuple[float, float]:
    numbers = isinstance(ends, list) and all(type(end) in (int, float) for end in ends)
    if numbers and len(ends) == 2:
        low, high = ends
        largest = float(np.finfo(np.float32).max)
        if -largest <= low <= 0 <= high <= largest and high - low >= LEAST_RANGE:
            return float(low), float(high)
    raise RecipeError(
        f"the range of tensor {name} is {ends!r}",
        fix="write [low, high], two float32 numbers with low <= 0 <= high and low < high, or null",
    )
