"""Time every node of OpenVINO's CPU plugin, to see which integers cost more than their float form.

Measured on 2026.4.1 with ``PERF_COUNT=YES``:

- `profiling_info` names a node by its friendly name in the compiled graph. What was fused into
  another op is listed as well, as not run or with a time of zero, and may carry the ONNX name, so
  that a node is found by its name only where the time is.
- A fused linear op is listed under the name of the *last* node that it swallowed: a FullyConnected
  with bias is called like the Add, its ONNX MatMul does not appear. `EngineOp.covers` knows both.
- Made-up names (``Multiply_4711``) are numbered anew in each compilation, so that those of a census
  say nothing here. The ONNX nodes that such an op covers are therefore entered with its time.
- Times are whole microseconds and hold the kernel alone. What the plugin spends between kernels
  (shape inference of dynamic shapes, preparing kernels) is not in them: a sum of times may say
  faster where the clock on the wall says slower.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qpass.verify.engine_op import EngineOp
from qpass.verify.engines import EngineError, compile_openvino, openvino_config

Array = NDArray[Any]


def profile_openvino(
    model: Path,
    feeds: Mapping[str, Array],
    runs: int = 10,
    *,
    warmup: int = 2,
    threads: int = 1,
    config: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Return the kernel time of every node that OpenVINO's CPU plugin runs.

    The names are those of the ops and of the ONNX nodes that they cover, so that `time_of` finds
    each op of the census of the same file. Times of one op stand under several names: do not sum
    them up. The census is taken without ``Subgraph`` ops (``SNIPPETS_MODE=DISABLE``), so
    the profile is, too: otherwise attention would be one op here and several ops there.

    Args:
        model: the ONNX file.
        feeds: one batch.
        runs: timed runs.
        warmup: runs before, whose times are dropped.
        threads: threads inside one op.
        config: properties of OpenVINO; they win over the ones set here.

    Returns:
        Node name to microseconds, the median over the runs. Nodes that were fused into others, or
        were too fast for the clock, are at 0.

    Raises:
        ValueError: `runs` is below 1.
        EngineError: OpenVINO refused the model or the feeds.
    """
    if runs < 1:
        raise ValueError("a profile takes at least one run")
    properties = {"PERF_COUNT": "YES", "SNIPPETS_MODE": "DISABLE", **(config or {})}
    compiled = compile_openvino(model, openvino_config(threads=threads, config=properties))
    request = compiled.create_infer_request()
    known = {name for port in compiled.inputs for name in port.get_names()}
    unknown = [name for name in feeds if name not in known]
    if unknown:
        raise EngineError("openvino", f"profile {model.name}", f"unknown inputs {unknown}")
    times: dict[str, list[float]] = {}
    for number in range(warmup + runs):
        try:
            request.infer(dict(feeds))
        except (RuntimeError, TypeError, ValueError) as error:
            raise EngineError("openvino", f"profile {model.name}", error) from error
        if number < warmup:
            continue
        for name, spent in _microseconds(request.profiling_info).items():
            times.setdefault(name, []).append(spent)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for node in compiled.get_runtime_model().get_ordered_ops():
        taken = medians.get(node.get_friendly_name())
        if taken is not None:
            for name in node.get_rt_info()["originalLayersNames"].astype(str).split(","):
                medians.setdefault(name, taken)
    return medians


def time_of(op: EngineOp, profile: Mapping[str, float]) -> float | None:
    """Return the microseconds of an op of the census, or None where the profile has none.

    By its name, and by the ONNX nodes that it covers where the plugin made up a name.
    """
    known = [profile[name] for name in (op.name, *op.covers) if name in profile]
    return max(known, default=None)


def _microseconds(rows: Any) -> dict[str, float]:
    """Sum the rows of one run by node: a node in the body of a loop comes once an iteration."""
    total: dict[str, float] = {}
    for row in rows:
        spent = row.real_time.total_seconds() * 1e6
        total[row.node_name] = total.get(row.node_name, 0.0) + spent
    return total
