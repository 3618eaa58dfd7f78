"""What compensation did: to the model, and to each layer and channel of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qpass.passes.channel_affine import ChannelAffine, PairMoments
from qpass.passes.channel_gate import GatedAffine
from qpass.passes.fold_affine import Site
from qpass.passes.model_gate import Verdict
from qpass.report.model import ChannelRefusal, PassReport
from qpass.verify.metrics import CAP_DB


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCompensation:
    """What happened to one linear op; SQNR of its output on held-out samples, against its aim."""

    name: str
    op: str
    sqnr_db_before: float
    sqnr_db_after: float
    gain_and_offset: int  # channels
    offset_only: int
    unchanged: int
    residual: bool  # aimed at the sum behind it
    refused: tuple[ChannelRefusal, ...] = ()

    @property
    def corrected(self) -> int:
        """Channels that got something."""
        return self.gain_and_offset + self.offset_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """Result of `compensate`: `method` is what was kept, "none" when nothing surely helped.

    `verdict` is that of the method kept, else of the last one tried; None when nothing was tried.
    """

    report: PassReport
    layers: tuple[LayerCompensation, ...]
    method: Literal["cwac", "bias", "none"]
    verdict: Verdict | None
    runtime_ops: tuple[str, ...] = ()  # what was added as nodes


def layer_of(
    site: Site, held: PairMoments, solved: GatedAffine, *, residual: bool
) -> LayerCompensation:
    """Describe the correction of one linear op.

    Args:
        site: of the op.
        held: moments of its output as it was, on samples that nothing was fitted to.
        solved: the correction.
        residual: True when the sum behind the op was aimed at.
    """
    identity = ChannelAffine.identity(site.channels)
    signal = float(np.nansum(held.signal()))
    before, after = (float(np.nansum(held.error(a))) for a in (identity, solved.affine))
    return LayerCompensation(
        name=site.linear,
        op=site.op,
        sqnr_db_before=_ratio_db(signal, before),
        sqnr_db_after=_ratio_db(signal, after),
        gain_and_offset=solved.gain_and_offset,
        offset_only=solved.offset_only,
        unchanged=solved.unchanged + solved.unusable,
        residual=residual,
        refused=tuple(
            ChannelRefusal(reason=reason, count=len(channels), channels=as_ranges(channels))
            for reason, channels in solved.refusals.items()
        ),
    )


def as_ranges(numbers: Sequence[int]) -> str:
    """Write rising numbers as text: ``0-3,7,9-10``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _ratio_db(signal: float, noise: float) -> float:
    if noise <= 0.0 or signal <= 0.0:
        return CAP_DB if noise <= 0.0 else -CAP_DB
    return min(CAP_DB, 10.0 * math.log10(signal / noise))
