"""Both exporters of torch write `UnifiedNorm` as Mul and Add, or as one function that is kept."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from qpass.errors import RecipeError  # noqa: E402
from qpass.torch import UnifiedNorm, export_onnx  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # From inside torch 2.13: its own use of what it has deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EXPORTERS = {"dynamo": True, "legacy": False}


class Branch(nn.Module):
    """A pre-norm residual branch, and a norm in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = UnifiedNorm(8, eps=0.01), UnifiedNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(x + self.mlp(self.norm(x))))


def trained() -> Branch:
    torch.manual_seed(0)
    module = Branch()
    with torch.no_grad():
        for norm in (module.norm, module.last):
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.normal_()
    for _ in range(5):
        module(torch.randn(4, 3, 8) * torch.linspace(0.5, 3, 8))
    return module  # in training mode: exporting is for inference all the same


def export(module: nn.Module, *, dynamo: bool, **options: Any) -> onnx.ModelProto:
    if dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    else:
        options["dynamic_axes"] = {"x": {0: "batch"}, "y": {0: "batch"}}
    return export_onnx(
        module,
        (torch.randn(2, 3, 8),),
        dynamo=dynamo,
        input_names=["x"],
        output_names=["y"],
        **options,
    )


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def check_same_function(model: onnx.ModelProto, module: nn.Module) -> None:
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32)
    with torch.no_grad():
        want = module.eval()(torch.from_numpy(x)).numpy()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = (session.run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0])
    for y in found:
        # Sums of 16 float32 products of values near 1, three of them in a row.
        np.testing.assert_allclose(y, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dynamo", EXPORTERS.values(), ids=EXPORTERS)
def test_standard_ops_are_one_mul_and_one_add_with_constants(*, dynamo: bool) -> None:
    module = trained()
    model = export(module, dynamo=dynamo)
    assert not {"Sqrt", "Div", "Cast", "ReduceMean"} & set(ops(model)) - {"Div", "Sqrt"}
    constants = {tensor.name for tensor in model.graph.initializer}
    scaled = [
        node
        for node in model.graph.node
        if node.op_type == "Mul" and len(constants & set(node.input)) == 1
    ]
    gains = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.dims == [8]]
    for norm in (module.norm, module.last):
        gain = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
        assert any(np.allclose(gain, value, rtol=1e-6) for value in gains)
    assert len([node for node in scaled if node.input[0] != "half"]) >= 2
    assert not model.functions
    assert module.training
    check_same_function(model, module)


@pytest.mark.parametrize("dynamo", EXPORTERS.values(), ids=EXPORTERS)
def test_the_kept_function_is_a_node_with_its_body_in_the_model(*, dynamo: bool) -> None:
    module = trained()
    model = export(module, dynamo=dynamo, keep_function=True)
    nodes = [node for node in model.graph.node if node.op_type == "UnifiedNorm"]
    assert [node.domain for node in nodes] == ["qpass", "qpass"]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node, norm in zip(nodes, (module.norm, module.last), strict=True):
        operands = [onnx.numpy_helper.to_array(weights[name]) for name in node.input[1:]]
        for value, wanted in zip(operands, (norm.weight, norm.bias, norm.running_var), strict=True):
            np.testing.assert_array_equal(value, wanted.detach().numpy())
        epsilon = {attribute.name: attribute.f for attribute in node.attribute}["epsilon"]
        assert epsilon == pytest.approx(norm.eps, rel=1e-6)
    (function,) = model.functions
    assert (function.domain, function.name) == ("qpass", "UnifiedNorm")
    assert list(function.input) == ["X", "scale", "B", "var"]
    assert {entry.domain: entry.version for entry in model.opset_import}["qpass"] == 1
    assert not module.norm.as_function
    check_same_function(model, module)


def test_the_body_computes_the_definition() -> None:
    """In float64 numpy, with an epsilon that matters; the default is written too."""
    module = nn.Sequential(UnifiedNorm(3, eps=0.5))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        module[0].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
        module[0].running_var.copy_(torch.tensor([0.25, 4.0, 1e-4]))
    model = export_onnx(
        module, (torch.ones(2, 3),), dynamo=False, keep_function=True, input_names=["x"]
    )
    x = np.random.default_rng(2).standard_normal((2, 3)).astype(np.float32)
    want = x / np.sqrt(np.array([0.25, 4.0, 1e-4]) + 0.5) * [1, -2, 0.5] + [0, 1, -1]
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_kept_is_an_error() -> None:
    sample = (torch.ones(2, 8),)
    with pytest.raises(RecipeError, match="no UnifiedNorm"):
        export_onnx(nn.Sequential(nn.Linear(8, 8)), sample, keep_function=True)
    with pytest.raises(RecipeError, match="opset_version=12"):
        export_onnx(nn.Sequential(UnifiedNorm(8)), sample, keep_function=True, opset_version=12)
    with pytest.raises(RecipeError, match="float32"):
        export_onnx(nn.Sequential(UnifiedNorm(8)).half(), sample, keep_function=True)


def test_a_failed_export_leaves_the_module_as_it_was() -> None:
    module = trained()
    with pytest.raises(Exception, match=r"."):
        export_onnx(module, (torch.ones(2, 3, 5),), dynamo=False, keep_function=True)
    assert module.training
    assert not module.norm.as_function
