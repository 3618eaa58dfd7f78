"""Every op of the executor gives what onnxruntime gives without optimizations."""

from __future__ import annotations

import re
import weakref
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

from qpass.errors import UserError  # noqa: E402
from qpass.graph import Graph  # noqa: E402
from qpass.torch.executor import Executor, UnsupportedOpError  # noqa: E402
from qpass.torch.executor_ops import OPS  # noqa: E402

pytestmark = pytest.mark.torch
Array = np.ndarray[Any, Any]
QUANTIZE = "q = QuantizeLinear (x, step, u128)\n"
IMAGE, SERIES, TOKENS = "float[2, 4, 7, 6] x", "float[2, 4, 9] x", "float[2, 5, 8] x"

# op, input, body; constants are made from their names, see `constants_of`.
CASES: tuple[tuple[str, str, str], ...] = (
    ("Abs", TOKENS, "y = Abs (x)"),
    ("Add", TOKENS, "y = Add (x, v8)"),
    ("AveragePool", IMAGE, "y = AveragePool <kernel_shape = [3, 2], strides = [2, 1]> (x)"),
    ("AveragePool", IMAGE, "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 0, 1]> (x)"),
    (
        "AveragePool",
        IMAGE,
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 0, 1, 1], count_include_pad = 1> (x)",
    ),
    (
        "AveragePool",
        IMAGE,
        "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)",
    ),
    (
        "AveragePool",
        IMAGE,
        'y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER"> (x)',
    ),
    ("BatchNormalization", IMAGE, "y = BatchNormalization <epsilon = 0.01> (x, v4, b4, m4, p4)"),
    ("Cast", TOKENS, "i = Cast <to = 7> (x)\ny = Cast <to = 1> (i)"),
    ("Clip", TOKENS, "y = Clip (x, low, high)"),
    ("Clip", TOKENS, "y = Clip (x, , high)"),
    ("Concat", TOKENS, "y = Concat <axis = 1> (x, x)"),
    ("Conv", IMAGE, "y = Conv <pads = [1, 0, 1, 2], strides = [2, 1]> (x, c3x3, b6)"),
    ("Conv", IMAGE, "y = Conv <dilations = [2, 1], pads = [1, 1, 1, 1]> (x, c3x3)"),
    ("Conv", IMAGE, "y = Conv <group = 4, pads = [1, 1, 1, 1]> (x, d3x3, v4)"),
    ("Conv", IMAGE, 'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, c3x3, b6)'),
    ("Conv", IMAGE, 'y = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (x, c3x3, b6)'),
    ("Conv", IMAGE, 'y = Conv <auto_pad = "VALID"> (x, c3x3, b6)'),
    ("Conv", SERIES, "y = Conv <pads = [1, 2]> (x, c3, b6)"),
    ("ConvTranspose", IMAGE, "y = ConvTranspose <strides = [2, 2]> (x, t3x3, b6)"),
    (
        "ConvTranspose",
        IMAGE,
        "y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 0]>"
        " (x, t3x3)",
    ),
    ("Cos", TOKENS, "y = Cos (x)"),
    ("Div", TOKENS, "y = Div (x, p8)"),
    ("DequantizeLinear", TOKENS, QUANTIZE + "y = DequantizeLinear (q, step, u128)"),
    (
        "DequantizeLinear",
        TOKENS,
        "q = QuantizeLinear <axis = 2> (x, p8, z8)\nr = Relu (x)\n"
        "y = DequantizeLinear <axis = 2> (q, p8, z8)",
    ),
    ("Elu", TOKENS, "y = Elu <alpha = 0.7> (x)"),
    ("Equal", TOKENS, "e = Equal (x, v8)\ny = Cast <to = 1> (e)"),
    ("Erf", TOKENS, "y = Erf (x)"),
    ("Exp", TOKENS, "y = Exp (x)"),
    ("Expand", "float[2, 1, 8] x", "y = Expand (x, i1_3_1)"),
    ("Flatten", IMAGE, "y = Flatten <axis = 2> (x)"),
    ("Flatten", IMAGE, "y = Flatten <axis = -1> (x)"),
    ("Gather", TOKENS, "y = Gather <axis = 1> (x, i0_2_n1)"),
    (
        "Gather",  # a single size, as exported models reshape by
        TOKENS,
        "s = Shape (x)\nn = Gather (s, last)\nu = Unsqueeze (n, i0)\ny = Expand (one, u)",
    ),
    ("Gelu", TOKENS, "y = Gelu (x)"),
    ("Gelu", TOKENS, 'y = Gelu <approximate = "tanh"> (x)'),
    ("Gemm", "float[5, 8] x", "y = Gemm <transB = 1, beta = 0.5> (x, w3x8, v3)"),
    ("Gemm", "float[8, 5] x", "y = Gemm <transA = 1, alpha = 2.0> (x, w8x3)"),
    ("GlobalAveragePool", IMAGE, "y = GlobalAveragePool (x)"),
    ("GlobalMaxPool", IMAGE, "y = GlobalMaxPool (x)"),
    ("HardSigmoid", TOKENS, "y = HardSigmoid <alpha = 0.3, beta = 0.4> (x)"),
    ("HardSwish", TOKENS, "y = HardSwish (x)"),
    ("Identity", TOKENS, "y = Identity (x)"),
    ("InstanceNormalization", IMAGE, "y = InstanceNormalization (x, v4, b4)"),
    ("LayerNormalization", TOKENS, "y = LayerNormalization <epsilon = 0.01> (x, v8, b8)"),
    ("LayerNormalization", TOKENS, "y = LayerNormalization <axis = 1> (x, w5x8)"),
    ("LeakyRelu", TOKENS, "y = LeakyRelu <alpha = 0.2> (x)"),
    ("Log", TOKENS, "a = Abs (x)\ny = Log (a)"),
    ("LogSoftmax", TOKENS, "y = LogSoftmax <axis = 1> (x)"),
    ("MatMul", TOKENS, "y = MatMul (x, w8x3)"),
    ("Max", TOKENS, "y = Max (x, v8, low)"),
    ("MaxPool", IMAGE, "y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 0]> (x)"),
    (
        "MaxPool",
        IMAGE,
        "y = MaxPool <kernel_shape = [2, 3], strides = [2, 2], ceil_mode = 1> (x)",
    ),
    ("MaxPool", SERIES, "y = MaxPool <kernel_shape = [2], dilations = [3]> (x)"),
    ("Min", TOKENS, "y = Min (x, v8)"),
    ("Mish", TOKENS, "y = Mish (x)"),
    ("Mul", TOKENS, "y = Mul (x, v8)"),
    ("Neg", TOKENS, "y = Neg (x)"),
    ("PRelu", IMAGE, "y = PRelu (x, s4x1x1)"),
    ("Pad", IMAGE, "y = Pad (x, i0_0_1_2_0_0_2_0, low)"),
    ("Pad", IMAGE, 'y = Pad <mode = "reflect"> (x, i0_0_1_2_0_0_2_0)'),
    ("Pad", IMAGE, 'y = Pad <mode = "edge"> (x, i1_2_2_0, , i2_n1)'),
    ("Pow", TOKENS, "y = Pow (x, two)"),
    ("QuantizeLinear", TOKENS, QUANTIZE + "i = Cast <to = 7> (q)\ny = Cast <to = 1> (i)"),
    ("QuantizeLinear", TOKENS, "q = QuantizeLinear (x, step)\ny = DequantizeLinear (q, step)"),
    (
        "QuantizeLinear",
        TOKENS,
        "q = QuantizeLinear (x, step)\ni = Cast <to = 7> (q)\ny = Cast <to = 1> (i)",
    ),
    ("RMSNormalization", TOKENS, "y = RMSNormalization <epsilon = 0.01> (x, v8)"),
    ("Reciprocal", TOKENS, "e = Exp (x)\ny = Reciprocal (e)"),
    ("ReduceMax", TOKENS, "y = ReduceMax <keepdims = 0> (x, i1)"),
    ("ReduceMean", TOKENS, "y = ReduceMean (x, in1)"),
    ("ReduceMean", TOKENS, "y = ReduceMean <keepdims = 0> (x)"),
    ("ReduceSum", TOKENS, "y = ReduceSum (x, i0_2)"),
    ("Relu", TOKENS, "y = Relu (x)"),
    ("Reshape", TOKENS, "y = Reshape (x, i0_n1_4)"),
    ("Selu", TOKENS, "y = Selu (x)"),
    ("Shape", TOKENS, "s = Shape <start = 1> (x)\ny = Expand (one, s)"),
    ("Sigmoid", TOKENS, "y = Sigmoid (x)"),
    ("Sin", TOKENS, "y = Sin (x)"),
    ("Slice", TOKENS, "y = Slice (x, i1_n6, i9_8, i1_2, i2_3)"),
    ("Softmax", TOKENS, "y = Softmax <axis = 1> (x)"),
    ("Softplus", TOKENS, "y = Softplus (x)"),
    ("Softsign", TOKENS, "y = Softsign (x)"),
    ("Split", TOKENS, "a, b = Split <axis = 2> (x, i3_5)\ny = Concat <axis = 2> (b, a)"),
    ("Split", TOKENS, "a, b = Split <axis = 1, num_outputs = 2> (x)\ny = Concat <axis = 1> (b, a)"),
    ("Sqrt", TOKENS, "a = Abs (x)\ny = Sqrt (a)"),
    ("Squeeze", "float[2, 1, 8] x", "y = Squeeze (x, i1)"),
    ("Sub", TOKENS, "y = Sub (v8, x)"),
    ("Swish", TOKENS, "y = Swish <alpha = 1.5> (x)"),
    ("Tanh", TOKENS, "y = Tanh (x)"),
    ("Transpose", TOKENS, "y = Transpose <perm = [0, 2, 1]> (x)"),
    ("Transpose", TOKENS, "y = Transpose (x)"),
    ("Unsqueeze", TOKENS, "y = Unsqueeze (x, i0_n1)"),
    ("Where", TOKENS, "e = Equal (x, x)\ny = Where (e, x, v8)"),
)  # fmt: skip


