"""Samples that are wrong: each error says what, and where."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.calibrate.inputs import InputSpec
from qpass.calibrate.samples import open_samples
from qpass.errors import SampleError


def spec(name="x", shape=(None, 3), dtype=np.float32):
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


X = (spec(),)


def rows(count, seed=0, columns=3):
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([[1, 2, 3]])}, "x is int64, expected float32"),
        ({"x": np.ones((2, 4), np.float32)}, r"x has shape \[1, 4\], expected float32 \[\?, 3\]"),
        ({"x": np.ones((2, 2, 2, 3), np.float32)}, r"x has shape \[2, 2, 2, 3\]"),
        ({"y": rows(2)}, "x is missing"),
        ({"x": rows(2), "labels": np.zeros(2)}, "no input labels"),
        ({"x": np.array([[0, 0, 0], [0, np.nan, 0]], np.float32)}, r"NaN .* at \[0, 1\]"),
        ({"x": np.array([[0, 0, 0], [0, 1e300, 0]])}, "overflows float32"),
        ({"x": np.array(["text"])}, "x"),
    ],
)
@pytest.mark.parametrize("form", ["npz", "dict", "list", "generator"])
def test_what_is_wrong_is_named_with_its_place(tmp_path, arrays, message, form):
    source, place = arrays, "arrays"
    if form == "npz":
        np.savez(tmp_path / "data.npz", **arrays)
        source, place = tmp_path / "data.npz", r"data\.npz"
    elif form != "dict":
        source = [arrays] if form == "list" else iter([arrays])
        place = "item 0"
    with pytest.raises(SampleError, match=message) as error:
        list(open_samples(source, X))
    assert error.match(place)


def test_the_sample_is_named(tmp_path):
    array = rows(4)
    array[2, 1] = np.inf
    np.savez(tmp_path / "data.npz", x=array)
    with pytest.raises(SampleError, match=r"data\.npz, sample 2"):
        list(open_samples(tmp_path / "data.npz", X))


def test_unequal_numbers_of_samples():
    with pytest.raises(SampleError, match="x 3, y 2"):
        list(open_samples({"x": rows(3), "y": rows(2)}, (spec(), spec("y"))))


@pytest.mark.parametrize("content", [b"not a zip", b"PK\x03\x04 half"])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(SampleError, match=r"data\.npz"):
        list(open_samples(tmp_path / "data.npz", X))


def test_a_cut_file_is_named(tmp_path):
    np.save(tmp_path / "a.npy", rows(50))
    path = tmp_path / "a.npy"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(SampleError, match=r"a\.npy: it ends too early"):
        list(open_samples(tmp_path, X))


def test_python_objects_are_refused(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.array([{}, 1], object))
    with pytest.raises(SampleError, match="Python objects"):
        list(open_samples(tmp_path / "data.npz", X))


def test_sources_that_are_none(tmp_path):
    (tmp_path / "data.csv").write_text("1,2,3")
    for source, message in (
        (tmp_path / "data.csv", "not known"),
        (tmp_path / "nothing.npz", "no such file"),
        (tmp_path, "no samples in this folder"),
        (7, "int holds no samples"),
    ):
        with pytest.raises(SampleError, match=message):
            open_samples(source, X)
    with pytest.raises(SampleError, match="folders of images"):
        open_samples({"x": rows(1)}, X, preprocess="imagenet")


def test_casts_keep_the_values():
    specs = (spec("x"), spec("ids", (None,), np.int32))
    (feeds,) = open_samples({"x": np.ones((1, 3)), "ids": np.array([7])}, specs)
    assert (feeds["x"].dtype, feeds["ids"].dtype) == (np.float32, np.int32)
    with pytest.raises(SampleError, match="int32 cannot hold"):
        list(open_samples({"x": np.ones((1, 3)), "ids": np.array([2**40])}, specs))
