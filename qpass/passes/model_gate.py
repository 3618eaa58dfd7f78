"""Judge a whole change by the model's outputs on held-out samples, paired sample by sample.

The SQNR over all samples is ruled by the few samples with the largest errors: on some models it
moves by 3 dB either way on sixteen samples when nothing but noise has changed. So a change must
also help the typical sample: the mean over the samples of how many dB its error falls has to be
above `CONFIDENCE` standard errors. And no output may pay for another: a model with two outputs of
unlike size had one of them made worse for the mean of both. Outputs that are integers, or as good
as exact before and after, have no say: the noise of float32 in a sum that is always 1 is none of
the change's doing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Graph
from qpass.submodel import Feeds, Submodel
from qpass.verify.metrics import CAP_DB, ErrorMeter, sqnr_db

Array = NDArray[Any]
CONFIDENCE: Final = 2.0  # standard errors
# For a change whose parts have each passed a gate of their own on held-out samples. With two,
# compensation of resnet18 and mobilenet_v2 was refused at +0.29 +- 0.17 and +0.37 +- 0.23 dB on 16
# samples, and rounding of vit_tiny at +0.38 +- 0.30 (21.3 -> 21.6 dB on 128 others).
GATED_CONFIDENCE: Final = 1.0
# Integers of 16 bits give at most 98 dB, what float32 rounding leaves is 120 to 150.
EXACT_DB: Final = 110.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """SQNR over all samples, and the gain of the typical sample, in dB.

    Means over the outputs that count. `least_db` is the change of the output that gained least.
    """

    before_db: float
    after_db: float
    gain_db: float
    gain_error_db: float  # standard error; infinite for less than two samples
    least_db: float = 0.0

    @property
    def helps(self) -> bool:
        """True when the change is an improvement beyond doubt."""
        return self.helps_by(CONFIDENCE)

    def helps_by(self, confidence: float) -> bool:
        """True when the typical sample gains by so many standard errors, and no output loses."""
        sure = self.gain_db > confidence * self.gain_error_db
        return self.after_db > self.before_db and self.least_db >= 0.0 and sure

    @property
    def sentence(self) -> str:
        """The numbers, for a report."""
        worse = f", one output {self.least_db:.2f} dB" if self.least_db < 0.0 else ""
        return (
            f"{self.before_db:.2f} dB -> {self.after_db:.2f} dB on held-out samples, "
            f"{self.gain_db:+.2f} +- {self.gain_error_db:.2f} dB a sample{worse}"
        )


def outputs_of(
    graph: Graph,
    batches: Sequence[Feeds],
    names: Sequence[str],
    *,
    threads: int | None = None,
    qdq_in_float: bool = False,
) -> list[Feeds]:
    """Run a whole graph; return some of its tensors by name, one mapping a batch.

    Args:
        graph: float or quantized.
        batches: its inputs by name.
        names: of tensors.
        threads: of the session.
        qdq_in_float: for a graph that is aimed at, see `Submodel`.
    """
    session = Submodel(graph, batches[0], names, threads=threads, qdq_in_float=qdq_in_float)
    return [session.run(batch) for batch in batches]


def judge(wanted: Sequence[Feeds], before: Sequence[Feeds], after: Sequence[Feeds]) -> Verdict:
    """Compare two models with the one that they should be: the float model, or what is aimed at.

    Args:
        wanted: outputs of that model by name, one mapping a batch.
        before: outputs of the model as it was.
        after: outputs of the changed model.
    """
    first, second = output_sqnr_db(wanted, before), output_sqnr_db(wanted, after)
    names = _counting(wanted[0], first, second)
    aims = [{name: feeds[name] for name in names} for feeds in wanted]
    left, right = (
        np.concatenate([sample_sqnr_db(w, g) for w, g in zip(aims, got, strict=True)])
        for got in (before, after)
    )
    gains = right - left
    count = gains.size
    error = float(gains.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Verdict(
        before_db=float(np.mean([first[name] for name in names])),
        after_db=float(np.mean([second[name] for name in names])),
        least_db=min(second[name] - first[name] for name in names),
        gain_db=float(gains.mean()),
        gain_error_db=error,
    )


def total_sqnr_db(wanted: Sequence[Feeds], got: Sequence[Feeds]) -> float:
    """Return the mean over the outputs of their SQNR over all batches, at most `EXACT_DB` each."""
    values = output_sqnr_db(wanted, got).values()
    return float(np.mean(np.minimum(list(values), EXACT_DB)))


def _counting(wanted: Feeds, *found: Mapping[str, float]) -> list[str]:
    """Return the outputs that a verdict is about; all where none is float or off."""
    floats = [name for name, array in wanted.items() if array.dtype.kind == "f"]
    off = [name for name in floats if min(one[name] for one in found) < EXACT_DB]
    return off or floats or list(wanted)


def output_sqnr_db(wanted: Sequence[Feeds], got: Sequence[Feeds]) -> dict[str, float]:
    """Return the SQNR of each output over all batches, in dB, within +-200 dB."""
    values = {}
    for name in wanted[0]:
        meter = ErrorMeter()
        for left, right in zip(wanted, got, strict=True):
            meter.update(left[name], right[name])
        values[name] = max(meter.sqnr_db, -CAP_DB)
    return values


def sample_sqnr_db(wanted: Feeds, got: Feeds) -> Array:
    """Return the SQNR of each sample of one batch, the mean over the outputs, in dB, float64.

    Samples lie along the first axis where all outputs have the same length there; else the batch
    counts as one sample. Values that cannot be averaged are kept within +-200 dB.
    """
    lengths = {np.shape(array)[:1] for array in wanted.values()}
    rows = lengths.pop()[0] if len(lengths) == 1 and () not in lengths else 0
    if rows < 2:
        values = [[sqnr_db(array, got[name]) for name, array in wanted.items()]]
    else:
        values = [
            [sqnr_db(array[row], got[name][row]) for name, array in wanted.items()]
            for row in range(rows)
        ]
    result: Array = np.clip(np.array(values, np.float64), -200.0, 200.0).mean(axis=1)
    return result
