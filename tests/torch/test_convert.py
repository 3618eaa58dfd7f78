"""`convert_layernorm`: what it swaps, what it keeps, and what it refuses."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from qpass.errors import RecipeError  # noqa: E402
from qpass.torch import UnifiedNorm, convert_layernorm  # noqa: E402

pytestmark = pytest.mark.torch


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(x + self.linear(self.norm1(x)))


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Block(width), Block(width), nn.LayerNorm(width))
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.uniform_(part.weight, 0.5, 2.0)
            nn.init.normal_(part.bias)
    return model


def test_every_layernorm_is_swapped_and_keeps_its_weights() -> None:
    model = network()
    before = copy.deepcopy(model)
    done = convert_layernorm(model, filtration=True, window=(3, 5), warmup=7, momentum=0.8)
    assert done.swapped == ("0.norm1", "0.norm2", "1.norm1", "1.norm2", "2")
    assert done.excluded == done.refused == ()
    for name in done.swapped:
        norm, layer = model.get_submodule(name), before.get_submodule(name)
        assert type(norm) is UnifiedNorm
        assert torch.equal(norm.weight, layer.weight)
        assert torch.equal(norm.bias, layer.bias)
        assert norm.eps == layer.eps
        assert (norm.filtration, norm.warmup, norm.momentum) == (True, 7, 0.8)
        assert (len(norm.moments), len(norm.gradients)) == (3, 5)
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_patterns_choose_by_name() -> None:
    model = network()
    done = convert_layernorm(model, include=["*.norm1", "2"], exclude=["0.*"])
    assert done.swapped == ("1.norm1", "2")
    assert done.excluded == ("0.norm1", "0.norm2", "1.norm2")
    assert type(model[0].norm1) is nn.LayerNorm


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_without_a_match_is_an_error_and_changes_nothing(where: str) -> None:
    model = network()
    with pytest.raises(RecipeError, match=r"'\*\.norm3' matches no LayerNorm"):
        convert_layernorm(model, **{where: ["*.norm1", "*.norm3"]})
    assert type(model[0].norm1) is nn.LayerNorm


def test_a_model_without_layernorm_is_an_error() -> None:
    with pytest.raises(RecipeError, match="the model has none"):
        convert_layernorm(nn.Sequential(nn.Linear(4, 4)))


def test_a_layernorm_by_itself_is_an_error() -> None:
    with pytest.raises(RecipeError, match="in place"):
        convert_layernorm(nn.LayerNorm(4))


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SameThing(nn.LayerNorm):
    pass


def test_what_cannot_be_swapped_is_refused_with_its_reason() -> None:
    hooked = nn.LayerNorm(4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "image": nn.LayerNorm((4, 4)),
            "first": ChannelsFirst(4),
            "same": SameThing(4),
            "hooked": hooked,
            "plain": nn.LayerNorm(4),
        }
    )
    done = convert_layernorm(model, classes=[SameThing])
    assert done.swapped == ("same", "plain")
    reasons = dict(done.refused)
    assert set(reasons) == {"image", "first", "hooked"}
    assert "2 axes" in reasons["image"]
    assert "ChannelsFirst may compute something else" in reasons["first"]
    assert "hooks" in reasons["hooked"]


def test_nothing_swapped_is_an_error_with_the_reasons() -> None:
    with pytest.raises(RecipeError, match="0: it normalizes over 2 axes"):
        convert_layernorm(nn.Sequential(nn.LayerNorm((4, 4))))


def test_a_shared_layernorm_stays_shared() -> None:
    shared = nn.LayerNorm(4)
    model = nn.Sequential(shared, nn.Linear(4, 4), shared)
    assert convert_layernorm(model).swapped == ("0", "2")
    assert model[0] is model[2]


def test_frozen_and_missing_parameters_stay_so() -> None:
    frozen = nn.LayerNorm(4).requires_grad_(requires_grad=False)
    model = nn.Sequential(frozen, nn.LayerNorm(4, elementwise_affine=False))
    convert_layernorm(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model[1].weight, torch.ones(4))


def test_dtype_and_mode_are_kept() -> None:
    model = network().bfloat16().eval()
    convert_layernorm(model)
    assert model[0].norm1.weight.dtype == torch.bfloat16
    assert model[0].norm1.running_var.dtype == torch.float32
    assert not model[0].norm1.training


def test_a_norm_without_parameters_goes_where_its_neighbours_are() -> None:
    norm, bare = nn.LayerNorm(4, elementwise_affine=False), nn.Sequential()
    bare.add_module("norm", norm)
    model = nn.Sequential(nn.Linear(4, 4), bare).to(device="meta", dtype=torch.float64)
    convert_layernorm(model)
    assert (bare.norm.weight.device.type, bare.norm.weight.dtype) == ("meta", torch.float64)


def test_the_fused_path_of_torch_transformers_does_not_compute_layernorm() -> None:
    """At inference nn.TransformerEncoderLayer reads the norms' weights and skips their forward."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    convert_layernorm(layer)
    x = torch.randn(3, 5, 8)
    for part in (layer.norm1, layer.norm2):
        part.running_var.fill_(25.0)
    layer.eval()
    with torch.no_grad():
        got = layer(x)
        z = layer.norm1(x)
        want = x + layer.self_attn(z, z, z, need_weights=False)[0]
        want = want + layer.linear2(torch.relu(layer.linear1(layer.norm2(want))))
    # Some hundred float32 operations on values near 1.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
