"""Choose the range method by trial: build the candidates and measure what leaves the model.

A method that is best for every tensor by itself need not be best for the model, for clipping errors
are systematic and add up where rounding errors average out. Measured (SQNR in dB of minmax,
percentile, per tensor): squeezenet1_1 32.3, 33.1, 32.5; kwt1_core 24.8, 24.5, 23.8; resnet18 23.4,
24.0, 24.1. So three tables compete on a few calibration samples; the error that counts is the one
at the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import onnx
from numpy.typing import NDArray

from qpass.exact_session import open_exact
from qpass.targets.schema import Target
from qpass.verify.metrics import ErrorMeter

Array = NDArray[Any]
CANDIDATES: Final = ("minmax", "percentile", "auto")
NAMES: Final = {"auto": "per tensor", "output": "by outputs"}  # for the report
TRIAL_SAMPLES: Final = 16
# A candidate has to win by this much against the one before it: less is chance on few samples.
MARGIN_DB: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The method that won, and the SQNR of all in dB."""

    method: str
    sqnr_db: Mapping[str, float]

    def sentence(self) -> str:
        """Return one sentence for the report."""
        scores = ", ".join(
            f"{NAMES.get(name, name)} {value:.2f} dB" for name, value in self.sqnr_db.items()
        )
        return f"ranges by trial: {scores}"


def try_methods(
    float_model: onnx.ModelProto,
    build: Callable[[str], onnx.ModelProto],
    samples: Sequence[Mapping[str, Array]],
    target: Target,
    *,
    methods: Sequence[str] = CANDIDATES,
    threads: int = 0,
) -> Trial:
    """Build the model with each method and compare its outputs with the float model.

    Args:
        float_model: the reference.
        build: returns the quantized model for a method.
        samples: calibration samples; never the held-out ones.
        target: whose files they are.
        methods: that compete, the safest first.
        threads: of the engine; 0: all.
    """
    wanted = _outputs(float_model, samples, target, threads)
    scores: dict[str, float] = {}
    for method in methods:
        meters = [ErrorMeter() for _ in float_model.graph.output]
        for expected, got in zip(
            wanted, _outputs(build(method), samples, target, threads), strict=True
        ):
            for meter, one, other in zip(meters, expected, got, strict=True):
                meter.update(one, other)
        scores[method] = min(meter.sqnr_db for meter in meters)
    best = methods[0]
    for method in methods[1:]:
        if scores[method] > scores[best] + MARGIN_DB:
            best = method
    return Trial(method=best, sqnr_db=scores)


def _outputs(
    model: onnx.ModelProto, samples: Sequence[Mapping[str, Array]], target: Target, threads: int
) -> list[list[Array]]:
    session = open_exact(model, target, threads=threads)
    return [session.run(None, dict(feeds)) for feeds in samples]
