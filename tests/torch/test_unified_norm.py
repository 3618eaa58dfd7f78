"""`UnifiedNorm` against a reference in numpy, and what it promises of its state."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qpass.errors import RecipeError  # noqa: E402
from qpass.torch import UnifiedNorm  # noqa: E402
from qpass.torch import unified_norm as module_under_test  # noqa: E402
from tests.torch.reference import Reference  # noqa: E402

pytestmark = pytest.mark.torch
CHANNELS = 6


def batches(count: int, *, seed: int = 0, spikes: tuple[int, ...] = ()) -> list[np.ndarray]:
    """Batches (3, 5, CHANNELS) of unequal channels; at `spikes` one channel is 40 times larger."""
    random = np.random.default_rng(seed)
    scales = random.uniform(0.2, 3.0, CHANNELS)
    made = [random.standard_normal((3, 5, CHANNELS)) * scales + 0.3 for _ in range(count)]
    for index in spikes:
        made[index][..., 2] *= 40
    return made


def pair(**options: object) -> tuple[UnifiedNorm, Reference]:
    """The module in float64 and the reference, with the same weight and bias."""
    norm = UnifiedNorm(CHANNELS, **options).double()
    window = options.pop("window", 4)
    forward, backward = window if isinstance(window, tuple) else (window, window)
    reference = Reference(CHANNELS, forward, backward, **options)
    random = np.random.default_rng(9)
    reference.gamma = random.uniform(0.5, 2.0, CHANNELS) * [1, -1, 1, 1, 1, 1]
    reference.beta = random.standard_normal(CHANNELS)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(reference.gamma))
        norm.bias.copy_(torch.from_numpy(reference.beta))
    return norm, reference


CASES = {
    "warm-up only": {"warmup": 1000},
    "smoothing": {"warmup": 6},
    "smoothing at once": {"warmup": 0},
    "filtration": {"warmup": 6, "filtration": True},
    "filtration at once": {"warmup": 0, "filtration": True},
    "plain": {"window": 1, "warmup": 3},
    "two windows": {"window": (3, 7), "warmup": 2, "filtration": True},
    "other constants": {"window": 5, "warmup": 2, "eps": 0.1, "momentum": 0.3},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_forward_backward_and_state_equal_the_reference(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 iterations; the ratio starts at iteration 15 instead of 1,000, so that it is seen."""
    monkeypatch.setattr(module_under_test, "_RATIO_FROM", 15)
    norm, reference = pair(**dict(options))
    reference.ratio_from = 15
    random = np.random.default_rng(4)
    for values in batches(30, spikes=(12, 20, 21)):
        x = torch.from_numpy(values).requires_grad_()
        dy = random.standard_normal(values.shape)
        y = norm(x)
        norm.zero_grad()
        y.backward(torch.from_numpy(dy))
        want_y = reference.forward(values)
        want = reference.backward(dy)
        # float64 and some ten roundings; sums of 15 products.
        close = {"rtol": 1e-12, "atol": 1e-12}
        np.testing.assert_allclose(y.detach(), want_y, **close)
        for got, wanted in zip((x.grad, norm.weight.grad, norm.bias.grad), want, strict=True):
            np.testing.assert_allclose(got, wanted, **close)
        np.testing.assert_allclose(norm.running_var, reference.rv, **close)
        np.testing.assert_allclose(norm.moments, reference.x2_window, **close)
        np.testing.assert_allclose(norm.gradient_mean, reference.ema_gz, **close)
        np.testing.assert_allclose(norm.gradients, reference.gz_window, **close)
        assert int(norm.skipped) == reference.skipped
    assert int(norm.iterations) == 30


def test_the_spikes_are_what_filtration_leaves_out() -> None:
    """The cases above would prove little if nothing were ever filtered, or everything."""
    norm, _ = pair(warmup=6, filtration=True)
    skipped = []
    for values in batches(30, spikes=(12, 20)):
        norm(torch.from_numpy(values))
        skipped.append(int(norm.skipped))
    assert np.flatnonzero(np.diff([0, *skipped])).tolist() == [12, 20]


