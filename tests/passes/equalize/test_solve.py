"""Candidates: pure functions of extremes, bounded, rounded to float32."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.passes.equalize.solve import LIMIT, Scales, solve_candidates, solve_shifts

LOW = np.array([-1.0, 0.0, -4.0, 0.0])
HIGH = np.array([1.0, 8.0, 2.0, 0.0])
WEIGHT = np.array([0.5, 0.25, 1.0, 2.0])


def by_method(**options) -> dict[str, Scales]:
    return {c.method: c for c in solve_candidates(LOW, HIGH, WEIGHT, **options)}


def test_smooth_quant_is_the_formula_of_the_paper_up_to_a_factor():
    found = by_method()["smooth 0.5"].scale[1:]
    wanted = np.sqrt(np.array([1.0, 8.0, 4.0, 1.0]) / WEIGHT)  # a dead channel: the smallest size
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-6)


def test_cross_layer_equalization_makes_both_sides_alike():
    scale = by_method()["smooth 0.5"].scale[1:4]
    size = np.array([1.0, 8.0, 4.0])
    ratio = (size / scale) / (WEIGHT[:3] * scale)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_repq_gives_every_channel_the_same_range_around_zero():
    repq = by_method(shift=True)["repq 1.0"]
    low, high = ((end - repq.shift[1:]) / repq.scale[1:] for end in (LOW, HIGH))
    np.testing.assert_allclose(high[:3], high[0], rtol=1e-5)
    np.testing.assert_allclose(low[:3], -high[:3], rtol=1e-5)


def test_caps_leave_ordinary_channels_alone():
    caps = [c for m, c in by_method().items() if m.startswith("cap")]
    assert caps
    for cap in caps:
        assert (cap.scale >= 1.0).all()
        assert cap.scale[1] == 1.0
        assert cap.scale[2] > 1.0


@pytest.mark.parametrize("shift", [False, True])
def test_every_candidate_is_a_bounded_float32_number_and_fixes_label_0(shift):
    wild = np.array([1e-30, 1e30, 1.0, 0.0])
    for c in solve_candidates(-wild, wild, WEIGHT, shift=shift):
        assert c.scale[0] == 1.0
        assert c.shift[0] == 0.0
        assert np.isfinite(c.scale).all()
        assert (c.scale > 0).all()
        assert c.scale.max() <= LIMIT * (1 + 1e-6)
        assert (c.scale == c.scale.astype(np.float32)).all()
        assert shift or not c.shift.any()


def test_offsets_are_the_mean_and_the_middle():
    plain = Scales.identity(4)
    mean, middle = solve_shifts([plain], LOW, HIGH, np.array([0.25, 1.0, -1.0, 0.0]))
    np.testing.assert_array_equal(mean.shift, [0, 0.25, 1, -1, 0])
    np.testing.assert_array_equal(middle.shift, [0, 0, 4, -1, 0])
