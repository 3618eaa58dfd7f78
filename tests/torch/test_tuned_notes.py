"""What a report says of tuning, where more than one file was tuned on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import qpass
from qpass.pipeline import UNLEARNED
from tests.jobs import CNN, DIGITS, normal, saved, small_model

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


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_a_run_that_learns_nothing_says_so(tmp_path: Path, precision: str) -> None:
    """Weights of 8 bits are rounded in closed form."""
    report = qpass.optimize(
        saved(small_model(), tmp_path), data=normal((48, 3, 8, 8)), engines=("ort",),
        precision=precision, round="adaround", iterations=10, tune=0, compensate="none",
        calibrate="minmax", equalize=False, low_bit_edges=precision != "w8a8",
    )  # fmt: skip
    assert (precision == "w8a8") == (UNLEARNED in report.notes)