def test_the_ratio_is_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_RATIO_FROM", 3)
    norm, reference = pair(warmup=0)
    reference.ratio_from = 3
    ratios = []
    for index, values in enumerate(batches(12)):
        values *= {5: 1e-4, 10: 1e4}.get(index, 1)
        x = torch.from_numpy(values).requires_grad_()
        norm(x).sum().backward()
        reference.forward(values)
        want = reference.backward(np.ones_like(values))[0]
        np.testing.assert_allclose(x.grad, want, rtol=1e-11, atol=1e-12)
        ratios.append(reference.r)
    assert (np.max(ratios), np.min(ratios)) == (5.0, 0.2)


def test_plain_statistics_have_the_gradient_that_autograd_finds() -> None:
    """With a window of 1 the layer is x / rms(x) per channel, which torch can differentiate."""
    norm, _ = pair(window=1)
    x = torch.from_numpy(batches(1)[0]).requires_grad_()
    dy = torch.from_numpy(np.random.default_rng(1).standard_normal(x.shape))
    norm(x).backward(dy)
    again = x.detach().clone().requires_grad_()
    deviation = torch.sqrt(again.square().mean((0, 1)) + norm.eps)
    (again / deviation * norm.weight.detach() + norm.bias.detach()).backward(dy)
    np.testing.assert_allclose(x.grad, again.grad, rtol=1e-12, atol=1e-12)


def test_padding_stays_out_of_the_moments_and_is_normalized() -> None:
    norm, reference = pair(warmup=2)
    random = np.random.default_rng(3)
    for values in batches(8):
        padding = random.random(values.shape[:2]) < 0.4
        values[padding] = 1e6
        x = torch.from_numpy(values).requires_grad_()
        y = norm(x, torch.from_numpy(padding))
        dy = random.standard_normal(values.shape)
        y.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(y.detach(), reference.forward(values, padding), rtol=1e-12)
        np.testing.assert_allclose(x.grad, reference.backward(dy)[0], rtol=1e-10, atol=1e-10)
    assert float(norm.running_var.max()) < 100


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_batch_that_is_not_finite_leaves_the_statistics_alone(bad: float) -> None:
    norm, _ = pair(warmup=2, filtration=True)
    for values in batches(9):
        x = torch.from_numpy(values).requires_grad_()
        norm(x).square().sum().backward()
    before = copy.deepcopy(norm.state_dict())
    broken = batches(1)[0]
    broken[0, 0, 0] = bad
    x = torch.from_numpy(broken).requires_grad_()
    norm(x).square().sum().backward()
    assert not torch.isfinite(x.grad).all()  # a loss scaler must see it
    for name in ("running_var", "gradient_mean"):
        # Both are averaged with themselves.
        np.testing.assert_allclose(getattr(norm, name), before[name], rtol=1e-14)
    assert all(torch.isfinite(value).all() for value in norm.state_dict().values())


def test_a_batch_of_padding_alone_leaves_the_statistics_alone() -> None:
    norm, _ = pair(warmup=2)
    for values in batches(9):
        norm(torch.from_numpy(values))
    before = norm.running_var.clone()
    y = norm(torch.from_numpy(batches(1)[0]), torch.ones(3, 5, dtype=torch.bool))
    np.testing.assert_allclose(norm.running_var, before, rtol=1e-14)
    assert torch.isfinite(y).all()


def train_a_step(norm: torch.nn.Module, optimizer: torch.optim.Optimizer, x: np.ndarray) -> None:
    optimizer.zero_grad()
    norm(torch.from_numpy(x).float()).pow(3).mean().backward()
    optimizer.step()


