"""Every mistake is a clear error with exit code 2, and leaves all folders as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

import qpass
from qpass.cli import main
from qpass.errors import ModelError, RecipeError, SampleError, UserError
from tests.jobs import changed, listing, model_of, normal, optimize, saved, small_model

Edit = Callable[[onnx.ModelProto], None]


def quantized(model: onnx.ModelProto) -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="first_q")
    back = helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xdq"], name="first_dq")
    for name, value in (("s", np.float32(1)), ("z", np.uint8(0))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    model.graph.node[0].input[0] = "xdq"
    model.graph.node.insert(0, node)
    model.graph.node.insert(1, back)


def custom_op(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("acme", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Sparkle", "acme"


def twice_made(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "a"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (quantized, ["quantized already", "QuantizeLinear", "first_q", "qpass lint"]),
        (custom_op, ["Sparkle", "acme"]),
        (twice_made, ["'a'", "twice"]),
    ],
)
def test_models_refused(edit: Edit, words: list[str], tmp_path: Path) -> None:
    path = saved(changed(small_model(), edit), tmp_path)
    before = listing(tmp_path)
    with pytest.raises(ModelError) as caught:
        optimize(path, normal())
    assert [word for word in words if word not in str(caught.value)] == []
    assert listing(tmp_path) == before


def test_not_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ModelError, match="not an ONNX"):
        optimize(path, normal())


@pytest.mark.parametrize("name", ["none.onnx", "."])
def test_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        optimize(tmp_path / name, normal(), output=tmp_path / "q.onnx")
    assert listing(tmp_path) == {}


def test_external_data_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(small_model(), path, save_as_external_data=True, size_threshold=0, location="m.data")
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"m\.data is missing"):
        optimize(path, normal())
    assert listing(tmp_path).keys() == {"m.onnx"}


def test_no_quantizable_op(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[N,4] x) => (float[N,4] y) {
      a = Relu(x) y = Tanh(a) }"""
    path = saved(model_of(text), tmp_path)
    with pytest.raises(ModelError, match="no op of the model can be quantized"):
        optimize(path, normal((8, 4)))
    assert listing(tmp_path).keys() == {"m.onnx"}


