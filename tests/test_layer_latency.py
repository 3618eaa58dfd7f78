"""Layers alone: what is cut out, what is timed once, and when times say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from qpass import layer_latency
from qpass.calibrate import collect, input_specs, open_samples
from qpass.choose import choose_qtable
from qpass.errors import RecipeError
from qpass.evidence import taps_of
from qpass.graph import Graph
from qpass.layer_latency import NOISE, TIE, Variant, engine_of, level_off, signature, time_layers
from qpass.planner import plan as make_plan
from qpass.program import Policy, Precision
from qpass.quantize import build_quantized
from qpass.targets import TARGETS
from qpass.verify import available_engines, open_engine, read_back
from qpass.verify.engines import EngineName
from tests.jobs import model_of

TARGET = TARGETS["ort-x86-avx2"]  # its times say something on any x86
W8A8 = Precision(weight=8, activation=8)
CHAIN = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,16,8,8] x) => (float[N,16,8,8] y, float[N,16,8,8] c) {
  [one] a = Conv<pads = [1,1,1,1]>(x, w1)
  [relu] b = Relu(a)
  [two] c = Conv<pads = [1,1,1,1]>(b, w2)
  [three] d = Conv<pads = [1,1,1,1]>(c, w3)
  [four] e = Conv<pads = [1,1,1,1]>(d, w4)
  [last] y = Conv<pads = [1,1,1,1]>(e, w5)
}
"""
PRODUCT = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,6,32] x) => (float[N,6,48] y) {
  [norm] a = Softmax(x)
  [product] b = MatMul(a, w)
  [head] y = Sigmoid(b)
}
"""
Pieces = Sequence[Any]


def graph_of(text: str, **constants: Any) -> Graph:
    graph = Graph(model_of(text, **constants))
    graph.infer_shapes()
    return graph


def chain() -> Graph:
    return graph_of(CHAIN, **{f"w{i}": (16, 16, 3, 3) for i in range(1, 6)})


def variant(graph: Graph, precision: Precision, x: np.ndarray) -> Variant:
    """The graph with all layers at one precision, calibrated on one sample."""
    policy = Policy(precision=precision, low_bit_edges=True)
    plan = make_plan(graph, TARGET, policy)
    model = graph.to_model()
    stats = collect(model, taps_of(graph, plan), open_samples([{"x": x}], input_specs(model))).stats
    table = choose_qtable(graph, plan, stats, method="minmax")
    quantized, _ = build_quantized(graph, plan, table, TARGET, policy)
    return Variant(graph=quantized, plan=plan, qparams=table.qparams, config={})


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Pieces]:
    """The pieces of each layer that was timed; every level takes one millisecond more."""
    seen: list[Pieces] = []

    def record(pieces: Pieces, engine: str, threads: int) -> tuple[list[float], float]:
        seen.append(pieces)
        return [1.0 + number for number in range(len(pieces))], 1.0

    monkeypatch.setattr(layer_latency, "_time", record)
    return seen


def ops_of(piece: Any) -> list[str]:
    return [n.op_type for n in piece.model.graph.node if n.op_type != "DequantizeLinear"]


def fed(piece: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(array.dtype.name, array.shape) for array in piece.feeds.values()]


def test_layers_are_cut_between_the_integers_that_neighbours_hand_on(timed: list[Pieces]) -> None:
    graph, x = chain(), normal(1, 16, 8, 8)
    levels = {name: [W8A8, None] for name in ("one", "two", "three")}
    found = time_layers(graph, levels, [variant(graph, W8A8, x)], {"x": x}, "ort")
    assert {name: own.tolist() for name, own in found.milliseconds.items()} == {
        name: [1.0, 2.0] for name in levels
    }
    (stem, plain_stem), (two, plain_two) = timed
    shape = (1, 16, 8, 8)
    # Nothing in front of the stem makes integers: the Q is its own. Its Relu is in the Q behind.
    assert ops_of(stem) == ["QuantizeLinear", "Conv", "Relu", "QuantizeLinear"]
    assert fed(stem) == [("float32", shape)]
    assert ops_of(two) == ["Conv", "QuantizeLinear"]
    assert fed(two) == [("uint8", shape)]
    assert (ops_of(plain_stem), ops_of(plain_two)) == (["Conv", "Relu"], ["Conv"])
    assert fed(plain_two) == [("float32", shape)]
    # The integers are those of the activations.
    (stored,) = two.feeds.values()
    assert (stored.min(), stored.max()) == (0, 255)


@pytest.mark.parametrize("engine", [e for e in available_engines() if e != "reference"])
def test_pieces_fuse_as_in_the_model(
    engine: EngineName, timed: list[Pieces], tmp_path: Path
) -> None:
    graph, x = chain(), normal(1, 16, 8, 8)
    time_layers(graph, {"two": [W8A8, None]}, [variant(graph, W8A8, x)], {"x": x}, engine)
    found = []
    for number, piece in enumerate(timed[0]):
        path = tmp_path / f"piece{number}.onnx"
        onnx.save(piece.model, path)
        ops = read_back(engine, path, tmp_path).ops
        found.append([op.precision for op in ops if "Conv" in op.op and op.op != "Convert"])
        assert not {"QuantizeLinear", "DequantizeLinear", "FakeQuantize"} & {op.op for op in ops}
    assert found == [["integer"], ["float"]]


def test_an_output_of_the_model_that_is_read_as_well(timed: list[Pieces]) -> None:
    """`c` keeps its name behind the DQ; the piece ends in the integers all the same."""
    graph, x = chain(), normal(1, 16, 8, 8)
    time_layers(graph, {"two": [W8A8, None]}, [variant(graph, W8A8, x)], {"x": x}, "ort")
    piece = timed[0][0]
    (end,) = piece.model.graph.output
    assert piece.model.graph.node[-1].op_type == "QuantizeLinear"
    assert list(piece.model.graph.node[-1].output) == [end.name]


def test_a_product_has_a_q_of_its_own_and_makes_float(timed: list[Pieces], tmp_path: Path) -> None:
    graph, x = graph_of(PRODUCT, w=(32, 48)), normal(2, 6, 32)
    time_layers(graph, {"product": [W8A8, None]}, [variant(graph, W8A8, x)], {"x": x[:1]}, "ort")
    piece, plain = timed[0]
    assert ops_of(piece) == ["QuantizeLinear", "MatMul"]
    assert fed(piece) == fed(plain) == [("float32", (1, 6, 32))]
    onnx.save(piece.model, tmp_path / "p.onnx")
    (output,) = open_engine("ort", tmp_path / "p.onnx").run(piece.feeds)
    assert output.shape == (1, 6, 48)


def test_integers_below_eight_bits_get_a_q_of_their_own(timed: list[Pieces]) -> None:
    graph, x = chain(), normal(1, 16, 8, 8)
    low = Precision(weight=4, activation=4)
    time_layers(graph, {"four": [low, None]}, [variant(graph, low, x)], {"x": x}, "ort")
    assert fed(timed[0][0]) == [("float32", (1, 16, 8, 8))]


def test_layers_that_are_alike_are_timed_once(timed: list[Pieces]) -> None:
    graph, x = chain(), normal(1, 16, 8, 8)
    levels = {name: [W8A8, None] for name in ("one", "two", "three", "four", "last")}
    told: list[tuple[str, int, int | None]] = []
    time_layers(
        graph, levels, [variant(graph, W8A8, x)], {"x": x}, "ort",
        progress=lambda *state: told.append(state),
    )  # fmt: skip
    assert len(timed) == 2  # the stem, and four that are alike
    assert told == [("layer latency", i + 1, 5) for i in range(5)]


def conv(shape: tuple[int, ...], pads: int = 1, name: str = "y", dtype: str = "float") -> bytes:
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g ({dtype}[1,16,8,8] x{name}) => ({dtype}[N,M,H,W] {name}) {{
      {name} = Conv<pads = [{pads},{pads},{pads},{pads}]>(x{name}, w) }}"""
    model = onnx.parser.parse_model(text)
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    return signature(model)


