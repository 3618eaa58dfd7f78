"""Time and memory of the stages of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qpass.verify.latency import peak_rss_bytes


@dataclass(slots=True)
class Stages:
    """Seconds and peak memory by stage; a stage that comes again adds up."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)  # of stages within the open ones
    peak: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body as (a part of) stage `name`; stages within it count for themselves."""
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole
            self.peak[name] = max(self.peak.get(name, 0), peak_rss_bytes())

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started
