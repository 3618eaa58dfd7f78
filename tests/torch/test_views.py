"""Views of samples: shapes stay, pictures stay pictures, samples are mixed as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qpass.torch.views import MIXED, Views, has_views  # noqa: E402
from tests.folds import normal  # noqa: E402

pytestmark = pytest.mark.torch
Array = np.ndarray[Any, Any]
DRAWS = 40


def views_of(*batches: dict[str, Array], seed: int = 0) -> Views:
    return Views(batches, torch.Generator().manual_seed(seed))


def ramp(samples: int = 2, side: int = 48, step: float = 1.0) -> Array:
    """Pictures that grow by `step` a column."""
    rows = step * np.arange(side, dtype=np.float32)
    return np.broadcast_to(rows, (samples, 3, side, side)).copy()


def test_parts_of_pictures_keep_shape_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpass.torch.views.MIXED", 0.0)
    picture, slopes = ramp(), []
    views = views_of({"x": picture})
    for _ in range(DRAWS):
        seen = views.draw()["x"]
        assert seen.shape == picture.shape
        assert seen.dtype == np.float32
        assert seen.min() >= picture.min()
        assert seen.max() <= picture.max()
        for one in seen:
            steps = np.diff(one, axis=2)
            assert (steps >= -1e-4).all() or (steps <= 1e-4).all()
            slopes.append(float(steps.mean()))
    # Stretched parts are flatter than the whole; half of them run the other way.
    assert max(np.abs(slopes)) <= 1.0
    assert min(np.abs(slopes)) < 0.7
    assert 0.25 < np.mean(np.array(slopes) < 0) < 0.75


def test_mixing_lies_between_two_samples() -> None:
    low, high = np.zeros((2, 5), np.float32), np.ones((2, 5), np.float32)
    views = views_of({"x": low}, {"x": high})
    drawn = [views.draw()["x"] for _ in range(DRAWS)]
    between = [one for one in drawn if ((one > 0) & (one < 1)).all()]
    pure = [one for one in drawn if np.isin(one, (0.0, 1.0)).all()]
    assert len(between) + len(pure) == DRAWS
    assert 0.0 < len(between) / DRAWS < MIXED  # the partner is the same batch half of the time
    for one in between:  # one share for all of a sample
        np.testing.assert_array_equal(one, one[:, :1].repeat(5, axis=1))
        assert one[0, 0] != one[1, 0]


def test_all_inputs_of_a_sample_are_mixed_alike() -> None:
    one = {"x": np.zeros((3, 4), np.float32), "y": np.zeros((3, 2, 2), np.float32)}
    two = {"x": np.ones((3, 4), np.float32), "y": np.ones((3, 2, 2), np.float32)}
    views = views_of(one, two)
    for _ in range(DRAWS):
        seen = views.draw()
        np.testing.assert_array_equal(seen["x"][:, 0], seen["y"][:, 0, 0])


def test_a_batch_of_another_size_is_not_mixed_with() -> None:
    views = views_of({"x": np.zeros((4, 5), np.float32)}, {"x": np.ones((1, 5), np.float32)})
    for _ in range(DRAWS):
        seen = views.draw()["x"]
        assert np.unique(seen).size == 1
        assert seen.flat[0] == (1.0 if len(seen) == 1 else 0.0)


def test_the_seed_decides() -> None:
    batch = {"x": normal((2, 3, 40, 40), seed=1)}
    first, second, other = (views_of(batch, seed=seed).draw()["x"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize(
    "batch",
    [
        {"ids": np.zeros((2, 5), np.int64)},
        {"x": np.zeros((2, 5), np.float32), "mask": np.ones((2, 5), bool)},
        {"x": np.zeros((2, 5), np.float32), "state": np.zeros((1, 5), np.float32)},
        {"x": np.float32(1.0).reshape(())},
        {"x": np.array([[0.0, -np.inf]], np.float32)},
    ],
)
def test_what_has_no_views(batch: dict[str, Array]) -> None:
    assert not has_views([batch])


def test_what_has_views() -> None:
    assert has_views([{"x": np.zeros((2, 5), np.float32), "y": np.zeros((2, 1), np.float16)}])
