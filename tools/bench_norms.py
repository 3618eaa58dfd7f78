"""What a norm costs: LayerNorm, fused Unified Normalization, and no norm at all.

    python tools/bench_norms.py speed [--batches 1 8] [--seconds 20] [--json rows.json]
    python tools/bench_norms.py trained --pair NAME LN.onnx UN.onnx --calibration C.npz --test T.npz

`speed` builds three networks that differ in nothing but their norms (DeiT-Tiny: 192 wide, 12
blocks, 3 heads, 197 tokens; seeded random weights), folds and quantizes each with qpass, and times
them in turns on one thread. The network without norms is the limit of what folding can reach.
`trained` compares the integer files of two trained twins, by default of those in `models/`. Both
print Markdown; with `--json` the rows are written as well.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from digits_networks import VisionTransformer
from torch import nn
from torch_export import export_dynamo, save

import qpass
from qpass.graph import Graph
from qpass.modelfile import load_model, save_model
from qpass.passes.normalize import normalize
from qpass.passes.norms import rewrite_norms
from qpass.saturation import saturates
from qpass.torch import UnifiedNorm
from qpass.verify.engines import Engine, EngineName, open_engine
from qpass.verify.host import config_of
from qpass.verify.latency import measure_interleaved
from qpass.verify.metrics import sqnr_db

MODELS: Final = Path(__file__).parents[1] / "models"
PAIR: Final = ("digits", str(MODELS / "digits_vit.onnx"), str(MODELS / "digits_vit_un.onnx"))
SEED: Final = 0
SIZE: Final = 224  # pixels: 196 patches of 16 x 16, and the class token
NETWORK: Final = {
    "size": SIZE,
    "patch": 16,
    "colours": 3,
    "width": 192,
    "heads": 3,
    "depth": 12,
    "expansion": 4,
    "classes": 1000,
}
NORMS: Final = ("layer", "unified", "none")
ENGINES: Final[tuple[EngineName, ...]] = ("ort", "openvino")
CALIBRATION: Final = 16  # random images: the integers must run, not classify
NORM_OPS: Final = {
    "LayerNormalization",
    "SkipLayerNormalization",
    "SimplifiedLayerNormalization",
    "RMSNormalization",
    "BatchNormalization",
    "UnifiedNorm",
    "ReduceMean",
    "Sqrt",
    "Pow",
}
Row = dict[str, Any]


def target_of(engine: str) -> str:
    """Return the dialect of the engine that is exact on this machine."""
    return {"ort": "ort-x86", "openvino": "openvino"}[engine] + ("-avx2" if saturates() else "")


def images(count: int, seed: int) -> np.ndarray:
    """Return (count, 3, SIZE, SIZE) standard normal float32."""
    shape = (count, 3, SIZE, SIZE)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(norm: str) -> nn.Module:
    """Return the network in evaluation mode; all have the same weights outside of the norms."""
    makers = {
        "layer": nn.LayerNorm,
        "unified": lambda channels: UnifiedNorm(channels, momentum=0.0),
        "none": lambda _: nn.Identity(),
    }
    torch.manual_seed(SEED)
    module = VisionTransformer(**NETWORK, norm=makers[norm])
    for part in module.modules():
        if isinstance(part, nn.LayerNorm | UnifiedNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    with torch.no_grad():  # momentum 0: one batch makes the statistics
        module.train()(torch.from_numpy(images(4, SEED + 1)))
    return module.eval()


def export(norm: str, work: Path) -> Path:
    """Write the network as torch exports it, unless it is there."""
    path = work / f"{norm}.onnx"
    if not path.exists():
        sample = torch.from_numpy(images(2, SEED))
        save(export_dynamo(build(norm), sample, input_name="image", output_name="logits"), path)
    return path


def fold(source: Path) -> Path:
    """Write the float network after qpass's exact rewrites."""
    path = source.with_name(f"{source.stem}.folded.onnx")
    graph: Graph = load_model(source)
    normalize(graph)
    rewrite_norms(graph)
    save_model(graph, path, metadata={})
    return path


def quantize(
    source: Path, target: str, data: Mapping[str, np.ndarray], folder: Path, **options: Any
) -> Path:
    """Return the integer file; planned ops stay as they are, whatever their speed here."""
    kind = "_".join([target, *options.values()])
    output = folder / f"{source.stem}.{kind}.onnx"
    report = qpass.optimize(
        source, data=samples(data), target=target, output=output, repair=False, **options
    )
    for gate in report.gates:
        if not gate.passed:
            print(f"{output.name}: gate {gate.name} failed, wanted {gate.wanted}, got {gate.got}")
    return Path(report.output)


