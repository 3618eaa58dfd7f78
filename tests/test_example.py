"""The example runs: a torch module through both exporters to verified integer models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from qpass.modelfile import read_metadata

EXAMPLE = Path(__file__).parents[1] / "examples" / "export_and_optimize.py"


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # of torch, about its exporters
def test_both_exporters_lead_to_integer_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--out", str(tmp_path)])
    # As a program, but in this process: a new one would take longer to import torch than to run.
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "failed" not in printed
    assert printed.count("5 of 5 planned ops in integers") >= 2
    for exporter in ("legacy", "dynamo"):
        metadata = read_metadata(tmp_path / f"network_{exporter}.int8.onnx")
        assert metadata["qpass.target"] == "ort-x86"
