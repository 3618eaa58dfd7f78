"""From torch to a graph without norms: every way to export is folded, exactly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from qpass.modelfile import load_model, save_model  # noqa: E402
from qpass.passes.normalize import normalize  # noqa: E402
from qpass.passes.norms import rewrite_norms  # noqa: E402
from qpass.torch import UnifiedNorm, export_onnx  # noqa: E402
from qpass.verify.engines import EngineName, available_engines, open_engine  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # From inside torch 2.13: its own use of what it has deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WIDTH, TOKENS = 8, 5
EXPORTERS = {"dynamo": True, "legacy": False}
TWIN = Path(__file__).parents[2] / "models" / "digits_vit_un.onnx"


class PreNorm(nn.Module):
    """Two residual branches and a head, a norm in front of each; one norm has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(UnifiedNorm(WIDTH) for _ in range(3))
        self.gate, self.value = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.out = nn.Linear(12, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.norms[0](x)
        x = x + self.out(torch.relu(self.gate(z)) + self.value(z))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))


def trained() -> PreNorm:
    torch.manual_seed(0)
    module = PreNorm()
    with torch.no_grad():
        for norm in module.norms:
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.normal_()
    for _ in range(5):
        module(torch.randn(4, TOKENS, WIDTH) * torch.linspace(0.5, 3, WIDTH))
    return module.eval()


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def fold(source: Path, folder: Path) -> Path:
    graph = load_model(source)
    normalize(graph)
    rewrite_norms(graph)
    save_model(graph, folder / "folded.onnx", metadata={})
    return folder / "folded.onnx"


def run(engine: EngineName, path: Path, **feeds: Any) -> np.ndarray:
    return open_engine(engine, path).run(feeds)[0]


@pytest.mark.parametrize("keep_function", [False, True], ids=["ops", "function"])
@pytest.mark.parametrize("dynamo", EXPORTERS.values(), ids=EXPORTERS)
def test_no_norm_is_left_of_an_export(*, dynamo: bool, keep_function: bool, tmp_path: Path) -> None:
    module = trained()
    model = export_onnx(
        module,
        (torch.randn(2, TOKENS, WIDTH),),
        dynamo=dynamo,
        keep_function=keep_function,
        input_names=["x"],
    )
    onnx.save(model, tmp_path / "network.onnx")
    folded = fold(tmp_path / "network.onnx", tmp_path)
    found = ops(folded)
    assert not {"UnifiedNorm", "Mul", "Div", "Sqrt", "Sub"} & set(found)
    # Six biases (a Gemm has its own), two residual sums, and the sum inside of the first branch.
    # The three biases in front of these sums have moved to what reads the stream.
    assert found["MatMul"] + found["Gemm"] == 6
    assert found["Add"] + found["Gemm"] == 9 - 3
    x = np.random.default_rng(0).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    with torch.no_grad():
        want = module(torch.from_numpy(x)).numpy()
    for engine in available_engines():
        # Folded weights are rounded once more; sums of at most 16 products, six in a row.
        np.testing.assert_allclose(
            run(engine, folded, x=x), want, rtol=0, atol=1e-5 * np.abs(want).max()
        )


def test_no_norm_is_left_of_the_shipped_twin(tmp_path: Path) -> None:
    folded = fold(TWIN, tmp_path)
    before, after = ops(TWIN), ops(folded)
    assert not {"LayerNormalization", "UnifiedNorm", "Div", "Sqrt"} & set(after)
    # Nine norms had a Mul and an Add; the Mul of the queries is left in each of the four blocks.
    assert before["Mul"] - 9 == after["Mul"] == 4
    image = np.random.default_rng(1).standard_normal((3, 1, 8, 8)).astype(np.float32)
    want = run("reference", TWIN, image=image)
    for engine in available_engines():
        found = run(engine, folded, image=image)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
