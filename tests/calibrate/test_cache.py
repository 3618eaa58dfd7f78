"""Statistics on disk: what is written comes back, damage is noticed, shards merge."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.calibrate import (
    CalibrationCache,
    CollectResult,
    TapRequest,
    TensorObserver,
    load_stats,
    merge_stats,
    missing_shards,
    save_stats,
)
from qpass.errors import RecipeError

META = {"model": "abc", "samples_sha256": "def"}


def stats_of(seed, channels=3):
    observer = TensorObserver("t", axis=1, importance=np.arange(1.0, channels + 1))
    plain = TensorObserver("u")
    for index in range(2):
        array = np.random.default_rng([seed, index]).standard_normal((1, channels, 9))
        observer.update(array.astype(np.float32))
        plain.update(array.astype(np.float32))
    return {"t/with:odd name": observer.result(), "u": plain.result()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        left, right = a[name].to_arrays(), b[name].to_arrays()
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


def test_files_hold_everything_and_are_deterministic(tmp_path):
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path in paths:
        save_stats(path, stats_of(0), META)
    stats, meta = load_stats(paths[0])
    assert "shard" not in meta
    assert_same(stats, stats_of(0))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "other", "array"])
def test_damaged_files_of_the_user_are_refused(tmp_path, damage):
    path = tmp_path / "stats.npz"
    save_stats(path, stats_of(0), META)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "text":
        path.write_text("no statistics")
    elif damage == "missing":
        path.unlink()
    elif damage == "other":
        np.savez(path, x=np.ones(3))
    else:
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    with pytest.raises(RecipeError, match=r"stats\.npz"):
        load_stats(path)


def test_merged_shards_are_the_whole(tmp_path):
    for index in range(3):
        meta = {**META, "samples": "2", "shard": f"{index}/3"}
        save_stats(tmp_path / f"{index}.npz", stats_of(index), meta)
    paths = [tmp_path / f"{index}.npz" for index in range(3)]
    stats, meta = merge_stats(paths)
    assert meta == {**META, "samples": "6", "shard": "0/3+1/3+2/3"}
    assert stats["u"].count == 3 * stats_of(0)["u"].count
    assert stats["u"].low == min(stats_of(i)["u"].low for i in range(3))
    # Counts are exact in any order.
    again, _ = merge_stats(paths[::-1])
    np.testing.assert_array_equal(again["u"].histogram.counts, stats["u"].histogram.counts)
    with pytest.raises(RecipeError, match="shard 0/3 is there twice"):
        merge_stats([paths[0], paths[1], paths[0]])


def test_shards_that_are_missing_have_names(tmp_path):
    parts = [tmp_path / f"{index}.npz" for index in range(4)]
    for index, path in enumerate(parts):
        save_stats(path, stats_of(index), {**META, "samples": "2", "shard": f"{index}/4"})
    stats, meta = merge_stats([parts[2], parts[0]])
    assert missing_shards(meta) == ["1/4", "3/4"]
    half = tmp_path / "half.npz"
    save_stats(half, stats, meta)
    with pytest.raises(RecipeError, match="shard 2/4 is there twice"):
        merge_stats([half, parts[2]])
    assert missing_shards(merge_stats([half, parts[1], parts[3]])[1]) == []


def test_shards_of_another_division_and_the_whole_do_not_merge(tmp_path):
    for name, shard in (("a", "0/2"), ("b", "1/3")):
        save_stats(tmp_path / f"{name}.npz", stats_of(0), {**META, "shard": shard})
    save_stats(tmp_path / "whole.npz", stats_of(0), META)
    with pytest.raises(RecipeError, match="shard 1/3 does not go with shard 0/2"):
        merge_stats([tmp_path / "a.npz", tmp_path / "b.npz"])
    with pytest.raises(RecipeError, match="does not go with"):
        merge_stats([tmp_path / "a.npz", tmp_path / "whole.npz"])
    with pytest.raises(RecipeError, match="all samples gave is there twice"):
        merge_stats([tmp_path / "whole.npz", tmp_path / "whole.npz"])
    _, meta = merge_stats([tmp_path / "whole.npz"])
    assert "shard" not in meta
    assert missing_shards(meta) == []


@pytest.mark.parametrize(
    ("meta", "stats", "message"),
    [
        ({**META, "model": "xyz"}, stats_of(1), "model is xyz"),
        ({**META, "samples_sha256": "0"}, stats_of(1), "samples_sha256"),
        ({"model": "abc"}, stats_of(1), "samples_sha256"),
        (META, {"u": stats_of(1)["u"]}, "other tensors"),
    ],
)
def test_statistics_of_something_else_do_not_merge(tmp_path, meta, stats, message):
    save_stats(tmp_path / "a.npz", stats_of(0), META)
    save_stats(tmp_path / "b.npz", stats, meta)
    with pytest.raises(RecipeError, match=message) as error:
        merge_stats([tmp_path / "a.npz", tmp_path / "b.npz"])
    assert error.match(r"b\.npz")
    with pytest.raises(RecipeError):
        merge_stats([])


def test_cache_keeps_results_by_content(tmp_path):
    cache = CalibrationCache(tmp_path / "cache")
    taps = [TapRequest(tensor="u"), TapRequest(tensor="t", axis=1, importance=np.ones(3))]
    key = cache.key("model", "samples", taps)
    assert key == cache.key("model", "samples", taps[::-1])
    others = {
        cache.key("other", "samples", taps),
        cache.key("model", "other", taps),
        cache.key("model", "samples", taps[:1]),
        cache.key("model", "samples", [taps[0], TapRequest(tensor="t", axis=1)]),
        cache.key("model", "samples", [taps[0], TapRequest(tensor="t", axis=0)]),
        cache.key("model", "samples", [taps[1], TapRequest(tensor="u", mask_below=-1e4)]),
    }
    assert len(others | {key}) == 7
    assert cache.get(key) is None
    checkpoint = cache.checkpoint(key)
    checkpoint.part("0").save(1, stats_of(0))
    cache.put(key, CollectResult(stats=stats_of(0), samples=2))
    found = cache.get(key)
    assert found.samples == 2
    assert_same(found.stats, stats_of(0))
    assert checkpoint.part("0").load() is None
    next((tmp_path / "cache").glob("*.npz")).write_bytes(b"damaged")
    assert cache.get(key) is None


def test_checkpoints_are_due_by_time(tmp_path):
    cache = CalibrationCache(tmp_path)
    assert not cache.checkpoint("k").due()
    slow = cache.checkpoint("k")
    slow.seconds = 0.0
    assert slow.due()
