"""Streaming must be indistinguishable from running whole models, at a cost linear in depth."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime as ort
import pytest

from qpass.errors import InternalError, PreconditionError
from qpass.graph import Graph
from qpass.passes.channel_affine import ChannelAffine
from qpass.passes.fold_affine import find_site, fold
from qpass.stream import Pair, Stream
from qpass.submodel import Submodel
from qpass.units import split_into_units

DEPTH, WIDTH = 4, 6


def residual_network(*, quantized: bool) -> Graph:
    """DEPTH times x + Tanh(Gemm(x)), a long skip to a second output, and an integer tensor."""
    random = np.random.default_rng(0)
    lines = ["twice = Add (ids, ids)"]
    constants, x = {"axes": np.array([1])}, "x"
    for i in range(DEPTH):
        weight = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 2
        constants[f"b{i}"] = np.zeros(WIDTH, np.float32)
        if quantized:
            scale = np.abs(weight).max(1) / 7
            constants[f"w{i}_int"] = np.rint(weight / scale[:, None]).astype(np.int8)
            constants[f"w{i}_scale"] = scale
            lines.append(f"w{i} = DequantizeLinear <axis = 0> (w{i}_int, w{i}_scale)")
        else:
            constants[f"w{i}"] = weight
        lines += [
            f"[fc{i}] h{i} = Gemm <transB = 1> ({x}, w{i}, b{i})",
            f"t{i} = Tanh (h{i})",
            f"y{i} = Add ({x}, t{i})",
        ]
        x = f"y{i}"
    lines += [
        "summed = ReduceSum (x, axes)",
        f"out = Mul ({x}, summed)",
        f"skip = Sub (y0, {x})",
        "picked = Gather (skip, twice)",
    ]
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[N, {WIDTH}] x, int64[M] ids) => (float[N, {WIDTH}] out, float[M, {WIDTH}] picked)
    {{ {chr(10).join(lines)} }}"""
    return Graph.from_text(text, **constants)


