"""Observers: exact where they claim to be, and merged parts are the whole."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qpass.calibrate.observers import ELEMENTS_PER_SAMPLE, TensorObserver
from qpass.calibrate.stats import EMPTY, MAX_BINS, TensorStats, exponent_for, merge
from qpass.errors import InternalError, SampleError

CHANNELS = 3
IMPORTANCE = np.array([0.5, 2.0, 7.0])
# Values below 2**-100 would be lost when they meet values of 2**20 in one histogram.
numbers = st.floats(-(2.0**20), 2.0**20, width=32).filter(lambda v: v == 0 or abs(v) > 1e-20)
samples = hnp.arrays(
    np.float32, st.tuples(st.just(1), st.just(CHANNELS), st.integers(1, 6)), elements=numbers
)


def observe(arrays, first=0, **options):
    observer = TensorObserver("t", axis=1, importance=IMPORTANCE, **options)
    for index, array in enumerate(arrays):
        observer.update(array, [first + index])
    return observer.result()


def assert_same(a: TensorStats, b: TensorStats):
    """Counts, bounds and bins are equal; float64 sums up to their rounding."""
    left, right = a.to_arrays(), b.to_arrays()
    assert left.keys() == right.keys()
    for key in left:
        if key == "channel_sum":
            # n terms in another order: n * 2**-53 of the sum of their magnitudes, which is at most
            # sqrt(n * sum of squares). It may cancel, so this is absolute.
            count = left["integers"][0]
            room = count * 2.0**-53 * np.sqrt(count * left["channel_square_sum"])
            assert (np.abs(left[key] - right[key]) <= room).all()
        elif key in ("weights", "channel_square_sum", "floats"):
            # Sums of at most 1e4 terms without sign: 1e4 * 2**-53 relative.
            np.testing.assert_allclose(left[key], right[key], rtol=1e4 * 2.0**-53, atol=0.0)
        else:
            np.testing.assert_array_equal(left[key], right[key])
    assert (a.low, a.high) == (b.low, b.high)


@settings(deadline=None, max_examples=40)
@given(st.lists(samples, min_size=3, max_size=6), st.integers(1, 4))
def test_merge_is_associative_and_commutative_and_parts_make_the_whole(arrays, cut):
    cut = min(cut, len(arrays) - 1)
    whole = observe(arrays)
    parts = observe(arrays[:cut]), observe(arrays[cut:], first=cut)
    assert_same(merge(*parts), whole)
    assert_same(merge(*reversed(parts)), whole)
    singles = [observe([array], first=i) for i, array in enumerate(arrays)]
    right = reduce(lambda a, b: merge(b, a), reversed(singles))
    assert_same(reduce(merge, singles), right)
    assert_same(merge(EMPTY, whole), whole)


@settings(deadline=None, max_examples=40)
@given(st.lists(samples, min_size=1, max_size=4))
def test_everything_is_exact_below_the_limit(arrays):
    stats = observe(arrays)
    channels = [np.concatenate([a[0, c] for a in arrays]).astype(np.float64) for c in range(3)]
    values = np.concatenate(channels)
    assert (stats.count, stats.low, stats.high) == (values.size, values.min(), values.max())
    histogram = stats.histogram
    bins = np.floor(values / histogram.width).astype(int) - histogram.first_bin
    np.testing.assert_array_equal(
        histogram.counts, np.bincount(bins, minlength=len(histogram.counts))
    )
    assert histogram.zeros == np.count_nonzero(values == 0)
    for c, channel in enumerate(channels):
        assert stats.channel_low[c] == channel.min()
        assert stats.channel_high[c] == channel.max()
        # n roundings of 2**-53 on either side, of the largest value (a mean may cancel) and of
        # the sum of squares (which cannot).
        room = 2.0 * channel.size * 2.0**-53
        scale = np.abs(channel).max()
        np.testing.assert_allclose(
            stats.channel_mean[c], channel.mean(), rtol=0.0, atol=room * scale
        )
        np.testing.assert_allclose(
            stats.channel_second_moment[c], np.mean(channel**2), rtol=room, atol=0.0
        )
    weights = np.concatenate(
        [np.full(len(v), w) for v, w in zip(channels, IMPORTANCE, strict=True)]
    )
    room = 2.0 * values.size * 2.0**-53
    np.testing.assert_allclose(
        histogram.weights,
        np.bincount(bins, weights, minlength=len(histogram.counts)),
        rtol=room,
    )
    np.testing.assert_allclose(histogram.zero_weight, weights[values == 0].sum(), rtol=room)


@given(st.floats(-(2.0**100), 2.0**100), st.floats(-(2.0**100), 2.0**100))
def test_bins_are_few_and_no_coarser_than_needed(a, b):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    exponent = exponent_for(low, high)

    def bins(k):
        return np.floor(high / 2.0**k) - np.floor(low / 2.0**k) + 1

    assert bins(exponent) <= MAX_BINS
    assert exponent == -120 or bins(exponent - 1) > MAX_BINS


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4, 8, 60, 60), 1),
        ((4, 700, 33), -1),
        ((4, 50_000), None),
        ((4, 20_000), -1),
        ((4, 3, 5), 2),
    ],
)
def test_channels_and_bounds_are_exact_whatever_is_picked(shape, axis):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    observer = TensorObserver("t", axis=axis)
    observer.update(array, range(4))
    stats = observer.result()
    assert (stats.low, stats.high, stats.count) == (array.min(), array.max(), array.size)
    channels = shape[axis] if axis is not None else 1
    assert stats.sampled <= max(4 * ELEMENTS_PER_SAMPLE, 4 * channels)
    assert stats.sampled == stats.histogram.counts.sum()
    if axis is None:
        assert stats.channel_low is None
        return
    others = tuple(i for i in range(array.ndim) if i != axis % array.ndim)
    np.testing.assert_array_equal(stats.channel_low, array.min(others))
    np.testing.assert_array_equal(stats.channel_high, array.max(others))
    assert set(stats.channel_sampled) == {stats.sampled // channels}


def test_positions_do_not_depend_on_the_batches():
    array = np.random.default_rng(1).standard_normal((6, 4, 5000)).astype(np.float32)
    together, alone = TensorObserver("t", axis=1), TensorObserver("t", axis=1)
    together.update(array[:4], range(4))
    together.update(array[4:], range(4, 6))
    for index in (5, 1, 0, 3, 2, 4):
        alone.update(array[index : index + 1], [index])
    assert_same(together.result(), alone.result())


def test_positions_rotate_so_that_every_element_is_seen_in_time():
    observer = TensorObserver("t", limit=100)
    for index in range(99):
        observer.update(np.arange(1000, dtype=np.float32)[None], [index])
    # 1000 / 100 = 10 positions apart, made odd: 11.
    assert observer.result().sampled == 99 * (1000 // 11)
    histogram = observer.result().histogram
    assert histogram.coarsen(3).counts.min() > 0


def test_masked_values_are_left_out():
    array = np.array([[[-np.inf, 1.0, 2.0], [-1e4, -3.0, 0.0]]], np.float32)
    observer = TensorObserver("t", axis=1, mask_below=-1e4)
    observer.update(array)
    stats = observer.result()
    assert (stats.count, stats.low, stats.high, stats.sampled) == (4, -3.0, 2.0, 4)
    assert stats.histogram.counts.sum() == 4
    assert stats.histogram.zeros == 1
    np.testing.assert_array_equal(stats.channel_sampled, [2, 2])
    np.testing.assert_array_equal(stats.channel_mean, [1.5, -1.5])
    observer.update(np.full((1, 2, 3), -1e5, np.float32))
    assert observer.result().count == 4


@pytest.mark.parametrize("mask", [None, -1e4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_name_the_tensor(bad, mask):
    array = np.ones((1, 2, 4), np.float32)
    array[0, 1, 2] = bad
    with pytest.raises(SampleError, match="blocks/attention"):
        TensorObserver("blocks/attention", axis=1, mask_below=mask).update(array)


def test_half_precision_is_taken_and_integers_are_not():
    observer = TensorObserver("t")
    observer.update(np.array([0.5, -1.5], np.float16))
    assert (observer.result().low, observer.result().high) == (-1.5, 0.5)
    with pytest.raises(InternalError, match="int64"):
        observer.update(np.array([1]))
    with pytest.raises(InternalError, match="3 weights for 2 channels"):
        TensorObserver("t", axis=1, importance=IMPORTANCE).update(np.ones((1, 2, 4), np.float32))


def test_no_elements_are_no_statistics():
    observer = TensorObserver("t", axis=1)
    observer.update(np.zeros((1, 3, 0), np.float32))
    assert observer.result() is EMPTY
    other = TensorObserver("t", axis=1)
    other.update(np.ones((1, 3, 2), np.float32))
    observer.merge(other)
    assert_same(observer.result(), other.result())


def test_channels_of_free_length_are_dropped_in_any_order():
    arrays = [np.full((1, 2, n), n, np.float32) for n in (3, 3, 4)]
    parts = []
    for array in arrays:
        observer = TensorObserver("t", axis=-1)
        observer.update(array)
        parts.append(observer.result())
    a, b, c = parts
    assert merge(a, b).channel_axis == -1
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert left.channel_axis is None
    assert left.channel_mean is None
    assert (left.count, left.low, left.high) == (20, 3.0, 4.0)
    assert_same(left, right)


def test_arrays_hold_everything():
    stats = observe([np.random.default_rng(2).standard_normal((1, 3, 50)).astype(np.float32)])
    again = TensorStats.from_arrays(stats.to_arrays())
    assert_same(again, stats)
    assert again.channel_axis == 1
