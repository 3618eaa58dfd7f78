"""The memory budget of a walk: what does not fit lies in files, and results do not change."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.graph import Graph
from qpass.live_tensors import Store
from qpass.stream import NEVER, Stream

Array = np.ndarray[Any, Any]
DEPTH, WIDTH = 5, 6


def skips() -> Graph:
    """A chain of MatMuls whose outputs all wait for the last op, and live tensors of other types.

    `picked` is int64, `large` bool, `half` float16 and `top` a number; all are made in the first
    unit and read in the last.
    """
    random = np.random.default_rng(0)
    constants = {
        f"w{i}": random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 2 for i in range(DEPTH)
    }
    lines = ["large = Greater (x, zero)", "half = Cast <to = 10> (x)", "picked = Add (ids, ids)"]
    lines += ["top = ReduceMax <keepdims = 0> (x)"]
    source = "x"
    for i in range(DEPTH):
        lines += [f"[fc{i}] h{i} = MatMul ({source}, w{i})", f"t{i} = Tanh (h{i})"]
        source = f"t{i}"
    parts = ", ".join(f"t{i}" for i in range(DEPTH))
    lines += [
        f"all = Concat <axis = 1> ({parts})",
        "back = Cast <to = 1> (half)",
        "chosen = Where (large, back, t0)",
        "both = Concat <axis = 1> (all, chosen)",
        "scaled = Mul (both, top)",
        "out = Gather <axis = 1> (scaled, picked)",
    ]
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[N, {WIDTH}] x, int64[M] ids) => (float[N, M] out) {{ {chr(10).join(lines)} }}"""
    graph = Graph.from_text(text, **constants, zero=np.float32(0))
    graph.infer_shapes()
    return graph


def quantized() -> Graph:
    """The same with coarse weights."""
    graph = skips()
    for i in range(DEPTH):
        node = graph.node(f"fc{i}")
        node.inputs[1] = graph.constant(f"v{i}", np.rint(node.inputs[1].values * 4) / 4)
    return graph


def ragged() -> list[dict[str, Array]]:
    """Batches of 7, 4 and 1 samples; the second input differs in length, and is empty once."""
    random = np.random.default_rng(7)
    return [
        {"x": random.standard_normal((n, WIDTH), dtype=np.float32), "ids": np.arange(m)}
        for n, m in ((7, 3), (4, 1), (1, 0))
    ]


def walk(budget: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Array], list[int], int]:
    """Return all taps and outputs, the bytes held after each put, and the count of files."""
    held: list[int] = []
    real = Store.put

    def watched(self: Store, *args: Any) -> None:
        real(self, *args)
        held.append(self.held_bytes)

    monkeypatch.setattr(Store, "put", watched)
    found = []
    with Stream(skips(), quantized(), ragged(), memory_bytes=budget, optimize=False) as stream:
        for step in stream:
            found += [np.array(a) for tap in step.taps() for a in (tap.float, tap.quantized)]
            held_now = sum(a.nbytes for a in stream.store._held.values())
            assert stream.store.held_bytes == held_now  # the account is right
        found += [np.array(a) for pair in stream.outputs() for d in pair for a in d.values()]
        spilled = stream.store.spilled
        assert len(list(stream.folder.iterdir())) == len(stream.store._files)
    return found, held, spilled


def test_between_all_and_nothing_some_tensors_spill_and_some_stay(monkeypatch):
    wanted, held, spilled = walk(1 << 30, monkeypatch)
    peak = max(held)
    assert spilled == 0
    counts = []
    for share in (0.9, 0.6, 0.3, 0.1):
        budget = int(share * peak)
        got, held, spilled = walk(budget, monkeypatch)
        assert max(held) <= budget
        assert max(held) > 0.5 * budget  # memory that was granted is used
        counts.append(spilled)
        for left, right in zip(wanted, got, strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
    assert 0 < counts[0] < counts[1] < counts[2] < counts[3]


def test_a_budget_below_the_smallest_tensor_keeps_nothing(monkeypatch):
    wanted, _, _ = walk(1 << 30, monkeypatch)
    # `top` of one sample is a number of four bytes.
    got, held, spilled = walk(3, monkeypatch)
    assert set(held) == {0}
    # Each of the tensors that live between units, of each side and batch, but for the empty one.
    units = [unit.outputs for unit in _stream_units()]
    assert spilled == 2 * 3 * sum(len(names) for names in units) - 2 * empty_outputs(units)
    for left, right in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(left, right)


def _stream_units() -> tuple[Any, ...]:
    with Stream(skips(), quantized(), ragged()) as stream:
        return stream.units


def empty_outputs(units: list[tuple[str, ...]]) -> int:
    """Tensors of the last batch without elements: what is gathered, and the numbers to gather."""
    return sum(name in ("picked", "out") for names in units for name in names)


def test_what_is_needed_last_goes_first(tmp_path: Path):
    uses = {"soon": 1, "later": 5, "never": NEVER}
    store = Store(8, tmp_path, uses.__getitem__)
    four = np.ones(1, np.float32)
    for name in ("never", "soon", "later"):
        store.put("float", name, 0, four)
    assert {key[1] for key in store._files} == {"never"}
    store.put("quantized", "soon", 0, four)
    assert {key[1] for key in store._files} == {"never", "later"}
    # Of one tensor the last batch is needed last.
    store = Store(4, tmp_path, uses.__getitem__)
    for batch in (0, 1):
        store.put("float", "soon", batch, four)
    assert [key[2] for key in store._files] == [1]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array([[True], [False]]),
        np.array(2.5, np.float16),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(8, dtype=np.uint8)[::2],
        np.array([1 + 2j], np.complex64),
    ],
)
def test_files_hold_any_type_and_layout(array, tmp_path: Path):
    store = Store(0, tmp_path, lambda _: 0)
    store.put("float", "x", 0, array)
    assert (store.held_bytes, store.spilled) == (0, 1)
    found = store.get("float", "x", 0)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)
    with pytest.raises(ValueError, match="read-only"):
        found[...] = 0
    store.drop("x")
    assert not store.has("float", "x", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [0, 1 << 10])
