"""Bring a float graph into the form that every later pass relies on.

What it does
    Runs the folds below until none changes anything.
Why it is correct
    Every fold is exact in real arithmetic; constants are computed in float64 and rounded once.
Postconditions, checked by `check_normalized`
    N1 names of nodes and tensors are unique and not empty;
    N2 nodes are in topological order;
    N3 there are no Identity, Dropout or Constant nodes, but those that give a graph output or a
       tensor that control flow reads its name;
    N4 Conv, ConvTranspose and Gemm with constant weights have an explicit bias;
    N5 no BatchNormalization stands behind a linear op that could take it;
    N6 small constants have one reader each.
What is told and not checked, for a model may hold ops that onnx knows nothing about
    N7 the rank of the data of every linear op is known; where it is not, there is a refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qpass.errors import InternalError, PostconditionError
from qpass.graph import LINEAR_OPS, SHARED_LIMIT, Constant, Graph, Node, Tensor
from qpass.passes.normalize.activations import (
    is_silu,
    recognize_global_average_pool,
    recognize_hard_swish,
)
from qpass.passes.normalize.chunks import recognize_split
from qpass.passes.normalize.cleanup import (
    is_removable,
    merge_transposes,
    remove_no_ops,
    unshare_small_constants,
)
from qpass.passes.normalize.constant_folding import fold_constant_nodes, fold_constants
from qpass.passes.normalize.float32 import to_float32
from qpass.passes.normalize.folding import FoldResult, rank_of
from qpass.passes.normalize.gelu import recognize_gelu
from qpass.passes.normalize.gemm import give_biases, matmul_to_gemm, normalize_gemm
from qpass.passes.normalize.layer_norm import recognize_layer_norm
from qpass.passes.normalize.linear_folding import (
    BIASED,
    explain_batch_norms,
    fold_affine_into_linear,
    takes_batch_norm,
)
from qpass.passes.normalize.shapes import fold_reshape_targets, fold_shapes
from qpass.report.model import PassReport

__all__ = ["FOLDS", "check_normalized", "is_silu", "normalize", "to_float32"]

FOLDS: Final[tuple[Callable[[Graph], FoldResult], ...]] = (
    fold_constant_nodes,
    remove_no_ops,
    merge_transposes,
    fold_shapes,
    fold_reshape_targets,
    fold_constants,
    recognize_layer_norm,
    recognize_gelu,
    recognize_hard_swish,
    recognize_global_average_pool,
    recognize_split,
    matmul_to_gemm,
    normalize_gemm,
    fold_affine_into_linear,
    give_biases,
    unshare_small_constants,
)
# Chains are folded whole in one round; a round makes work for the next two or three at most.
MAX_ROUNDS: Final = 20


def normalize(graph: Graph) -> PassReport:
    """Run all folds to a fixed point; `changed` counts the rewrites.

    Raises:
        PostconditionError: a fold left a graph that breaks N1 to N6.
        InternalError: two folds undo each other.
    """
    graph.infer_shapes()
    half = to_float32(graph)
    changed = half.changed
    for _ in range(MAX_ROUNDS):
        graph.remove_unused()  # a reader that nobody needs would keep folds from its producer
        results = [fold(graph) for fold in FOLDS]
        round_changed = sum(result.changed for result in results)
        if not round_changed:
            break
        changed += round_changed
        graph.infer_shapes()
    else:
        raise InternalError(f"normalize does not come to an end in {MAX_ROUNDS} rounds")
    graph.sort()
    results += [half, explain_batch_norms(graph), _unknown_ranks(graph)]
    refusals = dict.fromkeys(refusal for result in results for refusal in result.refusals)
    check_normalized(graph)
    return PassReport(name="normalize", changed=changed, refusals=tuple(refusals))


def _unknown_ranks(graph: Graph) -> FoldResult:
    result = FoldResult()
    for node in graph.nodes:
        if node.op in LINEAR_OPS and rank_of(node.inputs[0]) is None:
            result.refuse("N7 ranks", node, f"the rank of {node.inputs[0].name} is not known")
    return result


def check_normalized(graph: Graph) -> None:
    """Check N1 to N6.

    Raises:
        PostconditionError: the number and the place.
    """
    names = [node.name for node in graph.nodes]
    if len(set(names)) != len(names) or not all(names):
        raise PostconditionError("N1: node names are not unique")
    known = {tensor.name: tensor for tensor in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if not isinstance(tensor, Constant):
                _check_made(node, tensor, known)
            elif len(tensor.outputs) > 1 and tensor._values.nbytes <= SHARED_LIMIT:
                raise PostconditionError(f"N6: {tensor.name} has several readers")
            elif known.setdefault(tensor.name, tensor) is not tensor:
                raise PostconditionError(f"N1: two tensors have the name {tensor.name}")
        for tensor in node.outputs:
            if tensor.name and known.setdefault(tensor.name, tensor) is not tensor:
                raise PostconditionError(f"N1: two tensors have the name {tensor.name}")
        _check_node(graph, node)


def _check_made(node: Node, tensor: Tensor, known: dict[str, Tensor]) -> None:
    if tensor.name and known.get(tensor.name) is not tensor:
        raise PostconditionError(f"N2: {node.name} reads {tensor.name} before it is made")


def _check_node(graph: Graph, node: Node) -> None:
    if node.op == "Constant" and not any(graph.is_output(out) for out in node.outputs):
        raise PostconditionError(f"N3: {node.name} (Constant) is left")
    if node.op in ("Identity", "Dropout") and is_removable(graph, node):
        raise PostconditionError(f"N3: {node.name} ({node.op}) is left")
    if node.op in BIASED and isinstance(node.inputs[1], Constant):
        if len(node.inputs) < 3 or not node.inputs[2].name:
            raise PostconditionError(f"N4: {node.name} has no bias")
        if takes_batch_norm(graph, node):
            raise PostconditionError(f"N5: the BatchNormalization behind {node.name} is left")
