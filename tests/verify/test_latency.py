from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qpass.verify import (
    EngineError,
    latency,
    measure_interleaved,
    open_engine,
    peak_rss_bytes,
    profile_ort,
    read_back,
)


class Clock:
    """Time that passes only when an engine runs."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeEngine:
    """Takes the planned seconds, one entry a call, and writes down that it was called."""

    version = "0"
    output_names = ()

    def __init__(self, name, clock, log, plan):
        self.name, self._clock, self._log, self._plan = name, clock, log, iter(plan)

    def run(self, feeds):
        self._log.append(self.name)
        self._clock.now += next(self._plan)
        return []


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_round_robin_warmup_and_statistics(clock):
    log: list[str] = []
    a = FakeEngine("a", clock, log, [9.0, 0.002, 0.004, 0.006])
    b = FakeEngine("b", clock, log, [9.0, 0.001, 0.002, 0.003])
    first, second = measure_interleaved([a, b], {}, seconds=0.0, min_runs=3, warmup=1)
    assert log == ["a", "b"] * 4
    assert (first.name, second.name) == ("a", "b")
    assert first.runs == second.runs == 3
    assert first.median_ms == pytest.approx(4.0, abs=1e-9)
    assert second.quartiles_ms == pytest.approx((1.5, 2.5), abs=1e-9)
    assert first.ratio == 1.0
    assert second.ratio == pytest.approx(0.5, abs=1e-9)
    assert second.speedup == pytest.approx(2.0, abs=1e-9)


def test_the_ratio_is_taken_within_rounds(clock):
    # The machine becomes ten times slower in most rounds: medians of either series alone would
    # move with it, each round says one half.
    slow = [10.0, 1.0, 10.0, 1.0, 10.0]
    a = FakeEngine("a", clock, [], [2 * s for s in slow])
    b = FakeEngine("b", clock, [], slow)
    _, result = measure_interleaved([a, b], {}, seconds=0.0, min_runs=5, warmup=0)
    assert result.ratio_quartiles == pytest.approx((0.5, 0.5), abs=1e-9)


def test_one_outlier_does_not_move_the_ratio(clock):
    a = FakeEngine("a", clock, [], [2.0] * 9)
    b = FakeEngine("b", clock, [], [1.0] * 8 + [100.0])
    _, result = measure_interleaved([a, b], {}, seconds=0.0, min_runs=9, warmup=0)
    assert result.ratio == pytest.approx(0.5, abs=1e-9)


def test_rounds_go_on_until_the_time_is_over(clock):
    engine = FakeEngine("a", clock, [], [0.1] * 100)
    (result,) = measure_interleaved([engine], {}, seconds=1.95, min_runs=3, warmup=0)
    assert result.runs == 20


def test_measuring_needs_engines_and_rounds():
    with pytest.raises(ValueError, match="at least one engine"):
        measure_interleaved([], {})
    with pytest.raises(ValueError, match="two rounds"):
        measure_interleaved([FakeEngine("a", Clock(), [], [])], {}, min_runs=1)


def test_real_engines_are_measured(saved, feeds):
    model, path = saved("gemm")
    pair = [open_engine("ort", path), open_engine("ort", path, optimize=False)]
    results = measure_interleaved(pair, feeds(model), seconds=0.0, min_runs=5)
    assert all(0 < r.quartiles_ms[0] <= r.median_ms <= r.quartiles_ms[1] for r in results)


@pytest.mark.parametrize("case", ["residual", "branches", "matmul_bias_trap"])
def test_profile_uses_the_names_of_the_census(case, saved, feeds, tmp_path):
    model, path = saved(case)
    profile = profile_ort(path, feeds(model), runs=3, warmup=1)
    names = {op.name for op in read_back("ort", path, tmp_path).ops}
    assert profile
    assert set(profile) <= names
    assert all(time >= 0 for time in profile.values())
    assert not [p for p in tmp_path.iterdir() if p != path]


def test_profile_leaves_out_the_branch_not_taken(saved, feeds):
    model, path = saved("branches")
    profile = profile_ort(path, feeds(model), runs=2)
    assert "then" in profile
    assert "else" not in profile


def test_median_by_node_sums_iterations_and_skips_the_warmup():
    def event(name, ts, dur, cat="Node"):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur}

    events = []
    for run, kernel in enumerate([900, 5, 7, 6]):
        start = run * 10_000
        events.append(event("model_run", start, 9_000, "Session"))
        events += [event("loop_body_kernel_time", start + i, kernel) for i in (1, 2)]
        events.append(event("loop_body_fence_before", start + 3, 1))
    assert latency._median_by_node(events, 1) == {"loop_body": 12.0}


def test_profile_refusals(saved, feeds):
    model, path = saved("gemm")
    with pytest.raises(EngineError, match=r"profile gemm\.onnx"):
        profile_ort(path, {"x": np.ones((1, 1), np.float32)})
    with pytest.raises(ValueError, match="at least one run"):
        profile_ort(path, feeds(model), runs=0)


def test_peak_memory_grows_with_use_and_never_shrinks():
    before = peak_rss_bytes()
    assert before > 10 << 20  # numpy and onnxruntime alone take more
    block = np.ones(before + (64 << 20), np.uint8)  # more than there ever was
    slack = 4 << 20  # the kernel counts pages in batches
    grown = peak_rss_bytes()
    assert grown >= block.nbytes - slack
    del block
    assert peak_rss_bytes() >= grown - slack


def test_peak_memory_without_proc(monkeypatch, tmp_path):
    usual = peak_rss_bytes()
    monkeypatch.setattr(latency, "_STATUS", tmp_path / "absent")
    # Both come from the kernel's high-water mark; getrusage updates it a little later.
    assert peak_rss_bytes() == pytest.approx(usual, rel=0.05)


def test_each_round_runs_every_engine_once_in_an_order_of_its_own() -> None:
    calls: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, feeds: object) -> None:
            calls.append(self.name)

    engines: list[Any] = [Recorder(name) for name in "abc"]
    results = measure_interleaved(engines, {}, seconds=0.0, min_runs=90, warmup=0)
    assert [result.name for result in results] == ["a", "b", "c"]
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 90
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    for name in "abc":  # 30 of 90 are expected, with a standard deviation of 4.5
        assert 15 <= sum(names[0] == name for names in rounds) <= 45
