"""What calibration is asked for, and what it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.observers import ELEMENTS_PER_SAMPLE, TensorObserver
from qpass.calibrate.stats import STATS_VERSION, TensorStats

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TapRequest:
    """A tensor to observe; the fields are those of `TensorObserver`."""

    tensor: str
    axis: int | None = None
    importance: Array | None = None
    mask_below: float | None = None

    def observer(self) -> TensorObserver:
        """Return a fresh observer."""
        return TensorObserver(
            self.tensor, axis=self.axis, importance=self.importance, mask_below=self.mask_below
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectResult:
    """Statistics by tensor; `forward_seconds` were spent in the engine, in `passes` passes."""

    stats: dict[str, TensorStats]
    samples: int
    forward_seconds: float = 0.0
    passes: int = 1


def fingerprint_of(taps: Sequence[TapRequest]) -> str:
    """Return the sha256 of what is asked for, in any order, and of how it is observed."""
    digest = hashlib.sha256(f"{STATS_VERSION} {ELEMENTS_PER_SAMPLE}".encode())
    for tap in sorted(taps, key=lambda tap: tap.tensor):
        digest.update(f"\0{tap.tensor}\0{tap.axis}\0{tap.mask_below}\0".encode())
        if tap.importance is not None:
            digest.update(np.asarray(tap.importance, np.float64).tobytes())
    return digest.hexdigest()
