"""The promises of `normalize`: N1 to N7, the same function, linear time, one form for exporters."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qpass.errors import InternalError, PostconditionError
from qpass.graph import Graph
from qpass.modelfile import load_model
from qpass.passes import normalize as package
from qpass.passes.normalize import check_normalized, normalize
from qpass.passes.normalize.folding import FoldResult
from tests import oracle
from tests.jobs import TINY
from tests.strategies import graphs

CHANNELS = 6
SHAPE = ["batch", CHANNELS, 4, 4]
# Ten folded layers, each with the rounding of its constants and of reordered sums; measured on
# 12,500 graphs: 1.4e-6.
TOLERANCE = 1e-5

Floats = Callable[..., str]


def layer_norm_nodes(x: str, y: str, floats: Floats, integers: Floats) -> list[tuple[Any, ...]]:
    axes = [integers(-1) for _ in range(2)]
    return [
        ("ReduceMean", [x, axes[0]], [f"{y}m"], {}),
        ("Sub", [x, f"{y}m"], [f"{y}c"], {}),
        ("Mul", [f"{y}c", f"{y}c"], [f"{y}q"], {}),
        ("ReduceMean", [f"{y}q", axes[1]], [f"{y}v"], {}),
        ("Add", [f"{y}v", floats(value=0.1)], [f"{y}e"], {}),
        ("Sqrt", [f"{y}e"], [f"{y}r"], {}),
        ("Div", [f"{y}c", f"{y}r"], [y], {}),
    ]


def gelu_nodes(x: str, y: str, floats: Floats, integers: Floats) -> list[tuple[Any, ...]]:
    return [
        ("Div", [x, floats(value=2**0.5)], [f"{y}d"], {}),
        ("Erf", [f"{y}d"], [f"{y}e"], {}),
        ("Add", [f"{y}e", floats(value=1)], [f"{y}s"], {}),
        ("Mul", [x, f"{y}s"], [f"{y}p"], {}),
        ("Mul", [f"{y}p", floats(value=0.5)], [y], {}),
    ]


def hard_swish_nodes(x: str, y: str, floats: Floats, integers: Floats) -> list[tuple[Any, ...]]:
    return [
        ("Add", [x, floats(value=3)], [f"{y}a"], {}),
        ("Clip", [f"{y}a", floats(value=0), floats(value=6)], [f"{y}c"], {}),
        ("Mul", [x, f"{y}c"], [f"{y}p"], {}),
        ("Div", [f"{y}p", floats(value=6)], [y], {}),
    ]


def reshape_nodes(x: str, y: str, floats: Floats, integers: Floats) -> list[tuple[Any, ...]]:
    return [
        ("Shape", [x], [f"{y}s"], {"end": 2}),
        ("Concat", [f"{y}s", integers(16)], [f"{y}t"], {"axis": 0}),
        ("Reshape", [x, f"{y}t"], [f"{y}f"], {}),
        ("Reshape", [f"{y}f", integers(-1, CHANNELS, 4, 4)], [y], {}),
    ]


def chunk_nodes(x: str, y: str, floats: Floats, integers: Floats) -> list[tuple[Any, ...]]:
    return [
        ("Slice", [x, integers(0), integers(2), integers(1)], [f"{y}l"], {}),
        ("Slice", [x, integers(2), integers(2**63 - 1), integers(1)], [f"{y}r"], {}),
        ("Concat", [f"{y}r", f"{y}l"], [y], {"axis": 1}),
    ]


def simple(op: str, **attributes: Any) -> Callable[..., list[tuple[Any, ...]]]:
    return lambda x, y, floats, integers: [(op, [x], [y], attributes)]


def pair(first: str, second: str, axis: int) -> Callable[..., list[tuple[Any, ...]]]:
    return lambda x, y, floats, integers: [
        (first, [x, integers(axis)], [f"{y}m"], {}),
        (second, [f"{y}m", integers(axis)], [y], {}),
    ]


def per_channel(op: str) -> Callable[..., list[tuple[Any, ...]]]:
    return lambda x, y, floats, integers: [(op, [x, floats(CHANNELS, 1, 1, low=0.5)], [y], {})]


PIECES: dict[str, Callable[..., list[tuple[Any, ...]]]] = {
    "identity": simple("Identity"),
    "dropout": simple("Dropout"),
    "cast": simple("Cast", to=1),
    "relu": simple("Relu"),
    "tanh": simple("Tanh"),
    "transpose": simple("Transpose", perm=[0, 1, 3, 2]),
    "unsqueeze": pair("Unsqueeze", "Squeeze", 1),
    "layer_norm": layer_norm_nodes,
    "gelu": gelu_nodes,
    "hard_swish": hard_swish_nodes,
    "reshape": reshape_nodes,
    "chunk": chunk_nodes,
    **{op: per_channel(op) for op in ("Mul", "Div", "Add", "Sub")},
    "from_constant": lambda x, y, floats, integers: [
        ("Neg", [floats(CHANNELS, 1, 1)], [f"{y}k"], {}),
        ("Sub", [f"{y}k", x], [y], {}),
    ],
    "conv": lambda x, y, floats, integers: [
        ("Conv", [x, floats(CHANNELS, 3, 1, 1)], [y], {"group": 2})
    ],
    "conv_transpose": lambda x, y, floats, integers: [
        ("ConvTranspose", [x, floats(CHANNELS, 3, 1, 1), floats(CHANNELS)], [y], {"group": 2})
    ],
    "matmul": lambda x, y, floats, integers: [("MatMul", [x, floats(4, 4)], [y], {})],
    "matmul_bias": lambda x, y, floats, integers: [
        ("MatMul", [x, floats(4, 4)], [f"{y}m"], {}),
        ("Add", [floats(4), f"{y}m"], [f"{y}a"], {}),
        ("Mul", [f"{y}a", floats(4)], [y], {}),
    ],
    "batch_norm": lambda x, y, floats, integers: [
        (
            "BatchNormalization",
            [x, *(floats(CHANNELS) for _ in range(3)), floats(CHANNELS, low=0.5)],
            [y],
            {},
        )
    ],
}


@st.composite
def exported(draw: st.DrawFn) -> Graph:
    """A chain of what exporters write, with a free batch, skips and second outputs."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    constants: list[TensorProto] = []

    def keep(values: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values), f"k{len(constants)}"))
        return str(constants[-1].name)

    def floats(*shape: int, low: float | None = None, value: float | None = None) -> str:
        if value is not None:
            return keep(np.float32(value))
        values = random.normal(0, 0.4, shape) if low is None else random.uniform(low, 2, shape)
        return keep(values.astype(np.float32))

    nodes, last = [], "x"
    outputs = []
    for number, kind in enumerate(draw(st.lists(st.sampled_from(sorted(PIECES)), max_size=10))):
        out = f"t{number}"
        for op, inputs, made, attributes in PIECES[kind](last, out, floats, lambda *v: keep([*v])):
            nodes.append(helper.make_node(op, inputs, made, **attributes))
        if draw(st.booleans()) and number % 3 == 2:
            nodes.append(helper.make_node("Add", [out, last], [f"{out}skip"]))
            out = f"{out}skip"
        if draw(st.integers(0, 5)) == 0:
            outputs.append(out)
        last = out
    nodes.append(helper.make_node("Neg", [last], ["y"]))
    types = [helper.make_tensor_value_info(n, TensorProto.FLOAT, SHAPE) for n in ["y", *outputs]]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)
    graph = helper.make_graph(nodes, "exported", [source], types, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return Graph(model)


def run(graph: Graph) -> dict[str, Any]:
    model = graph.to_model()
    onnx.checker.check_model(model, full_check=True)
    (source,) = graph.inputs
    shape = [size if isinstance(size, int) else 2 for size in source.shape]
    x = np.random.default_rng(9).standard_normal(shape).astype(np.float32)
    return oracle.ort_plain(model, {source.name: x})


@limits(max_examples=120)
@given(st.one_of(exported(), graphs()))
def test_random_graphs_keep_their_function_and_become_normal(graph: Graph) -> None:
    wanted = run(graph)
    normalize(graph)
    check_normalized(graph)
    # Inputs and constants are around 1, and a skip may take away what was added.
    assert oracle.relative_error(run(graph), wanted, floor=1.0) <= TOLERANCE
    text = graph.to_text()
    assert normalize(graph).changed == 0
    assert graph.to_text() == text


def test_every_engine_agrees_on_a_normalized_graph() -> None:
    graph = load_model(TINY["legacy"], opset=21)
    (source,) = graph.inputs
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    wanted = oracle.reference(graph.to_model(), {source.name: x})
    normalize(graph)
    for engine in oracle.ENGINES:
        got = engine(graph.to_model(), {source.name: x})
        # Fast erf and exp are exact to about 1e-6; the rest is the order of sums.
        assert oracle.relative_error(got, wanted) <= 2e-5, engine.__name__


def test_both_exporters_of_one_module_give_the_same_ops() -> None:
    counts = []
    for path in (TINY["legacy"], TINY["dynamo"]):
        graph = load_model(path, opset=21)
        normalize(graph)
        counts.append(Counter(node.op for node in graph.nodes))
    assert counts[0] == counts[1]
    assert (counts[0]["LayerNormalization"], counts[0]["Gelu"], counts[0]["HardSwish"]) == (2, 1, 1)
    assert counts[0]["BatchNormalization"] == counts[0]["Shape"] == counts[0]["Slice"] == 0


def ladder(nodes: int) -> Graph:
    """A residual chain: in every step constants to compute, a MatMul to fold into, a no-op."""
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    made: list[onnx.NodeProto] = []
    constants: list[TensorProto] = []
    x = "x"
    for step in range(nodes // 7):
        p = f"s{step}"
        constants.append(numpy_helper.from_array(weight, f"{p}w"))
        constants.append(numpy_helper.from_array(weight[0], f"{p}b"))
        made += [
            helper.make_node("Transpose", [f"{p}w"], [f"{p}t"]),
            helper.make_node("MatMul", [x, f"{p}t"], [f"{p}m"]),
            helper.make_node("Add", [f"{p}m", f"{p}b"], [f"{p}a"]),
            helper.make_node("Constant", [], [f"{p}c"], value_float=0.1),
            helper.make_node("Mul", [f"{p}a", f"{p}c"], [f"{p}s"]),
            helper.make_node("Identity", [f"{p}s"], [f"{p}i"]),
            helper.make_node("Add", [f"{p}i", x], [f"{p}y"]),
        ]
        x = f"{p}y"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4, 8]) for n in ("x", x)]
    graph = helper.make_graph(made, "ladder", ends[:1], ends[1:], constants)
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


