"""Whether a rewritten float graph computes what it did, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from qpass.exact_session import open_exact
from qpass.graph import Graph
from qpass.submodel import Feeds
from qpass.targets.schema import Target

# Some hundred float32 roundings in a row differ by about 1e-5 of the largest output.
EXACT: Final = 1e-4
EXACT_SAMPLES: Final = 4  # show it

Outputs = Sequence[Mapping[str, Any]]


def outputs_of(
    graph: Graph, samples: Sequence[Feeds], target: Target, *, threads: int
) -> list[dict[str, Any]]:
    """Return the outputs of a graph by name, a dict for each sample."""
    session = open_exact(graph.to_model(inline=True), target, threads=threads)
    names = [value.name for value in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(feeds)), strict=True)) for feeds in samples]


def same_outputs(wanted: Outputs, got: Outputs) -> bool:
    """True when outputs differ by roundings at most; the longer list may have more samples."""
    return all(
        np.isfinite(two[name]).all() and _close(array, two[name])
        for one, two in zip(wanted, got, strict=False)
        for name, array in one.items()
    )


def _close(wanted: Any, got: Any) -> bool:
    left, right = np.asarray(wanted), np.asarray(got)
    if left.dtype.kind != "f":
        return bool((left == right).mean() > 1 - EXACT) if left.size else True
    size = float(np.abs(left).max(initial=0.0))
    return float(np.abs(left - right).max(initial=0.0)) <= EXACT * max(size, 1e-30)
