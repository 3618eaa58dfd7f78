"""Walk a float graph and its quantized twin unit by unit, with the activations of both at hand.

Only the tensors that are still needed later are kept, once for each graph; what does not fit into
the memory budget lies in files until it is needed. A pass may change the constants of the quantized
graph's current unit (and of anything behind it) while it holds the unit; the walk then runs the
unit again, so that everything behind it sees the change.

Cost for a model of any depth: one float forward and two quantized forwards. The second one shrinks
to what lies behind the linear ops where the caller says what its change does to their outputs
(`Step.settle`). Both graphs carry the same names at the borders of units, because QDQ insertion
leaves the names of the float tensors in place. Bodies of If, Loop and Scan run inside of their
node.

The float side need not run the float graph: `aim` is the same graph with some quantizers in it (see
`weights_float`). Units and their borders are those of the float graph in any case.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from numpy.typing import NDArray

from qpass.arena import give_back_above
from qpass.errors import PreconditionError
from qpass.graph import Graph, Node
from qpass.live_tensors import LiveFeeds, Side, Store
from qpass.program import Progress
from qpass.submodel import Feeds, Submodel
from qpass.units import Unit, split_into_units, uses_of

Array = NDArray[Any]
NEVER: Final = 1 << 60  # next use of a tensor that is an output of the graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One tensor under its names in the two graphs."""

    float_name: str
    quantized_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """What the linear op of a unit gives for one batch.

    `float` and `quantized` are its outputs in the two graphs. `local` is what the op of the float
    side makes of the quantized graph's input (only where asked for). `also` holds the arrays of the
    extra pairs.
    """

    batch: int
    float: Array
    quantized: Array
    local: Array | None
    also: tuple[tuple[Array, Array], ...]


class Stream:
    """One walk over all units; a context manager, for it may own files.

    ::

        with Stream(reference, quantized, batches, memory_bytes=1 << 30) as stream:
            for step in stream:
                for tap in step.taps():
                    ...  # collect
                ...  # edit constants of the unit
            for wanted, got in stream.outputs():
                ...
    """

    def __init__(
        self,
        reference: Graph,
        quantized: Graph,
        batches: Sequence[Feeds],
        *,
        memory_bytes: int = 1 << 30,
        optimize: bool = True,
        threads: int | None = None,
        stage: str = "stream",
        progress: Progress | None = None,
        units: Sequence[Unit] | None = None,
        aim: Graph | None = None,
    ) -> None:
        """Prepare the walk; nothing runs before the first step.

        Args:
            reference: the float graph; never changed.
            quantized: the same graph after QDQ insertion; the caller may change its constants.
            batches: inputs by name; batches may differ in any dimension but not in rank.
            memory_bytes: activations above this many bytes go to files in a temporary folder.
            optimize: let onnxruntime fuse ops, as it will in use; False: run node by node.
            threads: threads of each session, None for onnxruntime's choice.
            stage: name of the stage for `progress`.
            progress: told after each unit (stage, units done, units in all).
            units: slices of `reference` to walk; by default those that end in its linear ops.
            aim: what the float side runs, with the nodes of `reference` and maybe Q and DQ between
                them; None: `reference` itself.

        Raises:
            PreconditionError: there are no batches.
        """
        if not batches:
            raise PreconditionError("streaming needs at least one batch")
        self.reference, self.quantized, self.batches = reference, quantized, batches
        self.units = split_into_units(reference) if units is None else tuple(units)
        self._optimize, self._threads = optimize, threads
        self._stage, self._progress = stage, progress
        self._folder = tempfile.TemporaryDirectory(prefix="qpass-stream-")
        self._uses = uses_of(self.units)
        self._position = 0
        self.aim = reference if aim is None else aim
        self.aims = {node.name: node for node in self.aim.nodes}
        self._renamed = _renamed(reference, self.aims)
        given = {tensor.name for tensor in reference.inputs}
        self._output_names = [
            tensor.name for tensor in reference.outputs if tensor.inputs or tensor.name in given
        ]
        self.folder = Path(self._folder.name)
        self.store = Store(memory_bytes, self.folder, self._next_use)

    def __enter__(self) -> Self:
        """Return the stream."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the files."""
        self.store.clear()
        self._folder.cleanup()

    def _next_use(self, name: str) -> int:
        if name in self._output_names:
            return NEVER
        return next((use for use in self._uses.get(name, ()) if use >= self._position), NEVER)

    def feeds(self, side: Side, batch: int) -> LiveFeeds:
        """Return a view of everything that is alive for one batch."""
        return LiveFeeds(self.batches[batch], self.store, side, batch)

    def __iter__(self) -> Iterator[Step]:
        """Walk; each step must be used before the next one is taken."""
        for number, unit in enumerate(self.units):
            self._position = number
            step = Step(self, unit)
            yield step
            step.finish()
            for name in self.store.names():
                if name not in self._output_names and self._uses[name][-1] <= number:
                    self.store.drop(name)
            give_back_above(self.store.most)
            if self._progress is not None:
                self._progress(self._stage, number + 1, len(self.units))
        self._position = len(self.units)

    def made(self, name: str) -> str:
        """Return the name on the float side of what the maker of a float tensor makes.

        Insertion of Q renames it where the old name has to stay behind DQ.
        """
        return self._renamed.get(name, name)

    def session(
        self, graph: Graph, side: Side, outputs: Sequence[str], *, as_written: bool = False
    ) -> Submodel:
        """Make a session that computes `outputs` from what is alive.

        `as_written`: Q and DQ run one by one, with floats between them, biases among them.
        """
        return Submodel(
            graph,
            self.feeds(side, 0),
            outputs,
            optimize=self._optimize,
            threads=self._threads,
            qdq_in_float=as_written or (graph is self.aim and graph is not self.reference),
        )

    def outputs(self) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
        """Yield, after the walk, the float and the quantized graph's outputs of each batch."""
        for batch in range(len(self.batches)):
            wanted, got = self.feeds("float", batch), self.feeds("quantized", batch)
            yield (
                {name: wanted[name] for name in self._output_names},
                {name: got[name] for name in self._output_names},
            )


