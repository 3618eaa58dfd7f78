"""The command line: parse, call `qpass.api`, print. No logic of its own.

Exit codes: 0 done, 1 a gate failed (the file is written with `.rejected` in its name), 2 usage or
bad input (nothing is written).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from qpass import api
from qpass.calibrate import merge_stats, missing_shards, save_stats
from qpass.cli_options import parse_engines, parse_shard, plan_options, samples_options
from qpass.errors import QpassError, UserError
from qpass.files import check_folder, write_text
from qpass.inspect import inspect_model
from qpass.lint import lint as lint_model
from qpass.report.terminal import print_summary, print_table
from qpass.rows import (
    ENGINE_COLUMNS,
    RULE_COLUMNS,
    difference_row,
    engine_row,
    plain,
    rule_row,
    short,
)
from qpass.targets import TARGETS, load_target
from qpass.verify.engines import EngineError
from qpass.version import __version__

PATH: Final = click.Path(path_type=Path)


def fail(error: QpassError) -> None:
    """Print what is wrong with the input and leave with exit code 2."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"error: {error}")
    sys.exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError of the body, and an engine that refuses the file, into exit code 2."""
    try:
        yield
    except (UserError, EngineError) as error:
        fail(error)


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a progress callback that draws a bar with the time left on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="qpass")
def main() -> None:
    """Compile a float ONNX model into an integer one that the engine really runs in integers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names in a model may not fit the terminal
            stream.reconfigure(errors="backslashreplace")


@main.command()
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, help="Result (default: MODEL.int8.onnx beside it).")
@click.option("--target", help="Engine to compile for, see `qpass targets` (default ort-x86).")
@click.option("--precision", help="wNaM, or wN for weights only (default w8a8).")
@click.option(
    "--activations",
    type=click.Choice(["static", "dynamic"]),
    help="Ranges from samples (static, default), or of MatMul inputs at run time.",
)
@click.option(
    "--calibrate",
    type=click.Choice(["auto", "minmax", "percentile", "mse", "entropy"]),
    help="How ranges are chosen; auto (default) lets methods compete.",
)
@click.option(
    "--compensate",
    type=click.Choice(["cwac", "bias", "qwt", "nbc", "none"]),
    help="Correction: cwac (default) and bias fold away; qwt and nbc add ops at run time.",
)
@click.option(
    "--fit",
    type=click.Choice(["ls", "mm"]),
    help="Of gains: least squares (default), or mm: keep the size of logits and outputs.",
)
@click.option(
    "--allow-runtime-ops",
    is_flag=True,
    default=None,
    help="Also correct as Mul and Add nodes where no constant can take it.",
)
@click.option(
    "--round",
    type=click.Choice(["auto", "rtn", "mse", "gptq", "erq", "unit", "adaround"]),
    help="How weights are rounded (auto: gptq, with refits at few bits; nearest for weights only).",
)
@click.option(
    "--weight-range",
    type=click.Choice(["auto", "minmax", "mse", "percentile"]),
    help="Ranges of weights: extremes, a search, 99.99 %, or what --round asks for (auto).",
)
@click.option(
    "--row-weights",
    type=click.Choice(["auto", "norm", "gradient"]),
    help="What rows count to the rounding: by norms, or by gradients (auto: those with adaround).",
)
@click.option("--iterations", type=int, help="Of adaround, for each unit (default 300).")
@click.option(
    "--tune",
    type=int,
    help="Steps that learn gains and offsets by gradients (default: 300 with adaround, else 0).",
)
@plan_options
@click.option("--static-norm", type=float, metavar="R2", help="LayerNorm becomes affine above R2.")
@click.option(
    "--equalize/--no-equalize", default=None, help="Migrate scales; may buy ops (default: on)."
)
@click.option("--mixed", is_flag=True, default=None, help="Bits by layer, to meet the gates.")
@click.option(
    "--mixed-cost",
    type=click.Choice(["size", "latency"]),
    help="What --mixed saves: bytes of weights (default), or time of the layers, measured here.",
)
@click.option("--holdout", type=float, metavar="F", help="Share held out to verify (default 0.25).")
@samples_options
@click.option("--accuracy-level", type=int, help="Of MatMulNBits: 0 float32, 4 (default) 8 bits.")
@click.option("--recipe", type=PATH, help="TOML file with any of these options.")
@click.option("--plan", help="Edited plan file of `qpass plan -o`.")
@click.option("--activation-scales", metavar="FILE", help="Scales to keep (json, npz).")
@click.option("--stats", help="Statistics of `qpass calibrate`.")
@click.option("--cache", help="Folder that keeps statistics by content.")
@click.option("--report", help="Folder for report.json and report.html.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Gate: smallest SQNR of the outputs.")
@click.option("--max-drop", type=float, metavar="PCT", help="Gate: largest drop of --eval.")
@click.option("--eval", metavar="MOD:FN", help="Task metric: function of a path, larger is better.")
@click.option("--min-speedup", type=float, metavar="X", help="Gate: float time / quantized time.")
@click.option("--engine", help="Engines to verify in, such as ort,openvino (default: installed).")
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of the summary.")
@click.option("-v", "--verbose", is_flag=True, help="Name every refusal.")
def optimize(model: Path, as_json: bool, verbose: bool, **options: Any) -> None:
    """Quantize MODEL, run it in its engine, and report what really happened."""
    with user_errors():
        options["engines"] = parse_engines(options.pop("engine"))
        options["keep"], options["bits"] = options["keep"] or None, options["bits"] or None
        with progress_bar(quiet=as_json) as progress:
            report = api.optimize(model, progress=progress, **options)
        if as_json:
            click.echo(report.to_json(), nl=False)
        else:
            print_summary(report, Console())
            if verbose:
                refused = [
                    (p.name, r.rule, r.where, r.reason) for p in report.passes for r in p.refusals
                ]
                columns = ("pass", "rule", "where", "reason")
                print_table(Console(), "Refusals", columns, refused)
    sys.exit(0 if report.ok else 1)


