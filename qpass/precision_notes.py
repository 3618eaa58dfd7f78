"""What a run says of its precision: where the file has another one than was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qpass.bits import bits_of_nodes, taken_by
from qpass.options import ACCURACY_LEVEL
from qpass.plan import Plan
from qpass.program import Precision
from qpass.run import Run
from qpass.verify.session import NBITS, is_for_onnxruntime

SIMULATED: Final = "SIMULATED:"  # begins the note of precisions that CPUs do not have


def precision_notes(run: Run) -> list[str]:
    """Return the notes of a planned run."""
    assert run.plan is not None
    return [*_widened(run), *_simulated(run.plan), *_weights_alone(run, run.plan)]


def is_simulated(plan: Plan) -> bool:
    """True when an op of `plan` has integers that no CPU engine multiplies."""
    return any(Precision.parse(node.bits).simulated for node in plan.nodes if node.bits)


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
    if is_simulated(plan):
        found = {node.bits for node in plan.nodes if node.bits}
        bits = ", ".join(sorted(text for text in found if Precision.parse(text).simulated))
        yield (
            f"{SIMULATED} the engines here compute {bits} in float; the numbers show the accuracy "
            "of the integers, not their speed."
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
    readers = {
        decision.spec
        for decision in plan.weights()
        if any(edge.node in alone for edge in decision.edges or ())
    }
    for bits, storage in sorted({(spec.bits, spec.storage) for spec in readers}, key=str):
        if bits in asked and bits < storage.bits:
            yield (
                f"weights of {bits} bits are stored as {storage.name}: the file has the size of "
                f"w{storage.bits}, and {storage.bits} bits would be more accurate"
            )
    size = run.policy.block_size
    if size is not None and all(spec.block_size != size for spec in readers):
        yield f"--block-size {size} is used for no weight; `qpass plan` says of each why not"
    level = run.options.accuracy_level
    if level != ACCURACY_LEVEL and not is_for_onnxruntime(plan):
        name = run.target.name
        yield f"--accuracy-level {level} is of {NBITS}, which target {name} does not have"
