"""Loading: broken files are named, data stays on disk, repairs and upgrades keep the function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import ModelError
from qpass.graph import array_of
from qpass.modelfile import load_model, read_metadata, save_model
from qpass.skim import skim
from tests.model_files import external_model, parsed, run, write

# ---------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am no model", "is not an ONNX model"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "is not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"PK\x03\x04" + b"a" * 60, "zip archive"),
    ],
    ids=["empty", "text", "no graph", "lfs", "zip"],
)
@pytest.mark.parametrize("read", [load_model, skim], ids=["load", "skim"])
def test_a_file_that_is_no_model(
    tmp_path: Path, content: bytes, message: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    if read is skim and not content:
        message = "is empty"
    with pytest.raises(ModelError, match=message):
        read(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path, parsed())
    path.write_bytes(path.read_bytes()[:-30])
    for read in (load_model, skim):
        with pytest.raises(ModelError, match="is not an ONNX model"):
            read(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        load_model(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load_model(tmp_path)


BROKEN = {
    "no opset": (lambda m: m.ClearField("opset_import"), "does not import any"),
    "future opset": (
        lambda m: setattr(m.opset_import[0], "version", 999),
        "the model has opset 999",
    ),
    "unknown dtype": (lambda m: setattr(m.graph.initializer[0], "data_type", 77), "unknown dtype"),
    "undefined input": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0),
        "unknown dtype 0",
    ),
    "short data": (
        lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234"),
        "has 4 bytes, its shape .* needs 512",
    ),
    "tensor twice": (lambda m: m.graph.node[1].output.__setitem__(0, "y"), "made twice"),
    "input twice": (lambda m: m.graph.input.append(m.graph.input[0]), "two graph inputs"),
    "initializer twice": (
        lambda m: m.graph.initializer.append(m.graph.initializer[0]),
        "two initializers",
    ),
    "output made by nobody": (lambda m: m.graph.node.pop(), "no node makes the graph output 'z'"),
    "read before made": (lambda m: m.graph.node.reverse(), "'y' is read before node first"),
    "undefined": (lambda m: m.graph.node[1].input.__setitem__(0, "q"), "nothing makes .*'q'"),
    "cycle": (lambda m: m.graph.node[0].input.__setitem__(0, "z"), "'z' is read before"),
    "custom op": (lambda m: setattr(m.graph.node[1], "domain", "acme"), "of the domain 'acme'"),
    "no such contrib op": (
        lambda m: setattr(m.graph.node[1], "domain", "com.microsoft"),
        "of the domain 'com.microsoft'",
    ),
    "op of a later opset": (
        lambda m: setattr(m.graph.node[1], "op_type", "Gelu"),
        "opset 17 has no op 'Gelu'",
    ),
    "quantized": (
        lambda m: setattr(m.graph.node[0], "op_type", "MatMulInteger"),
        "quantized already: it has a MatMulInteger\n  where: node first",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models_are_named(tmp_path: Path, case: str) -> None:
    model = parsed()
    damage, message = BROKEN[case]
    damage(model)
    with pytest.raises(ModelError, match=message):
        load_model(write(tmp_path, model))


def test_quantized_models_load_when_allowed(tmp_path: Path) -> None:
    model = parsed()
    model.graph.node[0].op_type = "MatMulInteger"
    assert load_model(write(tmp_path, model), allow_quantized=True).nodes[0].op == "MatMulInteger"


def test_known_contrib_op_loads(tmp_path: Path) -> None:
    model = parsed()
    model.graph.node[1].op_type, model.graph.node[1].domain = "QuickGelu", "com.microsoft"
    model.opset_import.add(domain="com.microsoft", version=1)
    assert load_model(write(tmp_path, model)).nodes[1].op == "QuickGelu"


def test_quantized_op_in_a_body_is_found(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (bool c, float[4] x, float s) => (float[4] y) {
          y = If(c) <
            then_branch = t () => (float[4] a) { q = QuantizeLinear(x, s) a = DequantizeLinear(q, s)
            },
            else_branch = e () => (float[4] b) { b = Relu(x) }
          >
        }""")
    with pytest.raises(ModelError, match="QuantizeLinear"):
        load_model(write(tmp_path, model))


# ---------------------------------------------------------------------------- external data


def test_external_data_stays_on_disk_until_it_is_read(tmp_path: Path) -> None:
    graph = load_model(external_model(tmp_path), opset=21)
    expected = numpy_helper.to_array(parsed().graph.initializer[0])
    weight = graph.node("first").inputs[1]
    assert type(weight._values).__name__ == "ExternalValues"
    np.testing.assert_array_equal(array_of(weight), expected)


def test_external_data_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="too short: 500 bytes, 512 needed"):
        load_model(external_model(tmp_path, size=500))
    with pytest.raises(ModelError, match=r"x\.data is missing"):
        load_model(external_model(tmp_path, location="x.data"))
    for outside in ("../m.data", "a/../../m.data", "..\\m.data"):
        with pytest.raises(ModelError, match="leads out of the model's folder"):
            load_model(external_model(tmp_path, location=outside))
    for absolute in (str(tmp_path / "m.data"), "C:\\m.data"):
        with pytest.raises(ModelError, match="is not relative"):
            load_model(external_model(tmp_path, location=absolute))


# ---------------------------------------------------------------------------- repairs


def test_constants_that_are_listed_as_inputs(tmp_path: Path) -> None:
    model = parsed()
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 16]))
    graph = load_model(write(tmp_path, model), opset=21)
    assert [tensor.name for tensor in graph.inputs] == ["x"]
    assert graph.header.ir_version == 10


