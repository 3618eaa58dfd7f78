"""Statistics on disk: files that users keep, a cache keyed by content, checkpoints of a run.

A statistics file is an .npz of numbers and text, never of Python objects. All files are written
under another name first, so that a reader sees the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Final

import numpy as np

from qpass.calibrate.stats import STATS_VERSION, TensorStats, merge
from qpass.calibrate.taps import CollectResult, TapRequest, fingerprint_of
from qpass.errors import RecipeError

Meta = dict[str, str]

CHECKPOINT_SECONDS: Final = 5.0
WHOLE: Final = "0/1"  # the shard that is all samples
_DAMAGE: Final = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    zipfile.BadZipFile,
    zlib.error,
)


def save_stats(path: Path, stats: Mapping[str, TensorStats], meta: Mapping[str, str]) -> None:
    """Write statistics and what is known about them.

    `meta` is text by key. `merge_stats` adds up "samples", wants "shard" to differ and everything
    else to be equal.
    """
    head = {"version": STATS_VERSION, "meta": dict(meta), "tensors": list(stats)}
    arrays: dict[str, Any] = {"head": np.array(json.dumps(head, sort_keys=True))}
    for number, tensor in enumerate(stats.values()):
        for field, array in tensor.to_arrays().items():
            arrays[f"{number}.{field}"] = array
    path = Path(path)
    trial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with trial.open("wb") as file:
            np.savez(file, **arrays)
        trial.replace(path)
    finally:
        trial.unlink(missing_ok=True)


def load_stats(path: Path) -> tuple[dict[str, TensorStats], Meta]:
    """Read what `save_stats` wrote.

    Raises:
        RecipeError: there is no such file, it is damaged, or of another version of qpass.
    """
    try:
        return _read(Path(path))
    except _DAMAGE as error:
        raise RecipeError(
            f"cannot read the statistics: {error}",
            where=str(path),
            fix="make them again with qpass calibrate",
        ) from error


def _read(path: Path) -> tuple[dict[str, TensorStats], Meta]:
    with path.open("rb") as stream:  # numpy leaves a file open that it cannot read
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is not an .npz file")
        arrays = dict(file)
    head = json.loads(str(arrays.pop("head")))
    if head["version"] != STATS_VERSION:
        raise ValueError(f"it has version {head['version']}, this qpass reads {STATS_VERSION}")
    parts: list[dict[str, Any]] = [{} for _ in head["tensors"]]
    for key, array in arrays.items():
        number, _, field = key.partition(".")
        parts[int(number)][field] = array
    stats = {
        name: TensorStats.from_arrays(part)
        for name, part in zip(head["tensors"], parts, strict=True)
    }
    return stats, {str(key): str(value) for key, value in head["meta"].items()}


def merge_stats(paths: Sequence[Path]) -> tuple[dict[str, TensorStats], Meta]:
    """Read and merge the statistics of the shards of one source.

    Raises:
        RecipeError: a file cannot be read, belongs to something else, or comes twice.
    """
    if not paths:
        raise RecipeError("there are no statistics to merge")
    loaded = [load_stats(path) for path in paths]
    first_stats, first = loaded[0]
    shards: list[str] = []
    for path, (stats, meta) in zip(paths, loaded, strict=True):
        differing = sorted(
            key
            for key in (first.keys() | meta.keys()) - {"samples", "shard"}
            if first.get(key) != meta.get(key)
        )
        if differing:
            key = differing[0]
            raise RecipeError(
                f"the statistics are not of the same thing: {key} is {meta.get(key)}, "
                f"and {first.get(key)} in {paths[0]}",
                where=str(path),
                fix="merge shards of one model, one source of samples, one version",
            )
        if stats.keys() != first_stats.keys():
            raise RecipeError(f"it has other tensors than {paths[0]}", where=str(path))
        for part in _shards(meta):
            if part in shards:
                what = "what all samples gave" if part == WHOLE else f"shard {part}"
                raise RecipeError(f"{what} is there twice", where=str(path))
            if shards and part.partition("/")[2] != shards[0].partition("/")[2]:
                raise RecipeError(
                    f"shard {part} does not go with shard {shards[0]} of {paths[0]}",
                    where=str(path),
                    fix="merge the shards of one --shard I/N",
                )
            shards.append(part)
    total = sum(int(meta.get("samples", 0)) for _, meta in loaded)
    merged = {
        name: reduce(merge, (stats[name] for stats, _ in loaded)) for name in sorted(first_stats)
    }
    meta = {**first, "samples": str(total)}
    if shards != [WHOLE]:
        meta["shard"] = "+".join(sorted(shards))
    return merged, meta


def _shards(meta: Mapping[str, str]) -> list[str]:
    return meta.get("shard", WHOLE).split("+")


def missing_shards(meta: Mapping[str, str]) -> list[str]:
    """Return the shards ("1/4") that statistics lack to be those of all samples."""
    there = _shards(meta)
    count = int(there[0].partition("/")[2])
    return [part for part in (f"{index}/{count}" for index in range(count)) if part not in there]


class Checkpoint:
    """What an unfinished run has done so far, in a folder.

    Args:
        folder: for the files, made when it is not there.
        key: tells the run from others; see `CalibrationCache.key`.
        seconds: between two savings.
    """

    def __init__(self, folder: Path, key: str, *, seconds: float = CHECKPOINT_SECONDS) -> None:
        """Start the clock."""
        self.folder, self.key, self.seconds = Path(folder), key, seconds
        self._saved = time.monotonic()

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.key}.partial.npz"

    def part(self, name: str) -> Checkpoint:
        """Return the checkpoint of a part of the run: a shard, or a group of tensors."""
        return Checkpoint(self.folder, f"{self.key}-{name}", seconds=self.seconds)

    def due(self) -> bool:
        """Return True when it is time to save again."""
        return time.monotonic() - self._saved >= self.seconds

    def save(self, samples: int, stats: Mapping[str, TensorStats]) -> None:
        """Replace what is saved."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_stats(self.path, stats, {"samples": str(samples)})
        self._saved = time.monotonic()

    def load(self) -> CollectResult | None:
        """Return what is saved, or None; a damaged file counts as none."""
        return _load_quietly(self.path)

    def clear(self) -> None:
        """Remove the files of this run and of its parts."""
        for path in self.folder.glob(f"{self.key}*.partial.npz"):
            path.unlink(missing_ok=True)


class CalibrationCache:
    """Statistics in a folder, keyed by the content of everything that they depend on."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made when it is not there."""
        self.folder = Path(folder)

    def key(self, model: str, samples: str, taps: Sequence[TapRequest]) -> str:
        """Return the key of a run.

        Args:
            model: sha256 of the model.
            samples: `Samples.fingerprint()`, which covers the preprocessing.
            taps: what is asked for.
        """
        text = f"{STATS_VERSION} {model} {samples} {fingerprint_of(taps)}"
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def get(self, key: str) -> CollectResult | None:
        """Return what is stored under a key, or None; a damaged file counts as none."""
        return _load_quietly(self._path(key))

    def put(self, key: str, result: CollectResult) -> None:
        """Store statistics; checkpoints of the run are not needed any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_stats(self._path(key), result.stats, {"samples": str(result.samples)})
        self.checkpoint(key).clear()

    def checkpoint(self, key: str) -> Checkpoint:
        """Return the checkpoint of the run with this key."""
        return Checkpoint(self.folder, key)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"


def _load_quietly(path: Path) -> CollectResult | None:
    try:
        stats, meta = _read(path)
        return CollectResult(stats=stats, samples=int(meta["samples"]))
    except _DAMAGE:
        return None
