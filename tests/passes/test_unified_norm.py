"""Unified Normalization disappears: the local function, the exporters' chains, whole networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qpass.graph import Graph
from qpass.modelfile import load_model
from qpass.passes.normalize import normalize
from qpass.passes.norms import rewrite_norms
from qpass.passes.unified_norm import recognize_unified_norms
from tests import oracle

TOLERANCE = 2e-6  # gains go into weights before the sum: a few roundings of float32


def called(epsilon: float | None = 1e-3, **change: Any) -> onnx.ModelProto:
    """A model that calls the local function, with its body, on [2, 5, 16]."""
    random = np.random.default_rng(2)
    arrays = {
        "gamma": random.uniform(0.5, 2, 16),
        "beta": random.standard_normal(16),
        "var": random.uniform(0.1, 4, 16),
        "w": random.standard_normal((16, 8)),
    }
    arrays |= change
    nodes = [
        helper.make_node("Constant", [], ["floor"]),
        helper.make_node("Add", ["var", "floor"], ["moment"]),
        helper.make_node("Sqrt", ["moment"], ["deviation"]),
        helper.make_node("Div", ["X", "deviation"], ["z"]),
        helper.make_node("Mul", ["z", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "B"], ["Y"]),
    ]
    nodes[0].attribute.append(
        onnx.AttributeProto(
            name="value_float", ref_attr_name="epsilon", type=onnx.AttributeProto.FLOAT
        )
    )
    body = helper.make_function(
        "qpass", "UnifiedNorm", ["X", "scale", "B", "var"], ["Y"], nodes,
        [helper.make_opsetid("", 21)], attribute_protos=[helper.make_attribute("epsilon", 1e-5)],
    )  # fmt: skip
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    graph = helper.make_graph(
        [
            helper.make_node(
                "UnifiedNorm", ["x", "gamma", "beta", "var"], ["n"], name="norm", domain="qpass",
                **attributes,
            ),
            helper.make_node("MatMul", ["n", "w"], ["y"], name="product"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5, 8])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qpass", 1)]
    return helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)


def x() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(5).standard_normal((2, 5, 16)).astype(np.float32)}


@pytest.mark.parametrize("epsilon", [None, 1e-3, 0.5])
def test_a_call_that_was_not_inlined(epsilon: float | None) -> None:
    model = called(epsilon)
    wanted = oracle.ort_plain(model, x())  # the reference evaluator has no default attributes
    graph = Graph(model)
    graph.infer_shapes()
    report = recognize_unified_norms(graph)
    assert (report.changed, report.refusals) == (1, ())
    assert [node.op for node in graph.nodes] == ["Mul", "Add", "MatMul"]
    flat = graph.to_model()
    del flat.functions[:]
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(flat, x()), wanted) < TOLERANCE


def test_a_call_in_a_file_is_inlined_and_folded(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(called(), path)
    wanted = oracle.reference(called(), x())
    graph = load_model(path, opset=21)
    normalize(graph)
    reports = rewrite_norms(graph)
    found = [(r.name, r.changed) for r in reports]
    assert found == [("unified-norm", 1), ("affine", 1), ("stream-bias", 0)]
    assert [node.op for node in graph.nodes] == ["MatMul", "Add"]
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(graph.to_model(), x()), wanted) < TOLERANCE


def test_a_call_with_broken_numbers_is_refused() -> None:
    graph = Graph(called(epsilon=0.0, var=np.zeros(16)))
    graph.infer_shapes()
    report = recognize_unified_norms(graph)
    assert report.changed == 0
    assert [r.where for r in report.refusals] == ["norm"]
    assert "not finite" in report.refusals[0].reason


def test_a_call_with_computed_numbers_is_refused() -> None:
    model = called()
    model.graph.node.insert(0, helper.make_node("Relu", ["gamma"], ["g1"], name="relu"))
    model.graph.node[1].input[1] = "g1"
    graph = Graph(model)
    graph.infer_shapes()
    report = recognize_unified_norms(graph)
    assert report.changed == 0
    assert "not constant" in report.refusals[0].reason


# ---------------------------------------------------------------------------- from torch


def network(pool: str) -> Any:
    """A pre-norm vision transformer with UN everywhere, and LayerScale; statistics are drawn."""
    torch = pytest.importorskip("torch")
    from qpass.torch import UnifiedNorm

    nn = torch.nn

    class Block(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = UnifiedNorm(width), UnifiedNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.scale1 = nn.Parameter(torch.rand(width))
            self.scale2 = nn.Parameter(torch.rand(width))

        def forward(self, x: Any) -> Any:
            batch, tokens, width = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
            x = x + self.scale1 * self.proj(mixed)
            return x + self.scale2 * self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Network(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.places = nn.Parameter(torch.randn(1, 5, 16))
            self.blocks = nn.ModuleList([Block(16, 2) for _ in range(2)])
            self.norm, self.head = UnifiedNorm(16), nn.Linear(16, 6)

        def forward(self, image: Any) -> Any:
            x = self.patches(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
            return self.head(x[:, 0] if pool == "token" else x.mean(1))

    torch.manual_seed(0)
    made = Network().eval()
    for part in made.modules():
        if isinstance(part, UnifiedNorm):
            part.running_var.uniform_(0.2, 3)
            part.weight.data.uniform_(0.5, 2)
            part.bias.data.normal_()
    return made


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch 2.13 about itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("dynamo", "keep_function", "pool"),
    [
        (False, False, "token"),
        (False, True, "mean"),
        (True, False, "mean"),
        (True, True, "token"),
    ],
    ids=["legacy", "legacy-function", "dynamo", "dynamo-function"],
)
def test_no_normalization_is_left_of_a_network(
    dynamo: bool, keep_function: bool, pool: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from qpass.torch import export_onnx

    module, image = network(pool), torch.randn(2, 3, 8, 8)
    options: dict[str, Any] = {"input_names": ["image"], "opset_version": 18}
    model = export_onnx(module, (image,), dynamo=dynamo, keep_function=keep_function, **options)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    graph = load_model(path, opset=21)
    normalize(graph)
    feeds = {graph.inputs[0].name: image.numpy()}
    wanted = {graph.outputs[0].name: module.double()(image.double()).detach().numpy()}
    wanted = {name: value.astype(np.float32) for name, value in wanted.items()}

    reports = rewrite_norms(graph)

    assert {r.name: r.changed for r in reports} == {
        "unified-norm": 5 if keep_function else 0,
        "affine": 5,  # one Gemm or MatMul behind each norm
        "stream-bias": 4,  # of both linear ops in front of the sums of both blocks
    }
    assert not any(r.refusals for r in reports)
    left = [node for node in graph.nodes if node.op in ("Mul", "Div", "Sub", "Sqrt", "Pow")]
    assert all(np.prod(t.shape) == 1 for node in left for t in node.inputs if not t.inputs)
    for engine in oracle.ENGINES:
        # All of the network: 1e-5 is what the issue asks of float32 against float64.
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < 1e-5, engine
    rewrite_norms(graph, rotate="all")
    for engine in oracle.ENGINES:
        assert oracle.relative_error(engine(graph.to_model(), feeds), wanted) < 1e-5, engine