def test_what_is_taken_is_gone_and_may_be_changed(budget, tmp_path: Path):
    store = Store(budget, tmp_path, lambda _: 0)
    array = np.arange(6, dtype=np.float32)
    array.flags.writeable = budget == 0
    for side in ("float", "pending"):
        for batch in (0, 1):
            store.put(side, "x", batch, array)
    taken = store.take("pending", "x", 1)
    np.testing.assert_array_equal(taken, array)
    taken[...] = 0
    np.testing.assert_array_equal(store.get("float", "x", 1), np.arange(6))
    assert not store.has("pending", "x", 1)
    assert store.has("pending", "x", 0)
    store.drop("x", "pending")
    assert not store.has("pending", "x", 0)
    store.drop("x", "float", 0)
    assert not store.has("float", "x", 0)
    assert store.has("float", "x", 1)
    assert store.held_bytes == (array.nbytes if budget else 0)
    assert len(list(tmp_path.iterdir())) == (0 if budget else 1)


def test_text_stays_in_memory(tmp_path: Path):
    """It has no fixed size; the budget cannot be kept then, and the walk goes on."""
    store = Store(0, tmp_path, lambda _: 0)
    store.put("float", "words", 0, np.array(["a", "bc"], object))
    store.put("float", "numbers", 0, np.ones(3))
    assert store.spilled == 1
    assert list(store.get("float", "words", 0)) == ["a", "bc"]
    np.testing.assert_array_equal(store.get("float", "numbers", 0), np.ones(3))


MEBIBYTE = 1 << 20
LAYERS, BATCHES = 6, 10
# A chain of products on a megabyte a batch, all of whose results wait for the last op.
PEAK = textwrap.dedent(
    """
    import json, pathlib, sys
    import numpy as np
    from qpass.graph import Graph
    from qpass.stream import Stream

    budget, layers, count = (int(a) for a in sys.argv[1:])
    lines, source = [], "x"
    for i in range(layers):
        lines.append(f"h{i} = MatMul ({source}, w{i})")
        source = f"h{i}"
    lines.append(f"y = Sum ({', '.join(f'h{i}' for i in range(layers))})")
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[N,16384,16] x) => '
    text += "(float[N,16384,16] y) {" + chr(10).join(lines) + "}"
    weights = {f"w{i}": np.eye(16, dtype=np.float32) for i in range(layers)}
    graph = Graph.from_text(text, **weights)
    graph.infer_shapes()
    batches = [{"x": np.ones((1, 16384, 16), np.float32)} for _ in range(count)]

    def peak():  # ru_maxrss will not do: a child begins with that of its parent
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

    with Stream(graph, graph.copy(), batches[:1], threads=1) as stream:  # what sessions take
        for step in stream:
            list(step.taps())
    before = peak()
    with Stream(graph, graph.copy(), batches, memory_bytes=budget, threads=1) as stream:
        for step in stream:
            for tap in step.taps():
                del tap
        right = all(bool((got["y"] == layers).all()) for _, got in stream.outputs())
        spilled = stream.store.spilled
    print(json.dumps({"grown": peak() - before, "spilled": spilled, "right": right}))
    """
)


def grown(budget: int) -> dict[str, Any]:
    """Walk in a process of its own; return how far its peak of resident memory grew."""
    arguments = [str(n) for n in (budget, LAYERS, BATCHES)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["right"]
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak there")
def test_resident_memory_stays_within_the_budget():
    free, bound = grown(1 << 30), grown(16 * MEBIBYTE)
    # In front of the last op wait, on both sides, the outputs of all layers.
    live = 2 * LAYERS * BATCHES * MEBIBYTE
    assert free["spilled"] == 0
    assert free["grown"] > 0.8 * live
    assert bound["spilled"] > 0
    # The budget, and the arrays that one run reads and makes: inputs and outputs of the last op.
    assert bound["grown"] < (16 + 3 * (LAYERS + 2)) * MEBIBYTE
