"""What lint is made of: rules, and what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from onnx import NodeProto

from qpass.lint.view import View
from qpass.walk import node_label

Severity = Literal["error", "warning"]

TARGET_NAMES: Final = (
    "ort-x86", "ort-arm", "openvino", "tensorrt", "qnn-htp", "vitis-xint8",
)  # fmt: skip


class Hit(NamedTuple):
    """A breach of a rule, before the rule's own texts are added."""

    node: str
    tensor: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table: what is checked, for which targets, why, and how to repair it.

    `check` yields the breaches; it must visit each node a bounded number of times.
    """

    id: str
    severity: Severity
    title: str
    repair: str
    source: str
    check: Callable[[View], Iterator[Hit]]
    targets: tuple[str, ...] = ()  # (): engines of every kind
    except_for: tuple[str, ...] = ()

    def applies(self, target: str | None) -> bool:
        """True when the rule is checked for `target` (None: rules of every engine only)."""
        if self.targets:
            return target in self.targets
        return target not in self.except_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A breach of a rule: where, what, how to repair it, and who says so."""

    rule: str
    severity: Severity
    node: str
    tensor: str
    message: str
    repair: str
    source: str


def hit(node: NodeProto, tensor: str, message: str) -> Hit:
    """Make a `Hit` at `node`."""
    return Hit(node_label(node), tensor, message)
