"""`tools/train_norms.py` and `tools/bench_norms.py`: the twins are twins, the tables are right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # scripts, not a package

import bench_norms  # noqa: E402
import train_norms  # noqa: E402
from train_loop import Recipe  # noqa: E402

pytestmark = pytest.mark.torch


def tiny_pair() -> train_norms.Pair:
    """30 random images of 8x8 in three classes."""
    images, labels = torch.randn(30, 1, 8, 8), torch.arange(30) % 3
    return train_norms.Pair(
        train=(images, labels),
        test=(images[:10], labels[:10]),
        network={"width": 8, "heads": 2, "depth": 1},
        recipe=Recipe(epochs=2, batch=10, learning_rate=1e-3),
    )


@pytest.mark.parametrize("norm", [*train_norms.MAIN, *train_norms.ABLATIONS])
def test_networks_differ_in_their_norms_alone(norm: str) -> None:
    pair = tiny_pair()
    states = []
    for name in ("layer", norm):
        torch.manual_seed(3)
        states.append(pair.build(name).state_dict())
    shared = [key for key in states[0] if "norm" not in key]
    assert len(shared) > 8
    assert all(torch.equal(states[0][key], states[1][key]) for key in shared)
    assert states[1]["norm.weight"].shape == (8,)


def test_a_run_and_a_conversion_give_rows_and_weights(tmp_path: Path) -> None:
    pair = tiny_pair()
    row = train_norms.run(pair, "layer", 1, tmp_path / "layer.pt")
    assert 0 <= row["accuracy"] <= 1
    assert (row["norm"], row["seed"], row["iterations"]) == ("layer", 1, 0)
    row = train_norms.run(pair, "unified", 1, tmp_path / "unified.pt")
    assert row["iterations"] == 3 * 6  # three norms, two epochs of three batches
    row = train_norms.convert(pair, 1, tmp_path / "layer.pt", tmp_path / "converted.pt")
    assert row["iterations"] == 3 * 3 * train_norms.FINETUNE_EPOCHS
    assert set(torch.load(tmp_path / "converted.pt")) == set(torch.load(tmp_path / "unified.pt"))


def test_the_table_has_mean_and_deviation_over_seeds() -> None:
    shares = {"layer": (0.90, 0.92), "unified": (0.95,)}
    rows = [
        {"norm": norm, "seed": seed, "accuracy": value, "filtered": 1, "iterations": iterations}
        for norm, values in shares.items()
        for seed, value in enumerate(values)
        for iterations in [4 if norm == "unified" else 0]
    ]
    lines = train_norms.table(rows).splitlines()
    assert lines[2] == "| layer | 2 | 91.00 ± 1.41 | 90.00, 92.00 |  |"
    assert lines[3] == "| unified | 1 | 95.00 | 95.00 | 25.0% |"


def test_the_speed_table_compares_with_layernorm_and_with_the_limit() -> None:
    rows = [
        {
            "engine": "ort",
            "precision": "int8",
            "batch": 1,
            "norm": norm,
            "ms": 10.0 / speedup,
            "rounds": 15,
            "speedup": speedup,
            "speedup_low": speedup - 0.01,
            "speedup_high": speedup + 0.01,
        }
        for norm, speedup in (("layer", 1.0), ("unified", 1.08), ("none", 1.10))
    ]
    cells = [cell.strip() for cell in bench_norms.speed_table(rows).splitlines()[2].split("|")]
    assert cells[1:-1] == [
        "ort",
        "int8",
        "1",
        "10.00",
        "1.080 (1.070 to 1.090)",
        "1.100 (1.090 to 1.110)",
        "0.982",
    ]
