"""Run the float model once over the samples and observe the tensors that were asked for.

Tapped tensors become graph outputs of one onnxruntime session with its default optimizations. What
a batch produces is observed and dropped; while the engine computes a batch, one thread looks at the
last one and one reads the next (numpy and image decoders work without Python's lock). So memory
holds the tapped tensors of two batches, whatever the number of samples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Final, Self

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qpass.calibrate.buffers import OutputBuffers
from qpass.calibrate.cache import Checkpoint
from qpass.calibrate.inputs import Feeds
from qpass.calibrate.samples import Samples, batches, shard
from qpass.calibrate.stats import TensorStats, merge
from qpass.calibrate.taps import CollectResult, TapRequest
from qpass.errors import InternalError, NotFiniteError, SampleError

Array = NDArray[Any]
Progress = Callable[[int, int | None], None]

PROTOBUF_LIMIT: Final = 2_000_000_000  # bytes; a little below what protobuf can serialize
BATCHES_HELD: Final = 2  # the one that is computed and the one that is observed


def collect(
    model: onnx.ModelProto,
    taps: Sequence[TapRequest],
    samples: Samples,
    *,
    batch_size: int = 8,
    memory_bytes: int = 2 << 30,
    threads: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    executor: Executor | None = None,
) -> CollectResult:
    """Gather the statistics of tensors of a model.

    Args:
        model: float model; its outputs are exchanged while this runs, and put back.
        taps: tensors to observe: inputs of the model, or outputs of its nodes.
        samples: what to feed.
        batch_size: samples to join when the model allows it.
        memory_bytes: the tapped tensors of the batches in work stay below it: first the batch
            shrinks, then the taps are shared out over several passes.
        threads: of the engine, 0 for all cores; with `executor` the number of shards.
        progress: called with (samples done, samples in all or None).
        checkpoint: where to keep what is done, to resume from after an interruption.
        executor: runs shards of the samples elsewhere, with one engine thread each; anything with
            the interface of `concurrent.futures.Executor`.

    Returns:
        The statistics of each tap.

    Raises:
        SampleError: there are no samples, the model does not run on one, or a tensor is not finite.
        InternalError: a tap is no tensor of the model.
    """
    _require_known(model, taps)
    with _tapped(model, [tap.tensor for tap in taps]) as data:
        job = _Job(data, tuple(taps), samples, batch_size, memory_bytes, threads)
        if executor is None:
            return job.run(progress, checkpoint)
        return _in_shards(job, executor, max(threads, 1), progress, checkpoint)


def _require_known(model: onnx.ModelProto, taps: Sequence[TapRequest]) -> None:
    known = {name for node in model.graph.node for name in node.output}
    known |= {value.name for value in model.graph.input}
    unknown = [tap.tensor for tap in taps if tap.tensor not in known]
    if unknown:
        raise InternalError(f"{unknown[0]} is no tensor of the model")


@contextmanager
def _tapped(model: onnx.ModelProto, names: Sequence[str]) -> Iterator[bytes | str]:
    """Give the model with the tensors as its outputs: bytes, or a path if it is too large.

    Outputs need a name only: onnxruntime infers their types. The proto is changed and put back
    rather than copied, because it holds the weights.
    """
    graph = model.graph
    before = list(graph.output)
    inputs = {value.name for value in graph.input}
    wanted = [onnx.ValueInfoProto(name=name) for name in names if name not in inputs]
    with tempfile.TemporaryDirectory(prefix="qpass-collect-") as folder:
        try:
            del graph.output[:]
            graph.output.extend(wanted or before)
            if model.ByteSize() < PROTOBUF_LIMIT:
                data: bytes | str = model.SerializeToString()
            else:
                copy = onnx.ModelProto()
                copy.CopyFrom(model)
                data = str(Path(folder, "model.onnx"))
                onnx.save_model(copy, data, save_as_external_data=True, location="model.data")
                del copy
        finally:
            del graph.output[:]
            graph.output.extend(before)
        yield data


@dataclass(frozen=True, slots=True)
class _Job:
    """One shard of the work; it can be pickled."""

    model: bytes | str
    taps: tuple[TapRequest, ...]
    samples: Samples
    batch_size: int
    memory_bytes: int
    threads: int
    first: int = 0  # its samples are number first, first + step, ... of the whole
    step: int = 1

    def run(self, progress: Progress | None, checkpoint: Checkpoint | None) -> CollectResult:
        engine = _Engine(open_session(self.model, self.threads), self.samples.source)
        probe = next(iter(self.samples), None)
        if probe is None:
            raise SampleError("there are no samples to calibrate with", where=self.samples.source)
        ((_, found),) = engine.run_batch(self.taps, 1, probe)
        sizes = {name: array.nbytes for name, array in found.items()}
        batch_size, groups = _fit(self.taps, sizes, self.batch_size, self.memory_bytes)
        total = self.samples.count * len(groups) if progress is not None else None
        engine.seconds = 0.0
        stats: dict[str, TensorStats] = {}
        done = before = 0
        for number, group in enumerate(groups):
            before += done
            part = checkpoint.part(f"{self.first}-{self.step}-{number}") if checkpoint else None
            with _Observers(group, self) as observers:
                done = observers.resume(part)
                rest = batches(self.samples.view(done), batch_size, self.samples.inputs)
                for count, feeds in observers.read_ahead(rest):
                    observers.look(engine, count, feeds, done)
                    done += count
                    if progress is not None:
                        progress(before + done, total)
                    if part is not None and part.due():
                        part.save(done, observers.result())
                stats |= observers.result()
                if part is not None:
                    part.save(done, observers.result())
        return CollectResult(
            stats=stats, samples=done, forward_seconds=engine.seconds, passes=len(groups)
        )


class _Engine:
    """The session, and the seconds that were spent in it."""

    def __init__(self, session: ort.InferenceSession, source: str) -> None:
        self.session, self.source = session, source
        self.outputs = {value.name for value in session.get_outputs()}
        self.buffers = OutputBuffers(session)
        self.seconds = 0.0
        self.joins = True  # False once the model refused a batch, though its axis 0 is free

    def run(
        self, taps: Sequence[TapRequest], feeds: Feeds, *, keep: bool = False
    ) -> dict[str, Array]:
        """Return the tapped tensors; unless they are to `keep`, later runs overwrite them."""
        # A tensor that is an input as well is observed as it was fed.
        names = [tap.tensor for tap in taps if tap.tensor not in feeds]
        begin = time.perf_counter()
        run = self.session.run if keep else self.buffers.run
        values = run(names, feeds) if names else []
        self.seconds += time.perf_counter() - begin
        found = {**feeds, **dict(zip(names, values, strict=True))}
        return {tap.tensor: found[tap.tensor] for tap in taps}

    def run_batch(
        self, taps: Sequence[TapRequest], count: int, feeds: Feeds, *, keep: bool = False
    ) -> list[tuple[int, dict[str, Array]]]:
        """Return (samples, tapped tensors) of the batch, or of each sample of it if need be."""
        if count == 1 or self.joins:
            try:
                return [(count, self.run(taps, feeds, keep=keep))]
            except Exception as error:  # onnxruntime's errors share no other base
                if count == 1:
                    raise SampleError(
                        f"the model does not run on a sample: {error}", where=self.source
                    ) from error
                self.joins = False
        rows = ({k: v[i : i + 1] if v.ndim else v for k, v in feeds.items()} for i in range(count))
        return [(1, self.run_batch(taps, 1, row, keep=True)[0][1]) for row in rows]


class _Observers:
    """The observers of a group of taps, and the threads that read and observe."""

    def __init__(self, taps: Sequence[TapRequest], job: _Job) -> None:
        self.taps, self.job = taps, job
        self.observers = {tap.tensor: tap.observer() for tap in taps}
        self.thread, self.reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()
        self.reader.shutdown()

    def read_ahead(self, rest: Iterator[tuple[int, Feeds]]) -> Iterator[tuple[int, Feeds]]:
        """Yield batches; the next one is read (images: decoded) while the engine works."""
        coming = self.reader.submit(next, rest, None)
        while (batch := coming.result()) is not None:
            coming = self.reader.submit(next, rest, None)
            yield batch

    def resume(self, part: Checkpoint | None) -> int:
        """Take over what an interrupted run has done; return its number of samples."""
        saved = part.load() if part is not None else None
        if saved is None or any(tensor not in saved.stats for tensor in self.observers):
            return 0
        for tensor, observer in self.observers.items():
            observer.add(saved.stats[tensor])
        return saved.samples

    def look(self, engine: _Engine, count: int, feeds: Feeds, done: int) -> None:
        """Run a batch of `count` samples, of which `done` came before, and observe it."""
        job = self.job
        for samples, arrays in engine.run_batch(self.taps, count, feeds):
            self._wait()
            numbers = [job.first + (done + i) * job.step for i in range(samples)]
            self.pending = self.thread.submit(self._observe, arrays, numbers)
            done += samples

    def _observe(self, arrays: dict[str, Array], numbers: list[int]) -> None:
        for tensor, observer in self.observers.items():
            try:
                observer.update(arrays[tensor], numbers)
            except NotFiniteError as error:
                where = f"{self.job.samples.source}, samples {numbers[0]} to {numbers[-1]}"
                raise NotFiniteError(error.what, where=where, fix=error.fix) from error

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def result(self) -> dict[str, TensorStats]:
        """Return the statistics so far."""
        self._wait()
        return {tensor: observer.result() for tensor, observer in self.observers.items()}


def _fit(
    taps: Sequence[TapRequest], sizes: Mapping[str, int], batch_size: int, memory_bytes: int
) -> tuple[int, list[tuple[TapRequest, ...]]]:
    """Return the batch size and the groups of taps that stay within the memory.

    `sizes` are the bytes of the taps of one sample. A tap larger than the memory is a group.
    """
    limit = memory_bytes // BATCHES_HELD
    whole = sum(sizes.values())
    if whole <= limit:
        return max(min(batch_size, limit // max(whole, 1)), 1), [tuple(taps)]
    groups: list[list[TapRequest]] = []
    room = 0
    for tap in taps:
        size = sizes[tap.tensor]
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(tap)
        room -= size
    return 1, [tuple(group) for group in groups]


def open_session(model: bytes | str, threads: int) -> ort.InferenceSession:
    """Open a model in onnxruntime on the CPU with its default optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Idle engine threads that spin take the core from the thread that observes: measured, a pass
    # over a small transformer took 1.6 times a plain one without spinning and 1.9 with it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _in_shards(
    job: _Job,
    executor: Executor,
    count: int,
    progress: Progress | None,
    checkpoint: Checkpoint | None,
) -> CollectResult:
    total = job.samples.count
    count = max(min(count, total), 1)
    futures = []
    for index in range(count):
        part = replace(
            job,
            samples=shard(job.samples, index, count),
            threads=1,
            first=index,
            step=count,
        )
        futures.append(executor.submit(_run_shard, part, checkpoint))
    done = 0
    for future in as_completed(futures):
        done += future.result().samples
        if progress is not None:
            progress(done, total)
    results = [future.result() for future in futures]
    # In the order of the shards, so that float64 sums do not depend on who was first.
    stats = {
        tap.tensor: reduce(merge, (result.stats[tap.tensor] for result in results))
        for tap in job.taps
    }
    return CollectResult(
        stats=stats,
        samples=done,
        forward_seconds=sum(result.forward_seconds for result in results),
        passes=max(result.passes for result in results),
    )


def _run_shard(job: _Job, checkpoint: Checkpoint | None) -> CollectResult:
    return job.run(None, checkpoint)
