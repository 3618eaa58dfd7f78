"""What a run says of its precision: where the file has another one than was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qpass.bits import EDGE_BITS, bits_of_nodes, taken_by
from qpass.matching import is_dynamic
from qpass.options import ACCURACY_LEVEL
from qpass.plan import Plan
from qpass.program import Precision
from qpass.run import Run
from qpass.verify.session import NBITS, is_for_onnxruntime

SIMULATED: Final = "SIMULATED:"  # begins the note of precisions that CPUs do not have


def precision_notes(run: Run) -> list[str]:
    """Return the notes of a planned run."""
    assert run.plan is not None
    return [
        *_simulated(run.plan),
        *_widened(run),
        *_weights_alone(run, run.plan),
        *_static(run, run.plan),
        *_nowhere(run, run.plan),
    ]


def _asked(run: Run) -> list[Precision]:
    return list(dict.fromkeys([run.policy.precision, *run.policy.node_bits.values()]))


def _widened(run: Run) -> Iterator[str]:
    for asked in _asked(run):
        taken = taken_by(run.target, asked)
        if taken != asked:
            yield (
                f"WIDER THAN ASKED: {asked} is narrower than target {run.target.name} takes; what "
                f"was to have it has {taken}."
            )


def _simulated(plan: Plan) -> Iterator[str]:
    found = {node.bits for node in plan.nodes if node.bits}
    bits = sorted(text for text in found if Precision.parse(text).simulated)
    if bits:
        yield (
            f"{SIMULATED} the engines here compute {', '.join(bits)} in float; the numbers show "
            "the accuracy of the integers, not their speed."
        )


def _nowhere(run: Run, plan: Plan) -> Iterator[str]:
    """Say where few bits were asked for and every layer has more."""
    asked, found = run.precision, {node.bits for node in plan.nodes if node.bits}
    few = min(asked.weight, asked.activation or EDGE_BITS) < EDGE_BITS
    if few and found and not run.options.mixed and str(asked) not in found:
        yield (
            f"NO LAYER HAS {asked}: stem and head keep {EDGE_BITS} bits (--low-bit-edges: fewer), "
            f"and others have bits of their own ({', '.join(sorted(found))})"
        )


def _static(run: Run, plan: Plan) -> Iterator[str]:
    """Say where dynamic ranges were asked for and no op can have one."""
    assert run.graph is not None
    if run.policy.activations == "static":
        return
    wanted, planned = bits_of_nodes(run.graph, run.policy, run.target), plan.integer_nodes()
    if not any(
        node.name in planned and is_dynamic(node, wanted[node.name].precision, run.policy)
        for node in run.graph.nodes
    ):
        yield (
            "--activations dynamic has no effect on this model: it is for MatMul with a matrix of "
            "weights, both operands of 8 bits"
        )


def _weights_alone(run: Run, plan: Plan) -> Iterator[str]:
    """Say where integer weights behind float activations are not stored as they were asked for."""
    assert run.graph is not None
    alone = {node.name: node.bits for node in plan.nodes if node.precision in ("weights", "stored")}
    if not alone:
        return
    wanted = bits_of_nodes(run.graph, run.policy, run.target)
    wide = [name for name, bits in alone.items() if bits != str(wanted[name].precision)]
    if wide:
        yield (
            f"WIDER THAN ASKED: {len(wide)} of {len(alone)} layers have 8-bit weights, for target "
            f"{run.target.name} takes narrower ones in blocks of matrices only; `qpass plan` says "
            "of each why it has none."
        )
    asked = {precision.weight for precision in _asked(run)}
    widest = max(rule.weight.bits for rule in run.target.rules if rule.weight is not None)
    readers = {
        decision.spec
        for decision in plan.weights()
        if any(edge.node in alone for edge in decision.edges or ())
    }
    for bits, storage in sorted({(spec.bits, spec.storage) for spec in readers}, key=str):
        if bits in asked and bits < storage.bits:
            better = f", and {storage.bits} bits would be more accurate"
            yield (
                f"weights of {bits} bits are stored as {storage.name}: the file has the size of "
                f"w{storage.bits}{better if storage.bits <= widest else ''}"
            )
    size = run.policy.block_size
    if size is not None and all(spec.block_size != size for spec in readers):
        yield f"--block-size {size} is used for no weight; `qpass plan` says of each why not"
    level = run.options.accuracy_level
    if level != ACCURACY_LEVEL and not is_for_onnxruntime(plan):
        name = run.target.name
        yield f"--accuracy-level {level} is of {NBITS}, which target {name} does not have"
