"""Samples: checked feed dicts that can be read again and again, and views of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.images import find_images, image_input, read_preprocess
from qpass.calibrate.inputs import Feeds, InputSpec, conform, input_specs
from qpass.calibrate.sources import (
    FolderReader,
    ImageReader,
    Item,
    ListReader,
    MappingReader,
    NpzReader,
    RandomReader,
    Reader,
    SpoolReader,
    TestDataReader,
    by_number,
    digest_of,
)
from qpass.callables import call_for_samples
from qpass.errors import SampleError

__all__ = ["InputSpec", "Samples", "batches", "input_specs", "open_samples", "shard", "split"]

Array = NDArray[Any]
FORMS: Final = "npz, a folder of .npy/.npz/images/ONNX test data, module:callable, random"


class Samples:
    """Samples ``start, start + step, ...`` below `stop` of a source, each checked when it is read.

    Iterating yields one feed dict per sample, with a batch axis of length 1 where the input has
    one; `qpass.calibrate.inputs` has the rules.

    Attributes:
        source: where they are from.
        preprocessing: text that is equal for equal preprocessing.
        is_random: True for noise.
    """

    def __init__(
        self,
        reader: Reader,
        inputs: Sequence[InputSpec],
        *,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        """Look at a reader through the slice `start`, `stop`, `step`."""
        self.inputs = tuple(inputs)
        self._reader, self._slice = reader, (start, stop, step)
        self.source, self.preprocessing = reader.source, reader.preprocessing
        self.is_random = isinstance(reader, RandomReader)
        self._count: int | None = None
        self._fingerprint: str | None = None
        self._distinct = 0

    def __iter__(self) -> Iterator[Feeds]:
        for item in self._items():
            yield conform(item.read(), self.inputs, item.where)

    def _items(self) -> Iterator[Item]:
        return islice(self._reader.items(), *self._slice)

    @property
    def count(self) -> int:
        """Number of samples; the first time, it may read a source that does not know."""
        if self._count is None:
            self._count = self.available(None)
        return self._count

    def available(self, limit: int | None) -> int:
        """Return the number of samples, or `limit` if there are more, without reading them all."""
        return sum(1 for _ in islice(self._items(), limit))

    def fingerprint(self) -> str:
        """Return the sha256 of all samples and the preprocessing; it reads them all once."""
        if self._fingerprint is None:
            digest, found = hashlib.sha256(self.preprocessing.encode()), set()
            for item in self._items():
                own = digest_of(item)
                digest.update(own)
                found.add(own)
            self._fingerprint, self._distinct = digest.hexdigest(), len(found)
        return self._fingerprint

    @property
    def distinct(self) -> int:
        """Number of samples that differ; it reads them all once."""
        self.fingerprint()
        return self._distinct

    def view(self, start: int, stop: int | None = None, step: int = 1) -> Samples:
        """Return samples ``start, start + step, ...`` below `stop` of these."""
        first, last, pace = self._slice
        end = last if stop is None else first + stop * pace
        if last is not None and end is not None:
            end = min(end, last)
        return Samples(
            self._reader, self.inputs, start=first + start * pace, stop=end, step=pace * step
        )


def open_samples(
    source: Any,
    inputs: Sequence[InputSpec],
    *,
    preprocess: str | Path | None = None,
    seed: int = 0,
) -> Samples:
    """Open samples of any form.

    Args:
        source: path of an .npz (keys = input names, axis 0 = samples) or .npy file; a folder of
            .npy or .npz files, of ONNX test data (test_data_set_0/input_0.pb) or of images;
            "module:callable" that returns an iterable; "random"; a dict of arrays as in an .npz
            file; an iterable of dicts, tuples or arrays, such as a torch DataLoader.
        inputs: of the model.
        preprocess: "imagenet" or a TOML file, for images.
        seed: of random samples.

    Raises:
        SampleError: no such source, or a form that does not fit the model.
        RecipeError: the preprocessing is wrong.
    """
    if isinstance(source, Samples):
        return source
    reader = _reader(source, tuple(inputs), preprocess, seed)
    if preprocess is not None and not isinstance(reader, ImageReader):
        raise SampleError(
            "preprocessing is for folders of images", where=reader.source, fix="leave it out"
        )
    return Samples(reader, inputs)


def _reader(
    source: Any, inputs: tuple[InputSpec, ...], preprocess: str | Path | None, seed: int
) -> Reader:
    if isinstance(source, str | Path):
        if str(source) == "random":
            return RandomReader(inputs, seed)
        path = Path(source)
        if path.is_dir():
            return _folder(path, inputs, preprocess)
        if path.is_file() and path.suffix in (".npz", ".npy"):
            return NpzReader(path, inputs)
        if path.exists() or ":" not in str(source):
            what = "this kind of file is not known" if path.exists() else "there is no such file"
            raise SampleError(f"{what}: {source}", fix=f"forms: {FORMS}")
        return _iterable(call_for_samples(str(source)), inputs, str(source))
    if isinstance(source, np.ndarray):
        return ListReader([source], inputs, "array")
    if isinstance(source, Mapping):
        return MappingReader(source, inputs)
    if isinstance(source, Iterable):
        return _iterable(source, inputs, type(source).__name__)
    raise SampleError(f"a {type(source).__name__} holds no samples", fix=f"forms: {FORMS}")


def _iterable(source: Iterable[Any], inputs: tuple[InputSpec, ...], name: str) -> Reader:
    if isinstance(source, list | tuple):
        return ListReader(source, inputs, name)
    return SpoolReader(source, inputs, name)


def _folder(path: Path, inputs: tuple[InputSpec, ...], preprocess: str | Path | None) -> Reader:
    images = find_images(path)
    if preprocess is not None:
        if not images:
            raise SampleError("there are no images in this folder", where=str(path))
        spec = image_input(inputs)
        return ImageReader(path, tuple(images), read_preprocess(preprocess, spec), spec)
    if any(path.glob("input_*.pb")):
        return TestDataReader(path, (path,), inputs)
    sets = sorted(path.glob("test_data_set_*"), key=by_number)
    if sets:
        return TestDataReader(path, tuple(sets), inputs)
    files = sorted(file for file in path.iterdir() if file.suffix in (".npy", ".npz"))
    if files:
        return FolderReader(path, tuple(files), inputs)
    if images:
        raise SampleError(
            "this is a folder of images, and there is no preprocessing",
            where=str(path),
            fix="add --preprocess imagenet, or --preprocess FILE.toml",
        )
    raise SampleError("there are no samples in this folder", where=str(path), fix=f"forms: {FORMS}")


def batches(
    samples: Iterable[Feeds], batch_size: int, inputs: Sequence[InputSpec]
) -> Iterator[tuple[int, Feeds]]:
    """Join consecutive samples of equal shapes, at most `batch_size`, along axis 0.

    Yields (number of samples, feeds). Samples come one at a time when an input has a fixed axis 0
    or a sample is longer than 1 along it. Scalars must be equal within a batch.
    """
    tensors = [spec.name for spec in inputs if spec.shape]
    joinable = bool(tensors) and all(spec.shape[0] is None for spec in inputs if spec.shape)
    group: list[Feeds] = []
    for feeds in samples:
        if group and not (
            joinable and len(group) < batch_size and _alike(group[0], feeds, tensors)
        ):
            yield len(group), _join(group, tensors)
            group = []
        group.append(feeds)
    if group:
        yield len(group), _join(group, tensors)


def _alike(a: Feeds, b: Feeds, tensors: Sequence[str]) -> bool:
    return all(
        a[name].shape == b[name].shape and a[name].shape[0] == 1
        if name in tensors
        else bool(a[name] == b[name])
        for name in a
    )


def _join(group: list[Feeds], tensors: Sequence[str]) -> Feeds:
    if len(group) == 1:
        return group[0]
    first = group[0]
    return {
        name: np.concatenate([feeds[name] for feeds in group]) if name in tensors else first[name]
        for name in first
    }


def split(samples: Samples, calibration: int | None, holdout: float) -> tuple[Samples, Samples]:
    """Return (calibration, hold-out): the first samples and those that follow them.

    With more than `calibration` samples, the hold-out is up to ``ceil(calibration * holdout)``
    further ones. Otherwise (or with None) it is the last share `holdout` of all, at least one of
    two or more; with holdout 0 it is empty.

    Raises:
        SampleError: there are no samples.
    """
    if calibration is not None:
        wanted = calibration + _ceil(calibration * holdout)
        found = samples.available(wanted)
        if found > calibration:
            return samples.view(0, calibration), samples.view(calibration, min(found, wanted))
    else:
        found = samples.count
    if found == 0:
        raise SampleError("there are no samples", where=samples.source)
    held = min(_ceil(found * holdout), found - 1)
    return samples.view(0, found - held), samples.view(found - held, found)


def _ceil(value: float) -> int:
    # 100 * 0.07 is a little more than 7.
    return math.ceil(value - 1e-9)


def shard(samples: Samples, index: int, count: int) -> Samples:
    """Return every `count`-th sample from `index` on: all shards together are all samples.

    Raises:
        SampleError: not 0 <= index < count.
    """
    if not 0 <= index < count:
        raise SampleError(f"there is no shard {index} of {count}", fix=f"0 to {count - 1}")
    return samples.view(index, None, count)