def test_second_node_of_a_name_is_renamed(tmp_path: Path) -> None:
    model = parsed()
    model.graph.node[1].name = "first"
    path = write(tmp_path, model)
    found = load_model(path, allow_quantized=True)
    assert [node.name for node in found.nodes] == ["first", "first_1"]
    with pytest.raises(ModelError, match="two nodes are called 'first'"):
        load_model(path)  # to be quantized, and onnxruntime would not run it


def test_two_nodes_of_a_name_in_a_body(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["": 21]> g (bool c, float[2] x) => (float[2] y) {
          [both] y = If (c) <
            then_branch = yes () => (float[2] t) { [one] n = Neg (x) [one] t = Neg (n) },
            else_branch = no () => (float[2] e) { [both] e = Identity (x) }
          >
        }
        """
    )
    with pytest.raises(ModelError, match="two nodes are called 'one'"):
        load_model(write(tmp_path, model))
    model.graph.node[0].attribute[0].g.node[1].name = "two"
    load_model(write(tmp_path, model))


def test_sparse_constants_become_dense(tmp_path: Path) -> None:
    model = parsed()
    del model.graph.initializer[:]
    values = numpy_helper.from_array(np.array([2.0, -3.0], np.float32), "w")
    places = numpy_helper.from_array(np.array([1, 17], np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [8, 16]))
    expected = np.zeros((8, 16), np.float32)
    expected[0, 1], expected[1, 1] = 2.0, -3.0
    graph = load_model(write(tmp_path, model))
    np.testing.assert_array_equal(array_of(graph.node("first").inputs[1]), expected)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2,3] x) => (float[2,3] z) { y = local.f(x) z = local.f(y) }
        <domain: "local", opset_import: ["" : 13]>
        f (a) => (b) { c = Relu(a) b = Neg(c) }
        """)
    graph = load_model(write(tmp_path, model), opset=21)
    assert [node.op for node in graph.nodes] == ["Relu", "Neg", "Relu", "Neg"]
    assert {o.domain for o in graph.header.opset_import} == {""}


# ---------------------------------------------------------------------------- opset upgrade


def old_model() -> onnx.ModelProto:
    """Return a model whose ops all changed between opset 11 and 21, strings in every place."""
    weight = np.random.default_rng(1).standard_normal((16, 8, 3, 3), dtype=np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", doc_string="a convolution"),
        helper.make_node("Squeeze", ["c"], ["s"], name="squeeze", axes=[0]),
        helper.make_node("Softmax", ["s"], ["p"], name="softmax", axis=1),
        helper.make_node("ReduceMean", ["p"], ["z"], name="mean", axes=[2], keepdims=0),
    ]
    for node in nodes:
        node.metadata_props.add(key="layer", value=f"layer of {node.name}")
    graph = helper.make_graph(
        nodes,
        "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 5, 5])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [16, 3])],
        [numpy_helper.from_array(weight, "w")],
        doc_string="graph doc",
    )
    graph.initializer[0].doc_string = "the weight"
    graph.quantization_annotation.add(tensor_name="c")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    model.metadata_props.add(key="author", value="somebody")
    model.graph.metadata_props.add(key="scope", value="whole")
    model.producer_name, model.doc_string = "maker", "model doc"
    return model


def test_upgrade_keeps_the_function_and_every_string(tmp_path: Path) -> None:
    before = write(tmp_path, old_model())
    graph = load_model(before, opset=21)
    after = tmp_path / "after.onnx"
    save_model(graph, after, metadata={"qpass.version": "1"})

    x = np.random.default_rng(2).standard_normal((1, 8, 5, 5), dtype=np.float32)
    # One rounding of the float32 softmax may move when it is split into Flatten and Reshape.
    np.testing.assert_allclose(run(after, x=x)[0], run(before, x=x)[0], rtol=1e-6)
    model = onnx.load(after)
    assert (model.opset_import[0].version, model.ir_version) == (21, 10)
    assert model.producer_name == "maker"
    assert model.doc_string == "model doc"
    assert model.graph.doc_string == "graph doc"
    assert read_metadata(after) == {"author": "somebody", "qpass.version": "1"}
    assert [(e.key, e.value) for e in model.graph.metadata_props] == [("scope", "whole")]
    layers = {n.name: n.metadata_props[0].value for n in model.graph.node if n.metadata_props}
    assert layers == {n: f"layer of {n}" for n in ("conv", "squeeze", "softmax", "mean")}
    assert model.graph.node[0].doc_string == "a convolution"
    assert not any("qpass-node" in node.doc_string for node in model.graph.node)
    assert model.graph.initializer[0].doc_string == "the weight"
    assert model.graph.quantization_annotation[0].tensor_name == "c"


def test_newer_models_keep_their_opset(tmp_path: Path) -> None:
    model = parsed()
    model.opset_import[0].version, model.ir_version = 22, 11
    graph = load_model(write(tmp_path, model), opset=17)
    assert (graph.opset, graph.header.ir_version) == (22, 11)


def test_conversions_that_would_change_the_meaning_are_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[1,4,3] x, float[2] s, float[2] b) => (float[1,4,3] y) {
          [norm] y = GroupNormalization<num_groups = 2>(x, s, b)
        }""")
    with pytest.raises(ModelError, match="from opset 18 to 21: GroupNormalization") as caught:
        load_model(write(tmp_path, model), opset=21)
    assert caught.value.where == "node norm"