BRANCH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 3] x, bool flag) => (float[N, 3] out)
<float[3, 3] w, float[3, 3] v>
{
    [first] a = MatMul (x, w)
    inner = If (flag) <
        then_branch = yes () => (float[N, 3] left) { left = Mul (a, a) },
        else_branch = no () => (float[N, 3] right) { right = Neg (x) }
    >
    [second] out = MatMul (inner, v)
}
"""


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(7)
    return [
        {"x": random.standard_normal((n, WIDTH), dtype=np.float32), "ids": np.arange(n // 2)}
        for n in (5, 3)
    ]


@pytest.fixture
def executed(monkeypatch) -> Counter[str]:
    """Count the ops that pieces of graphs run, by type."""
    counts: Counter[str] = Counter()
    real = Submodel.run

    def counting(self, feeds):
        counts.update(self.ops)
        return real(self, feeds)

    monkeypatch.setattr(Submodel, "run", counting)
    return counts


def run_whole(graph: Graph, tap: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = graph.to_model(taps=[tap])
    session = ort.InferenceSession(model.SerializeToString(), options)
    return session.run([tap], feeds)[0]


def shift(graph: Graph, original: Graph, linear: str) -> None:
    """Change the constants of one linear op, so that everything behind it changes."""
    nodes = {node.name: node for node in graph.nodes}
    site = find_site(graph, nodes, original.node(linear))
    fold(graph, site, ChannelAffine(gain=np.full(WIDTH, 1.25), offset=np.full(WIDTH, 0.5)))


def test_taps_equal_whole_model_runs_after_every_unit_was_changed(batches):
    reference, quantized = residual_network(quantized=False), residual_network(quantized=True)
    with Stream(reference, quantized, batches, optimize=False) as stream:
        for step in stream:
            for tap in step.taps():
                for graph, got in ((reference, tap.float), (quantized, tap.quantized)):
                    want = run_whole(graph, step.unit.tap, batches[tap.batch])
                    np.testing.assert_array_equal(got, want)
            shift(quantized, reference, step.unit.linear)
        for feeds, (wanted, got) in zip(batches, stream.outputs(), strict=True):
            for graph, arrays in ((reference, wanted), (quantized, got)):
                for name in ("out", "picked"):
                    np.testing.assert_array_equal(arrays[name], run_whole(graph, name, feeds))


def test_local_taps_and_extra_pairs(batches):
    reference, quantized = residual_network(quantized=False), residual_network(quantized=True)
    with Stream(reference, quantized, batches, optimize=False) as stream:
        for step in stream:
            if step.unit.linear != "fc2":
                continue
            for tap in step.taps(local=True, also=[Pair(float_name="y1", quantized_name="y1")]):
                feeds = batches[tap.batch]
                wanted, got = (run_whole(graph, "y1", feeds) for graph in (reference, quantized))
                np.testing.assert_array_equal(tap.also[0], (wanted, got))
                # The op of the float graph, fed with what the quantized graph has at its input.
                node = reference.node("fc2")
                local = got @ node.inputs[1].values.T + node.inputs[2].values
                np.testing.assert_allclose(tap.local, local, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_taps", [True, False])
def test_every_linear_op_runs_three_times_in_all(batches, executed, use_taps):
    graphs = residual_network(quantized=False), residual_network(quantized=True)
    with Stream(*graphs, batches) as stream:
        for step in stream:
            if use_taps:
                list(step.taps())
    # One float and two quantized forwards; without a look at the taps the first is not needed.
    assert executed["Gemm"] == (3 if use_taps else 2) * DEPTH * len(batches)


@pytest.mark.parametrize("memory", [0, 200, 1 << 30])
def test_a_settled_output_is_what_another_run_would_give(batches, executed, memory):
    """And it costs none: the second quantized forward leaves the linear ops out."""
    results = []
    for settle in (False, True):
        executed.clear()
        reference, quantized = residual_network(quantized=False), residual_network(quantized=True)
        with Stream(reference, quantized, batches, memory_bytes=memory) as stream:
            for step in stream:
                list(step.taps(keep=True))
                shift(quantized, reference, step.unit.linear)
                if settle:
                    step.settle(np.full(WIDTH, 1.25), np.full(WIDTH, 0.5), axis=-1)
            results.append([got for _, got in stream.outputs()])
            assert [
                key for key in (*stream.store._held, *stream.store._files) if key[0] == "pending"
            ] == []
        assert executed["Gemm"] == (2 if settle else 3) * DEPTH * len(batches)
    for plain, settled in zip(*results, strict=True):
        for name, want in plain.items():
            # Gains of 1.25 are exact; a product and a sum round once more at each of four layers.
            np.testing.assert_allclose(settled[name], want, rtol=1e-5, atol=1e-5)


def test_what_was_not_kept_cannot_be_settled(batches):
    graphs = residual_network(quantized=False), residual_network(quantized=True)
    with Stream(*graphs, batches) as stream:
        step = next(iter(stream))
        with pytest.raises(PreconditionError, match="no output was kept"):
            step.settle(np.ones(WIDTH), np.zeros(WIDTH), axis=-1)
        next(step.taps(keep=True))  # a look that stops early keeps nothing that is complete
        with pytest.raises(PreconditionError, match="no output was kept"):
            step.settle(np.ones(WIDTH), np.zeros(WIDTH), axis=-1)


@pytest.mark.parametrize("budget", [0, 100, 1000])
def test_a_small_budget_spills_and_changes_nothing(batches, budget):
    results, spilled = [], []
    for memory in (1 << 30, budget):
        graphs = residual_network(quantized=False), residual_network(quantized=True)
        taps = []
        with Stream(*graphs, batches, memory_bytes=memory) as stream:
            for step in stream:
                taps += [array for tap in step.taps() for array in (tap.float, tap.quantized)]
                shift(graphs[1], graphs[0], step.unit.linear)
            taps += [a for pair in stream.outputs() for arrays in pair for a in arrays.values()]
            taps = [np.array(array) for array in taps]
            spilled.append(stream.store.spilled)
            assert stream.store.held_bytes <= memory
        results.append(taps)
    assert spilled[0] == 0
    assert spilled[1] > 0
    for left, right in zip(*results, strict=True):
        np.testing.assert_array_equal(left, right)


def test_tensors_are_dropped_after_their_last_use(batches):
    graphs = residual_network(quantized=False), residual_network(quantized=True)
    alive = []
    with Stream(*graphs, batches) as stream:
        for step in stream:
            alive.append(set(stream.store.names()))
            list(step.taps())
    # Tensors come alive at the end of the step that makes them. y0 waits for the last unit;
    # between two units there is the output of the Gemm and, behind the second, its input.
    assert alive == [
        set(),
        {"h0", "twice"},
        {"y0", "h1", "twice"},
        {"y0", "y1", "h2", "twice"},
    ]


@pytest.mark.parametrize("flag", [True, False])
def test_control_flow_is_one_node_that_may_read_from_outside(flag):
    random = np.random.default_rng(3)
    constants = {name: random.standard_normal((3, 3)).astype(np.float32) for name in ("w", "v")}
    graph = Graph.from_text(BRANCH, **constants)
    feeds = [{"x": random.standard_normal((4, 3), dtype=np.float32), "flag": np.array(flag)}]
    with Stream(graph, graph.copy(), feeds, memory_bytes=0, optimize=False) as stream:
        for step in stream:
            list(step.taps())
        ((wanted, got),) = stream.outputs()
    np.testing.assert_array_equal(wanted["out"], run_whole(graph, "out", feeds[0]))
    np.testing.assert_array_equal(got["out"], wanted["out"])


def test_units_without_linear_ops_and_progress():
    graph = Graph.from_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N] x) => (float[N] y, float[N] x_copy) { y = Neg (x) x_copy = Abs (y) }"""
    )
    (unit,) = split_into_units(graph)
    assert (unit.linear, unit.tap, unit.inputs) == (None, None, ("x",))
    told = []
    feeds = [{"x": np.array([1.0, -2.0], np.float32)}]
    with Stream(graph, graph.copy(), feeds, progress=lambda *p: told.append(p)) as stream:
        for step in stream:
            with pytest.raises(PreconditionError, match="linear op"):
                list(step.taps())
        ((wanted, got),) = stream.outputs()
    assert told == [("stream", 1, 1)]
    np.testing.assert_array_equal(wanted["y"], [-1.0, 2.0])
    np.testing.assert_array_equal(got["x_copy"], [1.0, 2.0])


