"""Range methods compete on the error at the outputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qpass.targets import load_target
from qpass.trial import CANDIDATES, MARGIN_DB, try_methods
from tests.jobs import model_of

TARGET = load_target("ort-x86")
SAMPLES = [{"x": np.linspace(1, 2, 4, dtype=np.float32)[None]}]


def scaled(factor: float) -> onnx.ModelProto:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[1,4] x) => (float[1,4] y) { y = Mul(x, k) }"""
    return model_of(text, k=np.float32(factor))


@pytest.mark.parametrize(
    ("errors", "winner"),
    [
        ((0.10, 0.01, 0.05), "percentile"),
        ((0.01, 0.05, 0.10), "minmax"),
        ((0.10, 0.05, 0.01), "auto"),
        ((0.1000, 0.0999, 0.0998), "minmax"),  # less than the margin: chance
    ],
)
def test_the_smallest_error_wins(errors: tuple[float, ...], winner: str) -> None:
    wrong = dict(zip(CANDIDATES, errors, strict=True))
    trial = try_methods(scaled(1.0), lambda name: scaled(1.0 + wrong[name]), SAMPLES, TARGET)
    assert trial.method == winner
    for name, error in wrong.items():
        # y is off by `error` of itself: -20 log10 of it, as far as float32 holds 1 + error.
        assert trial.sqnr_db[name] == pytest.approx(-20 * np.log10(error), abs=1e-3)
    assert "per tensor" in trial.sentence()
    assert 20 * np.log10(0.1000 / 0.0998) < MARGIN_DB
