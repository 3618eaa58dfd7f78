"""Bars of accuracy and compensation in `tools/bench_accuracy.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # scripts, not a package

from bench_bars import judge_bars

WITH, WITHOUT = "qpass:ort-x86", "qpass:ort-x86,compensate=none"


def row(contestant: str, **values: Any) -> dict[str, Any]:
    facts = {
        "kind": "model", "status": "ok", "model": "m", "engine": "ort", "contestant": contestant,
        "sqnr_db": 20.0, "latency_ratio": 0.5, "size_ratio": 0.26, "quantize_seconds": 1.0,
        "float_pass_seconds": 1.0, "engine_ops": 30, "integer_ops": 20, "float_ops": 1,
        "weight_only_ops": 0, "peak_rss_bytes": 1e9, "calibration_samples": 64,
    }  # fmt: skip
    return facts | values


def verdict(name: str, *rows: dict[str, Any]) -> bool | None:
    found = [bar.met for bar in judge_bars(rows) if bar.name == name and WITHOUT not in bar.subject]
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize(
    ("name", "values", "met"),
    [
        ("compensation never worse", {"sqnr_db": 20.0}, True),
        ("compensation never worse", {"sqnr_db": 19.9}, False),
        ("time of compensation", {"stage_compensate_seconds": 5.5}, True),
        ("time of compensation", {"stage_compensate_seconds": 5.7}, False),
        ("compensation adds no op", {}, True),
        ("compensation adds no op", {"engine_ops": 31}, False),
        ("compensation adds no op", {"integer_ops": 19}, False),
        ("compensation costs no time", {"latency_ratio": 0.509}, True),
        ("compensation costs no time", {"latency_ratio": 0.511}, False),
        ("compensation costs no time", {"latency_ratio": 0.489}, False),
    ],
)
def test_pairs(name: str, values: dict[str, Any], met: bool) -> None:
    assert verdict(name, row(WITHOUT), row(WITH, **values)) is met


@pytest.mark.parametrize(
    ("sqnr", "latency", "met"),
    [(18.0, 0.5, True), (18.1, 0.5, False), (30.0, 0.53, None)],
)
@pytest.mark.parametrize("name", ["nncf", "aimet:enhanced"])
def test_peers_count_where_they_are_as_fast(
    name: str, sqnr: float, latency: float, met: bool | None
) -> None:
    peer = row(name, sqnr_db=sqnr, latency_ratio=latency)
    assert verdict("2 dB above the best peer", row("float"), peer, row(WITH)) is met


def test_no_verdict_without_the_twin() -> None:
    other = row("qpass:ort-x86,precision=w4a8,compensate=none")
    assert verdict("compensation never worse", other, row(WITH)) is None
    openvino = row(WITHOUT, engine="openvino")
    assert verdict("compensation never worse", openvino, row(WITH)) is None


@pytest.mark.parametrize(
    ("sqnr", "metric", "met"), [(27.0, 64.4, (True, True)), (26.9, 64.3, (False, False))]
)
def test_accuracy_of_a_known_model(sqnr: float, metric: float, met: tuple[bool, bool]) -> None:
    model = {"model": "resnet18_x"}
    rows = [
        row("float", metric=64.8, **model),
        row(WITH, sqnr_db=sqnr, metric=metric, **model),
    ]
    assert (verdict("SQNR, w8a8", *rows), verdict("points lost, w8a8", *rows)) == met


def test_low_bits_are_judged_by_rounding() -> None:
    rows = [
        row("float", model="resnet18_x", metric=64.8),
        row("qpass:ort-x86,precision=w4a8,round=rtn", model="resnet18_x", metric=60.0),
        row("qpass:ort-x86,precision=w4a8,round=unit", model="resnet18_x", metric=63.2),
    ]
    assert verdict("metric, w4a8 rtn/mse", *rows) is True
    assert verdict("points lost, w4a8 auto/gptq/erq/unit", *rows) is False


def test_other_models_have_no_bars_of_accuracy() -> None:
    names = {bar.name for bar in judge_bars([row("float", metric=9.0), row(WITH, metric=1.0)])}
    assert not any("w8a8" in name for name in names)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ("round=unit", "w4a8 auto/gptq/erq/unit"),
        ("round=unit,row_weights=norm", "w4a8 auto/gptq/erq/unit"),
        ("round=unit,row_weights=gradient", "w4a8 gradient"),
        ("tune=100", "w4a8 gradient"),
        ("round=adaround", "w4a8 gradient"),
    ],
)
def test_what_takes_gradients_has_bars_of_its_own(options: str, label: str) -> None:
    model = {"model": "resnet18_x"}
    contestant = f"{WITH},precision=w4a8,{options}"
    rows = [row("float", metric=64.8, **model), row(contestant, metric=64.4, **model)]
    names = [bar.name for bar in judge_bars(rows) if bar.name.startswith("points lost")]
    assert names == [f"points lost, {label}"]
