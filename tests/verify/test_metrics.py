from __future__ import annotations

import math

import numpy as np
import pytest

from qpass.verify.metrics import CAP_DB, ErrorMeter, sqnr_db


@pytest.fixture
def random():
    return np.random.default_rng(3)


def meter_of(*pairs) -> ErrorMeter:
    meter = ErrorMeter()
    for reference, got in pairs:
        meter.update(np.asarray(reference), np.asarray(got))
    return meter


def test_sqnr_of_a_planted_error():
    # 100 / 1 in energy is 20 dB.
    assert sqnr_db(np.full(8, 10.0), np.full(8, 11.0)) == pytest.approx(20.0, abs=1e-12)


def test_equal_outputs_are_capped_and_differ_from_almost_equal(random):
    x = random.standard_normal(1000).astype(np.float32)
    assert sqnr_db(x, x) == CAP_DB
    # One float32 rounding step is about 2^-24 relative: 20 log10(2^24) = 144.5 dB.
    assert 135 < sqnr_db(x, np.nextafter(x, np.float32(np.inf))) < 155


def test_batches_and_shards_sum_up_to_the_whole(random):
    reference = random.standard_normal((300, 2000)).astype(np.float32)  # several chunks
    got = reference + 0.01 * random.standard_normal(reference.shape).astype(np.float32)
    whole = meter_of((reference, got))
    batches = meter_of(*zip(np.split(reference, 10), np.split(got, 10), strict=True))
    left, right = meter_of((reference[:7], got[:7])), meter_of((reference[7:], got[7:]))
    left.merge(right)
    exact = np.asarray(reference, np.float64)
    expected = 10 * np.log10(np.sum(exact**2) / np.sum((exact - got) ** 2))
    for meter in (whole, batches, left):
        # Sums of 6e5 float64 terms: relative error below 1e-10.
        assert meter.sqnr_db == pytest.approx(expected, abs=1e-8)
        assert meter.cosine == pytest.approx(whole.cosine, abs=1e-12)
        assert meter.max_abs == np.abs(exact - got).max()
        assert meter.count == reference.size


def test_float32_sums_would_lose_what_float64_keeps():
    # 2e7 ones plus one error of 1e-3: the float32 running sum stops at 2^24.
    reference = np.ones(20_000_000, np.float32)
    got = reference.copy()
    got[-1] += 1e-3
    expected = 10 * math.log10(reference.size / (float(got[-1]) - 1.0) ** 2)
    assert sqnr_db(reference, got) == pytest.approx(expected, abs=1e-9)


def test_cosine_ignores_scale_and_sees_direction():
    assert meter_of(([1.0, 2.0], [2.0, 4.0])).cosine == pytest.approx(1.0, abs=1e-15)
    assert meter_of(([1.0, 0.0], [0.0, 1.0])).cosine == 0.0
    assert meter_of(([1.0, 2.0], [-1.0, -2.0])).cosine == pytest.approx(-1.0, abs=1e-15)
    assert meter_of(([0.0], [0.0])).cosine == 1.0
    assert meter_of(([0.0], [1.0])).cosine == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_breaks_the_output(bad):
    meter = meter_of(([1.0, 2.0], [1.0, bad]), ([1.0], [1.0]))
    assert meter.sqnr_db == -math.inf
    assert meter.cosine == 0.0
    assert meter.max_abs == math.inf


def test_the_same_infinity_on_both_sides_is_no_error():
    # Attention masks are -inf in both models.
    meter = meter_of(([1.0, -np.inf, np.nan], [1.0, -np.inf, np.nan]))
    assert meter.sqnr_db == CAP_DB
    assert meter_of(([np.inf], [-np.inf])).sqnr_db == -math.inf


def test_signal_of_zero():
    assert sqnr_db(np.zeros(3), np.zeros(3)) == CAP_DB
    assert sqnr_db(np.zeros(3), np.ones(3)) == -math.inf


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
def test_integers_are_right_or_wrong(dtype):
    reference = np.array([1, 0, 1, 1], dtype)
    meter = meter_of((reference, reference))
    assert (meter.match_share, meter.sqnr_db) == (1.0, CAP_DB)
    meter.update(reference, np.array([0, 0, 1, 1], dtype))
    assert meter.match_share == meter.cosine == 0.875
    assert meter.sqnr_db == pytest.approx(10 * math.log10(8), abs=1e-12)
    assert meter.max_abs == 1.0


def test_strings_compare_exactly():
    meter = meter_of((np.array(["cat", "dog"], object), np.array(["cat", "cow"], object)))
    assert meter.match_share == 0.5
    assert meter.max_abs == math.inf


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        sqnr_db(np.ones((2, 3)), np.ones((3, 2)))
