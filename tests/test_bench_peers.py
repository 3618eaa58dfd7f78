"""`tools/bench_peers.py`: what the contestants' peers are given."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # scripts, not a package

from bench_peers import narrow_weights, parse_contestant


def test_options_of_a_peer_of_4_bits() -> None:
    got = parse_contestant("quark,bits=4,adaround=true,iterations=300")
    assert (got.kind, got.argument, got.package) == ("quark", "", "quark")
    assert got.options == {"bits": 4, "adaround": True, "iterations": 300}


def linear_chain() -> onnx.ModelProto:
    """A convolution, a MatMul, two Gemms of either layout and a last MatMul, all of 4 channels."""
    random = np.random.default_rng(0)
    shapes = {
        "first": (4, 3, 1, 1),
        "middle": (4, 4),
        "rows": (4, 4),
        "columns": (4, 4),
        "last": (4, 4),
    }
    weights = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    weights["rows"][2] = 0.0
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"]),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "middle"], ["c"]),
        helper.make_node("Gemm", ["c", "rows"], ["d"], transB=1),
        helper.make_node("Gemm", ["d", "columns"], ["e"]),
        helper.make_node("MatMul", ["e", "last"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_peer_of_4_bits_keeps_first_and_last_and_has_15_codes() -> None:
    model = linear_chain()
    got = narrow_weights(model, 4)
    axes = {name: entries[0]["axis"] for name, entries in got.items()}
    assert axes == {"middle": 1, "rows": 0, "columns": 1}
    for tensor in model.graph.initializer:
        if tensor.name not in got:
            continue
        scales = np.array([entry["scale"] for entry in got[tensor.name]])
        by_channel = np.moveaxis(numpy_helper.to_array(tensor), axes[tensor.name], 0)
        codes = by_channel / scales[:, None]
        # AdaRound takes the code below or the one above: neither may lie beyond 7.
        assert np.floor(codes).min() >= -7
        assert np.ceil(codes).max() <= 7
        used = np.abs(by_channel).max(axis=1) > 0
        assert np.abs(codes).max(axis=1)[used].min() > 6.999
        assert all(int(entry["zero_point"]) == 0 for entry in got[tensor.name])


@pytest.mark.parametrize("bits", [1, 8])
def test_peer_has_no_grid_of_such_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} is not"):
        narrow_weights(linear_chain(), bits)
