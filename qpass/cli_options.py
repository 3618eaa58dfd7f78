"""Options that several commands have, and how those are read that stand for more than a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

from qpass.errors import RecipeError, UserError

Command = Callable[..., Any]

# Where samples come from.
_SAMPLES: Final = (
    click.option(
        "--data",
        metavar="SRC",
        help="npz, folder of npy/npz, ONNX test data, images, module:callable, or random.",
    ),
    click.option("--preprocess", help="For images: imagenet, or a TOML file."),
    click.option("--samples", type=int, help="Calibration samples to use (default 128)."),
    click.option("--batch-size", type=int, help="Samples per run of the model (default 4)."),
    click.option("--memory", help="Memory budget, such as 2GiB (default)."),
    click.option("--jobs", type=int, help="Threads of the engine; 0: all cores."),
    click.option("--seed", type=int, help="Seed of everything random (default 0)."),
)
# What becomes of a node, as far as no sample is needed to say.
_PLAN: Final = (
    click.option(
        "--unified-norm",
        type=click.Choice(["auto", "off"]),
        help="Fold Unified Normalization and other channel gains into linear ops (default auto).",
    ),
    click.option(
        "--rotate",
        type=click.Choice(["auto", "none", "heads", "stream", "all"]),
        help="Spread outliers: rotate attention heads, the residual stream, or both (default "
        "auto: only what lies between linear ops, where weights round better for it).",
    ),
    click.option("--rms-norm/--no-rms-norm", default=None, help="LayerNorm becomes RMSNorm."),
    click.option("--keep", multiple=True, metavar="PATTERN", help="Nodes that stay float."),
    click.option(
        "--bits", multiple=True, metavar="PATTERN=wNaM", help="Precision of single nodes."
    ),
    click.option("--block-size", type=int, help="Weights only: rows with one scale (default 32)."),
    click.option(
        "--asymmetric-weights", is_flag=True, default=None, help="Weights only: zero points."
    ),
    click.option(
        "--low-bit-edges", is_flag=True, default=None, help="Stem and head below 8 bits too."
    ),
)


def samples_options(command: Command) -> Command:
    """Add the options that say where samples come from."""
    return _with(_SAMPLES, command)


def plan_options(command: Command) -> Command:
    """Add the options that decide, without samples, what becomes of a node."""
    return _with(_PLAN, command)


def _with(options: tuple[Callable[[Command], Command], ...], command: Command) -> Command:
    for option in reversed(options):  # the last one that is added stands first in the help
        command = option(command)
    return command


def parse_shard(text: str | None) -> tuple[int, int]:
    """Parse `I/N`."""
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--shard {text!r} is not I/N", fix="write 0/4, 1/4, 2/4 or 3/4 for four")
    return int(index), int(count)


def parse_engines(text: str | None) -> tuple[str, ...] | None:
    """Parse `ort,openvino`."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise RecipeError(f"--engine {text!r} has an empty name", fix="write ort,openvino")
    return names
