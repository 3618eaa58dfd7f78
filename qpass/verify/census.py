"""Ask an engine what it made of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qpass.verify.census_openvino import read_back_openvino
from qpass.verify.census_ort import read_back_ort
from qpass.verify.engine_op import Census


def read_back(
    engine: str,
    model: Path,
    workdir: Path,
    *,
    session_config: Mapping[str, str] | None = None,
) -> Census:
    """Load `model` in an engine and return the ops of the engine's own optimized graph.

    Args:
        engine: ``ort`` or ``openvino``; the reference evaluator has no graph of its own.
        model: the ONNX file.
        workdir: existing folder for files that live during the call only.
        session_config: as for `open_engine`; it may change what the engine fuses.

    Raises:
        ValueError: the engine has no census.
        EngineError: the engine is not installed, or refused the model.
    """
    config = dict(session_config or {})
    if engine == "ort":
        return read_back_ort(model, workdir, config)
    if engine == "openvino":
        return read_back_openvino(model, config)
    msg = f"there is no census of engine {engine!r}"
    raise ValueError(msg)
