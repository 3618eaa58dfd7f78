"""Measure float and quantized models side by side, and peers on the same models and samples.

    python tools/bench.py run [--zoo FOLDER] [MODEL ...] --out docs/results --bars
    python tools/bench.py run --model M.onnx --data calib.npz --holdout-data test.npz
    python tools/bench.py determinism | scale | table RESULTS.json ...

docs/bench.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from bench_bars import judge_bars
from bench_jobs import work
from bench_peers import DEFAULT_CONTESTANTS, parse_contestant
from bench_run import (
    ROOT,
    Row,
    Settings,
    determinism_rows,
    machine_facts,
    run_case,
    write_rows,
)
from bench_samples import Case, load_case
from bench_table import bars_table, markdown

DEFAULT_MODELS: Final = (
    "mobilenet_v2_1.0_224",
    "resnet18_ktb",
    "squeezenet1_1",
    "vit_tiny_patch16_224_tinyimagenet",
    "kwt1_core",
)
OWN_MODELS: Final = ("digits_cnn", "digits_vit")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure contestants on models")
    _add_sources(run)
    _add_output(run)
    run.add_argument("--engines", default="ort,openvino", help="default: %(default)s")
    run.add_argument("--holdout", type=int, default=128, help="held-out samples for SQNR")
    run.add_argument("--limit", type=int, help="samples of the task metric; 0: none; default all")
    run.add_argument("--seconds", type=float, default=2.0, help="of timing per contestant")
    run.add_argument("--repeat", type=int, default=1, help="do everything timed so many times")
    run.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PATH", help="nncf, quark, aimet"
    )
    run.add_argument("--no-calibration", action="store_true", help="skip the cost of calibration")

    same = commands.add_parser("determinism", help="quantize twice and compare the bytes")
    _add_sources(same)
    _add_output(same)
    same.add_argument("--repeat", type=int, default=2, help="runs to compare")
    same.set_defaults(
        engines="", holdout=0, limit=0, seconds=0.0, no_calibration=True, peer_python=[]
    )

    scale = commands.add_parser("scale", help="a model of 2.2 GB, and one of 20,000 nodes")
    _add_output(scale)
    scale.add_argument("--size-gb", type=float, default=2.2)
    scale.add_argument("--nodes", type=int, default=20_000)

    table = commands.add_parser("table", help="print results as Markdown")
    table.add_argument("results", type=Path, nargs="+")
    table.add_argument("--bars", action="store_true", help="judge the bars, too")

    worker = commands.add_parser("worker", help="run one job; used by the other commands")
    worker.add_argument("question", type=Path)
    worker.add_argument("answer", type=Path)
    return top


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", nargs="*", help="names in the zoo, or of models/ without one")
    command.add_argument("--zoo", type=Path, metavar="FOLDER", help="such as ../shared/assets")
    command.add_argument("--model", type=Path, help="an ONNX file instead")
    command.add_argument("--data", type=Path, help="its calibration samples (npz)")
    command.add_argument("--holdout-data", type=Path, help="its held-out samples (npz)")
    command.add_argument("--labels", default="", help="key of the classes in --holdout-data")
    command.add_argument("--samples", type=int, default=64, help="calibration samples")
    command.add_argument(
        "--contestants", nargs="+", default=DEFAULT_CONTESTANTS, metavar="C", help="see bench_peers"
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, help="folder for NAME.json and NAME.md")
    command.add_argument("--name", default="bench", help="name of these files")
    command.add_argument("--date", default=datetime.datetime.now().astimezone().date().isoformat())
    command.add_argument("--timeout", type=float, default=1800.0, help="seconds for one job")
    command.add_argument("--scratch", type=Path, help="folder for temporary files")
    command.add_argument("--bars", action="store_true", help="judge the bars, too")


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the models of the command line, opened one after the other.

    Raises:
        ValueError: options that do not belong together.
    """
    if arguments.model is not None:
        if arguments.data is None or arguments.holdout_data is None:
            raise ValueError("--model needs --data and --holdout-data")
        yield load_case({
            "model": str(arguments.model),
            "data": str(arguments.data),
            "holdout": str(arguments.holdout_data),
            "labels": arguments.labels,
        })  # fmt: skip
    elif arguments.zoo is not None:
        for name in arguments.models or DEFAULT_MODELS:
            yield load_case({"zoo": str(arguments.zoo), "name": name})
    else:
        for name in arguments.models or OWN_MODELS:
            folder = ROOT / "models"
            yield load_case({
                "model": str(folder / f"{name}.onnx"),
                "data": str(folder / "digits_calibration.npz"),
                "holdout": str(folder / "digits_test.npz"),
                "labels": "labels",
            })  # fmt: skip


def measure(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of one model at a time."""
    parent = None if arguments.scratch is None else str(arguments.scratch)
    if arguments.command == "scale":
        from bench_scale import scale_rows

        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield scale_rows(
                Path(folder),
                size_gb=arguments.size_gb,
                nodes=arguments.nodes,
                timeout=arguments.timeout,
            )
        return
    settings = Settings(
        contestants=tuple(parse_contestant(text) for text in arguments.contestants),
        engines=tuple(arguments.engines.split(",")),
        samples=arguments.samples,
        holdout=arguments.holdout,
        limit=arguments.limit,
        seconds=arguments.seconds,
        repeat=arguments.repeat,
        timeout=arguments.timeout,
        calibration=not arguments.no_calibration,
        peer_pythons=dict(pair.split("=", 1) for pair in arguments.peer_python),
    )
    what = run_case if arguments.command == "run" else determinism_rows
    for case in cases(arguments):
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield what(case, settings, Path(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for a wrong one, otherwise 0, whatever was measured."""
    arguments = parser().parse_args(argv)
    if arguments.command == "worker":
        work(arguments.question, arguments.answer)
        return 0
    if arguments.command == "table":
        rows = [row for path in arguments.results for row in json.loads(path.read_text("utf-8"))]
        print(markdown(rows, judge_bars(rows) if arguments.bars else ()), end="")
        return 0
    facts, rows = machine_facts(arguments.date), []
    try:
        for part in measure(arguments):
            rows += [facts | row for row in part]
            # After every model, so that a long run that is broken off has not been for nothing.
            _write(rows, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.out is None:
        print(markdown(rows), end="")
    if arguments.bars:
        print(bars_table(judge_bars(rows)))
    return 0


def _write(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    if arguments.out is None:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.out / f"{arguments.name}.json", rows)
    text = markdown(rows, judge_bars(rows) if arguments.bars else ())
    (arguments.out / f"{arguments.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
