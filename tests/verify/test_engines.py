from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qpass.errors import QpassError
from qpass.saturation import exact_entries, saturates
from qpass.verify import EngineError, available_engines, open_engine, sqnr_db
from qpass.verify import engines as engines_module

ENGINES = available_engines()


def test_ort_and_reference_are_always_there():
    assert {"ort", "reference"} <= set(ENGINES)


@pytest.mark.parametrize("case", ["conv_chain", "residual", "matmul_float_output", "gemm"])
@pytest.mark.parametrize("name", ENGINES)
def test_engines_agree_with_the_reference(name, case, saved, feeds):
    model, path = saved(case)
    expected = open_engine("reference", path).run(feeds(model))
    if name == "openvino" and saturates() and case == "residual":
        pytest.skip("without VNNI OpenVINO saturates sums of 8-bit products")
    config = exact_entries() if name == "ort" else None
    got = open_engine(name, path, session_config=config).run(feeds(model))
    assert len(got) == len(expected) == 1
    assert got[0].dtype == np.float32
    # Engines differ by single steps of the u8 outputs: 1 of 255, half of the time at most.
    assert sqnr_db(expected[0], got[0]) > 35


@pytest.mark.parametrize("name", ENGINES)
def test_float_parts_stay_in_float32(name, saved, feeds):
    model, path = saved("float_blocks")
    expected = open_engine("reference", path).run(feeds(model))[0]
    # float32 gives about 130 dB after these layers, bfloat16 (8 bits of mantissa) about 50.
    assert sqnr_db(expected, open_engine(name, path).run(feeds(model))[0]) > 90


def test_without_optimizations_ort_computes_what_the_file_says(saved, feeds):
    model, path = saved("matmul_bias_trap")
    expected = open_engine("reference", path).run(feeds(model))[0]
    literal = open_engine("ort", path, optimize=False).run(feeds(model))[0]
    # Same float32 ops one by one: only the order of 16 additions differs.
    np.testing.assert_allclose(literal, expected, rtol=1e-5, atol=1e-6)


def test_the_optimizer_of_ort_changes_the_result(saved, feeds):
    model, path = saved("weight_only")
    expected = open_engine("reference", path).run(feeds(model))[0]
    on = open_engine("ort", path).run(feeds(model))[0]
    off = open_engine("ort", path, optimize=False).run(feeds(model))[0]
    # Literally, 32 float32 products are summed: about 2^-22 relative, 130 dB.
    assert sqnr_db(expected, off) > 120
    # MatMulNBits quantizes the activations to 8 bits behind the user's back: 46 dB measured.
    assert 35 < sqnr_db(off, on) < 100
    level = engines_module.session_options(optimize=False).graph_optimization_level
    assert level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


@pytest.mark.parametrize("name", ENGINES)
def test_outputs_come_in_the_order_of_the_graph(name, tmp_path):
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] z, float[2] a, int64[1] n) {
           a = Neg (x)
           z = Abs (a)
           n = Shape (x)
        }""")
    path = tmp_path / "order.onnx"
    onnx.save(model, path)
    engine = open_engine(name, path)
    assert engine.name == name
    assert engine.version
    assert engine.output_names == ("z", "a", "n")
    z, a, n = engine.run({"x": np.array([1, -2], np.float32)})
    assert (z.tolist(), a.tolist(), n.tolist()) == ([1, 2], [-1, 2], [2])


@pytest.mark.parametrize("name", ENGINES)
def test_results_survive_the_next_run(name, saved, feeds):
    model, path = saved("gemm")
    engine = open_engine(name, path)
    first = engine.run(feeds(model, seed=1))[0]
    kept = first.copy()
    engine.run(feeds(model, seed=2))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", ENGINES)
def test_missing_and_unknown_inputs_are_named(name, saved, feeds):
    model, path = saved("gemm")
    engine = open_engine(name, path)
    with pytest.raises(EngineError, match=r"missing inputs \['x'\]"):
        engine.run({})
    with pytest.raises(EngineError, match=r"unknown inputs \['extra'\]"):
        engine.run({**feeds(model), "extra": np.ones(1, np.float32)})


@pytest.mark.parametrize("name", ENGINES)
def test_wrong_shape_is_an_engine_error(name, saved):
    _, path = saved("gemm")
    with pytest.raises(EngineError, match=f"{name} failed to run"):
        open_engine(name, path).run({"x": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize("name", ENGINES)
def test_a_file_that_is_not_there_is_an_engine_error(name, tmp_path):
    with pytest.raises(EngineError, match=f"{name} failed to load gone.onnx"):
        open_engine(name, tmp_path / "gone.onnx")


@pytest.mark.parametrize("name", ENGINES)
def test_a_graph_that_makes_no_sense_is_an_engine_error(name, tmp_path):
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21, "nowhere" : 1]>
        g (float[2] x) => (float[2] y) { y = nowhere.Nothing (x) }""")
    path = tmp_path / "broken.onnx"
    onnx.save(model, path)
    with pytest.raises(EngineError, match="Nothing") as caught:
        open_engine(name, path).run({"x": np.ones(2, np.float32)})
    assert isinstance(caught.value, QpassError)
    assert len(str(caught.value)) < 700
    assert "Exception from" not in str(caught.value)


OPENVINO_SAYS = """Exception from src/inference/src/cpp/core.cpp:132:
Check 'false' failed at src/frontends/common_translators/src/unconverted_ops_report.cpp:151:
FrontEnd API failed with OpConversionFailure:
Model wasn't fully converted. Failed operations detailed log:
-- com.microsoft.GatherBlockQuantized with a message:
While validating ONNX node '<Node(GatherBlockQuantized): e>':
GatherBlockQuantized: 'scales' must be a constant

Summary:
-- Conversion is failed for: com.microsoft.GatherBlockQuantized
"""


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (OPENVINO_SAYS, "GatherBlockQuantized: 'scales' must be a constant"),
        ("[ONNXRuntimeError] : 1 : FAIL\nmore", "[ONNXRuntimeError] : 1 : FAIL"),
        ("x" * 500, "x" * 200),
        ("Summary:", "Summary:"),
    ],
)
def test_the_cause_of_a_refusal_is_one_line(said: str, cause: str) -> None:
    assert EngineError("openvino", "load m.onnx", said).cause == cause


def test_openvino_cannot_run_unoptimized(saved):
    _, path = saved("gemm")
    with pytest.raises(ValueError, match="no switch"):
        open_engine("openvino", path, optimize=False)


def test_an_engine_that_does_not_import_is_unavailable(saved, monkeypatch):
    def fail(name):
        raise ImportError(name)

    _, path = saved("gemm")
    monkeypatch.setattr(engines_module.importlib, "import_module", fail)
    assert available_engines() == ("ort", "reference")
    with pytest.raises(EngineError, match="not installed"):
        open_engine("openvino", path)


def test_session_config_reaches_the_engine(saved):
    _, path = saved("gemm")
    options = engines_module.session_options(config={"session.disable_quant_qdq": "1"}, threads=2)
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert options.intra_op_num_threads == 2
    with pytest.raises(ValueError, match="session_config"):
        open_engine("reference", path, session_config={"a": "b"})


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
def test_an_unknown_property_of_openvino_is_refused(saved):
    _, path = saved("gemm")
    with pytest.raises(EngineError, match="Unsupported property NOPE"):
        open_engine("openvino", path, session_config={"NOPE": "1"})