@main.command()
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Statistics file (.npz).")
@click.option("--target", help="Only what this target needs (default: all targets).")
@click.option("--shard", metavar="I/N", help="Only every N-th sample, from I (0-based).")
@samples_options
def calibrate(model: Path, output: Path, shard: str | None, **options: Any) -> None:
    """Gather statistics of MODEL in one pass over the samples."""
    with user_errors():
        part = parse_shard(shard)
        with progress_bar(quiet=False) as progress:
            api.calibrate(model, output=output, shard=part, progress=progress, **options)
        click.echo(f"wrote {output}")


@main.command()
@click.argument("stats", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="Statistics file (.npz).")
def merge(stats: tuple[Path, ...], output: Path) -> None:
    """Merge the STATS of shards into one file."""
    with user_errors():
        check_folder(output)
        merged, meta = merge_stats(stats)
        save_stats(output, merged, meta)
        click.echo(f"wrote {output}")
        if lacking := missing_shards(meta):
            click.echo(f"shards that are still missing: {', '.join(lacking)}", err=True)


@main.command()
@click.argument("model", type=PATH)
@click.option("--target", default="ort-x86", show_default=True, help="Engine to plan for.")
@click.option("--precision", default="w8a8", show_default=True, help="wNaM or wN.")
@click.option(
    "--activations",
    type=click.Choice(["static", "dynamic"]),
    default="static",
    help="Ranges of activations: from samples, or at run time.",
)
@plan_options
@click.option("-o", "--output", type=PATH, help="Write the plan as JSON, to be edited.")
def plan(model: Path, output: Path | None, **options: Any) -> None:
    """Show what would become of each node of MODEL, and why."""
    with user_errors():
        result = api.plan(model, **options)
        if output is not None:
            write_text(output, result.to_json())
            click.echo(f"wrote {output}")
            return
        rows = [(n.name, n.op, n.precision, n.bits, n.because) for n in result.nodes]
        print_table(Console(), "Nodes", ("node", "op", "runs in", "bits", "because"), rows)
        tensors = [
            (d.tensor, d.kind, d.spec.describe(), d.group or "", d.because)
            for d in result.decisions
        ]
        print_table(Console(), "Tensors", ("tensor", "kind", "becomes", "tied", "because"), tensors)


