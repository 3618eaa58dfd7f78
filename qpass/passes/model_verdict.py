"""Ask the whole model whether what a stream has done to it is an improvement.

Batches that nothing was fitted to are the better judges. A caller that has none lets the stream's
own held-out batches judge: their outputs are there already.
"""

from __future__ import annotations

from collections.abc import Sequence

from qpass.graph import Graph
from qpass.passes.model_gate import Verdict, judge, outputs_of
from qpass.stream import Stream
from qpass.submodel import Feeds


def model_verdict(
    stream: Stream,
    before: Graph,
    *,
    first_held: int,
    judges: Sequence[Feeds] = (),
    threads: int | None = None,
) -> Verdict:
    """Compare the quantized graph of a stream at its end with what it has to beat.

    Args:
        stream: has been walked through; its aim is what both should be.
        before: what has to be beaten.
        first_held: number of the first batch of the stream that judges without `judges`.
        judges: batches that no pass was fitted to.
        threads: of each session.
    """
    names = [tensor.name for tensor in before.outputs]
    if not judges:
        outputs = list(stream.outputs())[first_held:]
        plain = outputs_of(before, stream.batches[first_held:], names, threads=threads)
        return judge([wanted for wanted, _ in outputs], plain, [got for _, got in outputs])
    wanted = outputs_of(
        stream.aim,
        judges,
        names,
        threads=threads,
        qdq_in_float=stream.aim is not stream.reference,
    )
    plain, got = (
        outputs_of(graph, judges, names, threads=threads) for graph in (before, stream.quantized)
    )
    return judge(wanted, plain, got)
