"""One run of the pipeline: its options, what it has found out so far, and its manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import onnx

from qpass.bits import taken_by
from qpass.calibrate import (
    TensorStats,
)
from qpass.choose import WIDE_BITS, GivenRanges, QTable
from qpass.errors import RecipeError
from qpass.graph import Graph
from qpass.options import Options, parse_node_bits
from qpass.passes.compensate_blocks import BlockCompensation
from qpass.passes.compensation import Compensation
from qpass.passes.patch_matmul import NAME as PATCHES
from qpass.passes.rounding.replay import Rounding
from qpass.passes.weight_only import STRAIGHT
from qpass.plan import Plan
from qpass.program import Policy, Precision, Progress
from qpass.report.model import EngineReport, LayerReport, MixedReport, PassReport, RuntimeCost
from qpass.stages import Stages
from qpass.targets import Target, load_target
from qpass.verify.session import SESSION_KEY, TARGET_KEY, entries_for
from qpass.version import __version__

# Passes that leave every activation as it is.
SAME_VALUES: Final = ("normalize", PATCHES, STRAIGHT)
SCALED_KEY: Final = "qpass.scaled"  # in the metadata of a result


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def model_key(run: Run) -> str:
    """Return what the statistics of a run belong to: the file, and what was rewritten in it.

    Patch embeddings are rewritten by moving values, and weights of Gemm are transposed: statistics
    stay what they are. Balanced streams are known by the graph that they were balanced in: products
    of matrices differ in the last digit between CPUs, and one machine may gather statistics for
    another.
    """
    assert run.graph is not None
    content = run.known or (run.graph.fingerprint() if run.is_rewritten else "")
    return sha256_of(run.source) + (f"-{content}" if content else "")


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that one run has found out so far; `qpass.result` makes the report of it."""

    source: Path
    options: Options
    target: Target
    policy: Policy
    stages: Stages = field(default_factory=Stages)
    graph: Graph | None = None  # normalized float graph, never changed after `prepare`
    known: str = ""  # what stands for its content, where that is not its fingerprint
    passes: list[PassReport] = field(default_factory=list)
    plan: Plan | None = None
    planned: tuple[Graph, Policy] | None = None  # with --mixed: what plan files are made for
    found: Policy | None = None  # of a plan file of --mixed, whose bits come later
    stats: dict[str, TensorStats] = field(default_factory=dict)
    method: str = ""  # range method that won the trial
    output_ranges: GivenRanges = field(default_factory=dict)  # what it stands on, if it was those
    qtable: QTable | None = None
    plain: Graph | None = None  # quantized, not compensated
    quantized: Graph | None = None
    batches: list[Mapping[str, Any]] = field(default_factory=list)  # to compensate with
    judges: list[Mapping[str, Any]] = field(default_factory=list)  # batches that judge models
    scaled: Mapping[str, Any] = field(default_factory=dict)  # by migration: its key, linear ops
    aim: Graph | None = None  # weights-float network of frozen scales, see `weights_float`
    rounding: tuple[Plan, Rounding] | None = None  # of the weights, and for which plan
    compensation: Compensation | None = None
    block_compensation: BlockCompensation | None = None
    mixed: MixedReport | None = None
    runtime_costs: list[RuntimeCost] = field(default_factory=list)
    progress: Progress | None = None
    float_score: tuple[str, float] | None = None  # name and value of --eval for the float model
    eval_failure: str = ""  # how --eval failed for the result
    engines: list[EngineReport] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # engine -> its own message
    layers: list[LayerReport] = field(default_factory=list)
    rounds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forward_seconds: float = 0.0
    samples: int = 0
    fingerprint: str = ""

    @property
    def is_rewritten(self) -> bool:
        """True where a pass has changed what activations hold."""
        return any(report.changed for report in self.passes if report.name not in SAME_VALUES)

    @property
    def precision(self) -> Precision:
        """The precision that the result has: the one asked for, or what the target makes of it."""
        return taken_by(self.target, self.policy.precision)

    @property
    def is_simulated(self) -> bool:
        """True where no engine here has kernels for the integers of the result as a whole.

        That of the run's precision decides, for other layers are few (stem and head); a layer with
        narrow activations keeps all others in float as well.
        """
        narrow = self.plan is not None and self.plan.has_narrow_activations
        return self.precision.simulated or narrow


def start(source: Path, options: Options) -> Run:
    """Check the options and load the target."""
    policy = Policy(
        precision=Precision.parse(options.precision),
        activations=options.activations,
        keep=options.keep,
        node_bits=parse_node_bits(options.bits),
        low_bit_edges=options.low_bit_edges,
        block_size=options.block_size,
        asymmetric_weights=options.asymmetric_weights,
    )
    if options.round == "auto" and policy.precision.activation is None:
        if options.row_weights != "auto":
            raise RecipeError(
                f"weights alone are rounded to nearest: no --row-weights {options.row_weights}",
                where=f"--precision {options.precision}",
                fix="give --round gptq, or leave --row-weights out",
            )
        # To nearest, so that no samples are needed; with few bits in ranges that are searched.
        searched = policy.precision.weight < WIDE_BITS and options.weight_range == "auto"
        options = replace(options, round="mse" if searched else "rtn")
    return Run(source=source, options=options, target=load_target(options.target), policy=policy)


def metadata_of(run: Run) -> dict[str, str]:
    """Return the manifest that goes into the model: what it was made from, and how."""
    options = {k: v for k, v in asdict(run.options).items() if k not in ("report", "cache", "jobs")}
    assert run.plan is not None
    engine = run.target.own_engine
    session = entries_for(run.plan, engine, run.options.accuracy_level)
    return {
        **({SCALED_KEY: json.dumps(run.scaled, sort_keys=True)} if run.scaled else {}),
        **({SESSION_KEY: json.dumps(session, sort_keys=True)} if session else {}),
        "qpass.version": __version__,
        "qpass.source_sha256": sha256_of(run.source),
        TARGET_KEY: run.target.name,
        "qpass.precision": str(run.precision),
        "qpass.samples_sha256": run.fingerprint,
        "qpass.options": json.dumps(options, sort_keys=True, default=list),
        "qpass.onnx": onnx.__version__,
    }