@main.command()
@click.argument("model", type=PATH)
@click.option("--reference", type=PATH, metavar="FP.onnx", help="Float model to compare with.")
@click.option("--engine", default=None, help="Engines, such as ort,openvino (default: installed).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@samples_options
def verify(
    model: Path, reference: Path | None, engine: str | None, as_json: bool, **options: Any
) -> None:
    """Run MODEL in its engines and read back what they made of it."""
    with user_errors():
        engines = parse_engines(engine) or ()
        reports = api.verify(model, reference=reference, engines=engines, **options)
    if as_json:
        click.echo(json.dumps([plain(report) for report in reports], indent=2))
        return
    rows = [engine_row(report) for report in reports]
    print_table(Console(), str(model), ENGINE_COLUMNS, rows)
    for report in reports:
        floats = [(op.node, op.op, op.rule, op.reason) for op in report.float_ops]
        if floats:
            title = f"{report.name}: linear ops in float"
            print_table(Console(), title, ("node", "op", "rule", "reason"), floats)


@main.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@samples_options
def compare(a: Path, b: Path, as_json: bool, **options: Any) -> None:
    """Compare model A (the reference) and B layer by layer."""
    with user_errors():
        rows = api.compare(a, b, **options)
    if as_json:
        click.echo(json.dumps([plain(row) for row in rows], indent=2))
        return
    columns = ("layer", "op", "SQNR dB", "cosine", "max error", "max LSB")
    print_table(Console(), f"{a} -> {b}", columns, [difference_row(row) for row in rows])
    if left_out := api.scaled_layers(a, b):
        click.echo(f"{len(left_out)} layers are left out: their channels were scaled (--equalize)")


@main.command()
@click.argument("model", type=PATH)
@click.option("--target", help="Also the rules of this target.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def lint(model: Path, target: str | None, as_json: bool) -> None:
    """Check any QDQ MODEL against what engines accept; exit code 1 when there are errors."""
    with user_errors():
        if target is not None:
            load_target(target)
        findings = lint_model(model, target)
    if as_json:
        click.echo(json.dumps([plain(row) for row in findings], indent=2))
    else:
        columns = ("rule", "severity", "node", "message", "repair")
        rows = [(f.rule, f.severity, f.node, f.message, f.repair) for f in findings]
        print_table(Console(), f"{model}: {len(findings)} findings", columns, rows)
    sys.exit(1 if any(f.severity == "error" for f in findings) else 0)


@main.command()
@click.argument("model", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def inspect(model: Path, as_json: bool) -> None:
    """Show ops, dtypes, sizes of MODEL and what can be quantized; weights are not loaded."""
    with user_errors():
        summary = inspect_model(model)
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
        return
    rows = [(key, short(value)) for key, value in summary.to_dict().items()]
    print_table(Console(), str(model), ("what", "found"), rows)


@main.command()
@click.argument("name", required=False)
def targets(name: str | None) -> None:
    """List the targets, or the rule table of target NAME with sources."""
    with user_errors():
        if name is None:
            rows = [(t.name, t.title, t.engine, str(t.opset)) for t in TARGETS.values()]
            print_table(Console(), "Targets", ("name", "what", "verified in", "opset"), rows)
            return
        target = load_target(name)
        table = [rule_row(rule) for rule in target.rules]
        print_table(Console(), target.title, RULE_COLUMNS, table)
        for note in target.notes:
            click.echo(f"- {note}")
