"""Calibration: samples in, statistics of tensors and their ranges out."""

from __future__ import annotations

from qpass.calibrate.cache import (
    CalibrationCache,
    Checkpoint,
    load_stats,
    merge_stats,
    missing_shards,
    save_stats,
)
from qpass.calibrate.collect import collect
from qpass.calibrate.inputs import InputSpec, input_specs
from qpass.calibrate.observers import TensorObserver
from qpass.calibrate.ranges import (
    RangeChoice,
    estimated_sqnr_db,
    histogram_view,
    solve_range,
)
from qpass.calibrate.samples import Samples, batches, open_samples, shard, split
from qpass.calibrate.stats import Histogram, TensorStats
from qpass.calibrate.taps import CollectResult, TapRequest

__all__ = [
    "CalibrationCache",
    "Checkpoint",
    "CollectResult",
    "Histogram",
    "InputSpec",
    "RangeChoice",
    "Samples",
    "TapRequest",
    "TensorObserver",
    "TensorStats",
    "batches",
    "collect",
    "estimated_sqnr_db",
    "histogram_view",
    "input_specs",
    "load_stats",
    "merge_stats",
    "missing_shards",
    "open_samples",
    "save_stats",
    "shard",
    "solve_range",
    "split",
]
