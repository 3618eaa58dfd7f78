"""The weights-float network: what a network with activation scales of its own was trained to be.

Without its activation quantizers a network that was trained with them is another one, so the float
graph is nothing that its weights should be fitted to. The *weights-float* network has the
quantizers that a file of scales brings, with its numbers, and weights in float. Rounding and
compensation aim at it: they undo what the quantization of weights does, and leave alone what the
training has undone already (the second stage of GPLQ, Liang et al., NeurIPS 2025).

Quantizers of other tensors are not in it. They are ours, the training knew nothing of them, and
their error is one to be corrected like that of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qpass.graph import Graph
from qpass.passes.insert_qdq import insert_qdq
from qpass.passes.model_gate import output_sqnr_db
from qpass.plan import Decision, Plan
from qpass.qparams import choose_qparams
from qpass.submodel import Submodel


def weights_float(graph: Graph, plan: Plan, decisions: Sequence[Decision]) -> Graph:
    """Return a copy of a float graph with some activations quantized and all weights in float.

    Args:
        graph: the float graph; not changed, shares its constants with the copy.
        plan: of the graph.
        decisions: those of its activations to carry out; their ranges are pinned.
    """
    twin = graph.copy()
    numbers = {}
    for decision in decisions:
        assert decision.pinned is not None
        numbers[decision.key] = choose_qparams(decision.spec, *decision.pinned)
    insert_qdq(twin, replace(plan, decisions=tuple(decisions)), numbers)
    return twin


def closeness_db(
    aim: Graph,
    quantized: Graph,
    samples: Sequence[Mapping[str, Any]],
    *,
    threads: int | None = None,
) -> float:
    """Return the SQNR of a quantized graph against the one that was aimed at, in dB.

    The mean over the outputs, as onnxruntime runs both.

    Args:
        aim: the weights-float network.
        quantized: the result, with the inputs and outputs of `aim`.
        samples: inputs by name; at least one.
        threads: of each session, None for onnxruntime's choice.
    """
    names = [tensor.name for tensor in aim.outputs]
    wanted, got = (
        Submodel(graph, samples[0], names, threads=threads, qdq_in_float=graph is aim)
        for graph in (aim, quantized)
    )
    found = output_sqnr_db([wanted.run(s) for s in samples], [got.run(s) for s in samples])
    return sum(found.values()) / len(found)
