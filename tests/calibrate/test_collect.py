"""Collecting: one pass gives what running and looking by hand gives, also in parts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest

from qpass.calibrate import Checkpoint, TapRequest, collect, input_specs, open_samples
from qpass.calibrate import collect as collect_function
from qpass.calibrate.stats import TensorStats
from qpass.errors import InternalError, SampleError

# Elementwise ops on dyadic values: results do not depend on the batch or the kernel.
MODEL = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,4,T] x) => (float[N,4,T] y) <float half = {0.5}, float two = {2.0}> {
   a = Mul (x, half)
   b = Relu (a)
   c = Mul (b, two)
   y = Sub (c, x)
}"""
TAPS = (
    TapRequest(tensor="x", axis=1),
    TapRequest(tensor="a", axis=1, importance=np.array([1.0, 2.0, 0.0, 4.0])),
    TapRequest(tensor="b", axis=1),
    TapRequest(tensor="y"),
)


@pytest.fixture
def model():
    return onnx.parser.parse_model(MODEL)


def samples_of(model, count=20, lengths=(30,)):
    r = np.random.default_rng(0)
    arrays = [
        {"x": r.integers(-64, 64, (1, 4, lengths[i % len(lengths)])).astype(np.float32) / 16}
        for i in range(count)
    ]
    return open_samples(arrays, input_specs(model))


def assert_same(a: dict[str, TensorStats], b: dict[str, TensorStats]):
    assert a.keys() == b.keys()
    for name in a:
        left, right = a[name].to_arrays(), b[name].to_arrays()
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


def test_statistics_are_those_of_the_tensors(model):
    samples = samples_of(model)
    before = model.SerializeToString()
    seen = []
    result = collect(model, TAPS, samples, batch_size=8, progress=lambda *s: seen.append(s))
    assert model.SerializeToString() == before
    assert seen == [(8, 20), (16, 20), (20, 20)]
    assert (result.samples, result.passes) == (20, 1)
    x = np.concatenate([feeds["x"] for feeds in samples])
    values = {"x": x, "a": x / 2, "b": np.maximum(x / 2, 0), "y": np.maximum(x, 0) - x}
    for name, array in values.items():
        stats = result.stats[name]
        assert (stats.count, stats.low, stats.high) == (array.size, array.min(), array.max())
        assert stats.histogram.zeros == np.count_nonzero(array == 0)
    means = values["a"].mean((0, 2), dtype=np.float64)
    np.testing.assert_array_equal(result.stats["a"].channel_mean, means)
    assert result.stats["a"].histogram.weights.sum() == 7.0 * 20 * 30


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("lengths", [(30,), (30, 30, 7)])
def test_batches_do_not_matter(model, batch_size, lengths):
    samples = samples_of(model, lengths=lengths)
    wanted = collect(model, TAPS, samples, batch_size=8)
    assert_same(collect(model, TAPS, samples, batch_size=batch_size).stats, wanted.stats)


def test_little_memory_takes_smaller_batches_then_more_passes(model):
    samples = samples_of(model)
    wanted = collect(model, TAPS, samples)
    # A sample of all four taps is 4 * 480 bytes, and two batches are held.
    for memory, passes in ((2 * 4 * 480 * 2, 1), (2 * 2 * 480, 2), (1, 4)):
        last = {}
        result = collect(
            model, TAPS, samples, memory_bytes=memory, progress=partial(dict.__setitem__, last)
        )
        assert result.passes == passes
        assert max(last) == last[20 * passes] == 20 * passes
        assert_same(result.stats, wanted.stats)