class Step:
    """One unit of the walk, while its constants may still change."""

    def __init__(self, stream: Stream, unit: Unit) -> None:
        """Stand in front of `unit`."""
        self.unit, self.batches = unit, len(stream.batches)
        self._stream = stream
        self._float_done = False
        self._kept: str | None = None  # output of the linear op that waits in the store
        self._settled: tuple[Array, Array, int] | None = None

    def taps(
        self,
        quantized_tap: str | None = None,
        *,
        local: bool = False,
        also: Sequence[Pair] = (),
        keep: bool = False,
    ) -> Iterator[Tap]:
        """Run the unit in both graphs and yield the outputs of its linear op, batch by batch.

        Args:
            quantized_tap: name of that output in the quantized graph where it differs.
            local: also run the op of the float side on the quantized graph's activations.
            also: tensors to fetch on the way: alive, or made from what is alive.
            keep: hold the quantized outputs for `settle`; on the first run of the unit alone.

        Raises:
            PreconditionError: the unit has no linear op.
        """
        tap, stream = self.unit.tap, self._stream
        if tap is None:
            raise PreconditionError("the unit has no linear op")
        if self._float_done:
            yield from self._taps_again(tap, quantized_tap or tap, local=local, also=also)
            return
        float_names = [pair.float_name for pair in also]
        quantized_names = [pair.quantized_name for pair in also]
        quantized_tap = quantized_tap or tap
        self._kept = quantized_tap if keep else None
        float_tap = stream.made(tap)
        float_session = self._float_session(float_tap, *float_names)
        alive = stream.feeds("quantized", 0)
        session = stream.session(
            stream.quantized,
            "quantized",
            _distinct(quantized_tap, *(name for name in quantized_names if name not in alive)),
        )
        local_session = stream.session(stream.aim, "quantized", [float_tap]) if local else None
        for batch in range(len(stream.batches)):
            wanted = self._run_float(float_session, batch)
            alive = stream.feeds("quantized", batch)
            got = session.run(alive)
            if keep:
                stream.store.put("pending", quantized_tap, batch, got[quantized_tap])
            before = stream.feeds("float", batch)
            yield Tap(
                batch=batch,
                float=wanted[float_tap],
                quantized=got[quantized_tap],
                local=None if local_session is None else local_session.run(alive)[float_tap],
                also=tuple(
                    (
                        wanted[left] if left in wanted else before[left],
                        got[right] if right in got else alive[right],
                    )
                    for left, right in zip(float_names, quantized_names, strict=True)
                ),
            )
        self._float_done = True

    def settle(self, gain: Array, offset: Array, *, axis: int) -> None:
        """Say what the changes made since `taps` do to the kept output: `finish` computes it so.

        The linear op does not run again, nor what is in front of it for its sake.

        Args:
            gain: factor of each channel.
            offset: what is added after it, likewise.
            axis: where the output has its channels.

        Raises:
            PreconditionError: `taps` has kept nothing.
        """
        if self._kept is None or not self._float_done:
            raise PreconditionError("no output was kept that could be corrected")
        self._settled = gain, offset, axis

    def _taps_again(
        self, tap: str, quantized_tap: str, *, local: bool, also: Sequence[Pair]
    ) -> Iterator[Tap]:
        stream = self._stream
        tap = stream.made(tap)
        session = stream.session(stream.aim, "quantized", [tap]) if local else None
        pairs = [Pair(float_name=tap, quantized_name=quantized_tap), *also]
        for batch, ((floating, quantized), *others) in enumerate(self.look(pairs)):
            alive = stream.feeds("quantized", batch)
            yield Tap(
                batch=batch,
                float=floating,
                quantized=quantized,
                local=None if session is None else session.run(alive)[tap],
                also=tuple(others),
            )

    def output_of(self, node: str) -> str:
        """Return the name on the float side of the first output of a node."""
        return str(self._stream.aims[node].outputs[0].name)

    def look(
        self, pairs: Sequence[Pair], batches: Sequence[int] | None = None
    ) -> Iterator[tuple[tuple[Array, Array], ...]]:
        """Yield, batch by batch, tensors of the unit as (float, quantized), one for each pair.

        Runs what makes them and nothing else, as the constants are now; may be called at any time
        and again. Tensors behind the linear op cost its run. Looks at all `batches` by default.
        """
        stream = self._stream
        sides: list[tuple[Side, list[str], Submodel | None]] = []
        wanted: tuple[tuple[Side, Graph, list[str]], ...] = (
            ("float", stream.aim, [pair.float_name for pair in pairs]),
            ("quantized", stream.quantized, [pair.quantized_name for pair in pairs]),
        )
        for side, graph, names in wanted:
            made = _distinct(*(name for name in names if name not in stream.feeds(side, 0)))
            session = stream.session(graph, side, made) if made else None
            sides.append((side, names, session))
        for batch in range(self.batches) if batches is None else batches:
            found = []
            for side, names, session in sides:
                alive = stream.feeds(side, batch)
                results = {} if session is None else session.run(alive)
                found.append([results[n] if n in results else alive[n] for n in names])
            yield tuple(zip(*found, strict=True))

    def _float_session(self, *taps: str) -> Submodel:
        alive = self._stream.feeds("float", 0)
        names = _distinct(*self.unit.outputs, *(name for name in taps if name not in alive))
        return self._stream.session(self._stream.aim, "float", names)

    def _run_float(self, session: Submodel, batch: int) -> dict[str, Array]:
        results = session.run(self._stream.feeds("float", batch))
        for name in self.unit.outputs:
            self._stream.store.put("float", name, batch, results[name])
        return results

    def finish(self) -> None:
        """Run what has not run yet, the quantized unit with its new constants."""
        stream, names = self._stream, self.unit.outputs
        if self._kept is not None and (self._settled is None or not names):
            stream.store.drop(self._kept, "pending")
        if not names:
            return
        if not self._float_done:
            for name in names:  # of batches before the caller stopped to look
                stream.store.drop(name)
            session = self._float_session()
            for batch in range(len(stream.batches)):
                self._run_float(session, batch)
            self._float_done = True
        if self._kept is not None and self._settled is not None:
            self._finish_settled(self._kept, *self._settled)
            return
        session = stream.session(stream.quantized, "quantized", names)
        for batch in range(len(stream.batches)):
            results = session.run(stream.feeds("quantized", batch))
            for name in names:
                stream.store.put("quantized", name, batch, results[name])

    def _finish_settled(self, kept: str, gain: Array, offset: Array, axis: int) -> None:
        stream, store = self._stream, self._stream.store
        others = [name for name in self.unit.outputs if name != kept]
        session: Submodel | None = None
        for batch in range(len(stream.batches)):
            output = store.take("pending", kept, batch)
            shape = [-1 if i == axis % output.ndim else 1 for i in range(output.ndim)]
            output *= gain.astype(output.dtype).reshape(shape)
            output += offset.astype(output.dtype).reshape(shape)
            store.put("quantized", kept, batch, output)
            if others and session is None:
                session = stream.session(stream.quantized, "quantized", others)
            results = {} if session is None else session.run(stream.feeds("quantized", batch))
            for name in others:
                store.put("quantized", name, batch, results[name])
            if kept not in self.unit.outputs:
                store.drop(kept, "quantized", batch)


def _renamed(reference: Graph, aims: Mapping[str, Node]) -> dict[str, str]:
    """Return the outputs of nodes that have other names on the float side."""
    return {
        old.name: new.name
        for node in reference.nodes
        for old, new in zip(node.outputs, aims[node.name].outputs, strict=True)
        if old.name != new.name
    }


def _distinct(*names: str) -> list[str]:
    return list(dict.fromkeys(names))
