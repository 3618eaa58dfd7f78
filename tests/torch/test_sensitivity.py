"""How much rows count to the outputs: derivatives by hand, and what rounding does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import qpass
from qpass.errors import RecipeError
from qpass.passes.round_weights import Method, round_weights
from qpass.passes.rounding.guide import FLOOR, guide_rows
from qpass.torch.executor_ops import OPS
from qpass.torch.sensitivity import row_sensitivity
from qpass.verify.metrics import sqnr_db
from tests.folds import graph_of, normal
from tests.jobs import CNN, DIGITS
from tests.rounded import numbers_of, quantized_at
from tests.small_models import feeds_of, residual_cnn, run, transformer

pytestmark = pytest.mark.torch
Array = np.ndarray[Any, Any]


def test_one_output_has_the_derivative_of_pencil_and_paper() -> None:
    """A single number at the end: its gradient squared, whatever the sign."""
    body = """
        [fc] h = MatMul (x, w)
        t = Tanh (h)
        y = ReduceSum <keepdims = 0> (t, axes)
    """
    graph = graph_of(
        "float[1, 3, 4] x", "float[1] y", body, w=normal((4, 5), seed=1), axes=np.array([1, 2])
    )
    x = normal((1, 3, 4), seed=2)
    found = row_sensitivity(list(graph.nodes), ["y"], {"h": -1}, [{"x": x}])
    tanh = np.tanh(x.astype(np.float64) @ normal((4, 5), seed=1).astype(np.float64))
    wanted = np.square(1.0 - np.square(tanh)).sum(axis=-1) / np.square(tanh.sum())
    # float32: the sum of 15 terms (10.1 in size, 2.8 with signs), squared, is off by at most
    # 2 * 15 * 3.6 * 2**-24; 1 - tanh^2, at least 0.03, squared as well, by 2 * 36 * 2**-24.
    np.testing.assert_allclose(found["h"][0], wanted, rtol=2.0**-16)


def test_signs_give_the_squared_jacobian_on_average() -> None:
    body = "[a] h = MatMul (x, v)\n[fc] y = MatMul (h, w)"
    graph = graph_of(
        "float[N, 4] x", "float[N, 6] y", body, v=normal((4, 3), seed=3), w=normal((3, 6), seed=1)
    )
    x = normal((4000, 4), seed=2)
    (found,) = row_sensitivity(list(graph.nodes), ["y"], {"h": -1}, [{"x": x}])["h"]
    y = x @ normal((4, 3), seed=3) @ normal((3, 6), seed=1)
    wanted = np.square(normal((3, 6), seed=1)).sum() / np.square(y).mean()
    # Two vectors of signs a row: the mean of 4,000 rows scatters by about 1 %.
    assert found.mean() == pytest.approx(wanted, rel=0.05)
    assert found.shape == (4000,)


def test_rows_that_no_output_reads_count_nothing() -> None:
    body = """
        [conv] h = Conv <pads = [1, 1, 1, 1]> (x, k)
        y = Slice (h, starts, ends, axes)
    """
    graph = graph_of(
        "float[N, 2, 6, 6] x", "float[N, 3, 2, 6] y", body, k=normal((3, 2, 3, 3), seed=1),
        starts=np.array([1]), ends=np.array([3]), axes=np.array([2]),
    )  # fmt: skip
    (found,) = row_sensitivity(
        list(graph.nodes), ["y"], {"h": 1}, [{"x": normal((5, 2, 6, 6), seed=2)}]
    )["h"]
    assert found.shape == (5, 6, 6)
    assert (found[:, 1:3] > 0.0).all()
    assert (found[:, [0, 3, 4, 5]] == 0.0).all()
    guide = guide_rows(graph, ["conv"], [{"x": normal((5, 2, 6, 6), seed=2)}])
    assert not isinstance(guide, str)
    (weights,) = guide["conv"]
    assert weights.mean() == pytest.approx(1.0)
    assert weights[:, 0] == pytest.approx(FLOOR)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[fc] h = MatMul (x, w)\ny = Shape (h)", "no output has a gradient"),
        ("[fc] h = MatMul (x, w)\nz = Sub (h, h)\ny = Sqrt (z)", "NaN or infinity"),
    ],
)
def test_outputs_without_a_gradient_are_named(body: str, reason: str) -> None:
    kind = "int64[2]" if "Shape" in body else "float[N, 3]"
    graph = graph_of("float[N, 4] x", f"{kind} y", body, w=normal((4, 3), seed=1))
    found = guide_rows(graph, ["fc"], [{"x": normal((5, 4), seed=2)}])
    assert isinstance(found, str)
    assert reason in found


def first_token(seed: int) -> Array:
    """Rows of two kinds: those of the first token lie in another subspace, and are smaller."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((4, 12, 16)) @ np.random.default_rng(0).standard_normal((16, 16))
    x[:, 0] = random.standard_normal((4, 16)) @ np.random.default_rng(1).standard_normal((16, 16))
    return (x / 8.0).astype(np.float32)  # inside of what the graph was calibrated with


