"""How far a quantized output is from its reference: streaming error sums in float64.

For float outputs, over everything that was fed in::

    SQNR   = 10 log10( sum reference^2 / sum (reference - got)^2 )     dB, at most 200 (equal)
    cosine = sum reference * got / sqrt( sum reference^2 * sum got^2 )

For integer, bool and string outputs (class numbers, masks, token numbers) distance means nothing,
so they are compared exactly: a value is right or wrong, ``SQNR = 10 log10( count / wrong )``, and
`ErrorMeter.cosine` is the share of right values.

Values that are not finite carry no energy. Where reference and got are the same infinity or both
NaN they agree and are left out; where only one of them is, the output is broken: SQNR is -inf,
cosine is 0 and the largest error is inf.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Equal outputs have no error: this finite number stands for it, so that reports can be averaged.
CAP_DB: Final = 200.0
# Elements converted to float64 at a time: bounds the extra memory at a few megabytes.
_CHUNK: Final = 1 << 18


class ErrorMeter:
    """Sums of one output over many batches; `update` in any order, `merge` of shards."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self.count = 0
        self.max_abs = 0.0
        self._wrong = 0  # values that compare exactly and differ
        self._exact = 0  # values that compare exactly
        self._broken = 0  # values finite on one side only
        self._reference_energy = 0.0
        self._got_energy = 0.0
        self._error_energy = 0.0
        self._product = 0.0

    def update(self, reference: Array, got: Array) -> None:
        """Add one batch.

        Args:
            reference: output of the reference, any shape and dtype.
            got: output to be judged, of the same shape.

        Raises:
            ValueError: the shapes differ, so values cannot be paired.
        """
        reference, got = np.asarray(reference), np.asarray(got)
        if reference.shape != got.shape:
            msg = f"reference has shape {reference.shape}, got {got.shape}"
            raise ValueError(msg)
        self.count += reference.size
        compare = self._update_float if reference.dtype.kind in "fV" else self._update_exact
        left, right = reference.ravel(), got.ravel()
        for start in range(0, left.size, _CHUNK):
            compare(left[start : start + _CHUNK], right[start : start + _CHUNK])

    def _update_float(self, reference: Array, got: Array) -> None:
        # bfloat16 has numpy kind "V"; it converts like the other floats.
        ref, out = reference.astype(np.float64), got.astype(np.float64)
        finite = np.isfinite(ref) & np.isfinite(out)
        if not finite.all():
            agree = (ref == out) | (np.isnan(ref) & np.isnan(out))
            self._broken += int(np.count_nonzero(~finite & ~agree))
            ref, out = ref[finite], out[finite]
        error = ref - out
        self._reference_energy += float(ref @ ref)
        self._got_energy += float(out @ out)
        self._error_energy += float(error @ error)
        self._product += float(ref @ out)
        self._note_largest(error)

    def _update_exact(self, reference: Array, got: Array) -> None:
        differ = reference != got
        wrong = int(np.count_nonzero(differ))
        self._exact += reference.size
        self._wrong += wrong
        if reference.dtype.kind in "iub":
            self._note_largest(reference.astype(np.float64) - got.astype(np.float64))
        elif wrong:
            self.max_abs = math.inf

    def _note_largest(self, error: Array) -> None:
        self.max_abs = max(self.max_abs, float(np.abs(error).max(initial=0.0)))
        if self._broken:
            self.max_abs = math.inf

    def merge(self, other: ErrorMeter) -> None:
        """Add what `other` measured, as if its batches had come here."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "max_abs" else mine + value)

    @property
    def match_share(self) -> float:
        """Share of equal values among those compared exactly; 1 when there were none."""
        return 1.0 - self._wrong / self._exact if self._exact else 1.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB: 200 when equal, -inf when broken."""
        if self._broken:
            return -math.inf
        # A right value counts as energy 1, a wrong one as error 1.
        signal = self._reference_energy + self._exact
        noise = self._error_energy + self._wrong
        if noise == 0.0:
            return CAP_DB
        if signal == 0.0:
            return -math.inf
        return min(CAP_DB, 10.0 * math.log10(signal / noise))

    @property
    def cosine(self) -> float:
        """Cosine between reference and got; 1 when both are zero, 0 when broken."""
        if self._broken:
            return 0.0
        if self._exact:
            return self.match_share
        norms = math.sqrt(self._reference_energy) * math.sqrt(self._got_energy)
        if norms == 0.0:
            return float(self._error_energy == 0.0)
        return self._product / norms


def sqnr_db(reference: Array, got: Array) -> float:
    """Return the SQNR of `got` against `reference` in dB (see the module's definition)."""
    meter = ErrorMeter()
    meter.update(reference, got)
    return meter.sqnr_db
