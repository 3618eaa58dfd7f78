"""Samples: every form of source, and an error that says where for every way to get it wrong."""

from __future__ import annotations

import pickle
import sys
import tracemalloc

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.calibrate.inputs import InputSpec, input_specs
from qpass.calibrate.samples import batches, open_samples, shard, split
from qpass.errors import ModelError, SampleError


def spec(name="x", shape=(None, 3), dtype=np.float32):
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


X = (spec(),)
# As in voice activity models: a batch, a state whose axis 0 is not the batch, and a scalar.
RECURRENT = (
    spec("input", (None, 4)),
    spec("state", (2, None, 5)),
    spec("sr", (), np.int64),
)


def rows(count, seed=0, columns=3):
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


def assert_rows(samples, array):
    found = list(samples)
    assert all(feeds["x"].shape == (1, *array.shape[1:]) for feeds in found)
    np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds in found]), array)


# ------------------------------------------------------------------------------- forms of sources
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_gives_its_rows_again_and_again(tmp_path, save, order):
    array = np.asarray(rows(5), order=order)
    save(tmp_path / "data.npz", x=array)
    samples = open_samples(tmp_path / "data.npz", X)
    assert_rows(samples, array)
    assert_rows(samples, array)
    assert samples.count == 5
    assert not samples.is_random
    assert samples.source == str(tmp_path / "data.npz")


def test_npz_is_never_read_whole(tmp_path):
    specs = (spec("x", (None, 250_000)),)
    np.savez_compressed(tmp_path / "data.npz", x=np.zeros((64, 250_000), np.float32))
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_samples(tmp_path / "data.npz", specs)) == 64
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A row has 1 MB, the file 64 MB; a row, its predecessor and zip buffers are in memory.
    assert peak < 6_000_000


def test_folders_of_arrays_hold_batches_and_single_samples(tmp_path):
    array = rows(6)
    np.save(tmp_path / "a.npy", array[:3])
    np.save(tmp_path / "b.npy", array[3])
    np.savez(tmp_path / "c.npz", x=array[4:])
    assert_rows(open_samples(tmp_path, X), array)


def test_onnx_test_data(tmp_path):
    specs = (spec("a"), spec("b", (None, 2)))
    for number in (0, 2, 10):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        a = numpy_helper.from_array(np.full((1, 3), number, np.float32))
        b = numpy_helper.from_array(np.full((1, 2), -number, np.float32), "b")
        (folder / "input_0.pb").write_bytes(a.SerializeToString())
        (folder / "input_1.pb").write_bytes(b.SerializeToString())
    found = [(f["a"][0, 0], f["b"][0, 0]) for f in open_samples(tmp_path, specs)]
    assert found == [(0, 0), (2, -2), (10, -10)]
    assert len(list(open_samples(tmp_path / "test_data_set_2", specs))) == 1
    (tmp_path / "test_data_set_2" / "input_1.pb").write_bytes(b"\xff\xff no tensor")
    with pytest.raises(SampleError, match=r"input_1\.pb"):
        list(open_samples(tmp_path, specs))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (":", "not of the form module:callable"),
        (":f", "not of the form"),
        ("faulty_samples:", "not of the form"),
        ("faulty_samples:fails", "failed: KeyError: 'k'"),
        ("faulty_samples:takes", "failed: TypeError"),
        ("faulty_samples:leaves", "failed: SystemExit: 3"),
        ("faulty_samples:midway", "failed at item 2: RuntimeError: cut off"),
        ("faulty_samples:nothing", "returned a NoneType"),
        ("faulty_samples:number", "is not callable"),
        ("faulty_import:f", "cannot import --data faulty_import:f: ZeroDivisionError"),
    ],
)
def test_callables_that_fail_are_named(target, words, tmp_path, monkeypatch):
    (tmp_path / "faulty_samples.py").write_text(
        "import sys, numpy as np\n"
        "def fails(): return {}['k']\n"
        "def takes(path): return []\n"
        "def leaves(): sys.exit(3)\n"
        "def nothing(): return None\n"
        "number = 3\n"
        "def midway():\n"
        "    for i in range(2):\n"
        "        yield {'x': np.full((2, 3), i, np.float32)}\n"
        "    raise RuntimeError('cut off')\n"
    )
    (tmp_path / "faulty_import.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SampleError, match=words) as caught:
        list(open_samples(target, X))
    if "failed" in words and "TypeError" not in words:
        assert "faulty_samples.py, line" in str(caught.value)


def test_samples_that_differ_are_counted(tmp_path):
    arrays = np.zeros((5, 3), np.float32)
    arrays[4] = 1
    assert open_samples({"x": arrays}, X).distinct == 2
    assert open_samples({"x": arrays}, X).view(0, 4).distinct == 1


def test_module_and_callable_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_calibration.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    for i in range(3):\n"
        "        yield {'x': np.full((2, 3), i, np.float32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    samples = open_samples("my_calibration:batches", X)
    assert sys.path == before
    assert [feeds["x"][0, 0] for feeds in samples] == [0, 0, 1, 1, 2, 2]
    for target in ("my_calibration:nothing", "no_such_module:f"):
        with pytest.raises(SampleError, match=target.partition(":")[2]):
            open_samples(target, X)


class Tensor:
    """What a framework's tensor offers."""

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return self.array


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a: {"x": a},
        lambda a: {"x": Tensor(a)},
        lambda a: (Tensor(a), np.zeros(len(a))),
        lambda a: [a],
        lambda a: Tensor(a),
    ],
)
@pytest.mark.parametrize("kind", [list, iter])
def test_iterables_of_batches(wrap, kind):
    array = rows(5)
    samples = open_samples(kind([wrap(array[:2]), wrap(array[2:4]), wrap(array[4:])]), X)
    assert_rows(samples, array)
    assert_rows(samples, array)
    assert_rows(pickle.loads(pickle.dumps(samples)), array)


