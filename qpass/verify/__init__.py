"""Load the result in the engine it is for, see what became of it, compare and time it.

`qpass.verify.trace.trace` stays in its module, whose name it would hide here.
"""

from __future__ import annotations

from qpass.verify.census import read_back
from qpass.verify.engine_op import Census, EngineOp
from qpass.verify.engines import Engine, EngineError, available_engines, open_engine
from qpass.verify.latency import (
    LatencyResult,
    measure_interleaved,
    peak_rss_bytes,
    profile_ort,
)
from qpass.verify.metrics import ErrorMeter, sqnr_db

__all__ = [
    "Census",
    "Engine",
    "EngineError",
    "EngineOp",
    "ErrorMeter",
    "LatencyResult",
    "available_engines",
    "measure_interleaved",
    "open_engine",
    "peak_rss_bytes",
    "profile_ort",
    "read_back",
    "sqnr_db",
]
