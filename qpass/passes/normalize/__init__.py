"""Bring a float graph into the form that every later pass relies on.

What it does
    Runs the folds below until none changes anything.
Why it is correct
    Every fold is exact in real arithmetic; constants are computed in float64 and rounded once.
Postconditions, checked by `check_normalized`
    N1 names of nodes and tensors are unique and not empty;
    N2 nodes are in topological order;
    N3 there are no Identity, Dropout or Constant nodes (but an Identity from input to output);
    N4 Conv and Gemm with constant weights have an explicit bias of one value per channel;
    N5 no BatchNormalization stands behind a Conv or Gemm that only it reads;
    N6 small constants have one reader each;
    N7 the rank of the input and output of every linear op is known, where onnx can infer it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qpass.errors import PostconditionError
from qpass.graph import Constant, Graph, Node
from qpass.passes.normalize.cleanup import remove_no_ops
from qpass.passes.normalize.constant_folding import fold_constant_nodes, fold_constants
from qpass.passes.normalize.float32 import to_float32
from qpass.passes.normalize.folding import FoldResult, sole_reader
from qpass.passes.normalize.linear_folding import (
    explain_batch_norms,
    fold_affine_into_linear,
    give_biases,
    matmul_to_gemm,
)
from qpass.passes.normalize.patterns import (
    recognize_gelu,
    recognize_global_average_pool,
    recognize_hard_swish,
    recognize_layer_norm,
)
from qpass.report.model import PassReport, Refusal

FOLDS: Final[tuple[Callable[[Graph], FoldResult], ...]] = (
    fold_constant_nodes,
    fold_constants,
    remove_no_ops,
    recognize_layer_norm,
    recognize_gelu,
    recognize_hard_swish,
    recognize_global_average_pool,
    matmul_to_gemm,
    fold_affine_into_linear,
    give_biases,
)
MAX_ROUNDS: Final = 10


def normalize(graph: Graph) -> PassReport:
    """Run all folds to a fixed point; `changed` counts the rewrites.

    Raises:
        PostconditionError: a fold left a graph that breaks N1 to N7.
    """
    graph.infer_shapes()
    changed = to_float32(graph).changed
    refusals: dict[Refusal, None] = {}
    for _ in range(MAX_ROUNDS):
        refusals = {}
        before = changed
        for fold in FOLDS:
            result = fold(graph)
            changed += result.changed
            refusals.update((refusal, None) for refusal in result.refusals)
        if changed == before:
            break
        graph.infer_shapes()
    graph.remove_unused()
    graph.sort()
    refusals.update((refusal, None) for refusal in explain_batch_norms(graph).refusals)
    check_normalized(graph)
    return PassReport(name="normalize", changed=changed, refusals=tuple(refusals))


def check_normalized(graph: Graph) -> None:
    """Check N1 to N6 (N7 depends on what onnx can infer).

    Raises:
        PostconditionError: the number and the place.
    """
    names = [node.name for node in graph.nodes]
    if len(set(names)) != len(names) or not all(names):
        raise PostconditionError("N1: node names are not unique")
    known = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if tensor.name and not isinstance(tensor, Constant) and tensor.name not in known:
                raise PostconditionError(f"N2: {node.name} reads {tensor.name} before it is made")
        known |= {tensor.name for tensor in node.outputs}
        _check_node(graph, node)


def _check_node(graph: Graph, node: Node) -> None:
    if node.op == "Constant" and not any(graph.is_output(out) for out in node.outputs):
        raise PostconditionError(f"N3: {node.name} (Constant) is left")
    constant_weight = node.op in ("Conv", "Gemm") and isinstance(node.inputs[1], Constant)
    if constant_weight and (len(node.inputs) < 3 or not node.inputs[2].name):
        raise PostconditionError(f"N4: {node.name} has no bias")
    if node.op != "BatchNormalization":
        return
    maker = graph.producer(node.inputs[0])
    foldable = (
        maker is not None
        and maker.op in ("Conv", "Gemm")
        and all(isinstance(t, Constant) for t in (maker.inputs[1], *node.inputs[1:]))
        and sole_reader(graph, node.inputs[0]) is node
    )
    if foldable and not node.attrs.get("training_mode", 0):
        raise PostconditionError(f"N5: {node.name} behind a linear op is left")
