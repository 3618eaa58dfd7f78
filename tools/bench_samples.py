"""Where `bench.py` gets models, samples and scores from, and how samples reach its processes.

A `Case` is one float model with calibration samples, held-out samples and, where there is one, a
task metric. It comes from a zoo (a folder with `zoo.py`, see docs/bench.md) or from files. Samples
are written once to an uncompressed `.npz` with a key ``NUMBER/INPUT`` for every array; every
process then streams them from there, so that reading costs all contestants the same and nobody
holds more samples than it wants to.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[Feeds], list[Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSamples:
    """Samples in a file of `write_samples`; iterating reads one at a time, again and again.

    `count` samples are given; when the file has fewer they start again from the first.
    """

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Feeds]:
        with np.load(self.path) as file:
            keys: dict[int, list[tuple[str, str]]] = {}
            for key in file.files:
                number, name = key.split("/", 1)
                keys.setdefault(int(number), []).append((name, key))
            for position in range(self.count):
                yield {name: file[key] for name, key in keys[position % len(keys)]}

    def batches(self, size: int) -> Iterator[Feeds]:
        """Yield `size` samples at a time, joined along axis 0; the last batch may be smaller."""
        pending: list[Feeds] = []
        for feeds in self:
            pending.append(feeds)
            if len(pending) == size:
                yield _joined(pending)
                pending = []
        if pending:
            yield _joined(pending)


def _joined(feeds: list[Feeds]) -> Feeds:
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]}


def write_samples(path: Path, samples: Iterable[Mapping[str, Array]], wanted: int) -> StoredSamples:
    """Write samples (each a batch of one); fewer than `wanted` are no error.

    Raises:
        ValueError: there is not a single sample.
    """
    arrays = {
        f"{number:06d}/{name}": value
        for number, feeds in enumerate(samples)
        for name, value in feeds.items()
    }
    if not arrays:
        raise ValueError(f"no samples for {path.name}")
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return StoredSamples(path=path, count=min(wanted, len({key[:6] for key in arrays})))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One float model with its samples; `source` is what `load_case` made it from.

    `score` takes a function that runs one batch, and a limit of samples; it returns the metric,
    larger is better. `batched` tells whether samples may be joined along axis 0.
    """

    name: str
    model: Path
    source: dict[str, str]
    calibration: Callable[[int], Iterable[Feeds]]
    holdout: Callable[[int], Iterable[Feeds]]
    batched: bool
    metric: str | None
    score: Callable[[Run, int | None], float] | None


def load_case(source: Mapping[str, str]) -> Case:
    """Open a case from its description, which is plain text so that any process can do it.

    Args:
        source: ``zoo`` (folder) and ``name``; or ``model``, ``data``, ``holdout`` (files) and,
            for top-1, ``labels`` (the key in the held-out file).
    """
    return _zoo_case(source) if "zoo" in source else _file_case(source)


def _zoo_case(source: Mapping[str, str]) -> Case:
    folder = str(Path(source["zoo"]).resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    entry = importlib.import_module("zoo").load(source["name"])

    def score(run: Run, limit: int | None) -> float:
        session = _Session(run, single=bool(entry.batched))
        return float(entry.evaluate(session, limit)[entry.metric])

    return Case(
        name=source["name"],
        model=Path(entry.path),
        source=dict(source),
        calibration=entry.calibration,
        holdout=entry.evaluation_feeds,
        batched=bool(entry.batched),
        metric=entry.metric,
        score=score,
    )


class _Session:
    """What a zoo scores: `run(None, feeds)`. A batch is run sample by sample.

    Some tools freeze the batch size at 1; and ranges that are found at run time must not depend
    on which samples happen to share a batch.
    """

    def __init__(self, run: Run, *, single: bool) -> None:
        self._run = run
        self._single = single

    def run(self, _names: None, feeds: Feeds) -> list[Array]:
        size = next(iter(feeds.values())).shape[0] if self._single else 1
        if size == 1:
            return self._run(feeds)
        rows = [self._run({k: v[i : i + 1] for k, v in feeds.items()}) for i in range(size)]
        return [np.concatenate(outputs) for outputs in zip(*rows, strict=True)]


def _file_case(source: Mapping[str, str]) -> Case:
    labels_key = source.get("labels", "")

    def samples(file: str) -> Callable[[int], list[Feeds]]:
        def take(count: int) -> list[Feeds]:
            with np.load(source[file]) as found:
                arrays = {key: found[key] for key in found.files if key != labels_key}
            rows = min(count, *(len(array) for array in arrays.values()))
            return [{k: v[i : i + 1] for k, v in arrays.items()} for i in range(rows)]

        return take

    def score(run: Run, limit: int | None) -> float:
        with np.load(source["holdout"]) as found:
            labels = found[labels_key][:limit]
        feeds = samples("holdout")(len(labels))
        return 100.0 * float(
            np.mean([run(x)[0].argmax() == y for x, y in zip(feeds, labels, strict=True)])
        )

    return Case(
        name=Path(source["model"]).stem,
        model=Path(source["model"]),
        source=dict(source),
        calibration=samples("data"),
        holdout=samples("holdout"),
        batched=True,
        metric="top1" if labels_key else None,
        score=score if labels_key else None,
    )