def constants_of(body: str) -> dict[str, Array]:
    """Make a constant for each name: `w3x8` is 3 by 8, `i1_n2` the integers 1 and -2."""
    random = np.random.default_rng(3)
    made: dict[str, Array] = {
        "one": np.ones(1, np.float32),
        "low": np.array(-0.4, np.float32),
        "high": np.array(0.5, np.float32),
        "two": np.array(2.0, np.float32),
        "step": np.array(2.0**-6, np.float32),
        "u128": np.array(128, np.uint8),
        "last": np.array(-1, np.int64),
        "z8": np.arange(-4, 4).astype(np.int8),
    }
    for token in re.findall(r"[a-z]n?[0-9][0-9nx_]*", body):
        kind, sizes = token[0], token[1:]
        if kind == "i":
            made[token] = np.array([int(n) for n in sizes.replace("n", "-").split("_")], np.int64)
        elif kind in "bcdmpstvw":
            shape = [int(size) for size in sizes.split("x")]
            shape = {"c": [6, 4, *shape], "d": [4, 1, *shape], "t": [4, 6, *shape]}.get(kind, shape)
            values = random.standard_normal(shape)
            made[token] = (np.abs(values) + 0.5 if kind == "p" else values).astype(np.float32)
    return {name: value for name, value in made.items() if re.search(rf"\b{name}\b", body)}


