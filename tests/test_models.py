"""What `models/README.md` promises of the shipped files, and what tests expect of `tests/data`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
DATA = ROOT / "tests" / "data"

SHIPPED = ("digits_cnn.onnx", "digits_vit.onnx", "digits_vit_un.onnx")
TINY = ("tiny_legacy.onnx", "tiny_dynamo.onnx")
ALL = [*(MODELS / name for name in SHIPPED), *(DATA / name for name in TINY)]
ROW = re.compile(r"^\| `(\S+\.onnx)` \| ([\d.]+)% \| (\d+) \| `([0-9a-f]{64})` \|$", re.MULTILINE)


def readme_rows() -> dict[str, tuple[float, int, str]]:
    """File name -> (accuracy in 0..1, bytes, sha256), as the README states them."""
    text = (MODELS / "README.md").read_text(encoding="utf-8")
    return {name: (float(a) / 100, int(size), sha) for name, a, size, sha in ROW.findall(text)}


def run(path: Path, image: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": image})[0])


def samples(name: str) -> dict[str, np.ndarray]:
    with np.load(MODELS / f"digits_{name}.npz") as file:
        return dict(file)


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_is_valid_and_self_contained(path: Path) -> None:
    onnx.checker.check_model(path, full_check=True)
    # Loaded from bytes there is no folder to look for external data in.
    model = onnx.load_model_from_string(path.read_bytes())
    external = [t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    assert external == []


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_interface_is_image_to_logits_with_dynamic_batch(path: Path) -> None:
    graph = onnx.load(path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["image", "logits"]
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        batch, *rest = value.type.tensor_type.shape.dim
        assert batch.dim_param
        assert all(dim.dim_value > 0 for dim in rest)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_holds_no_trace_of_the_machine(path: Path) -> None:
    content = path.read_bytes()
    found = [
        trace
        for trace in (b"/root", b"/home", b"/Users", b"C:\\", b"site-packages", b".py")
        if trace in content
    ]
    assert found == []


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_is_the_one_in_the_readme(name: str) -> None:
    content = (MODELS / name).read_bytes()
    _, size, sha256 = readme_rows()[name]
    assert len(content) == size
    assert size < 1_000_000
    assert hashlib.sha256(content).hexdigest() == sha256


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_reaches_its_accuracy(name: str) -> None:
    """Another engine or processor may flip one image that lies on a decision boundary."""
    test = samples("test")
    accuracy = float(np.mean(run(MODELS / name, test["image"]).argmax(axis=1) == test["labels"]))
    stated = readme_rows()[name][0]
    assert stated > 0.95
    # Half of the last digit of the README, and one image of the test set.
    assert abs(accuracy - stated) <= 0.00005 + 1 / len(test["labels"])


def test_samples_have_the_promised_form() -> None:
    calibration, test = samples("calibration"), samples("test")
    assert set(calibration) == {"image"}
    assert set(test) == {"image", "labels"}
    assert calibration["image"].shape == (128, 1, 8, 8)
    assert test["image"].shape == (449, 1, 8, 8)
    assert calibration["image"].dtype == test["image"].dtype == np.float32
    assert test["labels"].dtype == np.int64
    assert set(test["labels"].tolist()) == set(range(10))


def test_calibration_and_test_are_disjoint() -> None:
    """No image is in both, and none is twice in one: 128 + 449 different ones."""
    images = np.concatenate([samples("calibration")["image"], samples("test")["image"]])
    assert len({image.tobytes() for image in images}) == 577


def test_shipped_models_keep_the_structures_they_are_there_for() -> None:
    cnn, vit = ops(MODELS / "digits_cnn.onnx"), ops(MODELS / "digits_vit.onnx")
    assert cnn["Conv"] == cnn["BatchNormalization"] == 8
    assert cnn["Add"] == cnn["Clip"] == 2
    # Four blocks of qkv, q k^T, weights v, proj, and two of the perceptron.
    assert vit["MatMul"] == 24
    assert vit["Softmax"] == vit["Gelu"] == 4
    assert vit["LayerNormalization"] == 9
    twin = ops(MODELS / "digits_vit_un.onnx")
    assert twin["LayerNormalization"] == 0
    assert twin["Mul"] == vit["Mul"] + 9
    assert twin["Add"] == vit["Add"] + 9
    assert {op: twin[op] for op in ("MatMul", "Softmax", "Gelu")} == {
        op: vit[op] for op in ("MatMul", "Softmax", "Gelu")
    }


def test_tiny_exports_are_small_and_spelled_differently() -> None:
    legacy, dynamo = (DATA / name for name in TINY)
    assert max(legacy.stat().st_size, dynamo.stat().st_size) < 60_000
    chains = {"Erf", "Sqrt", "HardSigmoid", "BatchNormalization"}
    nodes = {"Gelu", "LayerNormalization", "HardSwish"}
    assert chains <= set(ops(legacy))
    assert not nodes & set(ops(legacy))
    assert nodes <= set(ops(dynamo))
    assert not chains & set(ops(dynamo))


def test_tiny_exports_compute_the_same_function() -> None:
    image = np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float32)
    legacy, dynamo = (run(DATA / name, image) for name in TINY)
    assert legacy.shape == (4, 5)
    # About 20 float32 operations in a row, each within a few units of 6e-8 of values near 1.
    np.testing.assert_allclose(legacy, dynamo, rtol=0, atol=1e-5)
    assert float(np.abs(legacy).max()) > 0.1  # the comparison is of numbers, not of zeros
