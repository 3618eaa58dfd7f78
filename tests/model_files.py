"""A small model as a file, with its weight inside or in a data file, and a run of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

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


def external_model(folder: Path, *, location: str = "m.data", size: int = 512) -> Path:
    model = parsed()
    (folder / "m.data").write_bytes(model.graph.initializer[0].raw_data[:size])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return write(folder, model)
