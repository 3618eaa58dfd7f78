"""Keep of a correction what helps on samples that it was not fitted to, channel by channel.

Groups of samples are left out of the fit in turn. They decide between gain and offset, the offset
alone (gain 1) and nothing: on the samples of the fit an improvement is certain and means nothing.

Why a channel is refused only when it surely got worse: there are thousands of pairs behind two
numbers, so a correction is more likely right than not, and a channel that stays behind while its
neighbours are corrected is an error of its own. W4A8 with round-to-nearest, SQNR in dB on 64 to 128
unseen samples (top-1 on 200 images): resnet18 8.95 (47.5 %) when plain least squares had to help by
one standard error, 9.63 (53.5 %) as it is done here; mobilenet_v2 2.34 (36.0 %), 2.55 (36.0 %) with
plain least squares and this gate, 2.76 (42.5 %) with the numbers shrunk as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from qpass.passes.channel_affine import (
    CLIP,
    DEAD_SHARE,
    Array,
    ChannelAffine,
    FitKind,
    GainKind,
    Groups,
    PairMoments,
    solve_shrunk,
)

# Parts in turn left out of the fit to judge by.
FOLDS: Final = 4
# Standard errors by which a correction has to help: it is refused when it surely does harm.
CONFIDENCE: Final = -1.0
NOT_FINITE: Final = "not finite"
CONSTANT: Final = "constant channel: offset only"
GAIN_WORSE: Final = "gain: worse on held-out groups"
ALL_WORSE: Final = "gain and offset: worse on held-out groups"
CLIPPED: Final = "gain clipped"
ONE_GROUP: Final = "one group of samples: nothing to judge by"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedAffine:
    """A correction and how many channels got what; `unusable` held NaN or infinity.

    `refusals` lists the channels that got less than the fit wanted, by reason.
    """

    affine: ChannelAffine
    gain_and_offset: int
    offset_only: int
    unchanged: int
    unusable: int
    refusals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def solve_gated(
    groups: Sequence[PairMoments],
    *,
    ridge: float = 1e-4,
    clip: tuple[float, float] = CLIP,
    gain: GainKind = "channel",
    offset: bool = True,
    confidence: float = CONFIDENCE,
    fit: FitKind = "ls",
) -> GatedAffine:
    """Fit on some groups of samples, judge on the others, and keep what helps there.

    Each channel takes the richest of nothing, offset alone, and gain with offset that lowers the
    error on groups it was not fitted to by more than `confidence` standard errors, against the
    poorer ones; a negative number lets all pass that do not surely raise it. The numbers then come
    from all groups. A single gain for the tensor is judged over all channels, since it cannot be
    left out of one.
    """
    stack = Groups(groups)
    whole = stack.whole
    finite = whole.finite
    if len(groups) < 2:
        return GatedAffine(
            affine=ChannelAffine.identity(finite.size),
            gain_and_offset=0,
            offset_only=0,
            unchanged=finite.size,
            unusable=0,
            refusals={ONE_GROUP: tuple(range(finite.size))},
        )

    def solve(some: Groups, kind: GainKind) -> ChannelAffine:
        return solve_shrunk(some, ridge=ridge, clip=clip, gain=kind, offset=offset, fit=fit)

    folds = min(FOLDS, len(groups))
    errors = np.zeros((3, len(groups), finite.size))
    for fold in range(folds):
        judging = slice(fold, None, folds)
        others = stack.without(judging)
        kinds = (ChannelAffine.identity(finite.size), solve(others, "none"), solve(others, gain))
        for kind, affine in enumerate(kinds):
            errors[kind, judging] = stack.some(judging).error(affine)
    shares = stack.count / max(whole.count, 1)
    errors = np.where(finite, errors * shares * len(groups), 0.0)
    shifted = _surely_positive(errors[0] - errors[1], confidence)
    best_plain = np.where(shifted, errors[1], errors[0])
    drop = best_plain - errors[2]
    if gain == "tensor":
        scaled = np.broadcast_to(
            _surely_positive(drop.sum(axis=1, keepdims=True), confidence), finite.shape
        )
    else:
        scaled = _surely_positive(drop, confidence) & finite
    full, shift = solve(stack, gain), solve(stack, "none")
    affine = ChannelAffine(
        gain=np.where(scaled, full.gain, 1.0),
        offset=np.select([scaled, shifted], [full.offset, shift.offset], 0.0),
    )
    changed = scaled | shifted
    constant = finite & (whole.m_aa <= DEAD_SHARE * np.where(finite, whole.m_aa, 0.0).mean())
    by_channel = gain == "channel"
    refused = {
        NOT_FINITE: ~finite,
        CONSTANT: constant & by_channel,
        GAIN_WORSE: finite & ~constant & ~scaled & changed & by_channel,
        ALL_WORSE: finite & ~changed & (errors[0] != errors[2]).any(axis=0),
        CLIPPED: scaled & np.isin(full.gain, clip) & by_channel,
    }
    return GatedAffine(
        affine=affine,
        gain_and_offset=int(np.count_nonzero(affine.gain != 1.0)),
        offset_only=int(np.count_nonzero(changed & (affine.gain == 1.0))),
        unchanged=int(np.count_nonzero(~changed & finite)),
        unusable=int(np.count_nonzero(~changed & ~finite)),
        refusals={
            reason: tuple(int(channel) for channel in np.flatnonzero(channels))
            for reason, channels in refused.items()
            if channels.any()
        },
    )


def _surely_positive(drops: Array, confidence: float) -> Array:
    """True where the mean over the groups (axis 0) is above `confidence` standard errors."""
    error = drops.std(axis=0, ddof=1) / np.sqrt(drops.shape[0])
    positive: Array = drops.mean(axis=0) > confidence * error
    return positive
