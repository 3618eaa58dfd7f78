"""The JSON contract: every key that other programs may rely on, and numbers that JSON can hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from qpass.report.model import FileSizes, Report

TOP = {
    "schema", "model", "output", "target", "precision", "passes", "nodes", "engines", "metric",
    "layers", "cost", "gates", "ok",
}  # fmt: skip
INNER = {
    "passes": {"name", "changed", "refusals", "seconds"},
    "engines": {
        "name", "version", "integer_ops", "float_ops", "latency_ms", "speedup", "sqnr_db", "cosine",
        "optimizer_diff_db",
    },
    "layers": {"name", "op", "sqnr_db_before", "sqnr_db_after"},
    "gates": {"name", "wanted", "got", "passed"},
    "nodes": {"float", "quantized", "added_at_runtime"},
    "metric": {"name", "float", "quantized", "drop"},
    "cost": {
        "seconds_total", "seconds_by_stage", "float_forward_seconds", "peak_rss_bytes", "samples",
    },
}  # fmt: skip


def loaded(report: Report) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(report.to_json())
    return data


def test_the_contract_keys_are_there(report: Report) -> None:
    data = loaded(report)
    assert data["schema"] == 1
    assert data.keys() >= TOP


@pytest.mark.parametrize("key", sorted(INNER))
def test_the_inner_contract_keys_are_there(report: Report, key: str) -> None:
    value = loaded(report)[key]
    rows = value if isinstance(value, list) else [value]
    assert rows
    for row in rows:
        assert row.keys() >= INNER[key]


def test_the_contract_keys_of_float_ops_and_latency(report: Report) -> None:
    engine = loaded(report)["engines"][0]
    assert engine["float_ops"][0].keys() >= {"node", "op", "rule", "reason"}
    assert engine["latency_ms"] == {"float": 12.34, "quantized": 4.56}


def test_numbers_that_are_not_finite_become_null(report: Report) -> None:
    layer = loaded(report)["layers"][6]
    assert math.isnan(report.layers[6].sqnr_db_before)
    assert layer["sqnr_db_before"] is None
    assert layer["sqnr_db_after"] is None


def test_metric_is_absent_without_eval(report: Report) -> None:
    assert "metric" not in loaded(replace(report, metric=None))


def test_one_failed_gate_makes_the_report_not_ok(report: Report) -> None:
    assert loaded(report)["ok"] is False
    passed = tuple(replace(gate, passed=True) for gate in report.gates)
    assert loaded(replace(report, gates=passed))["ok"] is True


def test_size_ratio_is_quantized_over_float() -> None:
    assert FileSizes(float_bytes=400, quantized_bytes=100).ratio == 0.25
    assert FileSizes(float_bytes=0, quantized_bytes=7).ratio == 7.0
