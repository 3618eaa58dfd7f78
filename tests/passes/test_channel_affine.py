"""The solver: planted corrections come back, sums merge, and chance is told from improvement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpass.errors import InternalError
from qpass.passes.channel_affine import (
    ChannelAffine,
    Groups,
    PairMoments,
    merge_all,
    solve_channel_affine,
)
from qpass.passes.channel_gate import solve_gated

FIELDS = ("mean_a", "mean_t", "m_aa", "m_at", "m_tt")


def groups_of(a, t, *, count=12, axis=-1):
    parts = zip(np.array_split(a, count), np.array_split(t, count), strict=True)
    return [PairMoments.of(left, right, axis=axis) for left, right in parts]


@given(
    gain=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=5),
    offset=st.floats(-10, 10),
    seed=st.integers(0, 2**16),
)
def test_a_planted_affine_is_recovered(gain, offset, seed):
    gain = np.array(gain)
    a = np.random.default_rng(seed).standard_normal((64, gain.size))
    affine = solve_channel_affine(PairMoments.of(a, gain * a + offset, axis=1), ridge=0.0)
    np.testing.assert_allclose(affine.gain, gain, rtol=1e-12)
    np.testing.assert_allclose(affine.offset, np.full(gain.size, offset), atol=1e-11)


def test_it_is_the_least_squares_of_numpy():
    random = np.random.default_rng(1)
    a = random.standard_normal((200, 3))
    t = 0.9 * a + 0.2 + 0.3 * random.standard_normal(a.shape)
    affine = solve_channel_affine(PairMoments.of(a, t, axis=1), ridge=0.0)
    for c in range(3):
        design = np.stack([a[:, c], np.ones(len(a))], axis=1)
        want = np.linalg.lstsq(design, t[:, c])[0]
        np.testing.assert_allclose([affine.gain[c], affine.offset[c]], want, rtol=1e-12)


def test_the_axis_may_be_any_and_chunks_do_not_show():
    random = np.random.default_rng(2)
    a = (random.standard_normal((2, 5, 90, 91)) + 3).astype(np.float32)  # several chunks
    t = (a * 1.1 + random.standard_normal(a.shape)).astype(np.float32)
    whole = PairMoments.of(a, t, axis=1)
    moved = PairMoments.of(np.moveaxis(a, 1, -1), np.moveaxis(t, 1, -1), axis=-1)
    rows = np.moveaxis(a, 1, -1).reshape(-1, 5).astype(np.float64)
    wanted = np.moveaxis(t, 1, -1).reshape(-1, 5).astype(np.float64)
    d_a, d_t = rows - rows.mean(0), wanted - wanted.mean(0)
    direct = (rows.mean(0), wanted.mean(0), (d_a**2).sum(0), (d_a * d_t).sum(0), (d_t**2).sum(0))
    assert whole.count == moved.count == len(rows)
    for name, want in zip(FIELDS, direct, strict=True):
        np.testing.assert_allclose(getattr(whole, name), want, rtol=1e-11)
        np.testing.assert_allclose(getattr(moved, name), want, rtol=1e-11)


@pytest.mark.parametrize("shape", [(6, 5, 7, 9), (6, 11, 5), (7, 5), (2, 5, 300, 300), (3, 5, 4)])
@pytest.mark.parametrize("most", [1, 3, 8])
def test_groups_at_once_are_groups_one_by_one(shape, most):
    random = np.random.default_rng(3)
    axis = 2 if shape == (6, 11, 5) else 1
    a = (random.standard_normal(shape) + 2).astype(np.float32)
    a.ravel()[7] = np.inf
    t = (a + random.standard_normal(shape)).astype(np.float32)
    parts = min(most, shape[0])
    want = groups_of(a, t, count=parts, axis=axis)
    got = PairMoments.of_groups(a, t, axis=axis, most=most)
    assert [g.count for g in got] == [w.count for w in want]
    for one, other in zip(got, want, strict=True):
        for name in FIELDS:
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-10)


def test_channels_on_the_first_axis_are_one_group():
    a = np.random.default_rng(5).standard_normal((4, 9))
    (group,) = PairMoments.of_groups(a, a, axis=0, most=8)
    assert (group.count, group.mean_a.size) == (9, 4)
    with pytest.raises(InternalError, match="pairs of shape"):
        PairMoments.of_groups(a, a[:2], axis=1, most=2)


def test_stacked_groups_judge_as_each_would():
    random = np.random.default_rng(6)
    a = random.standard_normal((12, 8, 3))
    groups = groups_of(a, 1.2 * a + 0.1, count=6)
    stack = Groups(groups)
    affine = ChannelAffine(gain=np.array([1.0, 1.1, 1.3]), offset=np.array([0.0, 0.1, 0.2]))
    errors = np.array([g.error(affine) for g in groups])
    np.testing.assert_allclose(stack.error(affine), errors, rtol=1e-13)
    picked = slice(1, None, 2)
    np.testing.assert_allclose(stack.some(picked).error(affine), errors[1::2], rtol=1e-13)
    np.testing.assert_allclose(stack.without(picked).error(affine), errors[::2], rtol=1e-13)
    merged = groups[0]
    for group in groups[1:]:
        merged = merged.merge(group)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(stack.whole, name), getattr(merged, name), rtol=1e-11)


@given(cut=st.integers(1, 39), mean=st.sampled_from([0.0, 1e6]))
def test_moments_merge_in_any_order_even_with_a_large_mean(cut, mean):
    random = np.random.default_rng(4)
    a = random.standard_normal((40, 3)) + mean
    t = random.standard_normal((40, 3)) + mean
    whole = PairMoments.of(a, t, axis=1)
    left, right = PairMoments.of(a[:cut], t[:cut], axis=1), PairMoments.of(a[cut:], t[cut:], axis=1)
    for merged in (left.merge(right), right.merge(left), PairMoments.empty(3).merge(whole)):
        for name in FIELDS:
            # A mean of 1e6 leaves 10 of the 16 digits of a value.
            np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-8)


def test_the_error_from_moments_is_the_error_of_the_values():
    random = np.random.default_rng(5)
    a, t = random.standard_normal((2, 50, 4))
    affine = ChannelAffine(gain=np.array([0.5, 1, 1.5, 2]), offset=np.array([0, -1, 0.3, 2]))
    moments = PairMoments.of(a, t, axis=1)
    want = ((affine.gain * a + affine.offset - t) ** 2).mean(axis=0)
    np.testing.assert_allclose(moments.error(affine), want, rtol=1e-12)
    np.testing.assert_allclose(moments.signal(), (t**2).mean(axis=0), rtol=1e-12)


def test_limits_of_the_gain():
    random = np.random.default_rng(6)
    a = random.standard_normal((100, 4)) * [1, 1, 1, 1e-7]  # the last channel is dead
    t = a * [5.0, -1.0, 0.8, 3.0] + 1.0
    moments = PairMoments.of(a, t, axis=1)
    affine = solve_channel_affine(moments, ridge=0.0)
    np.testing.assert_allclose(affine.gain, [2.0, 0.5, 0.8, 1.0], rtol=1e-12)
    np.testing.assert_allclose(affine.offset[3], 1.0, atol=1e-6)
    heavy = solve_channel_affine(moments, ridge=1e9)
    np.testing.assert_allclose(heavy.gain, 1.0, atol=1e-8)
    without = solve_channel_affine(moments, ridge=0.0, offset=False)
    assert (without.offset == 0).all()
    want = np.clip((a * t).sum(0)[2] / (a * a).sum(0)[2], 0.5, 2.0)
    np.testing.assert_allclose(without.gain[2], want, rtol=1e-12)
    one = solve_channel_affine(moments, ridge=0.0, gain="tensor")
    assert np.unique(one.gain).size == 1


def test_noise_is_refused_and_a_real_shift_is_kept():
    random = np.random.default_rng(7)
    a = random.standard_normal((240, 200))
    noise = 0.1 * random.standard_normal(a.shape)
    real = np.zeros(200)
    real[:50] = 0.1  # ten standard errors of the mean of 240 rows
    solved = solve_gated(groups_of(a, a + noise + real), confidence=3.0)
    assert (solved.affine.offset[:50] != 0.0).all()
    # Three standard errors of twelve groups, one-sided: about 0.6 % of 150 channels by chance.
    assert np.count_nonzero(solved.affine.offset[50:]) <= 4
    assert solved.gain_and_offset + solved.offset_only + solved.unchanged == 200


def test_kinds_of_correction_by_channel():
    random = np.random.default_rng(8)
    a = random.standard_normal((240, 4))
    t = a * [1.0, 1.0, 1.5, 1.0] + [0.0, 0.7, 0.7, 0.0]
    t[:, 3] = np.nan
    solved = solve_gated(groups_of(a, t), ridge=0.0)
    np.testing.assert_allclose(solved.affine.gain, [1, 1, 1.5, 1], rtol=1e-9)
    np.testing.assert_allclose(solved.affine.offset, [0, 0.7, 0.7, 0], atol=1e-9)
    assert solved.unusable == 1
    assert np.isfinite(solved.affine.offset).all()


def test_one_gain_for_a_tensor_is_all_or_nothing():
    random = np.random.default_rng(9)
    a = random.standard_normal((240, 3))
    scaled = solve_gated(groups_of(a, 1.3 * a), gain="tensor", ridge=0.0)
    np.testing.assert_allclose(scaled.affine.gain, 1.3, rtol=1e-12)
    same = solve_gated(groups_of(a, a), gain="tensor", ridge=0.0)
    np.testing.assert_array_equal(same.affine.gain, 1.0)


def test_a_correction_that_holds_in_one_part_only_is_refused():
    """The trap of small calibration sets: each sample is off in its own direction."""
    random = np.random.default_rng(10)
    sign = np.repeat([1.0, -1.0] * 6, 20)[:, None]
    a = random.standard_normal((240, 1))
    solved = solve_gated(groups_of(a, a + sign), ridge=0.0)
    np.testing.assert_array_equal(solved.affine.gain, 1.0)
    np.testing.assert_array_equal(solved.affine.offset, 0.0)


def test_a_single_group_cannot_judge():
    a = np.random.default_rng(11).standard_normal((20, 2))
    solved = solve_gated([PairMoments.of(a, a + 1, axis=1)])
    assert solved.unchanged == 2


def test_shapes_must_agree():
    with pytest.raises(InternalError, match="shape"):
        PairMoments.of(np.zeros((2, 3)), np.zeros((3, 2)), axis=1)
    assert merge_all([PairMoments.empty(2)]).count == 0


@pytest.mark.parametrize("most", [1, 4, 5])
@pytest.mark.parametrize("width", [3, 40_000])  # in one go, and in chunks
def test_a_weight_counts_as_so_many_pairs(most, width):
    random = np.random.default_rng(7)
    a, t = (random.standard_normal((4, 2, width)) + 5 for _ in range(2))
    weights = random.integers(1, 4, (4, 2))
    got = PairMoments.of_groups(a, t, axis=-1, most=most, weights=weights.astype(np.float64))
    splits = zip(*(np.array_split(x, len(got)) for x in (a, t, weights)), strict=True)
    for group, (left, right, counts) in zip(got, splits, strict=True):
        rows = [np.repeat(x.reshape(-1, width), counts.ravel(), axis=0) for x in (left, right)]
        want = PairMoments.of(*rows, axis=-1)
        assert group.count == want.count
        for name in FIELDS:
            # Sums of up to 24 products of size 10, which may cancel.
            np.testing.assert_allclose(
                getattr(group, name), getattr(want, name), rtol=1e-13, atol=24 * 10 * 2.0**-52
            )
