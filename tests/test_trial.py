"""Range methods compete on the error at the outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import qpass
from qpass.program import Policy, Precision
from qpass.targets import load_target
from qpass.trial import CANDIDATES, MARGIN_DB, try_methods
from tests.jobs import model_of
from tests.small_models import feeds_of, residual_cnn

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


def test_ranges_compete_with_weights_of_eight_bits(tmp_path: Path) -> None:
    """Weights of two bits to nearest would drown them; later they are rounded by their outputs."""
    reference = residual_cnn()
    path = tmp_path / "m.onnx"
    path.write_bytes(reference.to_model().SerializeToString())
    sentences = []
    for precision in ("w8a4", "w2a4"):
        found = qpass.optimize(
            path,
            data=feeds_of(reference, 24),
            output=tmp_path / "q.onnx",
            precision=precision,
            equalize=False,
            engines=("ort",),
        )
        sentences += [note for note in found.notes if note.startswith("ranges by trial")]
    assert len(sentences) == 2
    assert sentences[0] == sentences[1]


def test_only_integer_activations_get_wide_weights() -> None:
    bits = {"a": Precision(weight=3, activation=4), "b": Precision(weight=4, activation=None)}
    wide = Policy(precision=Precision(weight=4, activation=8), node_bits=bits).with_wide_weights()
    assert wide.precision == Precision(weight=8, activation=8)
    assert wide.node_bits == {"a": Precision(weight=8, activation=4), "b": bits["b"]}
