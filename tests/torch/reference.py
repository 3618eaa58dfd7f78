"""Unified Normalization in numpy and plain Python, written from the equations of the paper.

Conditions are `if`s and the window is a list indexed by the iteration, where the module has tensors
and `where`: the two share no code and no structure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass
class Reference:
    """One UN layer of `channels`; `forward` and `backward` are one training iteration."""

    channels: int
    forward_window: int = 4
    backward_window: int = 4
    warmup: int = 4000
    filtration: bool = False
    eps: float = 1e-5
    momentum: float = 0.9
    ratio_from: int = 1000

    t: int = 0
    skipped: int = 0
    rv: Array = field(init=False)
    ema_gz: Array = field(init=False)
    x2_window: Array = field(init=False)
    gz_window: Array = field(init=False)
    gamma: Array = field(init=False)
    beta: Array = field(init=False)

    def __post_init__(self) -> None:
        self.rv, self.ema_gz = np.ones(self.channels), np.zeros(self.channels)
        self.x2_window = np.zeros((self.forward_window, self.channels))
        self.gz_window = np.zeros((self.backward_window, self.channels))
        self.gamma, self.beta = np.ones(self.channels), np.zeros(self.channels)

    def forward(self, x: Array, padding: Array | None = None) -> Array:
        size = self.forward_window
        self.t += 1
        self.tokens = x.reshape(-1, self.channels)
        counted = self.tokens if padding is None else self.tokens[~padding.ravel()]
        x2 = np.sum(counted**2, axis=0) / len(counted)
        recorded = np.sqrt(self.x2_window).ravel()
        self.x2_window[self.t % size] = x2
        self.skip = size == 1
        if self.filtration and self.t >= self.warmup and self.t > size:
            arithmetic = sum(self.x2_window) / size
            geometric = np.prod(self.x2_window, axis=0) ** (1 / size)
            if np.any(arithmetic - geometric > size * np.var(recorded, ddof=1)):
                self.x2_window[self.t % size] = self.rv
                self.skip = True
                self.skipped += 1
        if self.t <= size or self.t < self.warmup or self.skip:
            v = x2
        else:
            v = np.prod(self.x2_window, axis=0) ** (1 / size)
        if self.t <= max(self.ratio_from, self.warmup) or self.skip:
            self.r = np.ones(self.channels)
        else:
            self.r = np.sqrt(v + self.eps) / np.sqrt(self.rv + self.eps)
            self.r = np.minimum(np.maximum(self.r, 1 / 5), 5)
        self.z, self.v = self.tokens / np.sqrt(v + self.eps), v
        self.rv = self.momentum * self.rv + (1 - self.momentum) * v
        return (self.gamma * self.z + self.beta).reshape(x.shape)

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        size = self.backward_window
        shape, dy = dy.shape, dy.reshape(-1, self.channels)
        g = dy * self.gamma * self.r
        gz = np.mean(g * self.z, axis=0)
        self.gz_window[self.t % size] = self.ema_gz if self.skip else gz
        if self.t <= size or self.t < self.warmup or self.skip:
            smooth = gz
        else:
            smooth = np.mean(self.gz_window, axis=0)
        self.ema_gz = self.momentum * self.ema_gz + (1 - self.momentum) * smooth
        subtracted = smooth if self.skip else self.ema_gz
        dx = (g - self.z * subtracted) / np.sqrt(self.v + self.eps)
        return dx.reshape(shape), np.sum(dy * self.r * self.z, axis=0), np.sum(dy, axis=0)
