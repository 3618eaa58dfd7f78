"""Saving: atomic, deterministic, memory-flat, with constants inside or in a data file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto

from qpass.errors import ModelError
from qpass.graph import Graph, array_of
from qpass.modelfile import load_model, model_bytes, read_metadata, save_model
from tests.model_files import external_model, parsed, run, write


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
