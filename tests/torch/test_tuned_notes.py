"""What a report says of tuning, where more than one file was tuned on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import qpass
from tests.jobs import CNN, DIGITS

pytestmark = pytest.mark.torch


def test_the_note_is_about_the_file_that_was_chosen(tmp_path: Path) -> None:
    """Plans that a search for bits builds are tuned as well."""
    report = qpass.optimize(
        CNN, data=DIGITS, output=tmp_path / "q.onnx", engines=("ort",), precision="w3a8",
        mixed=True, min_sqnr=18.0, tune=30, compensate="none", round="rtn", calibrate="minmax",
        equalize=False, repair=False,
    )  # fmt: skip
    assert report.mixed is not None
    assert sum(point.measured is not None for point in report.mixed.points) > 1
    notes = [note for note in report.notes if note.startswith("tuned by gradients")]
    assert next(part.changed for part in report.passes if part.name == "tune")
    assert len(notes) == 1
