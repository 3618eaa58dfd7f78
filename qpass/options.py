"""The options of a run as one frozen value, shared by Python, command line and recipe file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from qpass.errors import RecipeError
from qpass.program import Activations, Precision

CalibrateMethod = Literal["auto", "minmax", "percentile", "mse", "entropy"]
CompensateMethod = Literal["cwac", "bias", "qwt", "nbc", "none"]
RoundMethod = Literal["rtn", "mse", "gptq", "erq", "unit", "adaround"]

BYTES: Final = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]i?B|B)?", re.IGNORECASE)
UNITS: Final = {"b": 1, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_bytes(text: str) -> int:
    """Parse `2GiB`, `512MB`, `1000000`; RecipeError on anything else."""
    match = BYTES.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"{text!r} is not an amount of memory", fix="write for example 2GiB")
    unit = (match["unit"] or "B").lower()
    if unit == "b":
        factor = 1
    elif "i" in unit:
        factor = 1 << UNITS[unit[0]]
    else:
        factor = 1000 ** (UNITS[unit[0]] // 10)
    return int(float(match["number"]) * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of `optimize`; the names are those of the command line."""

    target: str = "ort-x86"
    precision: str = "w8a8"
    activations: Activations = "static"
    calibrate: CalibrateMethod = "auto"
    compensate: CompensateMethod = "cwac"
    round: RoundMethod = "rtn"
    keep: tuple[str, ...] = ()
    samples: int = 128
    holdout: float = 0.25
    batch_size: int = 4
    memory: str = "2GiB"
    jobs: int = 0  # threads of the engine while calibrating; 0: all cores
    seed: int = 0
    preprocess: str | None = None
    plan: str | None = None
    stats: str | None = None
    cache: str | None = None
    report: str | None = None
    engines: tuple[str, ...] = ()  # engines to verify in; (): the target's own and all installed
    repair: bool = True
    min_sqnr: float | None = None
    max_drop: float | None = None
    eval: str | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        """Check the values that can be checked without a model.

        Raises:
            RecipeError: a value is out of its range, or two options contradict each other.
        """
        Precision.parse(self.precision)
        parse_bytes(self.memory)
        if self.samples < 1:
            raise RecipeError(f"--samples {self.samples} is not positive")
        if not 0.0 <= self.holdout < 1.0:
            raise RecipeError(f"--holdout {self.holdout} is not in [0, 1)")
        if self.batch_size < 1:
            raise RecipeError(f"--batch-size {self.batch_size} is not positive")
        if self.max_drop is not None and self.eval is None:
            raise RecipeError("--max-drop needs --eval", fix="give --eval module:callable")
        if self.compensate not in ("cwac", "bias", "none"):
            raise RecipeError(
                f"--compensate {self.compensate} is not in this version",
                fix="use cwac, bias or none",
            )
        if self.round not in ("rtn", "mse"):
            raise RecipeError(
                f"--round {self.round} is not in this version", fix="use --round rtn or mse"
            )

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return parse_bytes(self.memory)