def test_the_temporary_folder_goes_away_even_after_an_error(batches):
    graphs = residual_network(quantized=False), residual_network(quantized=True)
    stream = Stream(*graphs, batches, memory_bytes=0)

    def fail_on_the_way():
        with stream:
            for step in stream:
                list(step.taps())
                assert stream.folder.exists()
                raise KeyError(step.unit.linear)

    with pytest.raises(KeyError, match="fc0"):
        fail_on_the_way()
    assert not stream.folder.exists()


def test_a_caller_may_stop_looking(batches):
    results = []
    for stop in (True, False):
        graphs = residual_network(quantized=False), residual_network(quantized=True)
        with Stream(*graphs, batches, optimize=False) as stream:
            for step in stream:
                for _ in step.taps():
                    if stop:
                        break
            results.append([a for pair in stream.outputs() for d in pair for a in d.values()])
    for left, right in zip(*results, strict=True):
        np.testing.assert_array_equal(left, right)


def test_what_cannot_be_reached_is_a_bug_of_the_caller(batches):
    graph = residual_network(quantized=False)
    with pytest.raises(InternalError, match="no tensor nowhere"):
        Submodel(graph, batches[0], ["nowhere"])
    with pytest.raises(InternalError, match="nothing makes x"):
        Submodel(graph, {}, ["out"])
    with pytest.raises(PreconditionError, match="at least one batch"):
        Stream(graph, graph, [])