def samples(data: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return batches of four as dicts."""
    count = len(next(iter(data.values())))
    starts = range(0, count, 4)
    return [{name: value[start : start + 4] for name, value in data.items()} for start in starts]


def open_file(engine: EngineName, path: Path) -> Engine:
    """Open a file as its metadata ask for, exact on this machine, on one thread."""
    config = config_of(path, engine)
    return open_engine(engine, path, session_config=config or None)


def norm_nodes(path: Path) -> dict[str, int]:
    """Return how many nodes of each normalizing op the file has."""
    found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    return {op: count for op, count in found.items() if op in NORM_OPS}


def relative_error(engine: EngineName, before: Path, after: Path, image: np.ndarray) -> float:
    """Return the largest difference of the outputs, relative to the largest output."""
    feeds = {"image": image}
    (wanted,), (found,) = (open_file(engine, path).run(feeds) for path in (before, after))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def speed(arguments: argparse.Namespace) -> list[Row]:
    """Return one row for each engine, precision, batch and norm."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    sources = {norm: export(norm, work) for norm in NORMS}
    folded = {norm: fold(path) for norm, path in sources.items()}
    left = norm_nodes(folded["unified"])
    print(f"normalizing nodes left in the folded network: {left or 'none'}")
    rows: list[Row] = []
    for engine in arguments.engines:
        error = relative_error(engine, sources["unified"], folded["unified"], images(2, SEED + 2))
        print(f"{engine}: folded against exported, float: {error:.1e} of the largest output")
        integer = {
            norm: quantize(
                path,
                target_of(engine),
                {"image": images(CALIBRATION, SEED + 3)},
                work,
                compensate="none",
            )
            for norm, path in sources.items()
        }
        for precision, files in (("float", folded), ("int8", integer)):
            opened = [open_file(engine, files[norm]) for norm in NORMS]
            for batch in arguments.batches:
                results = measure_interleaved(
                    opened,
                    {"image": images(batch, SEED + 4)},
                    seconds=arguments.seconds,
                    min_runs=arguments.rounds,
                )
                for norm, result in zip(NORMS, results, strict=True):
                    low, high = result.ratio_quartiles
                    rows.append(
                        {
                            "engine": engine,
                            "precision": precision,
                            "batch": batch,
                            "norm": norm,
                            "ms": result.median_ms,
                            "rounds": result.runs,
                            "speedup": 1 / result.ratio,
                            "speedup_low": 1 / high,
                            "speedup_high": 1 / low,
                        }
                    )
    return rows


def speed_table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, a line for each engine, precision and batch."""
    lines = [
        "| engine | precision | batch | LN ms | fused UN | no norms | UN of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for index in range(0, len(rows), len(NORMS)):
        layer, unified, none = rows[index : index + len(NORMS)]
        cells = [
            layer["engine"],
            layer["precision"],
            str(layer["batch"]),
            f"{layer['ms']:.2f}",
            *(
                f"{row['speedup']:.3f} ({row['speedup_low']:.3f} to {row['speedup_high']:.3f})"
                for row in (unified, none)
            ),
            f"{unified['speedup'] / none['speedup']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trained(arguments: argparse.Namespace) -> list[Row]:
    """Return one row for each twin and compensation: SQNR and accuracy of the integer file."""
    with np.load(arguments.calibration) as file:
        data = {name: file[name] for name in file.files}
    with np.load(arguments.test) as file:
        test = {name: file[name] for name in file.files}
    labels = test.pop("labels")
    name, *files = arguments.pair
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for norm, source in zip(("layer", "unified"), map(Path, files), strict=True):
        (wanted,) = open_file("ort", source).run(test)
        for compensation in ("none", "cwac"):
            target = target_of("ort") if arguments.target is None else arguments.target
            output = quantize(source, target, data, arguments.work, compensate=compensation)
            (found,) = open_file("ort", output).run(test)
            rows.append(
                {
                    "pair": name,
                    "norm": norm,
                    "target": target,
                    "compensate": compensation,
                    "sqnr_db": sqnr_db(wanted, found),
                    "float_accuracy": float((wanted.argmax(1) == labels).mean()),
                    "accuracy": float((found.argmax(1) == labels).mean()),
                    "norm_nodes": sum(norm_nodes(output).values()),
                }
            )
    return rows


def trained_table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| pair | norm | target | compensate | float | INT8 | SQNR dB | normalizing nodes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['pair']} | {row['norm']} | {row['target']} | {row['compensate']} "
        f"| {row['float_accuracy']:.2%} | {row['accuracy']:.2%} | {row['sqnr_db']:.2f} "
        f"| {row['norm_nodes']} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("speed")
    timing.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    timing.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    timing.add_argument("--seconds", type=float, default=20.0, help="for each three networks")
    timing.add_argument("--rounds", type=int, default=15, help="at least so many")
    timing.set_defaults(measure=speed, table=speed_table)
    twins = commands.add_parser("trained")
    twins.add_argument("--pair", nargs=3, metavar=("NAME", "LN", "UN"), default=PAIR)
    twins.add_argument("--calibration", type=Path, default=MODELS / "digits_calibration.npz")
    twins.add_argument(
        "--test", type=Path, default=MODELS / "digits_test.npz", help="inputs and `labels`"
    )
    twins.add_argument("--target", help="of the integer files")
    twins.set_defaults(measure=trained, table=trained_table)
    for command in (timing, twins):
        command.add_argument("--work", type=Path, default=Path("out/bench_norms"))
        command.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = arguments.measure(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(arguments.table(rows))


if __name__ == "__main__":
    main()