@pytest.mark.parametrize("shards", [1, 3, 50])
def test_shards_in_an_executor_give_the_same(model, shards):
    samples = samples_of(model, lengths=(3000,))  # more than an observer looks at
    wanted = collect(model, TAPS, samples)
    assert wanted.stats["a"].sampled < wanted.stats["a"].count
    with ThreadPoolExecutor(2) as executor:
        result = collect(model, TAPS, samples, threads=shards, executor=executor)
    assert result.samples == 20
    assert_same(result.stats, wanted.stats)


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("memory", [1 << 20, 2 * 2 * 480])
def test_an_interrupted_run_goes_on_where_it_was(model, tmp_path, memory):
    samples = samples_of(model)
    options = {"batch_size": 4, "memory_bytes": memory}
    wanted = collect(model, TAPS, samples, **options)
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if len(calls) == 4:
            raise InterruptionError

    checkpoint = Checkpoint(tmp_path, "run", seconds=0.0)
    with pytest.raises(InterruptionError):
        collect(model, TAPS, samples, progress=interrupt, checkpoint=checkpoint, **options)
    resumed = []
    result = collect(
        model,
        TAPS,
        samples,
        progress=lambda done, _: resumed.append(done),
        checkpoint=checkpoint,
        **options,
    )
    # Three batches were saved; the fourth was lost with its progress.
    assert resumed[0] == calls[3]
    assert result.samples == wanted.samples
    assert_same(result.stats, wanted.stats)


def test_a_damaged_checkpoint_is_ignored(model, tmp_path):
    samples = samples_of(model)
    checkpoint = Checkpoint(tmp_path, "run")
    checkpoint.part("0-1-0").path.write_bytes(b"damaged")
    result = collect(model, TAPS, samples, checkpoint=checkpoint)
    assert_same(result.stats, collect(model, TAPS, samples).stats)


def test_a_model_that_takes_one_sample_at_a_time(tmp_path):
    # Axis 0 is free by name, but the graph reshapes to one row.
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,4] x) => (float[N,4] y) <int64[2] shape = {1, 4}> {
       a = Reshape (x, shape)
       y = Relu (a)
    }"""
    model = onnx.parser.parse_model(text)
    array = np.arange(20, dtype=np.float32).reshape(5, 4)
    result = collect(
        model, [TapRequest(tensor="y", axis=1)], open_samples(array, input_specs(model))
    )
    assert (result.samples, result.stats["y"].count) == (5, 20)
    np.testing.assert_array_equal(result.stats["y"].channel_high, [16, 17, 18, 19])


def test_only_inputs_are_tapped(model):
    result = collect(model, TAPS[:1], samples_of(model))
    assert result.stats["x"].count == 20 * 120


def test_errors_name_the_tensor_and_the_samples(model):
    with pytest.raises(InternalError, match="nothing"):
        collect(model, [TapRequest(tensor="nothing")], samples_of(model))
    with pytest.raises(SampleError, match="no samples"):
        collect(model, TAPS, open_samples([], input_specs(model)))
    model.graph.node[0].op_type = "Div"
    model.graph.initializer[0].float_data[:] = [0.0]
    model.graph.initializer[0].ClearField("raw_data")
    with pytest.raises(SampleError, match=r"tensor a .*\n.*samples 0 to 3"):
        collect(model, TAPS, samples_of(model), batch_size=4)


def test_a_model_that_fails_on_its_first_sample_is_a_mistake_of_the_sample(model):
    model.graph.node[0].op_type = "Gather"
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("axis", 1))
    model.graph.node[0].input[1] = "rows"
    outside = np.full(4, 99)  # of the four rows that there are
    model.graph.initializer.append(onnx.numpy_helper.from_array(outside, "rows"))
    with pytest.raises(SampleError, match="does not run on a sample"):
        collect(model, (TapRequest(tensor="a"),), samples_of(model))


def test_a_model_above_the_limit_of_protobuf_goes_through_a_file(model, monkeypatch):
    samples = samples_of(model)
    wanted = collect(model, TAPS, samples)
    monkeypatch.setitem(collect_function.__globals__, "PROTOBUF_LIMIT", 1)
    assert_same(collect(model, TAPS, samples).stats, wanted.stats)
