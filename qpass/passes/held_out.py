"""How many batches judge what is fitted to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

LEAST_SAMPLES: Final = 2  # one says nothing of how much samples differ, and refuses everything


def count_held(batches: Sequence[Mapping[str, Any]], holdout: float) -> int:
    """Return how many batches at the end are held out.

    A share of `holdout`, at least one and as many as have two samples together, and never all: a
    last batch of one sample would be a judge that cannot say yes.
    """
    held = max(1, round(holdout * len(batches)))
    while held < len(batches) and sum(map(_samples, batches[-held:])) < LEAST_SAMPLES:
        held += 1
    return min(held, len(batches) - 1)


def _samples(batch: Mapping[str, Any]) -> int:
    """Return the number of samples of a batch: the longest first axis of its inputs."""
    return max((len(array) for array in batch.values() if np.ndim(array)), default=1)