def graph_of(inputs: str, body: str, opset: int = 21) -> Graph:
    header = f'<ir_version: 10, opset_import: ["": {opset}]>'
    text = f"{header} g ({inputs}) => (float y) {{ {body} }}"
    return Graph.from_text(text, **constants_of(body))


def onnxruntime(graph: Graph, x: Array) -> Array:
    """Node by node, without optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    model = graph.to_model()
    model.graph.output[0].type.tensor_type.ClearField("shape")  # the text says nothing of it
    return np.asarray(
        ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]
    )


def input_of(inputs: str, seed: int = 5) -> Array:
    shape = [int(size) for size in re.findall(r"[0-9]+", inputs)]
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("op", "inputs", "body"), CASES)
def test_equals_onnxruntime(op: str, inputs: str, body: str) -> None:
    assert op in body
    graph = graph_of(inputs, body, {"RMSNormalization": 23, "Swish": 24}.get(op, 21))
    x = input_of(inputs)
    wanted = onnxruntime(graph, x)
    executor = Executor(list(graph.nodes))
    (got,) = executor.run({"x": torch.from_numpy(x)}, ["y"])
    assert got.shape == wanted.shape
    # Sums of at most 60 terms and polynomials of a few, each rounded to float32.
    room = 64 * np.finfo(np.float32).eps * max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=room)


def test_every_op_of_the_table_is_tested() -> None:
    assert {op for op, _, _ in CASES} == set(OPS)


def test_an_op_or_attribute_that_is_missing_is_named() -> None:
    graph = graph_of(TOKENS, "[odd] y = ThresholdedRelu (x)")
    with pytest.raises(UserError, match="ThresholdedRelu") as error:
        Executor(list(graph.nodes))
    assert error.value.where == "odd"
    graph = graph_of(TOKENS, "[back] y = Slice (x, in1, in9, i1, in1)")
    x = torch.from_numpy(input_of(TOKENS))
    with pytest.raises(UnsupportedOpError, match="negative step") as error:
        Executor(list(graph.nodes)).run({"x": x}, ["y"])
    assert error.value.where == "back"


def test_of_a_single_position_instance_normalization_leaves_the_bias() -> None:
    graph = graph_of("float[1, 4, 1, 1] x", "y = InstanceNormalization (x, v4, b4)")
    executor = Executor(list(graph.nodes))
    (y,) = executor.run({"x": torch.randn(1, 4, 1, 1)}, ["y"])
    assert torch.equal(y, executor.constant("b4").reshape(1, 4, 1, 1))


def test_an_output_that_is_missing_is_named() -> None:
    body = "[norm] n, mean = LayerNormalization (x, v8, b8)\ny = Sub (n, mean)"
    executor = Executor(list(graph_of(TOKENS, body).nodes))
    x = torch.from_numpy(input_of(TOKENS))
    for wanted in ("y", "mean"):
        with pytest.raises(UnsupportedOpError, match="LayerNormalization does not give") as error:
            executor.run({"x": x}, [wanted])
        assert error.value.where == "norm"
    body = "n, mean = LayerNormalization (x, v8, b8)\ny = Neg (n)"  # nobody asks for it
    Executor(list(graph_of(TOKENS, body).nodes)).run({"x": x}, ["y"])


def test_a_float_that_is_made_from_a_size_lies_where_floats_do() -> None:
    body = "s = Shape <start = 2> (x)\nf = Cast <to = 1> (s)\ny = Add (x, f)"
    executor = Executor(list(graph_of(TOKENS, body).nodes), device="meta")
    f, y = executor.run({"x": executor.tensor(input_of(TOKENS))}, ["f", "y"])
    assert (f.device.type, y.device.type) == ("meta", "meta")


@pytest.mark.parametrize("learned", [False, True])
def test_rounding_passes_gradients_and_saturation_stops_them(learned: bool) -> None:
    """With a learned scale they are those of LSQ."""
    nodes = list(graph_of(TOKENS, QUANTIZE + "y = DequantizeLinear (q, step, u128)").nodes)
    scale = torch.tensor(2.0**-6, requires_grad=True)
    given = {nodes[0].inputs[1].name: scale} if learned else {}
    x = torch.tensor([-3.0, -0.51, 0.2, 1.9, 2.5], requires_grad=True)
    (y,) = Executor(nodes).run({"x": x, **given}, ["y"])
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [0, 1, 1, 1, 0])
    if learned:  # the integer where it saturates, else what rounding moved
        place = x.detach().numpy() * np.float32(64)
        moved = (np.rint(place) - place)[1:4]
        assert float(scale.grad) == pytest.approx(-128 + moved.sum() + 127, abs=1e-4)


def test_a_quantizer_and_its_dequantizer_can_be_mixed() -> None:
    body = QUANTIZE + "d = DequantizeLinear (q, step, u128)\ny = Neg (d)"
    executor = Executor(list(graph_of(TOKENS, body).nodes))
    x = torch.from_numpy(input_of(TOKENS))
    (y,) = executor.run({"x": x}, ["y"], mix=lambda floating, _: floating)
    assert torch.equal(y, -x)


def test_what_is_given_stands_for_constants_and_nodes() -> None:
    executor = Executor(list(graph_of(TOKENS, "a = Mul (x, v8)\ny = Add (a, b8)").nodes))
    x = torch.from_numpy(input_of(TOKENS))
    zero = torch.zeros(8)
    (y,) = executor.run({"x": x, "b8": zero}, ["y"], added={"a": torch.ones(8)})
    assert torch.equal(y, x * executor.constant("v8") + 1.0)
    (y,) = executor.run({"x": x, "b8": zero}, ["y"], scaled={"a": 2 * torch.ones(8)})
    assert torch.equal(y, x * executor.constant("v8") * 2.0)
    (y,) = executor.run({"a": x}, ["y"])
    assert torch.equal(y, x + executor.constant("b8"))


def test_what_nothing_reads_any_more_is_not_kept() -> None:
    body = """
        q = QuantizeLinear (x, step, u128)
        a = DequantizeLinear (q, step, u128)
        b = Relu (a)
        p = QuantizeLinear (b, step, u128)
        c = DequantizeLinear (p, step, u128)
        y = Relu (c)
    """
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def mix(_: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        alive.extend(one() is not None for one in made)
        made.append(weakref.ref(quantized))
        return quantized

    with torch.no_grad():
        x = torch.from_numpy(input_of(TOKENS))
        Executor(list(graph_of(TOKENS, body).nodes)).run({"x": x}, ["y"], mix=mix)
    assert alive == [False]  # `a`, when `c` is made
