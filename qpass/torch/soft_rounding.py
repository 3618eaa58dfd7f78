"""Soft rounding: each weight lies between two neighbours of its grid and is pushed to one of them.

``w = (floor + h(V)) * scale`` with the rectified sigmoid ``h(V) = clip(sigmoid(V) (zeta - gamma) +
gamma, 0, 1)``, whose ends are reached at finite `V`. The penalty ``1 - |2 h - 1|^beta`` lets `h`
move freely between the ends while `beta` is high, and draws it to them as `beta` falls.

It starts from integers that a closed form has found (GPTQ), 0.3 of the way towards the float
weight, and not from the float weight as published: there every rounding is undecided, and the
20,000 iterations that decide them well are more than a CPU has. With 200 to 800 iterations the
published start ended at 1.3 to 1.5 times the error that it should have improved.

Source: Nagel et al., "Up or down? Adaptive rounding for post-training quantization" (ICML 2020).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
ZETA: Final = 1.1
GAMMA: Final = -0.1
BETAS: Final = (20.0, 2.0)
START: Final = 0.3  # share of the way from the integers to the weight where it begins
WARM_UP: Final = 0.2  # of the iterations, without penalty


class SoftRounding:
    """The weight of one layer while its rounding is learned.

    Attributes:
        logits: the parameter `V`, of the shape of the weight.
        floor: the lower neighbours as integers of the grid, zero point included, numpy float64.
    """

    def __init__(
        self,
        weight: Array,
        integers: Array,
        scale: Array,
        zero_point: Array,
        bounds: tuple[int, int],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start between integers and a float weight.

        Args:
            weight: float64.
            integers: float64; every `h` begins on their side.
            scale: float64, broadcasts over the weight.
            zero_point: float64, likewise.
            bounds: smallest and largest integer.
            device: of the parameter.
            dtype: of the parameter.
        """
        rest = np.clip(weight / scale + zero_point - integers, -1.0, 1.0)
        self.floor: Array = np.clip(integers - (rest < 0.0), bounds[0], bounds[1] - 1)
        fraction = np.clip(integers + START * rest - self.floor, 0.0, 1.0)
        sigmoid = (fraction - GAMMA) / (ZETA - GAMMA)
        make = {"device": device, "dtype": dtype}
        self.logits = torch.tensor(np.log(sigmoid / (1.0 - sigmoid)), **make).requires_grad_()
        self._lower = torch.tensor((self.floor - zero_point) * scale, **make)
        self._scale = torch.tensor(scale, **make)

    def up(self) -> torch.Tensor:
        """Return `h`: 0 is the lower neighbour, 1 the upper one."""
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)

    def weight(self, up: torch.Tensor) -> torch.Tensor:
        """Return the soft weight for some `up`."""
        return torch.addcmul(self._lower, up, self._scale)

    def rounded(self) -> torch.Tensor:
        """Return the weight with every `h` at the end that is nearer."""
        return self.weight((self.logits.detach() >= 0.0).to(self.logits.dtype))

    def integers(self) -> Array:
        """Return the integers of `rounded`, float64."""
        integers: Array = self.floor + (self.logits.detach() >= 0.0).cpu().numpy()
        return integers


def beta_at(progress: float) -> float | None:
    """Return the exponent of the penalty at a share of all iterations; None: there is none yet."""
    if progress < WARM_UP:
        return None
    high, low = BETAS
    return high + (low - high) * (progress - WARM_UP) / (1.0 - WARM_UP)


def penalty(up: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the sum of ``1 - |2 h - 1|^beta``."""
    return up.numel() - (2.0 * up - 1.0).abs().pow(beta).sum()
