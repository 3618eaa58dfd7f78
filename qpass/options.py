"""The options of a run as one frozen value, shared by Python, command line and recipe file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

from qpass.errors import RecipeError
from qpass.program import Activations, Policy, Precision

CalibrateMethod = Literal["auto", "minmax", "percentile", "mse", "entropy"]
CompensateMethod = Literal["cwac", "bias", "qwt", "nbc", "none"]
FitMethod = Literal["ls", "mm"]
UnifiedNormMode = Literal["auto", "off"]
MixedCost = Literal["size", "latency"]
RotateMode = Literal["auto", "none", "heads", "stream", "all"]
RoundMethod = Literal["auto", "rtn", "mse", "gptq", "erq", "unit", "adaround"]
RowWeights = Literal["auto", "norm", "gradient"]
WeightRange = Literal["auto", "minmax", "mse", "percentile"]
# These look at calibration samples.
ROUND_WITH_DATA: Final = ("auto", "gptq", "erq", "unit", "adaround")
THOROUGH: Final = ("unit", "adaround")  # these look at all of them
TUNE_STEPS: Final = 300  # with adaround
ITERATIONS: Final = 300
ACCURACY_LEVEL: Final = 4
EDGE: Final = 8  # bits that stem and head keep

BYTES: Final = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]i?B|B)?", re.IGNORECASE)
UNITS: Final = {"b": 1, "k": 10, "m": 20, "g": 30, "t": 40}
LEAST_MEMORY: Final = 16 << 20  # bytes; a smaller budget holds no model and no samples
MOST_JOBS: Final = 1024  # threads; more are a slip of the keyboard, and the system kills them


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


def parse_node_bits(entries: tuple[str, ...]) -> dict[str, Precision]:
    """Parse `PATTERN=wNaM` entries; RecipeError on anything else."""
    found: dict[str, Precision] = {}
    for entry in entries:
        pattern, _, precision = entry.rpartition("=")
        if not pattern:
            raise RecipeError(
                f"--bits {entry!r} is not PATTERN=wNaM", fix="write for example fc*=w8a8"
            )
        found[pattern] = Precision.parse(precision)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of `optimize`; the names are those of the command line."""

    target: str = "ort-x86"
    precision: str = "w8a8"
    activations: Activations = "static"
    calibrate: CalibrateMethod = "auto"
    equalize: bool = True  # migrate scales of channels where it helps
    compensate: CompensateMethod = "cwac"
    fit: FitMethod = "ls"  # of gains: least squares, or mm: the size of what a Softmax reads
    allow_runtime_ops: bool = False  # Mul and Add where no constant can take a correction
    round: RoundMethod = "auto"  # gptq with refits where activations are quantized
    weight_range: WeightRange = "auto"  # auto: by the rounding, see `qpass.choose`
    row_weights: RowWeights = "auto"  # of the rounding; auto: gradient with adaround, else norm
    iterations: int = ITERATIONS  # of adaround, for each unit
    # Steps that learn gains and offsets by gradients of the outputs; None: some with adaround.
    tune: int | None = None
    unified_norm: UnifiedNormMode = "auto"  # auto: affine maps of channels fold into linear ops
    rotate: RotateMode = "auto"  # auto: streams that only linear ops make and read
    rms_norm: bool = False
    static_norm: float | None = None  # smallest R2 of a LayerNormalization that becomes affine
    keep: tuple[str, ...] = ()
    bits: tuple[str, ...] = ()  # PATTERN=wNaM: precision of single nodes
    mixed: bool = False  # more bits for some layers, for the budget of min_sqnr or max_drop
    mixed_cost: MixedCost = "size"  # bytes of the weights, or time of the layers on this machine
    low_bit_edges: bool = False  # stem and head may go below 8 bits
    block_size: int | None = None  # rows with one scale, weights only; None: 32 below 8 bits
    asymmetric_weights: bool = False  # weights only: a zero point for each scale
    # Of onnxruntime's MatMulNBits; 4 rounds activations to 8 bits.
    accuracy_level: int = ACCURACY_LEVEL
    samples: int = 128
    holdout: float = 0.25
    batch_size: int = 4
    memory: str = "2GiB"
    jobs: int = 0  # threads of the engine while calibrating; 0: all cores
    seed: int = 0
    preprocess: str | None = None
    plan: str | None = None
    activation_scales: str | None = None  # file of scales that stay as they are
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
        """Check what can be checked without a model.

        Raises:
            RecipeError: a value is out of its range, two options contradict each other, or one has
                no effect beside the others.
        """
        self.check_values()
        self.check_together()

    def check_values(self) -> None:
        """Check each option by itself; RecipeError for one out of its range."""
        Precision.parse(self.precision)
        parse_node_bits(self.bits)
        if self.block_size not in (None, 16, 32, 64, 128):
            raise RecipeError(f"--block-size {self.block_size} is not 16, 32, 64 or 128")
        if not 0 <= self.accuracy_level <= 4:
            raise RecipeError(f"--accuracy-level {self.accuracy_level} is not 0 to 4")
        if self.memory_bytes < LEAST_MEMORY:
            raise RecipeError(
                f"--memory {self.memory} is less than {LEAST_MEMORY >> 20}MiB",
                fix="write for example 2GiB",
            )
        if not 0 <= self.jobs <= MOST_JOBS:
            raise RecipeError(
                f"--jobs {self.jobs} is not 0 to {MOST_JOBS}", fix="0 stands for all cores"
            )
        if self.seed < 0:
            raise RecipeError(f"--seed {self.seed} is negative")
        self._check_gates()
        if self.samples < 1:
            raise RecipeError(f"--samples {self.samples} is not positive")
        if self.static_norm is not None and not 0.0 < self.static_norm <= 1.0:
            raise RecipeError(
                f"--static-norm {self.static_norm} is not in (0, 1]",
                fix="it is the smallest R2 to accept; 0.98 is a good value",
            )
        if not 0.0 <= self.holdout < 1.0:
            raise RecipeError(f"--holdout {self.holdout} is not in [0, 1)")
        if self.batch_size < 1:
            raise RecipeError(f"--batch-size {self.batch_size} is not positive")
        if self.mixed_cost not in get_args(MixedCost):
            raise RecipeError(
                f"there is no --mixed-cost {self.mixed_cost}", fix="use size or latency"
            )
        if self.compensate not in get_args(CompensateMethod):
            raise RecipeError(
                f"there is no --compensate {self.compensate}",
                fix=f"use {', '.join(get_args(CompensateMethod))}",
            )
        if self.fit not in get_args(FitMethod):
            raise RecipeError(f"there is no --fit {self.fit}", fix="use ls or mm")
        if self.round not in get_args(RoundMethod):
            raise RecipeError(
                f"there is no --round {self.round}", fix=f"use {', '.join(get_args(RoundMethod))}"
            )
        if self.weight_range not in get_args(WeightRange):
            raise RecipeError(
                f"there is no --weight-range {self.weight_range}",
                fix=f"use {', '.join(get_args(WeightRange))}",
            )
        if self.rotate not in get_args(RotateMode):
            raise RecipeError(
                f"there is no --rotate {self.rotate}",
                fix=f"use {', '.join(get_args(RotateMode))}",
            )
        if self.row_weights not in get_args(RowWeights):
            raise RecipeError(
                f"there is no --row-weights {self.row_weights}",
                fix=f"use {', '.join(get_args(RowWeights))}",
            )
        if self.iterations < 1:
            raise RecipeError(f"--iterations {self.iterations} is not positive")
        if self.tune is not None and self.tune < 0:
            raise RecipeError(f"--tune {self.tune} is negative", fix="300 is a good value")

    def check_together(self) -> None:
        """Check what options say of one another; RecipeError for what contradicts or does nothing.

        A recipe is checked without it: the command line may bring the other half.
        """
        precision = Precision.parse(self.precision)
        activation = precision.activation
        node_bits = parse_node_bits(self.bits)
        Policy(precision=precision, node_bits=node_bits)  # says what contradicts
        alone = any(own.activation is None for own in (precision, *node_bits.values()))
        if not alone and (self.block_size or self.asymmetric_weights):
            name = "--block-size" if self.block_size else "--asymmetric-weights"
            raise RecipeError(
                f"{name} is for weights alone, and --precision {self.precision} has activations of "
                f"{activation} bits",
                fix=f"choose w4 or w8 as precision, or leave {name} out",
            )
        if self.mixed and self.min_sqnr is None and self.max_drop is None:
            raise RecipeError(
                "--mixed needs a budget", fix="give --min-sqnr, or --max-drop and --eval"
            )
        if self.mixed_cost != "size" and not self.mixed:
            raise RecipeError(
                f"--mixed-cost {self.mixed_cost} is for --mixed",
                fix="give --mixed, or leave --mixed-cost out",
            )
        if self.mixed and self.activation_scales and activation is not None and activation < 8:
            raise RecipeError(
                f"--mixed would give activations more bits than the {activation} that "
                "--activation-scales counts",
                fix="leave --mixed out, or choose 8-bit activations (--precision wNa8)",
            )
        if self.max_drop is not None and self.eval is None:
            raise RecipeError("--max-drop needs --eval", fix="give --eval module:callable")
        if self.round == "mse" and self.weight_range not in ("auto", "mse"):
            raise RecipeError(
                f"--round mse searches the ranges, --weight-range {self.weight_range} does not",
                fix=f"use --round rtn --weight-range {self.weight_range}",
            )
        if self.row_weights != "auto" and self.round not in ROUND_WITH_DATA:
            raise RecipeError(
                f"--round {self.round} looks at no rows that --row-weights could weight",
                fix=f"use --round {' or '.join(ROUND_WITH_DATA)}, or leave --row-weights out",
            )
        for option, reason, fix in self._idle():
            raise RecipeError(
                f"{option} has no effect: {reason}", fix=f"{fix}, or leave {option} out"
            )

    def _idle(self) -> Iterator[tuple[str, str, str]]:
        """Yield options that were given and change nothing of any model: option, why, what to do.

        As far as the options alone tell; the rest are notes of a run.
        """
        given = Precision.parse(self.precision)
        if given.activation is None:
            reason, fix = f"--precision {given} leaves activations in float", "choose wNaM"
            if self.activations != "static":
                yield f"--activations {self.activations}", reason, fix
            if self.calibrate != "auto":
                yield f"--calibrate {self.calibrate}", reason, fix
            if self.stats is not None:
                yield "--stats", reason, fix
            if self.round not in ROUND_WITH_DATA[1:]:
                reason = f"--round {self.round} looks at no samples where only weights are integers"
                for option in self._fitted():
                    yield option, reason, "give --data and --round gptq"
        own = [given, *parse_node_bits(self.bits).values()]  # a plan may give nodes others
        if self.plan is None and all(precision.activation is not None for precision in own):
            level = f"--accuracy-level {self.accuracy_level}"
            reason = f"it is for weights behind float activations, not for {given}"
            if self.accuracy_level != ACCURACY_LEVEL:
                yield level, reason, "choose w4 or w8"
        if self.iterations != ITERATIONS and self.round != "adaround":
            reason = f"--round {self.round} does not iterate"
            yield f"--iterations {self.iterations}", reason, "give --round adaround"
        if self.low_bit_edges and min(given.weight, given.activation or EDGE) >= EDGE:
            reason = f"--precision {given} is below 8 bits nowhere"
            yield "--low-bit-edges", reason, "choose fewer bits"

    def _fitted(self) -> Iterator[str]:
        """Yield the options that were given for what is fitted to samples."""
        if self.tune:
            yield f"--tune {self.tune}"
        if self.compensate not in ("cwac", "none"):
            yield f"--compensate {self.compensate}"
        if self.fit != "ls":
            yield f"--fit {self.fit}"
        if self.allow_runtime_ops:
            yield "--allow-runtime-ops"

    def _check_gates(self) -> None:
        """Raise RecipeError for a gate that every result passes or none does."""
        if self.min_sqnr is not None and not math.isfinite(self.min_sqnr):
            raise RecipeError(f"--min-sqnr {self.min_sqnr} is not a number of dB")
        if self.min_speedup is not None and not 0.0 < self.min_speedup < math.inf:
            raise RecipeError(
                f"--min-speedup {self.min_speedup} is not a positive number",
                fix="it is float time / quantized time; 1 asks for a result that is not slower",
            )
        if self.max_drop is not None and not 0.0 <= self.max_drop < math.inf:
            raise RecipeError(
                f"--max-drop {self.max_drop} is not a number from 0 on",
                fix="it is the largest drop of what --eval returns",
            )

    @property
    def tune_steps(self) -> int:
        """How many steps learn gains and offsets end to end; 0: none."""
        if self.tune is None:
            return TUNE_STEPS if self.round == "adaround" else 0
        return self.tune

    @property
    def guides(self) -> bool:
        """True where rows count by the gradient of the outputs."""
        return self.row_weights == "gradient" or (
            self.row_weights == "auto" and self.round == "adaround"
        )

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return parse_bytes(self.memory)
