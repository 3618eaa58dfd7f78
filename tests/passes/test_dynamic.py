"""MatMuls with weights in integers become DynamicQuantizeLinear -> MatMulInteger."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qpass.graph import Graph
from qpass.passes.dynamic import make_dynamic
from qpass.saturation import exact_entries

RANDOM = np.random.default_rng(2)
HEAD = '<ir_version: 10, opset_import: ["": 21]> g (float[2,4,16] x) => '


def weights(name: str, *, per_channel: bool = True, shape: tuple[int, ...] = (16, 8)):
    columns = shape[-1] if per_channel else ()
    return {
        f"{name}_q": RANDOM.integers(-127, 128, shape, dtype=np.int8),
        f"{name}_s": RANDOM.uniform(0.002, 0.004, columns).astype(np.float32),
        f"{name}_z": np.zeros(columns, np.int8),
    }


def outputs(graph: Graph, x: np.ndarray) -> list[np.ndarray]:
    model = graph.to_model()
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    for key, entry in exact_entries().items():
        options.add_session_config_entry(key, entry)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


def names_of(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


@pytest.mark.parametrize("per_channel", [True, False])
def test_is_the_product_with_run_time_ranges(per_channel: bool) -> None:
    axis = "<axis = 1>" if per_channel else ""
    text = (
        HEAD
        + "(float[2,4,8] y) { w = DequantizeLinear"
        + axis
        + "(w_q, w_s, w_z) [fc] y = MatMul(x, w) }"
    )
    graph = Graph.from_text(text, **weights("w", per_channel=per_channel))
    x = RANDOM.standard_normal((2, 4, 16)).astype(np.float32)
    (wanted,) = outputs(graph, x)
    report = make_dynamic(graph, names_of(graph))
    assert (report.changed, report.refusals) == (1, ())
    assert [node.op for node in graph.nodes] == [
        "DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul",
    ]  # fmt: skip
    assert graph.node("fc").op == "MatMulInteger"  # keeps the name that the plan speaks of
    (got,) = outputs(graph, x)
    # Each product is off by at most half a step of x times |w|, summed over 16 terms.
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    assert np.abs(got - wanted).max() <= 16 * step / 2 * 127 * 0.004
    assert np.abs(got - wanted).max() > 0


def test_readers_of_one_tensor_share_its_quantizer() -> None:
    text = (
        HEAD
        + """(float[2,4,8] y, float[2,4,8] z) {
      w = DequantizeLinear<axis = 1>(w_q, w_s, w_z)
      v = DequantizeLinear<axis = 1>(v_q, v_s, v_z)
      y = MatMul(x, w)
      z = MatMul(x, v)
    }"""
    )
    graph = Graph.from_text(text, **weights("w"), **weights("v"))
    assert make_dynamic(graph, names_of(graph)).changed == 2
    assert [node.op for node in graph.nodes].count("DynamicQuantizeLinear") == 1
    outputs(graph, np.ones((2, 4, 16), np.float32))


def test_weight_that_is_no_matrix_is_refused() -> None:
    text = (
        HEAD
        + "(float[2,4,8] y) { w = DequantizeLinear<axis = 2>(w_q, w_s, w_z) [fc] y = MatMul(x, w) }"
    )
    graph = Graph.from_text(text, **weights("w", shape=(2, 16, 8)))
    report = make_dynamic(graph, names_of(graph))
    assert (report.changed, [row.where for row in report.refusals]) == (0, ["fc"])


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul(x, v)",
        "w = DequantizeLinear<axis = 1>(w_q, w_s, w_z) q = QuantizeLinear(x, s, z) "
        "d = DequantizeLinear(q, s, z) y = MatMul(d, w)",
    ],
    ids=["float weight", "static input"],
)
def test_other_matmuls_stay(body: str) -> None:
    constants = {
        **weights("w"),
        "v": np.ones((16, 8), np.float32),
        "s": np.float32(0.1),
        "z": np.uint8(128),
    }
    used = {
        name: value for name, value in constants.items() if f"{name})" in body or f"{name}," in body
    }
    graph = Graph.from_text(
        HEAD + "(float[2,4,8] y) {" + body + "}", **{k: np.asarray(v) for k, v in used.items()}
    )
    before = [node.op for node in graph.nodes]
    assert make_dynamic(graph, names_of(graph)).changed == 0
    assert [node.op for node in graph.nodes] == before


def test_weights_that_the_plan_leaves_behind_floats_stay() -> None:
    text = HEAD + "(float[2,4,8] y) { w = DequantizeLinear(w_q, w_s, w_z) [fc] y = MatMul(x, w) }"
    graph = Graph.from_text(text, **weights("w", per_channel=False))
    assert make_dynamic(graph, ["another"]).changed == 0
    assert [node.op for node in graph.nodes] == ["DequantizeLinear", "MatMul"]
