"""What engines really run: onnxruntime 1.31 and OpenVINO 2026.4 on the cases of conftest.py."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import pytest

from qpass.verify import (
    Census,
    EngineError,
    EngineOp,
    available_engines,
    census_openvino,
    census_ort,
    read_back,
)
from qpass.verify.trace import trace

needs_openvino = pytest.mark.skipif("openvino" not in available_engines(), reason="needs openvino")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Expected engine op type and precision of every linear node of a case."""

    case: str
    ort: dict[str, tuple[str, str]]
    openvino: dict[str, tuple[str, str]]


def all_(nodes: str, op: str, precision: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(nodes.split(), (op, precision))


ROWS = (
    Row(
        case="conv_chain",
        ort=all_("conv0 conv1", "QLinearConv", "integer"),
        openvino=all_("conv0 conv1", "Convolution", "integer"),
    ),
    Row(
        case="conv_without_output_q",
        ort=all_("conv", "FusedConv", "float"),
        openvino=all_("conv", "Convolution", "integer"),
    ),
    # A float weight does not keep a convolution in float: onnxruntime quantizes it at load.
    Row(
        case="float_weight_between_quantized",
        ort=all_("conv", "QLinearConv", "integer"),
        openvino=all_("conv", "Convolution", "float"),
    ),
    Row(
        case="residual",
        ort=all_("conv0 conv1", "QLinearConv", "integer"),
        openvino=all_("conv0 conv1", "Convolution", "integer"),
    ),
    Row(
        case="residual_signed_symmetric",
        ort=all_("conv", "FusedConv", "float"),
        openvino=all_("conv", "Convolution", "integer"),
    ),
    Row(
        case="signed_asymmetric",
        ort=all_("conv", "QLinearConv", "integer"),
        openvino=all_("conv", "Convolution", "integer"),
    ),
    Row(
        case="matmul_float_output",
        ort=all_("fc0 fc1", "MatMulIntegerToFloat", "integer"),
        openvino=all_("fc0 fc1", "FullyConnected", "integer"),
    ),
    Row(
        case="matmul_bias_trap",
        ort=all_("fc", "Gemm", "float"),
        openvino=all_("fc", "FullyConnected", "integer"),
    ),
    Row(
        case="attention",
        ort=all_("scores context", "MatMulIntegerToFloat", "integer"),
        openvino=all_("scores context", "MatMul", "integer"),
    ),
    Row(
        case="attention_unsigned",
        ort=all_("scores", "MatMulIntegerToFloat", "integer"),
        openvino=all_("scores", "MatMul", "float"),
    ),
    Row(
        case="gemm",
        ort=all_("fc0 fc1", "QGemm", "integer"),
        openvino=all_("fc0 fc1", "FullyConnected", "integer"),
    ),
    Row(
        case="dynamic",
        ort=all_("fc", "DynamicQuantizeMatMul", "integer"),
        openvino=all_("fc", "FullyConnected", "float"),
    ),
    Row(
        case="weight_only",
        ort=all_("fc", "MatMulNBits", "integer"),
        openvino=all_("fc", "FullyConnected", "integer"),
    ),
    Row(
        case="float_blocks",
        ort={
            **all_("c0 c1 c2", "Conv", "float"),
            **all_("g", "FusedGemm", "float"),
            **all_("m0 m1", "FusedMatMul", "float"),
        },
        openvino={
            **all_("c0 c1 c2", "Convolution", "float"),
            **all_("g m0", "FullyConnected", "float"),
            **all_("m1", "MatMul", "float"),
        },
    ),
)


def shown(found: dict[str, EngineOp | None]) -> dict[str, tuple[str, str] | None]:
    return {name: op and (op.op, op.precision) for name, op in found.items()}


def assert_one_op_each(found: dict[str, EngineOp | None]) -> None:
    assert len({id(op) for op in found.values()}) == len(found)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case)
def test_ort_names_every_linear_op(row, saved, tmp_path):
    model, path = saved(row.case)
    census = read_back("ort", path, tmp_path)
    found = trace(model, census)
    assert shown(found) == row.ort
    assert_one_op_each(found)
    assert not [p for p in tmp_path.iterdir() if p != path], "files were left behind"


@needs_openvino
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case)
def test_openvino_names_every_linear_op(row, saved, tmp_path):
    model, path = saved(row.case)
    found = trace(model, read_back("openvino", path, tmp_path))
    assert shown(found) == row.openvino
    assert_one_op_each(found)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case)
def test_tracing_does_not_need_node_names(row, saved, tmp_path):
    model, path = saved(row.case)
    outputs = {node.name: node.output[0] for node in model.graph.node}
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, path)
    expected = {outputs[name]: kind for name, kind in row.ort.items()}
    found = trace(model, read_back("ort", path, tmp_path))
    assert shown(found) == expected
    assert_one_op_each(found)


@needs_openvino
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case)
def test_tracing_in_openvino_does_not_need_node_names(row, saved, tmp_path):
    model, path = saved(row.case)
    outputs = {node.name: node.output[0] for node in model.graph.node}
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, path)
    expected = {outputs[name]: kind for name, kind in row.openvino.items()}
    assert shown(trace(model, read_back("openvino", path, tmp_path))) == expected


def test_each_node_gets_its_own_op_and_not_a_neighbour(saved, tmp_path):
    # One layer of four stays float; only a trace that is right layer by layer finds which.
    for kept in range(4):
        model, path = saved("mixed", kept=kept)
        found = trace(model, read_back("ort", path, tmp_path))
        precisions = [op and op.precision for op in found.values()]
        assert list(found) == ["conv0", "conv1", "conv2", "conv3"]
        assert precisions == ["float" if i == kept else "integer" for i in range(4)]


