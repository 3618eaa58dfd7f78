"""Bars of results with fewer than 8 bits in `tools/bench_low_bits.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # scripts, not a package

from bench_bars import judge_bars
from bench_peers import bits_of, parse_contestant

WITH_BITS = "qpass:ort-x86,precision=w4a8"
OWN = f"{WITH_BITS},round=unit"


def row(contestant: str, **values: Any) -> dict[str, Any]:
    facts = {
        "kind": "model", "status": "ok", "model": "m", "engine": "ort", "contestant": contestant,
        "sqnr_db": 10.0, "latency_ratio": 1.5, "size_ratio": 0.15, "quantize_seconds": 100.0,
        "float_pass_seconds": 1.0, "peak_rss_bytes": 2.9e9, "calibration_samples": 64,
        "engine_ops": 30, "integer_ops": 2, "float_ops": 20, "weight_only_ops": 0,
    }  # fmt: skip
    return facts | values


def verdicts(*rows: dict[str, Any]) -> dict[str, bool]:
    return {bar.name: bar.met for bar in judge_bars(rows)}


@pytest.mark.parametrize(
    ("contestant", "bits"),
    [
        ("float", "w8a8"),
        ("qpass:ort-x86", "w8a8"),
        ("qpass:ort-x86,precision=w4", "w4"),
        ("quark:minmax,bias=true", "w8a8"),
        ("quark,bits=4,adaround=true", "w4a8"),
        ("aimet:enhanced,bits=3", "w3a8"),
        ("ort:gptq,mse=true", "w4"),
        ("ort:dynamic", "w8a8"),
        ("nncf:int4", "w4"),
    ],
)
def test_bits(contestant: str, bits: str) -> None:
    assert bits_of(parse_contestant(contestant)) == bits


def test_bars_of_eight_bits_are_not_asked_of_fewer() -> None:
    peer = row("ort:minmax", sqnr_db=30.0, latency_ratio=0.5)
    assert verdicts(peer, row(OWN)) == {"size": True, "memory, w4a8": True}


def test_peers_of_fewer_bits_are_not_held_against_eight() -> None:
    own = row("qpass:ort-x86", latency_ratio=0.5)
    peer = row("quark,bits=4", latency_ratio=0.1, sqnr_db=90.0)
    names = verdicts(own, peer)
    assert "latency of the fastest peer" not in names
    assert "2 dB above the best peer" not in names


@pytest.mark.parametrize(
    ("options", "seconds", "met"),
    [
        ("round=unit", 180.0, True),
        ("round=unit", 180.1, False),
        ("round=adaround", 1200.0, True),
        ("round=adaround", 1200.1, False),
    ],
)
def test_time_of_the_timed_model(options: str, seconds: float, met: bool) -> None:
    own = row(f"{WITH_BITS},{options}", model="resnet18_x", quantize_seconds=seconds)
    assert verdicts(own)["seconds, w4a8"] is met


def test_memory() -> None:
    assert not verdicts(row(OWN, peak_rss_bytes=3e9))["memory, w4a8"]


@pytest.mark.parametrize(("metric", "met"), [(60.0, True), (59.9, False)])
def test_best_peer_is_the_one_with_the_best_metric(metric: float, met: bool) -> None:
    best = row("aimet,bits=4", sqnr_db=8.0, metric=60.0, quantize_seconds=100.1)
    others = (
        row("quark,bits=4", sqnr_db=12.0, metric=50.0, quantize_seconds=1.0),
        row("aimet,bits=3", metric=70.0),
        row("quark,bits=4,adaround=true", metric=90.0, model="another"),
        row("nncf:int4", metric=95.0),
    )
    found = verdicts(row(OWN, metric=metric), best, *others)
    assert found["best peer, w4a8"] is met
    assert found["time of the best peer, w4a8"] is True


@pytest.mark.parametrize(("sqnr", "met"), [(12.0, True), (11.9, False)])
def test_best_peer_without_a_metric(sqnr: float, met: bool) -> None:
    peers = (row("quark,bits=4", sqnr_db=12.0), row("aimet,bits=4", sqnr_db=11.0))
    found = verdicts(row(OWN, sqnr_db=sqnr), *peers)
    assert found["best peer, w4a8"] is met
    assert found["time of the best peer, w4a8"] is False


@pytest.mark.parametrize(
    ("model", "sqnr", "met"),
    [("m", 10.0, True), ("m", 9.9, False), ("kwt1_x", 16.0, True), ("kwt1_x", 15.9, False)],
)
def test_distance_from_nearest(model: str, sqnr: float, met: bool) -> None:
    twin = row(f"{WITH_BITS},round=rtn,jobs=1", model=model)
    others = (
        row(f"{WITH_BITS},round=rtn", model=model, sqnr_db=50.0, calibration_samples=128),
        row(f"{WITH_BITS},round=rtn,compensate=none", model=model, sqnr_db=50.0),
        row("qpass:ort-x86,precision=w3a8,round=rtn", model=model, sqnr_db=50.0),
    )
    found = verdicts(row(OWN, model=model, sqnr_db=sqnr), twin, *others)
    assert found["SQNR above nearest, w4a8"] is met


@pytest.mark.parametrize(("metric", "met"), [(-2.06, True), (-2.07, False)])
def test_loss_of_the_language_model(metric: float, met: bool) -> None:
    rows = [
        row("float", model="stories_x", metric=-2.0),
        row("qpass:ort-x86,precision=w4", model="stories_x", metric=metric),
    ]
    assert verdicts(*rows)["loss / float, w4"] is met


def test_uncompensated_results_are_not_judged() -> None:
    assert verdicts(row(f"{OWN},compensate=none")) == {"size": True}