def nan() -> Any:
    data = normal()
    data["x"][7, 1, 2, 3] = np.nan
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (nan(), ["x", "NaN", "sample 7"]),
        (normal((12, 3, 8)), ["x", "[12, 3, 8]", "3, 8, 8"]),
        (normal((12, 3, 8, 9)), ["x", "9]", "3, 8, 8"]),
        ({"x": normal()["x"].astype(np.int64)}, ["x", "int64", "float32"]),
        (normal(name="image"), ["x", "image"]),
        ([], ["no sample"]),
        ("none.npz", ["none.npz"]),
        ("nomodule:fn", ["nomodule"]),
        (None, ["no samples", "--data"]),
    ],
    ids=["nan", "rank", "shape", "dtype", "name", "empty", "file", "callable", "none"],
)
def test_samples_refused(data: Any, words: list[str], tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    before = listing(tmp_path)
    with pytest.raises(UserError) as caught:
        optimize(path, data)
    assert [word for word in words if word not in str(caught.value)] == []
    assert isinstance(caught.value, RecipeError if data is None else SampleError)
    assert listing(tmp_path) == before


def test_one_of_two_inputs_missing(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[N,16] x, float[N,16] u) => (float[N,16] y) { a = Add(x, u) y = MatMul(a, w) }"""
    with pytest.raises(SampleError, match="u"):
        optimize(saved(model_of(text, w=(16, 16)), tmp_path), normal((8, 16)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ["head*", "nothing*"]}, ["nothing*"]),
        ({"target": "npu"}, ["npu", "ort-x86"]),
        ({"precision": "int8"}, ["'int8'", "w8a8"]),
        ({"engines": ("tpu",)}, ["tpu", "openvino"]),
        ({"eval": "nomodule:fn"}, ["nomodule"]),
        ({"eval": "math"}, ["module:callable"]),
        ({"plan": "none.json"}, ["plan"]),
        ({"stats": "none.npz"}, ["none.npz"]),
        ({"output": "nowhere/q.onnx"}, ["no folder nowhere"]),
        ({"output": "m.onnx"}, ["overwrite the model"]),
        ({"recipe": "none.toml"}, ["none.toml"]),
        ({"output": "."}, [". is a folder"]),
        ({"output": "/proc/q.onnx"}, ["cannot write /proc/q.onnx"]),
        ({"output": "q" * 300}, ["cannot write qqq", "too long"]),
        ({"output": "q" * 240}, ["cannot write qqq", "too long"]),
        ({"report": "m.onnx"}, ["--report m.onnx: m.onnx is a file"]),
        ({"report": "m.onnx/out/r"}, ["--report m.onnx/out/r: m.onnx is a file"]),
        ({"report": "/proc/out"}, ["cannot write /proc/out"]),
        ({"cache": "m.onnx"}, ["--cache m.onnx: m.onnx is a file"]),
        ({"eval": ":"}, ["module:callable"]),
        ({"eval": "operator:add"}, ["operator:add cannot be called with one path"]),
        ({"eval": "math:sqrt"}, ["--eval math:sqrt failed for m.onnx: TypeError"]),
        ({"eval": "os.path:basename"}, ["os.path:basename returned 'm.onnx' for m.onnx"]),
        ({"eval": "sys:exit"}, ["--eval sys:exit failed for m.onnx: SystemExit"]),
    ],
)
def test_options_refused(
    options: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(small_model(), tmp_path)
    before = listing(tmp_path)
    with pytest.raises(RecipeError) as caught:
        optimize(Path("m.onnx"), normal(), **options)
    assert [word for word in words if word not in str(caught.value)] == []
    assert listing(tmp_path) == before


def test_plan_of_another_model_or_target(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text(qpass.plan(path).to_json())

    def rename(model: onnx.ModelProto) -> None:
        model.graph.node[0].name = "renamed"

    other = saved(changed(small_model(), rename), tmp_path, "other.onnx")
    with pytest.raises(RecipeError, match="c0"):
        optimize(other, normal(), plan=str(plan))
    with pytest.raises(RecipeError, match="target ort-x86"):
        optimize(path, normal(), plan=str(plan), target="qnn-htp")


def test_statistics_of_another_model_or_target(tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    stats = qpass.calibrate(path, data=normal(), output=tmp_path / "s.npz", target="ort-x86")
    other = saved(
        changed(small_model(), lambda m: m.metadata_props.add(key="a", value="b")),
        tmp_path, "other.onnx",
    )  # fmt: skip
    with pytest.raises(RecipeError, match="another model"):
        optimize(other, normal(), stats=str(stats))
    with pytest.raises(RecipeError, match="lack"):
        optimize(path, normal(), stats=str(stats), target="qnn-htp")


@pytest.mark.parametrize(
    "ask",
    [
        lambda path: qpass.compare(path, path, data=None),
        lambda path: qpass.verify(path, reference=path),
    ],
    ids=["compare", "verify"],
)
def test_a_comparison_needs_samples(ask: Callable[[Path], Any], tmp_path: Path) -> None:
    path = saved(small_model(), tmp_path)
    with pytest.raises(RecipeError, match="--data"):
        ask(path)


def test_models_that_share_no_layer(tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.name += "_b"

    path = saved(small_model(), tmp_path)
    other = saved(changed(small_model(), rename), tmp_path, "other.onnx")
    with pytest.raises(RecipeError, match="share no linear op"):
        qpass.compare(path, other, data=normal())


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "m.onnx", "--data", "none.npz", "--report", "out"],
        ["optimize", "m.onnx", "--data", "random", "--report", "m.onnx"],
        ["optimize", "m.onnx", "--data", "random", "-o", ""],
        ["optimize", "m.onnx", "--data", ":"],
        ["optimize", "m.onnx", "--data", "math:sqrt"],
        ["optimize", "none.onnx", "--data", "random"],
        ["optimize", "m.onnx", "--data", "random", "--target", "npu"],
        ["calibrate", "m.onnx", "--data", "random", "-o", "nowhere/s.npz"],
        ["calibrate", "m.onnx", "--data", "random", "-o", "s.npz", "--shard", "2/2"],
        ["merge", "none.npz", "-o", "s.npz"],
        ["plan", "m.onnx", "-o", "nowhere/plan.json"],
        ["plan", "m.onnx", "--keep", "nothing"],
        ["verify", "none.onnx"],
        ["verify", "m.onnx", "--reference", "m.onnx"],
        ["compare", "m.onnx", "none.onnx", "--data", "random"],
        ["lint", "none.onnx"],
        ["lint", "m.onnx", "--target", "npu"],
        ["inspect", "none.onnx"],
        ["targets", "npu"],
    ],
    ids=" ".join,
)
def test_exit_code_2_and_nothing_written(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(small_model(), tmp_path)
    before = {*tmp_path.rglob("*")}
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1]
    assert "error: " in result.stderr
    assert "Traceback" not in result.output
    assert {*tmp_path.rglob("*")} == before
