"""Rotate the residual stream, and turn LayerNormalization into RMSNormalization.

What they do
    `rotate_streams` writes a whole residual stream in another basis, x' = x R with R orthogonal: an
    outlier channel is spread over all channels, so the integers of every op that reads the stream
    get finer. `center_streams` writes it as x' = x (I - 11'/C), whose mean is 0 at every place, so
    that each LayerNormalization in it may be an RMSNormalization.
Why they are correct
    Sums and moves of channels commute with any x B; what linear ops, tables and tokens write can be
    multiplied beforehand. A norm without gain commutes with R when R is orthogonal and maps ones to
    ones: then |x R| = |x| and mean and centring are the same on both sides. So rotating needs no
    RMSNormalization, and no engine loses its kernel for LayerNormalization. A linear op that reads
    x R takes R' W. LayerNorm(x) does not see the mean of x at all.
Preconditions
    The graph is normalized and `fold_norm_gains` has run. A stream that something else makes or
    reads (a model output, a gate, a norm over concatenated channels as in patch merging, a gain
    that stays in a norm) is refused whole; centring also refuses a linear op that reads the stream
    without a norm.
Sources
    Ashkboos et al., SliceGPT (LayerNorm to RMSNorm) and QuaRot, 2024. The rotation that keeps the
    mean is ours.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from qpass.graph import Graph, Variable
from qpass.passes.norm_gain import Norm
from qpass.passes.normalize.folding import FoldResult, given_input
from qpass.passes.rotation.basis import change_basis, find_streams
from qpass.passes.rotation.hadamard import solve_mean_keeping_rotation, solve_rotation
from qpass.report.model import PassReport

RMS_OPSET: Final = 23


def rotate_streams(graph: Graph, seed: int) -> PassReport:
    """Rotate every residual stream that can be; `changed` counts constants."""
    result = FoldResult()
    for stream in find_streams(graph, norms="through"):
        if stream.refusal:
            result.refuse("rotate stream", stream.where, stream.refusal)
            continue
        keeps_mean = any(norm.node.op == "LayerNormalization" for norm in stream.norms)
        solve = solve_mean_keeping_rotation if keeps_mean else solve_rotation
        slots = [*stream.writers, *stream.readers]
        change_basis(graph, slots, solve(stream.channels, seed), stream.channels)
        result.changed += len(slots)
    return PassReport(name="rotate-stream", changed=result.changed, refusals=tuple(result.refusals))


def center_streams(graph: Graph) -> PassReport:
    """Turn LayerNormalization into RMSNormalization where that is exact; `changed` counts norms."""
    result = FoldResult()
    for stream in find_streams(graph, norms="end"):
        layer_norms = [n for n in stream.norms if n.node.op == "LayerNormalization"]
        if stream.refusal:
            result.refuse("LayerNorm to RMSNorm", stream.where, stream.refusal)
            continue
        if len(layer_norms) < len(stream.norms):
            reason = "an RMSNormalization reads the stream, too: it would see the mean missing"
            result.refuse("LayerNorm to RMSNorm", stream.where, reason)
            continue
        size = stream.channels
        change_basis(graph, stream.writers, np.eye(size) - 1.0 / size, size)
        for norm in layer_norms:
            _write_rms(graph, norm)
            result.changed += 1
    if result.changed:
        graph.sort()
        graph.infer_shapes()
    return PassReport(name="rms-norm", changed=result.changed, refusals=tuple(result.refusals))


def _write_rms(graph: Graph, norm: Norm) -> None:
    """Replace a LayerNormalization of centred channels: one op, or the chain of older opsets."""
    node, x, out = norm.node, norm.node.inputs[0], norm.node.outputs[0]
    assert isinstance(x, Variable)
    dtype, epsilon = x.dtype or np.dtype(np.float32), float(node.attrs.get("epsilon", 1e-5))
    scale, bias = node.inputs[1], given_input(node, 2) if norm.affine.offset.any() else None
    scaled = out if bias is None else graph.variable(f"{out.name}_scaled", dtype, out.shape)
    graph.remove(node)

    def add(op: str, inputs: list[Any], target: Variable, **attrs: Any) -> None:
        made = graph.make(op, inputs, [target], name=f"{node.name}_{op}", attrs=attrs)
        graph.add(made, before=node)

    def fresh(tail: str, shape: Any) -> Variable:
        return graph.variable(f"{out.name}_{tail}", dtype, shape)

    if graph.opset >= RMS_OPSET:
        add("RMSNormalization", [x, scale], scaled, axis=-1, epsilon=epsilon)
    else:
        row = [*x.shape[:-1], 1]
        square, mean, power = fresh("square", x.shape), fresh("mean", row), fresh("power", row)
        root, ratio = fresh("root", row), fresh("ratio", x.shape)
        two = graph.constant(f"{node.name}_two", np.array(2, dtype))
        floor = graph.constant(f"{node.name}_epsilon", np.array(epsilon, dtype))
        axes = graph.constant(f"{node.name}_axes", np.array([-1], np.int64))
        add("Pow", [x, two], square)
        add("ReduceMean", [square, axes], mean, keepdims=1)
        add("Add", [mean, floor], power)
        add("Sqrt", [power], root)
        add("Div", [x, root], ratio)
        add("Mul", [ratio, scale], scaled)
    if bias is not None:
        add("Add", [scaled, bias], out)
