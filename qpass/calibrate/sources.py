"""Where samples come from: one reader per form of `--data`.

A reader yields `Item`s again and again in the same order, and reads an item only when asked to, so
that views skip without decoding. Memory does not grow with the number of samples.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import numpy_helper

from qpass.calibrate.images import Preprocess, read_image
from qpass.calibrate.inputs import Feeds, InputSpec, Rows, conform, feeds_of, rows_of, samples_of
from qpass.calibrate.npzrows import NpzFile
from qpass.errors import SampleError

Array = NDArray[Any]

RANDOM_SAMPLES: Final = 64


@dataclass(frozen=True, slots=True)
class Item:
    """One sample: where it is from, how to read it, and the file to hash instead, if any."""

    where: str
    read: Callable[[], Mapping[str, Array]]
    file: Path | None = None


class Reader(Protocol):
    """A source that can be read again and again."""

    @property
    def source(self) -> str:
        """Where the samples are from, for messages."""

    @property
    def preprocessing(self) -> str:
        """Text that is equal for equal preprocessing."""

    def items(self) -> Iterator[Item]:
        """Yield the samples in their order."""


@dataclass(frozen=True, slots=True)
class NpzReader:
    """An .npz (or .npy) file whose arrays are rows; read row by row."""

    path: Path
    inputs: tuple[InputSpec, ...]
    preprocessing: str = ""

    @property
    def source(self) -> str:
        """Path of the file."""
        return str(self.path)

    def items(self) -> Iterator[Item]:
        """Yield one item per row."""
        return _file_items(self.path, self.inputs, rows_of)


@dataclass(frozen=True, slots=True)
class FolderReader:
    """A folder of .npy and .npz files, each a batch or one sample."""

    path: Path
    files: tuple[Path, ...]
    inputs: tuple[InputSpec, ...]
    preprocessing: str = ""

    @property
    def source(self) -> str:
        """Path of the folder."""
        return str(self.path)

    def items(self) -> Iterator[Item]:
        """Yield the samples of each file, a sample at a time."""
        for path in self.files:
            yield from _file_items(path, self.inputs, feeds_of)


Cutter = Callable[
    [Mapping[str, tuple[int, ...]], Sequence[InputSpec], str], tuple[int, dict[str, Rows]]
]


def _file_items(path: Path, inputs: Sequence[InputSpec], cutter: Cutter) -> Iterator[Item]:
    with NpzFile(path, inputs) as file:
        count, cuts = cutter(file.shapes(), inputs, str(path))
        rows = {name: file.rows(name, cut) for name, cut in cuts.items()}
        for index in range(count):
            arrays = {name: next(parts) for name, parts in rows.items()}
            yield Item(f"{path}, sample {index}", partial(dict, arrays))


@dataclass(frozen=True, slots=True)
class TestDataReader:
    """Folders of ONNX test data: input_0.pb, input_1.pb, ... in each."""

    path: Path
    folders: tuple[Path, ...]
    inputs: tuple[InputSpec, ...]
    preprocessing: str = ""

    @property
    def source(self) -> str:
        """Path of the folder."""
        return str(self.path)

    def items(self) -> Iterator[Item]:
        """Yield the samples of each test data set."""
        names = [spec.name for spec in self.inputs]
        for folder in self.folders:
            arrays: dict[str, Array] = {}
            for position, path in enumerate(sorted(folder.glob("input_*.pb"), key=by_number)):
                name, array = _read_tensor(path)
                if name not in names:
                    name = names[position] if position < len(names) else path.name
                arrays[name] = array
            for index, feeds in enumerate(samples_of(arrays, self.inputs, str(folder))):
                yield Item(f"{folder}, sample {index}", partial(dict, feeds))


def by_number(path: Path) -> tuple[int, str]:
    """Sort key: the number at the end of the name, so that set_10 comes after set_2."""
    digits = path.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else sys.maxsize), path.name


def _read_tensor(path: Path) -> tuple[str, Array]:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        return tensor.name, numpy_helper.to_array(tensor)
    except (DecodeError, ValueError, TypeError) as error:
        raise SampleError(f"{path.name} is not an ONNX tensor: {error}", where=str(path)) from error


@dataclass(frozen=True, slots=True)
class ImageReader:
    """A folder of images."""

    path: Path
    files: tuple[Path, ...]
    steps: Preprocess
    spec: InputSpec

    @property
    def source(self) -> str:
        """Path of the folder."""
        return str(self.path)

    @property
    def preprocessing(self) -> str:
        """The steps, as text."""
        return self.steps.describe()

    def items(self) -> Iterator[Item]:
        """Yield one item per image; it is decoded when it is read."""
        for path in self.files:
            yield Item(str(path), partial(self._read, path), path)

    def _read(self, path: Path) -> Feeds:
        return {self.spec.name: read_image(path, self.steps, self.spec)}


@dataclass(frozen=True, slots=True)
class RandomReader:
    """Seeded noise: normal floats, integers and bools of 0 and 1; free dimensions are 1."""

    inputs: tuple[InputSpec, ...]
    seed: int
    source: str = "random"
    preprocessing: str = ""

    def items(self) -> Iterator[Item]:
        """Yield `RANDOM_SAMPLES` items."""
        for index in range(RANDOM_SAMPLES):
            yield Item(f"random, sample {index}", partial(self._read, index))

    def _read(self, index: int) -> Feeds:
        rng = np.random.default_rng([self.seed, index])
        feeds: Feeds = {}
        for spec in self.inputs:
            shape = [dim or 1 for dim in spec.shape]
            integer = spec.dtype.kind in "iub"
            values = rng.integers(0, 2, shape) if integer else rng.standard_normal(shape)
            feeds[spec.name] = np.asarray(values).astype(spec.dtype)
        return feeds


@dataclass(frozen=True, slots=True)
class ListReader:
    """A list or tuple of batches or samples, in memory already."""

    batches: Sequence[Any]
    inputs: tuple[InputSpec, ...]
    source: str = "list"
    preprocessing: str = ""

    def items(self) -> Iterator[Item]:
        """Yield the samples of each entry."""
        return _items(self.batches, self.inputs, self.source)


@dataclass(frozen=True, slots=True)
class MappingReader:
    """Arrays by input name, as in an .npz file."""

    arrays: Mapping[str, Any]
    inputs: tuple[InputSpec, ...]
    source: str = "arrays"
    preprocessing: str = ""

    def items(self) -> Iterator[Item]:
        """Yield one item per row."""
        arrays = named(self.arrays, self.inputs, self.source)
        shapes = {name: array.shape for name, array in arrays.items()}
        count, cuts = rows_of(shapes, self.inputs, self.source)
        for index in range(count):
            feeds = {name: cut.take(arrays[name], index) for name, cut in cuts.items()}
            yield Item(f"{self.source}, sample {index}", partial(dict, feeds))


@dataclass(frozen=True, slots=True)
class SpooledReader:
    """Samples that lie in a folder as 0.npz, 1.npz, ... with the inputs in their order."""

    folder: Path
    wheres: list[str]
    inputs: tuple[InputSpec, ...]
    source: str
    preprocessing: str = ""

    def items(self) -> Iterator[Item]:
        """Yield one item per file."""
        for index, where in enumerate(self.wheres):
            yield Item(where, partial(self._read, index))

    def append(self, feeds: Feeds, where: str) -> None:
        """Store one more sample."""
        np.savez(self._path(len(self.wheres)), *(feeds[spec.name] for spec in self.inputs))
        self.wheres.append(where)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.npz"

    def _read(self, index: int) -> Feeds:
        with np.load(self._path(index), allow_pickle=False) as file:
            return {spec.name: file[f"arr_{i}"] for i, spec in enumerate(self.inputs)}


class SpoolReader:
    """Anything that can be iterated once: what it yields is kept in a temporary folder.

    It is read no further than someone asks for. A DataLoader that shuffles is spooled too: a second
    pass over it would mix calibration and hold-out. The folder goes when the reader goes; a pickled
    copy reads the same folder.
    """

    preprocessing = ""

    def __init__(self, batches: Iterable[Any], inputs: Sequence[InputSpec], source: str) -> None:
        """Keep the iterator of `batches`, which nobody else should use from now on."""
        self.source = source
        self._upstream = _items(batches, inputs, source)
        folder = Path(tempfile.mkdtemp(prefix="qpass-samples-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._spooled = SpooledReader(folder, [], tuple(inputs), source)

    def __reduce__(self) -> tuple[Any, ...]:
        for _ in self.items():
            pass
        spooled = self._spooled
        return SpooledReader, (spooled.folder, spooled.wheres, spooled.inputs, spooled.source)

    def items(self) -> Iterator[Item]:
        """Yield what is spooled, then go on with the source."""
        done = 0
        while True:
            for item in islice(self._spooled.items(), done, None):
                done += 1
                yield item
            fresh = next(self._upstream, None)
            if fresh is None:
                return
            feeds = conform(fresh.read(), self._spooled.inputs, fresh.where)
            self._spooled.append(feeds, fresh.where)


def _items(batches: Iterable[Any], inputs: Sequence[InputSpec], source: str) -> Iterator[Item]:
    index = 0
    for number, batch in enumerate(batches):
        where = f"{source}, item {number}"
        for feeds in samples_of(named(batch, inputs, where), inputs, where):
            yield Item(f"{where}, sample {index}", partial(dict, feeds))
            index += 1


def named(batch: Any, inputs: Sequence[InputSpec], where: str) -> dict[str, Array]:
    """Return what a loader yielded as arrays by input name.

    A dict is taken by its keys. The entries of a tuple or list are the inputs in their order, what
    follows (labels) is dropped. Anything else is the only input.

    Raises:
        SampleError: not convertible to arrays, or too few of them.
    """
    if isinstance(batch, Mapping):
        found = {str(name): value for name, value in batch.items()}
    else:
        values = list(batch) if isinstance(batch, tuple | list) else [batch]
        found = {spec.name: value for spec, value in zip(inputs, values, strict=False)}
    return {name: _array(value, name, where) for name, value in found.items()}


def _array(value: Any, name: str, where: str) -> Array:
    if hasattr(value, "detach"):  # a torch tensor that requires a gradient has no other way out
        value = value.detach().cpu()
    try:
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    except (TypeError, ValueError) as error:
        raise SampleError(f"input {name} is not an array: {error}", where=where) from error
    if array.dtype == object:
        raise SampleError(f"input {name} is a {type(value).__name__}, not an array", where=where)
    return array


def digest_of(item: Item) -> bytes:
    """Return the sha256 of a sample: of its file where that is cheaper, else of its arrays."""
    digest = hashlib.sha256()
    if item.file is not None:
        digest.update(item.file.read_bytes())
        return digest.digest()
    for name, array in sorted(item.read().items()):
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()
