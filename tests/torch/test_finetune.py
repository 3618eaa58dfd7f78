"""`finetune_unified` brings a converted digits transformer back to its teacher, without labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from qpass.errors import RecipeError, SampleError  # noqa: E402
from qpass.torch import UnifiedNorm, convert_layernorm, finetune_unified  # noqa: E402

pytestmark = pytest.mark.torch
MODELS = Path(__file__).parents[2] / "models"


class Network(nn.Module):
    """16 patches of a digit, two residual perceptrons over tokens and channels, the digit."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 24, 2, stride=2)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(3))
        self.mix = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(24, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = x + self.mix(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.dropout(self.mlp(self.norms[1](x)))
        return self.head(self.norms[2](x).mean(1))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(MODELS / "digits_test.npz") as file:
        return torch.from_numpy(file["image"]), torch.from_numpy(file["labels"])


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """A LayerNorm network that knows 300 of the digits."""
    torch.manual_seed(0)
    model, (images, labels) = Network(), digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images[:300]), labels[:300])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def agreement(model: nn.Module, teacher: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == teacher(images).argmax(1)).float().mean())


def student_of(teacher: nn.Module) -> nn.Module:
    model = copy.deepcopy(teacher)
    convert_layernorm(model, filtration=True)
    return model


def batches(images: torch.Tensor) -> list[torch.Tensor]:
    return list(images.split(50))


@pytest.mark.parametrize("loss", ["features+outputs", "outputs"])
def test_a_few_epochs_without_labels_recover_the_teacher(teacher: nn.Module, loss: str) -> None:
    images, _ = digits()
    student = student_of(teacher)
    before = agreement(student, teacher, images[300:])
    samples = list(images[:300].split(20))
    done = finetune_unified(student, teacher, samples, epochs=12, lr=4e-3, loss=loss)
    after = agreement(student, teacher, images[300:])
    assert len(done.losses) == 12
    assert done.iterations == 12 * 15
    assert done.losses[-1] < 0.5 * done.losses[0]
    # Of these digits, which neither has seen, the teacher itself knows about three quarters.
    assert before < 0.5
    assert after > 0.75, (before, after)
    assert agreement(student, teacher, images[:300]) > 0.85


def test_leaves_the_teacher_and_the_settings_alone(teacher: nn.Module) -> None:
    images, _ = digits()
    state = copy.deepcopy(teacher.state_dict())
    student = student_of(teacher)
    student.patches.requires_grad_(requires_grad=False)
    frozen = student.patches.weight.clone()
    finetune_unified(student, teacher, batches(images[:100]), epochs=1)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(student.patches.weight, frozen)
    assert not student.training
    assert not any(part.training for part in student.modules())
    norms = [part for part in student.modules() if isinstance(part, UnifiedNorm)]
    assert [(norm.warmup, len(norm._forward_pre_hooks)) for norm in norms] == [(4000, 0)] * 3
    assert [int(norm.iterations) for norm in norms] == [2] * 3
    assert not any(part._forward_pre_hooks for part in teacher.modules())


def test_batches_may_carry_labels_or_names(teacher: nn.Module) -> None:
    """The same samples in three forms give the same student, since dropout is off."""
    images, labels = digits()
    plain = batches(images[:100])
    forms = (plain, [(x, labels[:50]) for x in plain], [{"image": x} for x in plain])
    results = []
    for form in forms:
        student = student_of(teacher)
        finetune_unified(student, teacher, form, epochs=1)
        results.append(student.head.weight)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"loss": "labels"}, "'labels' is not known"),
    ],
)
def test_arguments_out_of_range_are_errors(
    teacher: nn.Module, options: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        finetune_unified(student_of(teacher), teacher, [], **options)


def test_bad_pairs_and_samples_are_errors(teacher: nn.Module) -> None:
    images, _ = digits()
    student = student_of(teacher)
    with pytest.raises(RecipeError, match="no UnifiedNorm"):
        finetune_unified(copy.deepcopy(teacher), teacher, [images])
    with pytest.raises(RecipeError, match=r"no module 'norms\.0' of its own"):
        finetune_unified(student, student, [images])
    with pytest.raises(RecipeError, match=r"no module 'norms\.0' of its own"):
        finetune_unified(student, nn.Linear(2, 2), [images])
    with pytest.raises(SampleError, match="no batch"):
        finetune_unified(student, teacher, [])
    with pytest.raises(SampleError, match="not finite"):
        finetune_unified(student, teacher, [torch.full((4, 1, 8, 8), float("nan"))], epochs=1)


class Spent:
    """Gives fewer batches, or more, each time that it is iterated."""

    def __init__(self, *counts: int) -> None:
        self.counts = iter(counts)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(batches(digits()[0])[: next(self.counts)])


@pytest.mark.parametrize(
    ("counts", "found"), [((2, 0), "then 0"), ((2, 2, 1), "then 1"), ((1, 1, 2), "then more")]
)
def test_a_loader_has_to_give_as_many_batches_every_time(
    teacher: nn.Module, counts: tuple[int, ...], found: str
) -> None:
    with pytest.raises(SampleError, match=found):
        finetune_unified(student_of(teacher), teacher, Spent(*counts), epochs=1)


def test_a_generator_is_refused_and_leaves_the_module_as_it_was(teacher: nn.Module) -> None:
    student = student_of(teacher)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(SampleError, match="can be iterated anew"):
        finetune_unified(student, teacher, (x for x in batches(digits()[0])))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
