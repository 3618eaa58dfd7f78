"""Time and memory, measured so that a noisy machine cannot change the verdict.

Engines are run in rounds, each once in each: what disturbs the machine disturbs neighbours alike,
so the ratio *within a round* stays true where two separate series would not be comparable. The
verdict is the median of the rounds' ratios. Each round has an order of its own: in a fixed one, the
engine that always runs behind the float model finds the caches full of that model's weights, which
cost it 2 to 4 % on models of a millisecond.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.verify.engines import ORT_ERRORS, Engine, EngineError, open_session, session_options

Array = NDArray[Any]

_STATUS: Final = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyResult:
    """Times of one engine; the ratio is against the first engine of the same measurement."""

    name: str
    runs: int
    median_ms: float
    quartiles_ms: tuple[float, float]  # lower, upper
    ratio: float  # median over rounds of this / first: below 1 is faster, 1 for the first
    ratio_quartiles: tuple[float, float]

    @property
    def speedup(self) -> float:
        """How many times faster than the first engine: above 1 is faster."""
        return 1.0 / self.ratio


def measure_interleaved(
    engines: Sequence[Engine],
    feeds: Mapping[str, Array],
    *,
    seconds: float = 2.0,
    min_runs: int = 15,
    warmup: int = 3,
) -> tuple[LatencyResult, ...]:
    """Time the engines in turns, in another (seeded) order each round.

    Args:
        engines: loaded models that take the same feeds; the first one is the yardstick.
        feeds: one batch.
        seconds: rounds go on until so much time has passed,
        min_runs: and at least so many rounds were made.
        warmup: untimed rounds before, for lazy allocation and for caches.

    Raises:
        ValueError: no engine, or fewer than two rounds, which have no quartiles.
        EngineError: an engine failed to run.
    """
    if not engines or min_runs < 2:
        raise ValueError("measuring takes at least one engine and two rounds")
    for _ in range(warmup):
        for engine in engines:
            engine.run(feeds)
    rounds: list[list[float]] = []  # milliseconds, one list a round
    end = time.perf_counter() + seconds
    shuffle = np.random.default_rng(0).permutation
    while len(rounds) < min_runs or time.perf_counter() < end:
        times = {i: _milliseconds(engines[i], feeds) for i in shuffle(len(engines)).tolist()}
        rounds.append([times[i] for i in range(len(engines))])
    results = []
    for position, engine in enumerate(engines):
        own = _quartiles([times[position] for times in rounds])
        ratios = _quartiles([times[position] / times[0] for times in rounds])
        results.append(
            LatencyResult(
                name=engine.name,
                runs=len(rounds),
                median_ms=own[1],
                quartiles_ms=(own[0], own[2]),
                ratio=ratios[1],
                ratio_quartiles=(ratios[0], ratios[2]),
            )
        )
    return tuple(results)


def _milliseconds(engine: Engine, feeds: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    engine.run(feeds)
    # A clock without progress would divide by zero in the ratio.
    return max(time.perf_counter() - start, 1e-9) * 1e3


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def profile_ort(
    model: Path,
    feeds: Mapping[str, Array],
    runs: int = 10,
    *,
    warmup: int = 2,
    threads: int = 1,
    session_config: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Return the kernel time of every node of onnxruntime's optimized graph.

    The names are those of `EngineOp.name` in the census of the same file; a node without name is
    called ``OP_INDEX`` by the profiler. A node in the body of a Loop counts with the sum of its
    iterations.

    Returns:
        Node name to microseconds, the median over the runs.

    Raises:
        ValueError: `runs` is below 1.
        EngineError: onnxruntime refused the model or the feeds.
    """
    if runs < 1:
        raise ValueError("a profile takes at least one run")
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads=threads, config=session_config)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = open_session(model, options)
        try:
            for _ in range(warmup + runs):
                session.run(None, dict(feeds))
        except ORT_ERRORS as error:
            raise EngineError("ort", f"profile {model.name}", error) from error
        finally:
            written = Path(session.end_profiling())
        events = json.loads(written.read_text(encoding="utf-8"))
    return _median_by_node(events, warmup)


def _median_by_node(events: Sequence[Mapping[str, Any]], warmup: int) -> dict[str, float]:
    # A node's event lies inside the span of the model_run that it belongs to.
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    sums: list[dict[str, float]] = [{} for _ in spans[warmup:]]
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        node = name.removesuffix("_kernel_time")
        for (start, end), total in zip(spans[warmup:], sums, strict=True):
            if start <= event["ts"] <= end:
                total[node] = total.get(node, 0.0) + event["dur"]
    names = dict.fromkeys(name for total in sums for name in total)
    # A branch that was not taken in a run took no time in it.
    return {name: statistics.median(total.get(name, 0.0) for total in sums) for name in names}


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    try:
        status = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes
