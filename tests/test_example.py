"""The example runs: a torch module through both exporters to verified integer models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpass.modelfile import read_metadata

EXAMPLE = Path(__file__).parents[1] / "examples" / "export_and_optimize.py"


@pytest.mark.torch
def test_both_exporters_lead_to_integer_models(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "failed" not in done.stdout
    assert done.stdout.count("5 of 5 planned ops in integers") >= 2
    for exporter in ("legacy", "dynamo"):
        metadata = read_metadata(tmp_path / f"network_{exporter}.int8.onnx")
        assert metadata["qpass.target"] == "ort-x86"
