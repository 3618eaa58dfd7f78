"""The live activations of a walk over a graph: in memory up to a budget, then in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qpass.arena import give_back, give_back_above, resident_bytes
from qpass.submodel import Feeds

Array = NDArray[Any]
# "pending" are outputs of the quantized graph that wait for the correction of their op.
Side = Literal["float", "quantized", "pending"]


class LiveFeeds(Mapping[str, Array]):
    """The inputs of the graph and the live tensors of one side and batch, as one mapping."""

    def __init__(self, inputs: Feeds, store: Store, side: Side, batch: int) -> None:
        """Look at one batch of one side."""
        self._inputs, self._store, self._side, self._batch = inputs, store, side, batch

    def __getitem__(self, name: str) -> Array:
        if name in self._inputs:
            return self._inputs[name]
        return self._store.get(self._side, name, self._batch)

    def __contains__(self, name: object) -> bool:
        return name in self._inputs or self._store.has(self._side, name, self._batch)

    def __iter__(self) -> Iterator[str]:
        yield from self._inputs
        yield from self._store.names()

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Store:
    """Live tensors in memory up to a budget; those needed last go to files first."""

    def __init__(self, budget: int, folder: Path, next_use: Callable[[str], int]) -> None:
        """Hold nothing yet; what `next_use` says is read last is spilled first."""
        self._budget, self._folder, self._next_use = budget, folder, next_use
        self._held: dict[tuple[Side, str, int], Array] = {}
        self._files: dict[tuple[Side, str, int], tuple[Path, Any, tuple[int, ...]]] = {}
        # More than this is not what lives: see `qpass.arena`.
        self.most = resident_bytes() + budget + budget // 4
        self.held_bytes = 0
        self.spilled = 0  # tensors that went to files so far

    def put(self, side: Side, name: str, batch: int, array: Array) -> None:
        """Keep one array."""
        key = (side, name, batch)
        self._held[key] = array
        self.held_bytes += array.nbytes
        while self.held_bytes > self._budget:
            candidates = [k for k, a in self._held.items() if a.nbytes and not a.dtype.hasobject]
            if not candidates:
                return  # text has no fixed size and stays
            self._spill(max(candidates, key=lambda k: (self._next_use(k[1]), k[2])))
            give_back_above(self.most)

    def _spill(self, key: tuple[Side, str, int]) -> None:
        array = self._held.pop(key)
        self.held_bytes -= array.nbytes
        path = self._folder / f"{self.spilled}.bin"
        self.spilled += 1
        array.tofile(path)
        self._files[key] = (path, array.dtype, array.shape)

    def has(self, side: Side, name: object, batch: int) -> bool:
        """True when the tensor is alive."""
        return (side, name, batch) in self._held or (side, name, batch) in self._files

    def get(self, side: Side, name: str, batch: int) -> Array:
        """Return one array: the one that was put, or a read-only map of its file."""
        key = (side, name, batch)
        if key in self._held:
            return self._held[key]
        path, dtype, shape = self._files[key]  # KeyError: not alive
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)

    def take(self, side: Side, name: str, batch: int) -> Array:
        """Return one array, in memory and writable, and forget it here."""
        array = self.get(side, name, batch)
        key = (side, name, batch)
        if key in self._held:
            self.held_bytes -= self._held.pop(key).nbytes
            return array if array.flags.writeable else array.copy()
        array = np.array(array)
        self._files.pop(key)[0].unlink()
        return array

    def names(self) -> list[str]:
        """Return the names of all tensors alive."""
        return list(dict.fromkeys(name for _, name, _ in (*self._held, *self._files)))

    def drop(self, name: str, side: Side | None = None, batch: int | None = None) -> None:
        """Forget a tensor, by default in all batches of all sides."""

        def meant(key: tuple[Side, str, int]) -> bool:
            return key[1] == name and side in (None, key[0]) and batch in (None, key[2])

        for key in [k for k in self._held if meant(k)]:
            self.held_bytes -= self._held.pop(key).nbytes
        for key in [k for k in self._files if meant(k)]:
            self._files.pop(key)[0].unlink()

    def clear(self) -> None:
        """Forget everything, and give the memory back."""
        for name in self.names():
            self.drop(name)
        give_back()
