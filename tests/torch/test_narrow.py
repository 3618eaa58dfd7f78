"""Products in bfloat16: how far they are off, and what stays as it is."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qpass.torch.executor import Executor  # noqa: E402
from qpass.torch.narrow import WIDE, narrow_pays  # noqa: E402
from tests.folds import graph_of  # noqa: E402

pytestmark = pytest.mark.torch
ROUND = 2.0**-8  # half a step of bfloat16, as a share
CASES = (
    ("float[N, 8, 6, 6] x", "y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", (5, 8, 3, 3)),
    ("float[N, 96] x", "y = Gemm <transB = 1, beta = 0.5> (x, w, b)", (5, 96)),
    ("float[N, 96] x", "y = Gemm (x, w, b)", (96, 5)),
    ("float[N, 4, 96] x", "p = MatMul (x, w)\ny = Add (p, b)", (96, 5)),
)


def executor_of(inputs: str, body: str, shape: tuple[int, ...]) -> Executor:
    random = np.random.default_rng(3)
    constants = {
        "w": random.standard_normal(shape).astype(np.float32),
        "b": random.standard_normal(5).astype(np.float32),
    }
    output = f"float[{', '.join('ABCD'[: inputs.count(',') + 1])}] y"
    return Executor(list(graph_of(inputs, output, body, **constants).nodes))


def input_of(inputs: str, seed: int = 4) -> torch.Tensor:
    shape = [3 if size == "N" else int(size) for size in inputs[6 : inputs.index("]")].split(", ")]
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize(("inputs", "body", "shape"), CASES)
def test_off_by_the_rounding_of_operands_and_result(
    inputs: str, body: str, shape: tuple[int, ...]
) -> None:
    executor, x = executor_of(inputs, body, shape), input_of(inputs)
    (exact,) = executor.run({"x": x}, ["y"])
    (got,) = executor.run({"x": x}, ["y"], narrow=True)
    weight = executor.constant("w")
    bias = executor.run({"x": torch.zeros_like(x)}, ["y"])[0]
    (size,) = executor.run({"x": x.abs(), "w": weight.abs(), "b": torch.zeros(5)}, ["y"])
    assert got.dtype == torch.float32
    # Two operands, and the result; float32 sums of 96 terms are far below.
    room = 2.0 * ROUND * size + ROUND * (exact - bias).abs() + 3.0 * ROUND**2 * size
    assert ((got - exact).abs() <= room).all()
    assert (got != exact).any()


@pytest.mark.parametrize(("inputs", "body", "shape"), CASES)
def test_biases_are_not_rounded(inputs: str, body: str, shape: tuple[int, ...]) -> None:
    executor, x = executor_of(inputs, body, shape), torch.zeros_like(input_of(inputs))
    (exact,) = executor.run({"x": x}, ["y"])
    (got,) = executor.run({"x": x}, ["y"], narrow=True)
    assert torch.equal(got, exact)


@pytest.mark.parametrize(
    ("inputs", "body", "shape"),
    [
        ("float[N, 8, 6, 6] x", "y = Conv <group = 8> (x, w)", (8, 1, 3, 3)),
        (f"float[N, {WIDE - 1}] x", "y = MatMul (x, w)", (WIDE - 1, 5)),
        ("float[N, 4, 96] x", "t = Transpose <perm = [0, 2, 1]> (x)\ny = MatMul (x, t)", (1, 1)),
    ],
    ids=["depthwise", "short", "activations"],
)
def test_short_sums_and_products_of_activations_stay(
    inputs: str, body: str, shape: tuple[int, ...]
) -> None:
    executor, x = executor_of(inputs, body, shape), input_of(inputs)
    (exact,) = executor.run({"x": x}, ["y"])
    (got,) = executor.run({"x": x}, ["y"], narrow=True)
    assert torch.equal(got, exact)


def test_gradients_reach_both_operands() -> None:
    inputs, body, shape = CASES[0]
    executor, x = executor_of(inputs, body, shape), input_of(inputs).requires_grad_()
    weight = executor.constant("w").clone().requires_grad_()
    for narrow in (False, True):
        (y,) = executor.run({"x": x, "w": weight}, ["y"], narrow=narrow)
        y.square().sum().backward()
    for operand in (x, weight):
        assert operand.grad is not None
    # Twice the same gradient, but for roundings of four operands (the output's error is one of
    # them, as its size) in one of the two.
    (y,) = executor.run({"x": x, "w": weight}, ["y"])
    exact = torch.autograd.grad(y.square().sum(), [x, weight])
    for operand, wanted in zip((x, weight), exact, strict=True):
        rest = operand.grad - 2.0 * wanted
        assert rest.norm() < 4.0 * ROUND * wanted.norm()
        assert rest.norm() > 0.0


def test_only_cpus_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ({}, {"avx512_bf16": False}, {"avx512_f": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert not narrow_pays("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert narrow_pays("cpu")
    assert not narrow_pays("cuda")