def test_dict_and_array_are_rows():
    array = rows(4)
    assert_rows(open_samples({"x": array}, X), array)
    assert_rows(open_samples(array, X), array)


def test_generators_are_read_once_and_no_further_than_needed():
    pulled = []

    def endless():
        index = 0
        while True:
            pulled.append(index)
            yield {"x": np.full((1, 3), index, np.float32)}
            index += 1

    samples = open_samples(endless(), X)
    first, held = split(samples, 4, 0.25)
    assert [f["x"][0, 0] for f in first] == [0, 1, 2, 3]
    assert [f["x"][0, 0] for f in held] == [4]
    assert [f["x"][0, 0] for f in first] == [0, 1, 2, 3]
    assert pulled == [0, 1, 2, 3, 4]


def test_random_is_seeded_and_marked():
    specs = (spec("x", (None, 3, None)), spec("ids", (1, 4), np.int64))
    one, two = (open_samples("random", specs, seed=s) for s in (0, 1))
    assert one.is_random
    first = next(iter(one))
    assert first["x"].shape == (1, 3, 1)
    assert set(first["ids"].ravel()) <= {0, 1}
    assert one.fingerprint() == open_samples("random", specs, seed=0).fingerprint()
    assert one.fingerprint() != two.fingerprint()


# ---------------------------------------------------------------------------- inputs of all shapes
def test_state_and_scalar_are_split_along_an_extra_axis(tmp_path):
    r = np.random.default_rng(0)
    arrays = {
        "input": r.standard_normal((6, 1, 4)).astype(np.float32),
        "state": r.standard_normal((6, 2, 1, 5)).astype(np.float32),
        "sr": np.full(6, 16000),
    }
    np.savez(tmp_path / "data.npz", **arrays)
    for index, feeds in enumerate(open_samples(tmp_path / "data.npz", RECURRENT)):
        assert feeds["input"].shape == (1, 4)
        assert feeds["sr"].shape == ()
        np.testing.assert_array_equal(feeds["state"], arrays["state"][index])
    constant = {"input": arrays["input"][:, 0], "state": arrays["state"][0], "sr": np.array(8000)}
    found = list(open_samples(constant, RECURRENT))
    assert len(found) == 6
    np.testing.assert_array_equal(found[5]["state"], arrays["state"][0])
    assert found[5]["sr"] == 8000


def test_a_feed_with_a_state_is_one_sample():
    feeds = {"input": np.ones((2, 4), np.float32), "state": np.ones((2, 2, 5)), "sr": np.array(1)}
    (sample,) = open_samples([feeds], RECURRENT)
    assert sample["input"].shape == (2, 4)
    assert sample["state"].dtype == np.float32


