"""`tools/bench_peers.py`: what the contestants' peers are given."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # scripts, not a package

from bench_peers import Reader, narrow_weights, parse_contestant
from bench_peers_low_bits import end_nodes, name_nodes, narrow_inputs, store_narrow
from bench_samples import write_samples


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


@pytest.mark.parametrize(
    ("text", "kind", "argument", "package"),
    [
        ("aimet:enhanced,bits=4,adaround=true,iterations=300", "aimet", "enhanced", "aimet_onnx"),
        ("aimet,bits=3,seqmse=true,candidates=20", "aimet", "", "aimet_onnx"),
        ("ort:gptq,block=32", "ort", "gptq", None),
        ("nncf:int4,awq=true", "nncf", "int4", "nncf"),
    ],
)
def test_peers_of_few_bits_are_contestants(
    text: str, kind: str, argument: str, package: str | None
) -> None:
    got = parse_contestant(text)
    assert (got.kind, got.argument, got.package, got.batch) == (kind, argument, package, 1)


@pytest.mark.parametrize("text", ["aimet:entropy", "ort:awq", "nncf:int3", "quark:gptq"])
def test_peers_have_no_other_arguments(text: str) -> None:
    with pytest.raises(ValueError, match="is none of"):
        parse_contestant(text)


def test_weights_that_aimet_gets_narrow_are_those_between_the_ends() -> None:
    model = linear_chain()
    assert narrow_inputs(model, 4) == ["middle", "rows", "columns"]
    assert narrow_inputs(model, 8) == []


@pytest.mark.parametrize("bits", [1, 9])
def test_aimet_has_no_weights_of_such_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} is not"):
        narrow_inputs(linear_chain(), bits)


def test_narrow_ops_have_weights_of_their_own() -> None:
    model = linear_chain()
    model.graph.node.insert(3, helper.make_node("MatMul", ["c", "c"], ["e"]))
    assert "c" not in narrow_inputs(model, 4)


def test_weight_that_an_end_shares_stays_wide() -> None:
    model = linear_chain()
    model.graph.node[-1].input[1] = "middle"
    assert narrow_inputs(model, 4) == ["rows", "columns"]


def test_ends_are_named_by_their_ops() -> None:
    model = linear_chain()
    name_nodes(model)
    assert end_nodes(model) == [model.graph.node[0].name, model.graph.node[-1].name]
    del model.graph.node[1:]
    assert len(end_nodes(model)) == 1


def test_names_are_given_where_there_are_none() -> None:
    model = linear_chain()
    model.graph.node[2].name = "kept"
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert names[2] == "kept"
    assert all(names)
    assert len(set(names)) == len(names)


def test_reader_begins_again_and_can_be_copied_before_it_is_read(tmp_path: Path) -> None:
    samples = [{"x": np.full((1, 2), value, np.float32)} for value in range(3)]
    reader = Reader(write_samples(tmp_path / "samples.npz", samples, 3))
    copied = copy.deepcopy(reader)  # what onnxruntime's GPTQ does
    for one in (reader, copied):
        got = [feeds["x"][0, 0] for feeds in iter(one.get_next, None)]
        assert got == [0, 1, 2]
    assert len(list(copied)) == 3
    reader.rewind()
    first = reader.get_next()
    assert first is not None
    assert first["x"][0, 0] == 0


@dataclasses.dataclass
class Encoding:
    """What AIMET keeps for a channel."""

    bw: int
    delta: float
    offset: float
    min: float = 0.0
    max: float = 0.0


class Quantizer:
    """As much of AIMET's quantizer of weights as is used, with codes -4 to 3."""

    enabled = True
    use_symmetric_encodings = True
    data_type = "int"

    def __init__(self, bitwidth: int) -> None:
        self.bitwidth = bitwidth
        self.encodings = [Encoding(bitwidth, 0.5, -(2.0 ** (bitwidth - 1)))]

    def quantize_dequantize(self, weight: np.ndarray) -> np.ndarray:
        return np.clip(np.round(weight / 0.5), -4, 3) * 0.5

    def get_encodings(self) -> list[Encoding]:
        return self.encodings

    def update_quantizer_and_load_encodings(self, encodings: list[Encoding], *_: Any) -> None:
        self.bitwidth = encodings[0].bw


def test_three_bits_are_stored_in_four_with_the_same_values() -> None:
    weight = np.array([[-9.0, -0.6, 0.2, 9.0]], np.float32)
    tensors = [numpy_helper.from_array(weight, name) for name in ("narrow", "kept")]
    model = helper.make_model(helper.make_graph([], "weights", [], [], tensors))
    narrow, kept = Quantizer(3), Quantizer(8)
    sim = SimpleNamespace(
        qc_quantize_op_dict={"narrow": narrow, "kept": kept, "activation": Quantizer(3)},
        param_names=["narrow", "kept"],
        model=SimpleNamespace(model=model),
    )
    assert store_narrow(sim, 3) == 1
    written = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(written["narrow"], [[-2.0, -0.5, 0.0, 1.5]])
    np.testing.assert_array_equal(written["kept"], weight)
    assert (narrow.bitwidth, kept.bitwidth) == (4, 8)
    assert narrow.encodings == [Encoding(4, 0.5, -8.0, min=-4.0, max=3.5)]


def test_four_bits_are_left_as_they_are() -> None:
    quantizer = Quantizer(4)
    sim = SimpleNamespace(qc_quantize_op_dict={"w": quantizer}, param_names=["w"])
    assert store_narrow(sim, 4) == 1
    assert quantizer.encodings == [Encoding(4, 0.5, -8.0)]