@needs_openvino
def test_openvino_also_tells_neighbours_apart(saved, tmp_path):
    model, path = saved("mixed", kept=2)
    found = trace(model, read_back("openvino", path, tmp_path))
    precisions = [op and op.precision for op in found.values()]
    assert precisions == ["integer", "integer", "float", "integer"]


def test_the_bias_trap_depends_on_static_shapes(saved, tmp_path):
    model, path = saved("matmul_bias_trap", batch="N")
    found = trace(model, read_back("ort", path, tmp_path))
    assert shown(found) == {"fc": ("MatMulIntegerToFloat", "integer")}


def test_counts_and_classes(saved, tmp_path):
    _, path = saved("residual")
    census = read_back("ort", path, tmp_path)
    assert census.engine == "ort"
    assert census.version.count(".") == 2
    assert census.counts()["QLinearConv"] == 2
    assert sum(census.counts().values()) == len(census.ops)
    precision = {op.op: (op.precision, op.kind) for op in census.ops}
    assert precision["QLinearAdd"] == ("integer", "other")
    assert precision["QuantizeLinear"] == ("other", "other")
    assert precision["Transpose"] == ("other", "other")
    assert precision["GlobalAveragePool"] == ("float", "other")
    assert len(census.integer_compute) == 2
    assert census.float_compute == census.weight_only_compute == ()


@pytest.mark.parametrize("engine", ["ort", pytest.param("openvino", marks=needs_openvino)])
def test_weight_only_is_counted_apart(engine, saved, tmp_path):
    _, path = saved("weight_only")
    census = read_back(engine, path, tmp_path)
    assert len(census.weight_only_compute) == 1
    assert census.integer_compute == census.float_compute == ()


def test_ort_shows_both_branches_of_an_if(saved, tmp_path):
    model, path = saved("branches")
    found = trace(model, read_back("ort", path, tmp_path))
    assert shown(found) == all_("then else", "MatMulIntegerToFloat", "integer")


@needs_openvino
def test_openvino_hides_the_branches_of_an_if(saved, tmp_path):
    model, path = saved("branches")
    found = trace(model, read_back("openvino", path, tmp_path))
    assert shown(found) == {"then": None, "else": None}


def test_a_session_option_changes_the_census(saved, tmp_path):
    _, path = saved("gemm")
    config = {"session.disable_quant_qdq": "1"}
    census = read_back("ort", path, tmp_path, session_config=config)
    assert len(census.float_compute) == 2


def test_initializers_beside_the_file(saved, tmp_path):
    model, path = saved("gemm")
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    files = set(tmp_path.iterdir())
    found = trace(onnx.load(path, load_external_data=False), read_back("ort", path, tmp_path))
    assert shown(found) == all_("fc0 fc1", "QGemm", "integer")
    assert set(tmp_path.iterdir()) == files


def test_refusals(saved, tmp_path):
    _, path = saved("gemm")
    with pytest.raises(ValueError, match="no census"):
        read_back("reference", path, tmp_path)
    path.write_bytes(b"not a model")
    with pytest.raises(EngineError, match="ort failed to load"):
        read_back("ort", path, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("module", "name", "original"),
    [
        (census_ort, "fc_token_12", "fc"),
        (census_ort, "relu_out_nchwc", "relu_out"),
        (census_ort, "fused fc", "fc"),
        (census_ort, "fc/MatMulAddFusion", "fc"),
        (census_ort, "fc/MatmulTransposeFusion//MatMulScaleFusion/", "fc"),
        (census_openvino, "y_original", "y"),
        (census_openvino, "fc/WithoutBiases/DequantizationMultiply", "fc"),
        (census_openvino, "fc/DequantizationSubtract", "fc"),
    ],
)
def test_names_of_fusions_lead_back(module, name, original):
    aliases = list(module._aliases(name))
    assert aliases[0] == name
    assert aliases[-1] == original


def test_the_packed_weight_of_matmulnbits_keeps_its_name(saved, tmp_path):
    _, path = saved("weight_only")
    (op,) = read_back("ort", path, tmp_path).weight_only_compute
    assert {"fc", "fc_1_out", "w_q"} <= set(op.covers)


def census_of(*covers: tuple[str, ...]) -> Census:
    ops = [
        EngineOp(name=c[0], op="MatMul", precision="float", kind="linear", covers=c) for c in covers
    ]
    return Census(engine="ort", version="0", ops=tuple(ops))


TWO_LAYERS = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[4,4] x) => (float[4,4] y) <float[4,4] w, float[4,4] v> {
       a = MatMul (x, w)
       b = Relu (a)
       c = MatMul (b, SECOND)
       y = Add (c, b)
    }"""


def test_a_weight_identifies_its_op_unless_it_is_shared():
    own = onnx.parser.parse_model(TWO_LAYERS.replace("SECOND", "v"))
    census = census_of(("v",), ("w",))
    assert trace(own, census) == {"a": census.ops[1], "c": census.ops[0]}
    shared = onnx.parser.parse_model(TWO_LAYERS.replace("SECOND", "w"))
    assert trace(shared, census_of(("w",))) == {"a": None, "c": None}


def test_the_op_of_a_later_layer_is_not_taken_for_a_lost_one():
    # The engine lost the first layer; the Add behind both was fused into the second.
    model = onnx.parser.parse_model(TWO_LAYERS.replace("SECOND", "v"))
    census = census_of(("c", "y"))
    assert trace(model, census) == {"a": None, "c": census.ops[0]}


def test_one_op_may_compute_two_nodes():
    # Equal nodes are merged by engines: both names lead to the one that is left.
    model = onnx.parser.parse_model(TWO_LAYERS.replace("SECOND", "v"))
    census = census_of(("a", "c"))
    assert trace(model, census) == {"a": census.ops[0], "c": census.ops[0]}
