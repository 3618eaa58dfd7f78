"""Judge a quantized ONNX model, whoever made it, by the rules of the engine that will run it.

``lint(model, "ort-x86")`` returns the findings; ``RULES`` is the table behind it. Nothing is run
and no weights are read: rules look at the structure, scales, zero points and biases. Nodes in the
bodies of If, Loop and Scan are not judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx

from qpass.errors import RecipeError
from qpass.external import check_external
from qpass.lint import engines_table, numbers, onnxruntime_table, structure
from qpass.lint.model import TARGET_NAMES, Finding, Rule
from qpass.lint.view import View
from qpass.skim import skim
from qpass.targets import TARGETS
from qpass.wellformed import check_wellformed

__all__ = ["RULES", "TARGET_NAMES", "Finding", "Rule", "error_notes", "lint", "rules_for"]

WITHOUT_VNNI: Final = "-avx2"
RULES: Final[tuple[Rule, ...]] = (
    *numbers.RULES,
    *structure.RULES,
    *onnxruntime_table.RULES,
    *engines_table.RULES,
)


def rules_for(target: str | None) -> tuple[Rule, ...]:
    """Return the rules that are checked for a target; None: those of every engine.

    A target for CPUs without VNNI (``ort-x86-avx2``) has the rules of its engine.

    Raises:
        RecipeError: there is no target of that name.
    """
    if target is not None and target in TARGETS:
        target = target.removesuffix(WITHOUT_VNNI)
    if target is not None and target not in TARGET_NAMES:
        raise RecipeError(
            f"lint knows no target called {target!r}",
            fix=f"choose one of: {', '.join(TARGET_NAMES)}",
        )
    return tuple(rule for rule in RULES if rule.applies(target))


def error_notes(path: Path, target: str) -> list[str]:
    """Say which rules of `target` the file at `path` breaks: a sentence each, with the repair.

    For results whose engine is not here: nothing else would find what it refuses.
    """
    errors = [found for found in lint(path, target) if found.severity == "error"]
    notes = []
    for rule in dict.fromkeys(found.rule for found in errors):
        hits = [found for found in errors if found.rule == rule]
        first = hits[0]
        notes.append(
            f"LINT {rule}, {len(hits)} times for target {target}: {first.message} "
            f"({first.node or first.tensor}); {first.repair}"
        )
    return notes


def lint(model: str | Path | onnx.ModelProto, target: str | None = None) -> tuple[Finding, ...]:
    """Return what is wrong with a quantized model, errors first, then in order of rules and nodes.

    Args:
        model: a file, whose external data stays on disk, or a ModelProto.
        target: name of the engine; None: only the rules that hold for every engine.

    Raises:
        ModelError: the file is no ONNX model, or a tensor is used that nobody defines.
        RecipeError: there is no target of that name.
    """
    rules = rules_for(target)
    folder = Path()
    if not isinstance(model, onnx.ModelProto):
        folder = Path(model).parent
        model = skim(Path(model))
        check_external(model, folder)
    check_wellformed(model)
    view = View(model=model, folder=folder)
    findings = [
        Finding(
            rule=rule.id,
            severity=rule.severity,
            node=found.node,
            tensor=found.tensor,
            message=found.message,
            repair=rule.repair,
            source=rule.source,
        )
        for rule in rules
        for found in rule.check(view)
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity))