def test_time_is_linear_in_the_number_of_nodes() -> None:
    """20,000 nodes take 2 to 4 s; here a fifth of that, with room for a busy machine."""
    graph = ladder(4000)
    begin = time.process_time()
    normalize(graph)
    assert time.process_time() - begin < 6.0
    assert Counter(node.op for node in graph.nodes) == {"MatMul": 571, "Add": 1142}


# ------------------------------------------------------------------ N1 to N7, one by one


def normal() -> Graph:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[2,3,4,4] x) => (float[2,3,4,4] y) {
        [one] a = Conv (x, w, b)
        [two] c = Add (a, x)
        [three] y = Conv (c, v, d)
    }"""
    weight, bias = np.ones((3, 3, 1, 1), np.float32), np.ones(3, np.float32)
    graph = Graph.from_text(text, w=weight, v=2 * weight, b=bias, d=bias)
    normalize(graph)
    return graph


def break_n1_nodes(graph: Graph) -> None:
    graph.node("two").name = "one"


def break_n1_tensors(graph: Graph) -> None:
    graph.node("one").outputs[0].name = "x"


def break_n2(graph: Graph) -> None:
    nodes = graph.nodes
    nodes[0], nodes[1] = nodes[1], nodes[0]


def break_n3(graph: Graph) -> None:
    add = graph.node("two")
    same = graph.variable("same", np.float32, [2, 3, 4, 4])
    graph.add(graph.make("Identity", [add.inputs[0]], [same], name="same"), before=add)
    graph.set_input(add, 0, same)


def break_n4(graph: Graph) -> None:
    graph.drop_input(graph.node("three"), 2)


def break_n5(graph: Graph) -> None:
    conv, add = graph.node("one"), graph.node("two")
    out = graph.variable("normed", np.float32, [2, 3, 4, 4])
    numbers = [graph.constant(name, np.ones(3, np.float32)) for name in "ghmv"]
    norm = graph.make("BatchNormalization", [conv.outputs[0], *numbers], [out], name="norm")
    graph.add(norm, after=conv)
    graph.set_input(add, 0, out)


def break_n6(graph: Graph) -> None:
    graph.set_input(graph.node("three"), 2, graph.node("one").inputs[2])


@pytest.mark.parametrize(
    "damage",
    [break_n1_nodes, break_n1_tensors, break_n2, break_n3, break_n4, break_n5, break_n6],
    ids=lambda damage: damage.__name__,
)
def test_a_broken_postcondition_is_named(damage: Callable[[Graph], None]) -> None:
    graph = normal()
    check_normalized(graph)
    damage(graph)
    number = damage.__name__.split("_")[1].upper()
    with pytest.raises(PostconditionError, match=f"^{number}: "):
        check_normalized(graph)
    if number not in ("N1", "N2"):  # those are no work of a fold
        normalize(graph)
        check_normalized(graph)


def test_n7_an_unknown_rank_is_told() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "com.example": 1]>
    g (float[2,3,4,4] x) => (float[2,3,4,4] y) {
        a = com.example.Custom (x)
        [conv] y = Conv (a, w, b)
    }"""
    weight = np.ones((3, 3, 1, 1), np.float32)
    graph = Graph.from_text(text, w=weight, b=np.ones(3, np.float32))
    report = normalize(graph)
    assert [(row.rule, row.where) for row in report.refusals] == [("N7 ranks", "conv")]


def test_folds_that_undo_each_other_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = normal()
    monkeypatch.setattr(package, "FOLDS", (lambda _: FoldResult(changed=1),))
    with pytest.raises(InternalError, match="does not come to an end"):
        normalize(graph)
