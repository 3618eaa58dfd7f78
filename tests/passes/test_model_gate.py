"""The gate looks at the typical sample, not only at the loudest one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qpass.passes.model_gate import Verdict, judge, sample_sqnr_db


def outputs(*rows: float):
    return [{"y": np.array([[row, 0.0] for row in rows], np.float32)}]


def test_numbers_of_a_planted_improvement():
    wanted = outputs(10.0, 10.0, 10.0)
    verdict = judge(wanted, outputs(11.0, 11.0, 11.0), outputs(10.1, 10.1, 10.1))
    # 100 / 1 is 20 dB and 100 / 0.01 is 40 dB; 10.1 in float32 is off by less than 1e-6.
    assert verdict.before_db == pytest.approx(20.0, abs=1e-4)
    assert verdict.after_db == pytest.approx(40.0, abs=1e-4)
    assert verdict.gain_db == pytest.approx(20.0, abs=1e-4)
    assert verdict.gain_error_db == pytest.approx(0.0, abs=1e-4)
    assert verdict.helps
    assert "+20.00" in verdict.sentence


def test_one_loud_sample_is_not_enough():
    wanted = outputs(*[10.0] * 6)
    before, after = outputs(*[10.1] * 5, 15.0), outputs(*[10.2] * 5, 11.0)
    verdict = judge(wanted, before, after)
    assert verdict.after_db > verdict.before_db + 10.0
    assert not verdict.helps


def test_a_single_sample_proves_nothing():
    verdict = judge(outputs(10.0), outputs(15.0), outputs(10.1))
    assert verdict.gain_error_db == math.inf
    assert not verdict.helps


def test_outputs_without_a_common_first_axis_count_as_one_sample():
    wanted = {"y": np.ones((4, 2), np.float32), "z": np.ones(3, np.float32)}
    assert sample_sqnr_db(wanted, wanted).tolist() == [200.0]
    assert sample_sqnr_db({"y": wanted["y"]}, {"y": wanted["y"]}).tolist() == [200.0] * 4
    broken = {"y": np.full((4, 2), np.nan, np.float32)}
    assert sample_sqnr_db({"y": wanted["y"]}, broken).tolist() == [-200.0] * 4


def test_no_output_pays_for_another():
    wanted = {"y": np.full((6, 2), 10.0, np.float32), "z": np.full((6, 2), 10.0, np.float32)}
    before = {"y": wanted["y"] + 1.0, "z": wanted["z"] + 1.0}
    after = {"y": wanted["y"] + 0.01, "z": wanted["z"] + 1.1}
    verdict = judge([wanted], [before], [after])
    assert verdict.gain_db > 15.0
    assert verdict.least_db == pytest.approx(-20.0 * math.log10(1.1), abs=1e-4)
    assert not verdict.helps
    assert "one output -0.83 dB" in verdict.sentence


def test_outputs_that_are_exact_or_integers_have_no_say():
    """A sum of float32 shares is off by its last digit, before and after, in another way."""
    ten = np.full((6, 2), 10.0, np.float32)
    wanted = {"y": ten, "sum": np.ones((6, 1), np.float32), "best": np.arange(6)}
    before = {"y": ten + 1.0, "sum": wanted["sum"], "best": wanted["best"]}
    after = {"y": ten + 0.1, "sum": wanted["sum"] + np.float32(1e-6), "best": wanted["best"] + 1}
    verdict = judge([wanted], [before], [after])
    alone = judge([{"y": ten}], [{"y": before["y"]}], [{"y": after["y"]}])
    assert verdict == alone
    assert verdict.helps
    worse = judge([wanted], [before], [{**after, "sum": wanted["sum"] + np.float32(1e-3)}])
    assert worse.least_db < -100.0
    assert not worse.helps
    nothing_else = {"best": wanted["best"]}
    assert judge([nothing_else], [nothing_else], [{"best": after["best"]}]).least_db < 0.0


def test_less_confidence_asks_for_less():
    verdict = Verdict(before_db=20.0, after_db=20.2, gain_db=0.3, gain_error_db=0.2)
    assert verdict.helps_by(1.0)
    assert not verdict.helps
    assert not replace(verdict, after_db=19.9).helps_by(1.0)
    assert not replace(verdict, least_db=-0.1).helps_by(1.0)
