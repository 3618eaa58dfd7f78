"""Everything that `--unified-norm`, `--rotate` and `--rms-norm` do to a normalized float graph.

The order is what each pass needs of the one before: chains of Unified Normalization become one Mul
and one Add; gains and offsets of channels fold forward; biases of what writes to a stream without
norms go to what reads it; gains of norms fold forward where a basis is to change; streams rotate
while their norms are still LayerNormalization; then these become RMSNormalization; heads are
independent of all of it. Streams without norms are balanced behind it (`rotation.balance`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from qpass.graph import Graph
from qpass.passes.affine import fold_channel_affines
from qpass.passes.norm_gain import fold_norm_gains
from qpass.passes.normalize import check_normalized
from qpass.passes.rotation.heads import rotate_heads
from qpass.passes.rotation.stream import center_streams, rotate_streams
from qpass.passes.stream_bias import move_stream_biases
from qpass.passes.unified_norm import recognize_unified_norms
from qpass.report.model import PassReport

Rotate = Literal["auto", "none", "heads", "stream", "all"]


def rewrite_norms(
    graph: Graph, *, unified: bool = True, rotate: Rotate = "none", rms: bool = False, seed: int = 0
) -> list[PassReport]:
    """Run the chosen rewrites, all exact in real arithmetic; return what each one did.

    Args:
        graph: a normalized graph, changed in place; it stays normalized.
        unified: fold Unified Normalization and other affine maps of channels into linear ops.
        rotate: "heads": channels within attention heads, "stream": the residual stream, or "all".
        rms: turn LayerNormalization into RMSNormalization.
        seed: of the signs of the rotations.

    Raises:
        PostconditionError: a pass left a graph that is not normalized.
    """
    steps: list[Callable[[Graph], PassReport]] = []
    if unified:
        steps += [recognize_unified_norms, fold_channel_affines, move_stream_biases]
    if rms or rotate in ("stream", "all"):
        steps.append(fold_norm_gains)
    if rotate in ("stream", "all"):
        steps.append(lambda graph: rotate_streams(graph, seed))
    if rms:
        steps.append(center_streams)
    if rotate in ("heads", "all"):
        steps.append(lambda graph: rotate_heads(graph, seed))
    reports = [step(graph) for step in steps]
    check_normalized(graph)
    return reports
