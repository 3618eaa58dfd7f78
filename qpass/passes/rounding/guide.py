"""Row weights by what the outputs of the model see of an error (torch).

What it does
    `qpass.torch.sensitivity` says how strongly noise in each row (a token, a pixel) of what a
    linear op makes shows in the squared error of the model's outputs. The geometric mean of that
    and of the weight by the norm behind (`row_weights`; 1 where there is none) is the weight of the
    row where errors of the op are added up: in rounding, refits, sweeps and gradients.
Why a mean of the two
    Errors count by the sensitivity itself, but then few rows are left to fit to: those of
    vit_tiny's blocks are worth 1 to 13 % of their number. Its root alone gives massive tokens too
    much. Numbers are in DESIGN.md. Rows of convolutions have nearly one weight and gain nothing.
Source
    GuidedQuant (Kim et al., ICML 2025) weights the Hessian of groups of outputs by squared
    gradients of the loss; here there are no labels, and one weight serves all outputs of an op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Constant, Graph
from qpass.submodel import Feeds

Array = NDArray[Any]
FLOOR: Final = 0.05  # of the mean weight: no row is without any


def guide_rows(
    graph: Graph,
    names: Sequence[str],
    batches: Sequence[Feeds],
    *,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, list[Array]] | str:
    """Return the roots of the sensitivity of the rows of some linear ops, or why there are none.

    Args:
        graph: the float graph.
        names: of Conv, Gemm and MatMul nodes with constant weights.
        batches: inputs by name.
        seed: of the random signs.
        threads: of torch.

    Returns:
        By name of the op: for each batch float64, of the shape of the output without its channels,
        in units of their mean over all batches.
    """
    from qpass.torch.sensitivity import UnsupportedOpError, row_sensitivity

    wanted = set(names)
    axes = {
        node.outputs[0].name: 1 if node.op == "Conv" else -1
        for node in graph.nodes
        if node.name in wanted and isinstance(node.inputs[1], Constant)
    }
    outputs = [tensor.name for tensor in graph.outputs]
    try:
        found = row_sensitivity(
            list(graph.nodes), outputs, axes, batches, seed=seed, threads=threads
        )
    except UnsupportedOpError as error:
        return f"{error.what} ({error.where})"
    for name, rows in found.items():
        if not all(np.isfinite(one).all() for one in rows):
            return f"its gradient is NaN or infinity ({name})"
    return {
        node.name: _weights(found[node.outputs[0].name])
        for node in graph.nodes
        if node.outputs and node.outputs[0].name in found
    }


def _weights(sensitivity: Sequence[Array]) -> list[Array]:
    roots = [np.sqrt(rows) for rows in sensitivity]
    mean = float(np.concatenate([rows.ravel() for rows in roots]).mean())
    if mean == 0.0:
        return [np.ones_like(rows) for rows in roots]
    return [(1.0 - FLOOR) * rows / mean + FLOOR for rows in roots]