def test_training_resumes_from_a_checkpoint_bit_by_bit() -> None:
    """Saved in the middle of a window, after the warm-up, with a batch filtered already."""
    data = batches(24, spikes=(8, 15))
    options = {"window": (4, 3), "warmup": 5, "filtration": True}
    norm = UnifiedNorm(CHANNELS, **options)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.01)
    for values in data[:11]:
        train_a_step(norm, optimizer, values)
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    resumed = UnifiedNorm(CHANNELS, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    again = torch.optim.SGD(resumed.parameters(), lr=0.01)
    for values in data[11:]:
        train_a_step(norm, optimizer, values)
        train_a_step(resumed, again, values)
    assert int(norm.skipped) >= 2
    for name, value in norm.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_reset_starts_the_warm_up_anew_and_keeps_what_inference_reads() -> None:
    norm = UnifiedNorm(CHANNELS, warmup=3)
    for values in batches(9):
        norm(torch.from_numpy(values).float()).sum().backward()
    kept = {name: getattr(norm, name).clone() for name in ("weight", "bias", "running_var")}
    norm.reset()
    for name, value in norm.state_dict().items():
        if name in kept:
            assert torch.equal(value, kept[name])
        else:
            assert not value.any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_float32_statistics(dtype: torch.dtype) -> None:
    """Values of 300 have squares that float16 does not hold; the statistics must."""
    wide = UnifiedNorm(CHANNELS, warmup=2)
    narrow = UnifiedNorm(CHANNELS, warmup=2).to(dtype)
    for values in batches(8):
        rounded = torch.from_numpy(values * 300).to(dtype)
        x, y = rounded.clone().requires_grad_(), rounded.float().requires_grad_()
        out, wanted = narrow(x), wide(y)
        assert out.dtype == dtype
        # One rounding of the result; weight and bias are 1 and 0.
        torch.testing.assert_close(out, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
        out.sum().backward()
        wanted.sum().backward()
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad, y.grad.to(dtype), rtol=1e-2, atol=1e-4)
    for name in ("running_var", "moments", "gradient_mean", "gradients"):
        assert getattr(narrow, name).dtype == torch.float32
        torch.testing.assert_close(getattr(narrow, name), getattr(wide, name), rtol=1e-6, atol=1e-7)
    assert narrow.eval()(rounded).dtype == dtype


def test_casting_to_half_and_back_loses_no_statistics() -> None:
    norm = UnifiedNorm(CHANNELS)
    norm(torch.from_numpy(batches(1)[0]).float())
    before = norm.running_var.clone()
    assert torch.equal(norm.half().float().running_var, before)
    assert norm.double().running_var.dtype == torch.float64


def test_runs_under_autocast() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(CHANNELS, CHANNELS), UnifiedNorm(CHANNELS))
    x = torch.from_numpy(batches(1)[0]).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = y.float().square().sum()
    loss.backward()
    assert y.dtype == torch.bfloat16
    assert layer[1].weight.grad.dtype == torch.float32
    assert layer[0].weight.grad.abs().sum() > 0


def test_inference_is_one_affine_map_per_channel() -> None:
    norm, reference = pair(warmup=2)
    for values in batches(8):
        norm(torch.from_numpy(values))
        reference.forward(values)
    x = batches(1, seed=5)[0]
    state = copy.deepcopy(norm.eval().state_dict())
    want = reference.gamma * x / np.sqrt(reference.rv + reference.eps) + reference.beta
    np.testing.assert_allclose(norm(torch.from_numpy(x)).detach(), want, rtol=1e-12, atol=1e-13)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} changed at inference"


def test_takes_the_weights_of_a_layernorm() -> None:
    layer = torch.nn.LayerNorm(CHANNELS)
    missing, unexpected = UnifiedNorm(CHANNELS).load_state_dict(layer.state_dict(), strict=False)
    assert not unexpected
    assert not {"weight", "bias"} & set(missing)


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 0},
        {"window": 0},
        {"window": (4, 0)},
        {"warmup": -1},
        {"eps": 0.0},
        {"momentum": 1.0},
        {"window": 1, "filtration": True},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(options: dict[str, object]) -> None:
    with pytest.raises(
        RecipeError, match=next(iter(options)) if len(options) == 1 else "filtration"
    ):
        UnifiedNorm(options.pop("channels", CHANNELS), **options)
