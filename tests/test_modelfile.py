"""Loading: every kind of broken file is named; saving: atomic, deterministic, memory-flat."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import ModelError
from qpass.graph import Graph, array_of
from qpass.modelfile import load_model, model_bytes, read_metadata, save_model
from qpass.skim import skim

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,8] x) => (float[N,16] z) {
  [first] y = MatMul(x, w)
  [second] z = Relu(y)
}
"""


def parsed(text: str = TEXT) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((8, 16), dtype=np.float32)
    if any("w" in node.input for node in model.graph.node):
        model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model


def write(folder: Path, model: onnx.ModelProto, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options).run(None, feeds)


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


def external_model(folder: Path, *, location: str = "m.data", size: int = 512) -> Path:
    model = parsed()
    (folder / "m.data").write_bytes(model.graph.initializer[0].raw_data[:size])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return write(folder, model)


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
    assert [node.name for node in load_model(write(tmp_path, model)).nodes] == ["first", "first_1"]


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


# ---------------------------------------------------------------------------- saving


def mixed_graph() -> Graph:
    """Return a graph with large and small constants of several dtypes, one of them int4."""
    random = np.random.default_rng(3)
    graph = Graph.from_text(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2,64] x) => (float[2,64] z) {
          [mm] y = MatMul(x, w)
          [dq] d = DequantizeLinear<axis = 1>(q, s)
          [mm4] t = MatMul(y, d)
          [add] z = Add(t, b)
        }""",
        w=random.standard_normal((64, 64), dtype=np.float32),
        b=random.standard_normal(64, dtype=np.float32),
        s=random.uniform(0.1, 1.0, 64).astype(np.float32),
        q=random.integers(-8, 8, (64, 64)).astype(ml_dtypes.int4),
    )
    fresh = graph.constant("w2", random.standard_normal((64, 64), dtype=np.float32))
    graph.set_input(graph.node("mm"), 1, fresh)
    return graph


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_saved_models_load_again_with_the_same_values(tmp_path: Path, external: bool) -> None:
    graph, path = mixed_graph(), tmp_path / "out.onnx"
    size = save_model(graph, path, external=external)
    assert size == model_bytes(path) == sum(f.stat().st_size for f in tmp_path.iterdir())
    onnx.checker.check_model(str(path), full_check=True)
    again = load_model(path, allow_quantized=True)
    for node in graph.nodes:
        for mine, other in zip(node.inputs, again.node(node.name).inputs, strict=True):
            if type(mine).__name__ == "Constant":
                np.testing.assert_array_equal(array_of(mine), array_of(other))
    x = np.random.default_rng(4).standard_normal((2, 64), dtype=np.float32)
    plain = write(tmp_path, graph.to_model(), "plain.onnx")
    np.testing.assert_array_equal(run(path, x=x)[0], run(plain, x=x)[0])


def test_external_constants_are_aligned_and_small_ones_inline(tmp_path: Path) -> None:
    save_model(mixed_graph(), tmp_path / "out.onnx", external=True)
    model = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    assert places["b"] == places["s"] == {}
    assert places["w2"]["location"] == "out.onnx.data"
    assert places["w2"]["length"] == str(64 * 64 * 4)
    assert places["q"]["length"] == str(64 * 64 // 2)  # int4 is packed
    assert all(int(place["offset"]) % 4096 == 0 for place in places.values() if place)


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_saving_is_deterministic(tmp_path: Path, external: bool) -> None:
    graph, path = mixed_graph(), tmp_path / "out.onnx"
    contents = []
    for order in (("b", "a"), ("a", "b")):
        save_model(graph, path, external=external, metadata={key: key for key in order})
        contents.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert contents[0] == contents[1]
    assert list(read_metadata(path)) == ["a", "b"]


def test_a_given_export_is_written(tmp_path: Path) -> None:
    graph, path = mixed_graph(), tmp_path / "out.onnx"
    model = graph.to_model()
    model.graph.doc_string = "changed by hand"
    save_model(graph, path, model=model)
    assert onnx.load(path) == model


def test_external_source_is_copied_inline_and_external(tmp_path: Path) -> None:
    source = external_model(tmp_path)
    graph = load_model(source)
    x = np.random.default_rng(5).standard_normal((3, 8), dtype=np.float32)
    target = tmp_path / "deep"
    target.mkdir()
    for external in (False, True):
        save_model(graph, target / "out.onnx", external=external)
        np.testing.assert_array_equal(run(target / "out.onnx", x=x)[0], run(source, x=x)[0])


def test_stale_data_file_goes_away(tmp_path: Path) -> None:
    graph, path = mixed_graph(), tmp_path / "out.onnx"
    save_model(graph, path, external=True)
    save_model(graph, path, external=False)
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]


def test_data_that_the_graph_reads_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    save_model(mixed_graph(), path, external=True)
    graph = load_model(path, allow_quantized=True)
    before = (tmp_path / "out.onnx.data").read_bytes()
    with pytest.raises(ModelError, match="still reads"):
        save_model(graph, path, external=True)
    save_model(graph, path, external=False)
    assert (tmp_path / "out.onnx.data").read_bytes() == before


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, path = mixed_graph(), tmp_path / "out.onnx"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("qpass.modelwriter._write_values", fail)
    for external in (False, True):
        with pytest.raises(OSError, match="disk full"):
            save_model(graph, path, external=external)
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]
    assert path.read_bytes() == b"old"


def test_missing_output_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        save_model(mixed_graph(), tmp_path / "absent" / "out.onnx")


MEMORY = """
import sys
from pathlib import Path
from qpass.inspect import inspect_model
from qpass.lint import lint
from qpass.modelfile import load_model, save_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

source, out = map(Path, sys.argv[1:])
load_model(out)  # warm: everything that is imported or cached on first use
before = peak()
lint(source)
inspect_model(source)
print(peak() - before)
graph = load_model(source, opset=21)
save_model(graph, out, external=True)
print(peak() - before)
"""


def big_model(folder: Path, *, inline: bool) -> Path:
    """Return a model of 96 MB weights: the data file is sparse, the inline form is zeros."""
    rows, columns, count = 4000, 2000, 3
    size = rows * columns * 4
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4000] x) => (float[N,2000] a, float[N,2000] b, float[N,2000] c) {
          a = MatMul(x, w0) b = MatMul(x, w1) c = MatMul(x, w2)
        }""")
    with (folder / "big.data").open("wb") as stream:
        stream.truncate(size * count)
    for index in range(count):
        tensor = model.graph.initializer.add(
            name=f"w{index}", data_type=TensorProto.FLOAT, dims=[rows, columns]
        )
        if inline:
            tensor.raw_data = bytes(size)
        else:
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="big.data")
            tensor.external_data.add(key="offset", value=str(index * size))
    return write(folder, model, "big.onnx")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("inline", [False, True], ids=["external", "inline"])
def test_memory_does_not_grow_with_the_weights(tmp_path: Path, inline: bool) -> None:
    source = big_model(tmp_path, inline=inline)
    out = write(tmp_path, parsed(), "out.onnx")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(out)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    looking, saving = (int(line) for line in done.stdout.split())
    # 96 MB of weights. Looking reads none of them; saving holds two pieces of 16 MiB. An inline
    # model is parsed once by loading (file and proto), but not copied again by saving.
    assert looking < 20e6
    assert saving < (250e6 if inline else 60e6)
