"""CPUs without VNNI: found by running, and computed exactly all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import qpass
from qpass.saturation import EXACT_KERNELS, exact_entries, saturates
from qpass.targets import TARGETS
from qpass.verify import host
from qpass.verify.engines import KEEP_SIGNED

MODELS = Path(__file__).parent.parent / "models"
DEPTH = 128
X86 = ("ort-x86", "openvino")


def product(weight: int) -> onnx.ModelProto:
    """Return DQ(x) @ DQ(w), all x at 255 and all w at `weight`, scales 1."""
    text = f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (uint8[4,{DEPTH}] x) => (float[4,8] y) {{
            a = DequantizeLinear (x, s, z)
            b = DequantizeLinear <axis = 1> (w, t, u)
            y = MatMul (a, b)
        }}"""
    model = onnx.parser.parse_model(text)
    constants = {
        "s": np.float32(1), "z": np.uint8(0), "w": np.full((DEPTH, 8), weight, np.int8),
        "t": np.ones(8, np.float32), "u": np.zeros(8, np.int8),
    }  # fmt: skip
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
    return model


def value(weight: int, *, exact: bool) -> float:
    options = ort.SessionOptions()
    if exact:
        for key, entry in exact_entries().items():
            options.add_session_config_entry(key, entry)
    session = ort.InferenceSession(product(weight).SerializeToString(), options)
    (y,) = session.run(None, {"x": np.full((4, DEPTH), 255, np.uint8)})
    assert (y == y[0, 0]).all()
    return float(y[0, 0])


def test_the_probe_says_what_a_product_shows() -> None:
    assert saturates() == (value(127, exact=False) != DEPTH * 255 * 127)


def test_products_are_exact_when_asked() -> None:
    assert value(127, exact=True) == DEPTH * 255 * 127
    assert value(-127, exact=True) == -DEPTH * 255 * 127


def test_seven_bits_never_saturate() -> None:
    assert value(63, exact=False) == DEPTH * 255 * 63


@pytest.mark.parametrize("name", X86)
def test_reduced_targets_differ_in_the_weights_only(name: str) -> None:
    full, reduced = TARGETS[name], TARGETS[f"{name}-avx2"]
    assert full.needs_vnni
    assert not reduced.needs_vnni
    for left, right in zip(full.rules, reduced.rules, strict=True):
        assert replace(left, weight=None, source="") == replace(right, weight=None, source="")
        if left.weight is not None:
            assert right.weight is not None
            assert (right.weight.qmin, right.weight.qmax) == (-63, 63)
            assert right.weight.storage == left.weight.storage


@pytest.mark.parametrize("name", X86)
def test_result_of_a_reduced_target_keeps_to_seven_bits(name: str, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    report = qpass.optimize(
        MODELS / "digits_cnn.onnx",
        data=MODELS / "digits_calibration.npz",
        output=out,
        target=f"{name}-avx2",
        compensate="none",
        samples=16,
    )
    assert report.ok, report.gates
    assert not any("VNNI" in note for note in report.notes)
    weights = [
        onnx.numpy_helper.to_array(t)
        for t in onnx.load(out).graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    ]
    assert len(weights) == 9
    assert max(int(np.abs(w.astype(int)).max()) for w in weights) == 63


@pytest.mark.parametrize("known", [True, False])
def test_entries_and_note_follow_the_cpu(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "saturates", lambda: known)
    monkeypatch.setattr(host, "exact_entries", lambda: EXACT_KERNELS if known else {})
    exact = dict(EXACT_KERNELS) if known else {}
    assert host.session_entries(TARGETS["ort-x86"]) == exact
    assert host.session_entries(TARGETS["ort-x86-avx2"]) == {}
    assert host.session_entries(TARGETS["qnn-htp"]) == {**exact, **KEEP_SIGNED}
    assert host.session_entries(TARGETS["tensorrt"]) == dict(KEEP_SIGNED)
    assert host.shows_speed(TARGETS["ort-x86"]) != known
    note = host.saturation_note(TARGETS["openvino"])
    assert ("--target openvino-avx2" in note) == known
    assert host.saturation_note(TARGETS["openvino-avx2"]) == ""


def test_entries_are_those_of_this_cpu() -> None:
    assert dict(exact_entries()) == (dict(EXACT_KERNELS) if saturates() else {})


def test_a_file_loads_with_exact_kernels(tmp_path: Path) -> None:
    """Weights that share a zero point would make onnxruntime refuse it."""
    out = tmp_path / "m.onnx"
    data = MODELS / "digits_calibration.npz"
    few = {"samples": 8, "compensate": "none"}
    qpass.optimize(MODELS / "digits_vit.onnx", data=data, output=out, **few)
    options = ort.SessionOptions()
    for key, entry in EXACT_KERNELS.items():
        options.add_session_config_entry(key, entry)
    image = np.load(data)["image"][:2]
    exact = ort.InferenceSession(out, options).run(None, {"image": image})[0]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    literal = ort.InferenceSession(out, options).run(None, {"image": image})[0]
    # Single steps of rounding apart.
    assert np.abs(exact - literal).max() < 0.05 * np.abs(literal).max()
