"""Arrays of .npz and .npy files read a piece at a time, compressed or not."""

from __future__ import annotations

import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from qpass.calibrate.inputs import InputSpec, Rows, require_names
from qpass.errors import SampleError

Array = NDArray[Any]
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, Fortran order, dtype

_DAMAGE: Final = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError)
_COPY: Final = 1 << 20


class NpzFile:
    """An open .npz file, or a .npy file as the only input of a model.

    Raises:
        SampleError: (any method) the file is damaged or holds Python objects.
    """

    def __init__(self, path: Path, inputs: Sequence[InputSpec]) -> None:
        """Open the file and read the headers of its arrays."""
        self.path = path
        self._stack = ExitStack()
        self._zip: zipfile.ZipFile | None = None
        try:
            if path.suffix == ".npy":
                names = [inputs[0].name]
            else:
                self._zip = self._stack.enter_context(zipfile.ZipFile(path))
                names = [name.removesuffix(".npy") for name in self._zip.namelist()]
            self._headers: dict[str, Header] = {}
            for name in names:
                with self._open(name) as stream:
                    self._headers[name] = _header(stream)
        except _DAMAGE as error:
            self._stack.close()
            raise self._damaged(error) from error
        if path.suffix == ".npy" and len(inputs) > 1:
            self._stack.close()
            require_names(self._headers, inputs, str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array, from the headers."""
        return {name: header[0] for name, header in self._headers.items()}

    def rows(self, name: str, cut: Rows) -> Iterator[Array]:
        """Yield the samples of an array; without end where it is the same for all."""
        shape, fortran, dtype = self._headers[name]
        try:
            with self._open(name) as stream:
                _header(stream)
                if fortran and len(shape) > 1:
                    yield from self._columns(stream, name, cut)
                    return
                size = math.prod(cut.shape) * dtype.itemsize
                part = self._part(stream, size, cut, dtype)
                while True:
                    yield part
                    if cut.step:
                        part = self._part(stream, size, cut, dtype)
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _part(self, stream: IO[bytes], size: int, cut: Rows, dtype: np.dtype[Any]) -> Array:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError("it ends too early")
        return np.frombuffer(data, dtype).reshape(cut.shape)

    def _columns(self, stream: IO[bytes], name: str, cut: Rows) -> Iterator[Array]:
        # Axis 0 runs fastest: a sample is scattered over the file, so it is unpacked and mapped.
        shape, _, dtype = self._headers[name]
        with tempfile.TemporaryFile() as file:
            while piece := stream.read(_COPY):
                file.write(piece)
            file.flush()
            array: Array = np.memmap(file, dtype, "r", shape=shape, order="F")
            index = 0
            while True:
                yield np.array(cut.take(array, index))
                index += 1

    def _open(self, name: str) -> IO[bytes]:
        if self._zip is None:
            return self.path.open("rb")
        member = name + ".npy"
        return self._zip.open(member if member in self._zip.NameToInfo else name)

    def _damaged(self, error: Exception) -> SampleError:
        return SampleError(
            f"cannot read {self.path.name}: {error}",
            where=str(self.path),
            fix="write it again with numpy.savez, arrays of numbers only",
        )


def _header(stream: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, fortran, dtype