def test_fixed_batch_takes_as_many_rows():
    fixed = (spec("x", (4, 3)),)
    array = rows(8)
    found = list(open_samples({"x": array}, fixed))
    assert len(found) == 2
    np.testing.assert_array_equal(found[1]["x"], array[4:])
    with pytest.raises(SampleError, match="multiple of 4"):
        list(open_samples({"x": rows(6)}, fixed))
    assert len(list(open_samples({"x": rows(5)[:, None]}, (spec("x", (1, 3)),)))) == 5


def test_ragged_samples():
    specs = (spec("x", (None, None)),)
    lengths = [3, 3, 5, 5, 5, 2]
    samples = open_samples([{"x": np.ones((1, n), np.float32)} for n in lengths], specs)
    grouped = [(count, feeds["x"].shape) for count, feeds in batches(samples, 2, specs)]
    assert grouped == [(2, (2, 3)), (2, (2, 5)), (1, (1, 5)), (1, (1, 2))]


def test_batches_join_only_what_the_model_takes():
    assert [n for n, _ in batches(open_samples(rows(5), X), 2, X)] == [2, 2, 1]
    fixed = (spec("x", (1, 3)),)
    assert [n for n, _ in batches(open_samples(rows(3), fixed), 2, fixed)] == [1, 1, 1]
    specs = (spec(), spec("sr", (), np.int64))
    arrays = {"x": rows(4), "sr": np.array([8, 8, 8, 16])}
    found = list(batches(open_samples(arrays, specs), 4, specs))
    assert [(n, int(feeds["sr"])) for n, feeds in found] == [(3, 8), (1, 16)]
    np.testing.assert_array_equal(found[0][1]["x"], arrays["x"][:3])


# ------------------------------------------------------------------------------------------ views
@pytest.mark.parametrize(
    ("count", "calibration", "holdout", "sizes"),
    [
        (100, 16, 0.25, (16, 4)),
        (17, 16, 0.25, (16, 1)),
        (16, 16, 0.25, (12, 4)),
        (10, None, 0.25, (7, 3)),
        (100, None, 0.07, (93, 7)),
        (2, 128, 0.25, (1, 1)),
        (1, 128, 0.25, (1, 0)),
        (10, 128, 0.0, (10, 0)),
        (10, 4, 0.0, (4, 0)),
    ],
)
def test_split(count, calibration, holdout, sizes):
    array = rows(count)
    first, held = split(open_samples(array, X), calibration, holdout)
    assert (first.count, held.count) == sizes
    assert_rows(first, array[: sizes[0]])
    if sizes[1]:
        assert_rows(held, array[sizes[0] : sum(sizes)])


def test_no_samples():
    with pytest.raises(SampleError, match="no samples"):
        split(open_samples([], X), 4, 0.25)


@pytest.mark.parametrize("count", [1, 3, 11])
def test_shards_are_all_samples_once(count):
    array = rows(10)
    part, _ = split(open_samples(array, X), 8, 0.0)
    found = [[f["x"] for f in shard(part, i, count)] for i in range(count)]
    assert sum(len(s) for s in found) == 8
    np.testing.assert_array_equal(np.concatenate(found[0]), array[:8:count])
    with pytest.raises(SampleError, match="shard 3 of 3"):
        shard(part, 3, 3)


def test_fingerprint_is_of_the_contents(tmp_path):
    array = rows(4)
    np.savez(tmp_path / "a.npz", x=array)
    np.savez_compressed(tmp_path / "b.npz", x=array)
    array[3, 0] += 1
    np.savez(tmp_path / "c.npz", x=array)
    a, b, c = (open_samples(tmp_path / f"{n}.npz", X) for n in "abc")
    assert a.fingerprint() == b.fingerprint() == open_samples(list(a), X).fingerprint()
    assert a.fingerprint() != c.fingerprint()
    assert a.view(0, 3).fingerprint() == c.view(0, 3).fingerprint()


def test_input_specs_leave_out_initializers():
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["N", 3]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]),
    ]
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    graph = helper.make_graph([], "g", inputs, [], [weight])
    assert input_specs(helper.make_model(graph)) == (spec("x", (None, 3), np.float16),)
    graph.input.append(onnx.ValueInfoProto(name="unknown"))
    with pytest.raises(ModelError, match="unknown"):
        input_specs(helper.make_model(graph))
