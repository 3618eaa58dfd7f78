"""What `inspect_model` says about a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import ModelError
from qpass.inspect import inspect_model

TEXT = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1], producer_name: "hand",
 producer_version: "2">
g (float[N,4,6,6] x, bool c) => (float[N,5] y, float[N,M,3,3] z) {
  [conv] a = Conv<kernel_shape = [3,3]>(x, w1)
  [up] u = ConvTranspose<kernel_shape = [2,2], strides = [2,2]>(a, w2)
  [pool] p = GlobalAveragePool(a)
  [flat] f = Flatten(p)
  [head] h = Gemm<transB = 1>(f, w3)
  [gelu] q = com.microsoft.QuickGelu(h)
  [branch] y = If(c) <
    then_branch = t () => (float[N,5] ty) { s = Relu(q) ty = Neg(s) },
    else_branch = e () => (float[N,5] ey) { ey = Identity(q) }
  >
  [left] z = MatMul(a, a)
}
"""


def model() -> onnx.ModelProto:
    parsed = onnx.parser.parse_model(TEXT)
    shapes = {"w1": (8, 4, 3, 3), "w2": (8, 2, 2, 2), "w3": (5, 8)}
    for name, shape in shapes.items():
        parsed.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    parsed.metadata_props.add(key="qpass.manifest", value="{}")
    return parsed


@pytest.mark.parametrize("external", [False, True])
def test_summary(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(), path, save_as_external_data=external, size_threshold=100, location="m.data")
    summary = inspect_model(path)

    assert summary.opsets == {"": 17, "com.microsoft": 1}
    assert (summary.ir_version, summary.producer) == (8, "hand 2")
    assert [(v.name, v.dtype, v.shape) for v in summary.inputs] == [
        ("x", "float", ("N", 4, 6, 6)),
        ("c", "bool", ()),
    ]
    assert summary.outputs[1].shape == ("N", "M", 3, 3)
    assert summary.nodes == 11
    assert summary.op_counts["com.microsoft::QuickGelu"] == 1
    assert summary.op_counts["Neg"] == 1  # in a body
    assert [(w.dtype, w.count, w.bytes) for w in summary.weights] == [
        ("float", 3, 4 * (8 * 4 * 9 + 8 * 2 * 4 + 5 * 8))
    ]
    assert [(b.node, b.op, b.attribute, b.nodes) for b in summary.control_flow] == [
        ("branch", "If", "then_branch", 2),
        ("branch", "If", "else_branch", 1),
    ]
    assert summary.metadata == {"qpass.manifest": "{}"}
    assert not summary.quantized
    assert summary.total_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert summary.external_files == (("m.data",) if external else ())


def test_multiply_accumulates(tmp_path: Path) -> None:
    """Counted by hand, for one sample: the batch N is 1."""
    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    found = {linear.op: linear for linear in inspect_model(path).quantizable}
    assert found["Conv"].macs == (8 * 4 * 4) * (4 * 3 * 3)  # output elements x window
    assert found["ConvTranspose"].macs == (8 * 4 * 4) * (2 * 2 * 2)  # input elements x kernel
    assert found["Gemm"].macs == 5 * 8
    assert found["Gemm"].weight_bytes == 5 * 8 * 4
    assert "MatMul" not in found  # both operands are activations


def test_unknown_dimensions_give_no_count(tmp_path: Path) -> None:
    unknown = model()
    unknown.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    onnx.save(unknown, tmp_path / "m.onnx")
    found = {linear.op: linear.macs for linear in inspect_model(tmp_path / "m.onnx").quantizable}
    assert (found["Conv"], found["Gemm"]) == (None, 40)


def test_quantized_functions_and_old_inputs(tmp_path: Path) -> None:
    parsed = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[4] x, float s, float[4] old) => (float[4] z) {
          q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) z = local.f(d)
        }
        <domain: "local", opset_import: ["" : 17]>
        f (a) => (b) { b = Relu(a) }
        """)
    parsed.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.int8), "old"))
    onnx.save(parsed, tmp_path / "m.onnx")
    summary = inspect_model(tmp_path / "m.onnx")
    assert summary.quantized_ops == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert summary.functions == ("local::f",)
    assert [value.name for value in summary.inputs] == ["x", "s"]
    assert [(w.dtype, w.bytes) for w in summary.weights] == [("int8", 4)]


def test_missing_data_file_is_listed_not_fatal(tmp_path: Path) -> None:
    onnx.save(
        model(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=100,
        location="m.data",
    )  # fmt: skip
    (tmp_path / "m.data").unlink()
    summary = inspect_model(tmp_path / "m.onnx")
    assert summary.missing_files == ("m.data",)
    assert summary.external_bytes == 0


def test_json_form(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    data = json.loads(json.dumps(inspect_model(tmp_path / "m.onnx").to_dict(), allow_nan=False))
    assert data["quantized"] is False
    assert data["inputs"][0] == {"name": "x", "dtype": "float", "shape": ["N", 4, 6, 6]}
    assert data["quantizable"][0]["op"] == "Conv"


def test_sequence_inputs(tmp_path: Path) -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    graph = helper.make_graph(
        [helper.make_node("SequenceLength", ["s"], ["n"])],
        "g",
        [helper.make_value_info("s", kind)],
        [helper.make_tensor_value_info("n", TensorProto.INT64, [])],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert inspect_model(tmp_path / "m.onnx").inputs[0].dtype == "sequence_type"


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read the model: No such file"):
        inspect_model(tmp_path / "absent.onnx")
