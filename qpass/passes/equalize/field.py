"""Which scales the tensors of a site have: labels by tensor, and labels joined or fixed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qpass.graph import Constant, Node, Tensor
from qpass.passes.equalize.labels import Labels
from qpass.passes.equalize.site import Slot


@dataclass(slots=True)
class Field:
    """Scales by tensor. Labels that have to be equal are joined; those joined with 0 are fixed."""

    fields: dict[int, tuple[Tensor, Labels, int]] = field(default_factory=dict, kw_only=True)
    parents: list[int] = field(default_factory=list, kw_only=True)
    waiting: list[Tensor] = field(default_factory=list, kw_only=True)
    slots: list[Slot] = field(default_factory=list, kw_only=True)
    taken: dict[tuple[int, int], Labels] = field(default_factory=dict, kw_only=True)  # of `slots`
    reason: str = field(default="", kw_only=True)

    def find(self, label: int) -> int:
        """Return the label that stands for all labels joined with this one."""
        while self.parents[label] != label:
            label = self.parents[label]
        return label

    def join(self, left: Labels, right: Labels) -> None:
        """Let labels have equal scales, element by element."""
        base = len(self.parents)
        for code in np.unique(left * base + right).tolist():
            low, high = sorted((self.find(code // base), self.find(code % base)))
            self.parents[high] = low  # 0, the fixed one, wins

    def fix(self, labels: Labels, reason: str) -> None:
        """Fix the scales of labels to 1; the first reason of all is kept."""
        self.reason = self.reason or reason
        self.join(labels, np.zeros(1, np.int64))

    def fix_all(self, reason: str) -> None:
        """Give the site up."""
        self.reason = reason
        self.parents = [0] * len(self.parents)
        self.waiting.clear()

    def label(self, tensor: Tensor, labels: Labels, power: int) -> None:
        """Scale `tensor` by ``s[labels] ** power``, and visit it when that is new."""
        if not labels.any():
            return
        known = self.fields.get(id(tensor))
        if known is None:
            self.fields[id(tensor)] = (tensor, labels, power)
            self.waiting.append(tensor)
        elif known[2] != power or known[1].ndim != labels.ndim:
            self.fix(known[1], f"{tensor.name} would be scaled both ways")
            self.fix(labels, "")
        else:
            self.join(known[1], labels)

    def give(self, node: Node, index: int, labels: Labels, power: int) -> None:
        """Pass the scale to an input: to its maker, or to the constant that it is."""
        tensor = node.inputs[index]
        if not isinstance(tensor, Constant):
            self.label(tensor, labels, power)
        elif labels.any():
            self.take(node, index, labels, power)

    def take(self, node: Node, index: int, labels: Labels, power: int) -> None:
        """Let the constant input `index` take ``s[labels] ** power``."""
        # A leading axis more than the constant has would change its rank for nothing.
        rank = len(node.inputs[index].shape)
        extra = labels.ndim - rank
        if extra > 0 and not any(size > 1 for size in labels.shape[:extra]):
            labels = labels.reshape(labels.shape[extra:])
        if node.inputs[index].dtype != np.float32:
            self.fix(labels, f"{node.inputs[index].name} is not float32")
            return
        known = self.taken.setdefault((id(node), index), labels)
        if known is labels:
            self.slots.append(Slot(node=node, index=index, labels=labels, power=power))
        else:
            self.join(known, labels)
