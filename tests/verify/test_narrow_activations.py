"""Activations of 4 bits: no CPU kernel has them, and the file says how it can be run."""

from __future__ import annotations

from pathlib import Path

import pytest

import qpass
from qpass.modelfile import read_metadata
from qpass.verify.session import NARROW_IN_FLOAT, recorded_entries
from tests.jobs import CNN, DIGITS


@pytest.mark.parametrize("precision", ["w8a4", "w4a4"])
def test_results_load_with_the_entries_that_they_record(precision: str, tmp_path: Path) -> None:
    report = qpass.optimize(
        CNN, data=DIGITS, precision=precision, calibrate="minmax", equalize=False, samples=16,
        compensate="none", round="rtn", engines=("ort",), output=tmp_path / "m.onnx",
    )  # fmt: skip
    assert report.ok
    assert report.engines[0].sqnr_db is not None
    assert recorded_entries(read_metadata(Path(report.output))) == NARROW_IN_FLOAT
    planned = [op.reason for op in report.engines[0].float_ops if op.planned]
    assert planned  # stem and head have 8 bits
    assert all("session.disable_quant_qdq=1" in reason for reason in planned)
