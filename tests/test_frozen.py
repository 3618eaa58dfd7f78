"""Activation scales from outside: the file, the ranges they pin, and scales by channel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from qpass.api import make_options
from qpass.choose import choose_qtable
from qpass.dtypes import INT4, UINT8
from qpass.errors import RecipeError
from qpass.frozen import FrozenScale, check_names, read_scales, solve_ranges
from qpass.passes.absorb_scales import absorb_scales
from qpass.qparams import choose_qparams
from qpass.targets import TARGETS
from tests.jobs import model_of, normal, optimize, saved, small_model
from tests.planning import cnn, decision, planned
from tests.small_models import feeds_of, run, transformer

CHAIN = "c = Conv (x, w) r = Relu (c) y = Conv (r, v)"


def frozen(scale: Any, zero_point: int | None = None, storage: Any = None) -> FrozenScale:
    return FrozenScale(scale=np.asarray(scale, np.float64), zero_point=zero_point, storage=storage)


def write(path: Path, entries: Any) -> Path:
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


# ------------------------------------------------------------------ the file


def test_json_and_npz_say_the_same(tmp_path: Path) -> None:
    entries = {"a": 0.5, "b/c": {"scale": [0.25, 0.5], "zero_point": 3}}
    np.savez(tmp_path / "s.npz", **{
        "a": np.float32(0.5), "b/c": np.array([0.25, 0.5]), "b/c.zero_point": np.array([3, 3]),
    })  # fmt: skip
    for path in (write(tmp_path / "s.json", entries), tmp_path / "s.npz"):
        found = read_scales(path)
        assert float(found["a"].scale) == 0.5
        assert (found["a"].zero_point, found["b/c"].zero_point) == (None, 3)
        assert found["b/c"].scale.tolist() == [0.25, 0.5]


def test_the_type_of_a_zero_point(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", {"a": {"scale": 1, "zero_point": 0, "type": "int4"}})
    assert read_scales(path)["a"].storage is INT4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read"),
        ("[]", "maps names"),
        ("{}", "maps names"),
        ('{"a": 0}', "positive"),
        ('{"a": -1}', "positive"),
        ('{"a": "x"}', "no scale"),
        ('{"a": true}', "True is no number"),
        ('{"a": "0.1"}', "'0.1' is no number"),
        ('{"a": [0.1, true]}', "True is no number"),
        ('{"a": {"scale": 1, "zero_point": "0"}}', "'0' is no number"),
        ('{"a": {"zero_point": 1}}', "no scale"),
        ('{"a": {"scale": 1, "zero": 1}}', "zero is not one of"),
        ('{"a": {"scale": [1, 2], "zero_point": [1, 2]}}', "one integer"),
        ('{"a": {"scale": 1, "zero_point": 1.5}}', "one integer"),
        ('{"a": {"scale": 1, "type": "float8"}}', "no scale"),
        ('{"a": [[1, 2], [3, 4]]}', "one or one for each channel"),
        ('{"a": 1e-20}', "from 1e-12 on"),
        ('{"a": 1e39}', "float32 numbers"),
        ('{"a": {"scale": 1, "zero_point": 1e400}}', "one integer"),
        ('{"a": {"scale": 1, "zero_point": NaN}}', "one integer"),
    ],
)
def test_what_is_no_scale_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_scales(write(tmp_path / "s.json", text))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole, cut, array = (tmp_path / name for name in ("whole.npz", "cut.npz", "array.npz"))
    np.savez_compressed(whole, a=np.linspace(0.1, 1, 999))
    cut.write_bytes(whole.read_bytes()[:-40])
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(array)
    for path, words in ((cut, "cannot read"), (array, "without a name")):
        with pytest.raises(RecipeError, match=words):
            read_scales(path)


# ------------------------------------------------------------------ ranges


@given(st.floats(1e-6, 1e3), st.integers(0, 255), st.sampled_from(["w8a8", "w8a4", "w8a16"]))
def test_a_range_gives_scale_and_zero_point_back(scale: float, zero: int, precision: str) -> None:
    plan = planned(cnn(CHAIN), precision=precision, low_bit_edges=True)
    spec = decision(plan, "x").spec
    zero = zero % (spec.qmax + 1)
    low, high = solve_ranges({"x": frozen(scale, zero)}, plan)["x"]
    numbers = choose_qparams(spec, low, high)
    assert numbers.scale == np.float32(scale)
    assert int(numbers.zero_point) == zero


@pytest.mark.parametrize("target", ["ort-x86", "ort-arm", "tensorrt"])
def test_a_scale_alone_is_symmetric(target: str) -> None:
    graph = cnn(CHAIN)
    plan = planned(graph, TARGETS[target])
    spec = next(d.spec for d in plan.activations() if d.tensor == "x")
    numbers = choose_qparams(spec, *solve_ranges({"x": frozen(0.1)}, plan)["x"])
    assert numbers.scale == np.float32(0.1)
    assert int(numbers.zero_point) == (0 if spec.storage.signed else 128)


def test_a_signed_zero_point_is_shifted() -> None:
    plan = planned(cnn(CHAIN), precision="w4a4", low_bit_edges=True)
    low, high = solve_ranges({"x": frozen(0.5, -3, INT4)}, plan)["x"]
    assert (low, high) == (-2.5, 5.0)  # integers -8 to 7 around -3


@pytest.mark.parametrize(
    ("entry", "target", "words"),
    [
        (frozen(0.1, 300), "ort-x86", "outside of"),
        (frozen(0.1, -3), "ort-x86", "outside of"),
        (frozen(0.1, 8, INT4), "ort-x86", "counts 4 bits, the plan has"),
        (frozen(0.1, 5), "tensorrt", "wants x symmetric"),
        (frozen(0.1), "vitis-xint8", "power of two"),
    ],
)
def test_what_a_target_cannot_have_is_refused(entry: Any, target: str, words: str) -> None:
    plan = planned(cnn(CHAIN), TARGETS[target])
    with pytest.raises(RecipeError, match=words):
        solve_ranges({"x": entry}, plan)


def test_the_narrowest_decision_of_a_tensor_is_meant() -> None:
    """A sum is made of 8 bits and read by a product with 4."""
    body = "a = Conv (x, w) m = Conv (a, v) s = Add (a, m) c = Conv (s, v) y = Conv (c, w)"
    plan = planned(cnn(body), precision="w4a4")
    assert sorted(d.spec.bits for d in plan.activations() if d.tensor == "s") == [4, 8]
    assert solve_ranges({"s": frozen(0.5, 8)}, plan)["s"] == (-4.0, 3.5)
    assert solve_ranges({"s": frozen(0.5, 0, UINT8)}, plan)["s"] == (0.0, 127.5)


def test_unknown_names_list_near_ones() -> None:
    plan = planned(cnn(CHAIN))
    with pytest.raises(RecipeError, match="no activation that this plan quantizes") as error:
        check_names(["rr"], plan)
    assert "r" in error.value.fix
    with pytest.raises(RecipeError):
        check_names(["c"], plan)  # absorbed: the Q stands behind the Relu
    check_names(["x", "r"], plan)


def test_tied_tensors_share_the_fixed_range() -> None:
    body = "c = Conv (x, w) p = MaxPool <kernel_shape = [1, 1]> (c) y = Conv (p, v)"
    graph = cnn(body)
    fixed = {"x": (-1.0, 1.0), "c": (-4.0, 3.5), "y": (-1.0, 1.0)}
    # Nothing was calibrated: p has no statistics, and needs none.
    table = choose_qtable(graph, planned(graph, ranges=fixed), {}).qparams
    assert table["p"].scale == table["c"].scale == np.float32(7.5 / 255)
    with pytest.raises(RecipeError, match="share one scale"):
        choose_qtable(graph, planned(graph, ranges={**fixed, "p": (-1.0, 1.0)}), {})


# ------------------------------------------------------------------ scales by channel


def test_ratios_go_into_the_norm_and_the_weights_behind_it() -> None:
    graph = transformer()
    feeds = feeds_of(graph, 1)[0]
    before = run(graph.to_model(taps=["n1"]), feeds)
    scales = np.random.default_rng(1).uniform(0.02, 0.5, 32)
    found, report = absorb_scales(graph, {"n1": frozen(scales)})
    assert (report.changed, report.refusals) == (1, ())
    after = run(graph.to_model(taps=["n1"]), feeds)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=1e-5)
    # The integers are those of a scale for each channel, but for what lies on a rounding edge.
    wanted = np.rint(before["n1"] / scales.astype(np.float32))
    got = np.rint(after["n1"] / float(found["n1"].scale))
    assert (wanted != got).mean() < 1e-3
    assert np.abs(wanted - got).max() <= 1


def test_channels_that_cannot_be_scaled_are_refused_with_a_reason() -> None:
    graph = transformer()
    before = graph.fingerprint()
    found, report = absorb_scales(graph, {"act": frozen(np.linspace(0.1, 1, 64))})
    assert found == {}
    (refusal,) = report.refusals
    assert refusal.where == "act"
    assert "Gelu" in refusal.reason
    assert graph.fingerprint() == before


def test_another_number_of_scales_than_of_channels_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match=r"n2 has 32 channels, .* gives it 31"):
        absorb_scales(transformer(), {"n2": frozen(np.linspace(0.1, 1, 31))})


def test_a_frozen_tensor_on_the_way_stops_the_ratios() -> None:
    """Relu: to scale the channels of r is to scale those of c."""
    graph = cnn("c = Conv (x, w) r = Relu (c) y = Conv (r, v)")
    entries = {"r": frozen(np.linspace(0.1, 1, 16)), "c": frozen(0.3)}
    found, report = absorb_scales(graph, entries)
    assert set(found) == {"c"}
    assert "c, which has a scale of its own" in report.refusals[0].reason
    found, report = absorb_scales(graph, {"r": entries["r"]})
    assert report.changed == 1


# ------------------------------------------------------------------ whole runs


def quantizers(path: str) -> dict[str, tuple[float, int]]:
    graph = onnx.load(path).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {
        n.input[0]: (float(constants[n.input[1]]), int(constants[n.input[2]]))
        for n in graph.node
        if n.op_type == "QuantizeLinear"
    }


@pytest.mark.parametrize("compensate", ["none", "cwac"])
def test_frozen_scales_are_in_the_result(tmp_path: Path, compensate: str) -> None:
    model = saved(small_model(), tmp_path)
    first = optimize(model, normal(), output=tmp_path / "a.onnx", compensate="none")
    entries = {
        name: {"scale": scale * 1.25, "zero_point": zero}
        for name, (scale, zero) in quantizers(first.output).items()
    }
    path = write(tmp_path / "s.json", entries)
    report = optimize(
        model,
        normal(),
        output=tmp_path / "b.onnx",
        activation_scales=str(path),
        compensate=compensate,
    )
    for name, (scale, zero) in quantizers(report.output).items():
        assert np.float32(entries[name]["scale"]) == np.float32(scale), name
        assert entries[name]["zero_point"] == zero


def test_scales_by_channel_that_nothing_takes_up_are_in_a_note(tmp_path: Path) -> None:
    model = model_of(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[N,16] x) => (float[N,8] y) { a = Gemm(x, w)
          b = Gelu(a)
          y = Gemm(b, v) }""",
        w=(16, 16),
        v=(16, 8),
    )
    path = write(tmp_path / "s.json", {"b": np.linspace(0.01, 0.02, 16).tolist()})
    report = optimize(saved(model, tmp_path), normal((12, 16)), activation_scales=str(path))
    (note,) = (note for note in report.notes if note.startswith("s.json gives b a scale"))
    assert "its range was calibrated" in note


def test_frozen_scales_and_passes_that_change_activations_exclude_each_other(
    tmp_path: Path,
) -> None:
    model = saved(small_model(), tmp_path)
    with pytest.raises(RecipeError, match="activations as they are"):
        optimize(model, normal(), activation_scales="s.json", static_norm=0.9)


def test_frozen_scales_below_8_bits_exclude_a_search_that_changes_bits() -> None:
    frozen = {"activation_scales": "s.json", "mixed": True, "min_sqnr": 10.0}
    with pytest.raises(RecipeError, match="more bits than the 4"):
        make_options(precision="w4a4", **frozen)
    assert make_options(precision="w4a8", **frozen).mixed