@pytest.mark.parametrize("method", ["auto", "gptq", "erq", "unit", "adaround"])
def test_guided_rounding_fits_what_the_outputs_read(method: Method) -> None:
    body = "[fc] h = MatMul (x, w)\n[head] g = MatMul (h, v)\ny = Gather <axis = 1> (g, first)"
    reference = graph_of(
        "float[N, 12, 16] x", "float[N, 8] y", body, w=normal((16, 16), seed=1),
        v=normal((16, 8), seed=2), first=np.array(0),
    )  # fmt: skip
    batches = [{"x": first_token(seed)} for seed in range(2, 26)]
    unseen = {"x": np.concatenate([first_token(seed) for seed in range(100, 140)])}
    wanted = run(reference.to_model(), unseen)["y"]
    found = {}
    for guided in (False, True):
        graph, table, plan = quantized_at(reference, "w4a8")
        round_weights(
            reference, graph, batches, numbers_of(plan, table), method=method, guided=guided,
            iterations=20, threads=1,
        )  # fmt: skip
        found[guided] = sqnr_db(wanted, run(graph.to_model(), unseen)["y"])
    assert found[True] > found[False]


def test_an_op_without_gradient_leaves_the_weights_of_norms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(OPS, "LayerNormalization")
    reference = transformer()
    made = []
    for guided in (False, True):
        graph, table, plan = quantized_at(reference, "w4a8")
        numbers = numbers_of(plan, table)
        batches = feeds_of(reference, 8)
        rounding = round_weights(reference, graph, batches, numbers, method="gptq", guided=guided)
        made.append((graph.fingerprint(), rounding))
    assert made[0][0] == made[1][0]
    reasons = [r.reason for r in made[1][1].report.refusals if r.where == "model"]
    assert any("LayerNormalization has no gradient here" in reason for reason in reasons)


def test_the_same_seed_gives_the_same_graph() -> None:
    found = []
    for seed in (1, 1, 2):
        reference = residual_cnn()
        graph, table, plan = quantized_at(reference, "w4a8")
        round_weights(
            reference, graph, feeds_of(reference, 8), numbers_of(plan, table), method="gptq",
            guided=True, seed=seed, threads=1,
        )  # fmt: skip
        found.append(graph.fingerprint())
    assert found[0] == found[1] != found[2]


def test_the_whole_way(tmp_path: Path) -> None:
    report = qpass.optimize(
        CNN, data=DIGITS, precision="w4a8", round="gptq", row_weights="gradient", samples=24,
        engines=("ort",), output=tmp_path / "m.onnx",
    )  # fmt: skip
    assert report.ok
    (rounding,) = [p for p in report.passes if p.name == "round_weights"]
    assert rounding.changed > 0


def test_weights_alone_to_nearest_have_no_rows(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--round gptq"):
        qpass.optimize(CNN, precision="w4", row_weights="gradient", output=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