def test_a_signature_is_of_ops_attributes_types_and_shapes() -> None:
    base = conv((16, 16, 3, 3))
    assert conv((16, 16, 3, 3), name="other") == base  # neither names nor weights
    others = [
        conv((8, 16, 3, 3)),
        conv((16, 16, 3, 3), pads=0),
        conv((16, 16, 3, 3), dtype="float16"),
    ]
    assert len({base, *others}) == 4


def test_wiring_is_in_the_signature() -> None:
    def of(second: str) -> bytes:
        text = f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[4] x) => (float[4] y) {{ a = Neg(x) y = Add(a, {second}) }}"""
        return signature(onnx.parser.parse_model(text))

    assert of("a") != of("x")


def test_times_that_differ_by_noise_are_equal_and_stay_so_in_sums() -> None:
    near = 1.0 + 0.9 * TIE
    low, eight, plain = level_off([near * 0.3, 0.3, 2.0])
    assert low == eight
    assert plain == 2.0
    assert eight == pytest.approx(0.3, abs=2.0**-21)
    # The most accurate one is the yardstick, not a chain of neighbours.
    first, second, third = level_off([near**2, near, 1.0])
    assert second == third == 1.0
    assert first == pytest.approx(near**2, abs=2.0**-21)
    # 0.1 + 0.2 + 0.3 depends on the order in float64; on the grid it does not.
    numbers = level_off([0.1, 0.2, 0.3])
    assert len({float(sum(order)) for order in permutations(numbers)}) == 1


def test_no_time_is_zero_or_less() -> None:
    """A piece as quick as the call around it."""
    assert (level_off([-0.5, 0.0, 1.0]) > 0).all()


@pytest.mark.parametrize(("spread", "noisy"), [(NOISE - 0.01, ()), (NOISE + 0.01, ("two",))])
def test_the_call_is_not_counted_and_noise_is_told(
    spread: float, noisy: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def measure(engines: Sequence[Any], feeds: Any, **options: Any) -> list[SimpleNamespace]:
        asked.append(options)
        for engine in engines:
            assert engine.run(feeds)
        return [
            SimpleNamespace(median_ms=t, quartiles_ms=(t / 2, t / 2 * spread))
            for t in (0.25, 1.25, 3.0)
        ]

    monkeypatch.setattr(layer_latency, "measure_interleaved", measure)
    graph, x = chain(), normal(1, 16, 8, 8)
    made = variant(graph, W8A8, x)
    found = time_layers(graph, {"two": [W8A8, None]}, [made], {"x": x}, "ort")
    assert found.milliseconds["two"].tolist() == [1.0, 2.75]
    assert found.noisy == noisy
    assert asked[0]["seconds"] == layer_latency.SECONDS  # a budget, and few rounds beyond it
    assert asked[0]["min_runs"] == layer_latency.FEWEST


def test_a_large_layer_takes_longer() -> None:
    """256 times the products: at least four times as long, whatever else the machine does."""
    found = {}
    for side in (8, 128):
        text = CHAIN.replace("8,8]", f"{side},{side}]")
        graph = graph_of(text, **{f"w{i}": (16, 16, 3, 3) for i in range(1, 6)})
        x = normal(1, 16, side, side)
        made = variant(graph, W8A8, x)
        times = time_layers(graph, {"two": [W8A8, None]}, [made], {"x": x}, "ort")
        found[side] = times.milliseconds["two"]
    assert (found[128] > 4 * found[8]).all()


@pytest.mark.parametrize("target", ["tensorrt", "qnn-htp", "vitis-xint8"])
def test_targets_without_an_engine_here_are_refused(target: str) -> None:
    with pytest.raises(RecipeError, match=f"{target} cannot be timed") as caught:
        engine_of(TARGETS[target])
    assert "--mixed-cost size" in str(caught.value)


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_latency, "available_engines", lambda: ("ort", "reference"))
    with pytest.raises(RecipeError, match=r"pip install qpass\[openvino\]"):
        engine_of(TARGETS["openvino-avx2"])
    assert engine_of(TARGET) == "ort"


def test_a_cpu_that_is_not_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_latency, "shows_speed", lambda target: not target.needs_vnni)
    with pytest.raises(RecipeError, match="--target ort-x86-avx2"):
        engine_of(TARGETS["ort-x86"])
    assert engine_of(replace(TARGET, needs_vnni=False)) == "ort"
