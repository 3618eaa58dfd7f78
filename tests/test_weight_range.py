"""`--weight-range` from the command line to the scales in the file, whatever rounds the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from qpass.api import optimize
from qpass.choose import percentile_weight_range, solve_weight_range, weight_range
from qpass.cli import main
from qpass.dtypes import storage_for
from qpass.qparams import TensorSpec, choose_qparams
from tests.jobs import normal, saved, small_model
from tests.planning import planned
from tests.small_models import from_text

# The weights of ort-x86 at 4 bits, where the three choices differ.
SPEC = TensorSpec(
    storage=storage_for(4, signed=True), bits=4, symmetric=False, granularity="per_channel", axis=0,
)  # fmt: skip
PRODUCT = (
    '<ir_version: 10, opset_import: ["": 21]> g (float[2,64] x) => (float[2,48] y) '
    "{ y = MatMul (x, w) }"
)
RANGES = {"minmax": weight_range, "mse": solve_weight_range, "percentile": percentile_weight_range}


@pytest.mark.parametrize("rounding", ["rtn", "gptq", "auto"])
@pytest.mark.parametrize("choice", RANGES)
def test_the_file_has_the_scales_of_the_choice(choice: str, rounding: str, tmp_path: Path) -> None:
    model = small_model()
    weight = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "w1")
    source, output = saved(model, tmp_path), tmp_path / "q.onnx"
    np.savez(tmp_path / "x.npz", **normal())
    arguments = [
        "optimize", source, "--data", tmp_path / "x.npz", "-o", output, "--engine", "ort",
        "--calibrate", "minmax", "--compensate", "none", "--no-equalize", "--round", rounding,
        "--precision", "w4a8", "--low-bit-edges", "--weight-range", choice,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    graph = onnx.load(output).graph
    made = {node.output[0]: node for node in graph.node}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    layer = next(node for node in graph.node if node.name == "c1")
    scale = constants[made[layer.input[1]].input[1]]
    wanted = {name: choose_qparams(SPEC, *own(weight, SPEC)).scale for name, own in RANGES.items()}
    np.testing.assert_array_equal(scale, wanted[choice])
    others = [name for name in RANGES if name != choice]
    assert all((wanted[name] != wanted[choice]).any() for name in others)


@pytest.mark.parametrize(
    ("precision", "asked", "searched"),
    [("w4", "auto", True), ("w3", "auto", True), ("w4", "minmax", False), ("w8", "auto", False)],
)
def test_weights_alone_are_searched_where_bits_are_few(
    precision: str, asked: str, searched: bool, tmp_path: Path
) -> None:
    """Without samples they are rounded to nearest, but not in ranges that one weight decides."""
    weight = np.random.default_rng(7).standard_normal((64, 48)).astype(np.float32)
    graph = from_text(PRODUCT, w=weight)
    edges = precision != "w8"
    spec = next(iter(planned(graph, precision=precision, low_bit_edges=edges).weights())).spec
    report = optimize(
        saved(graph.to_model(), tmp_path), precision=precision, low_bit_edges=edges,
        weight_range=asked, engines=("ort",),
    )  # fmt: skip
    stored = onnx.load(report.output).graph
    made = {node.output[0]: node for node in stored.node}
    dequantizer = next(node for node in stored.node if node.op_type == "DequantizeLinear")
    constants = {t.name: numpy_helper.to_array(t) for t in stored.initializer}
    name = dequantizer.input[1]
    scale = constants[made[name].input[0] if name in made else name]  # behind a Cast
    find = solve_weight_range if searched else weight_range
    np.testing.assert_array_equal(scale, choose_qparams(spec, *find(weight, spec)).scale)
    other = weight_range if searched else solve_weight_range
    assert (scale != choose_qparams(spec, *other(weight, spec)).scale).any()
