"""`--mixed-cost latency`: what the times decide, what is reported, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qpass import mixed
from qpass.cli import main
from qpass.errors import RecipeError
from qpass.layer_latency import LayerTimes, level_off
from qpass.report.model import MixedReport, Report
from tests.jobs import model_of, optimize, saved
from tests.test_mixed import DATA, QUICK, SHAPES, TEXT, widths

Times = Callable[[str, str], float]  # of a layer at a level
LATENCY: dict[str, Any] = {
    "precision": "w4a8", "mixed": True, "mixed_cost": "latency", "target": "ort-x86-avx2", **QUICK,
    "round": "rtn", "repair": False,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(model_of(TEXT, **SHAPES), tmp_path)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the stop watch: times of layers, and of whole models by their place."""

    def give(
        layer: Times,
        whole: Callable[[int], float] = lambda number: 1.0,
        noisy: tuple[str, ...] = (),
    ) -> None:
        def layers(
            graph: Any, levels: Mapping[str, Sequence[Any]], *rest: Any, **more: Any
        ) -> LayerTimes:
            names = {
                name: ["float" if level is None else str(level) for level in own]
                for name, own in levels.items()
            }
            return LayerTimes(
                milliseconds={
                    name: level_off([layer(name, level) for level in own])
                    for name, own in names.items()
                },
                noisy=noisy,
            )

        def models(engine: str, files: Sequence[Path], *rest: Any, **more: Any) -> list[float]:
            return [whole(number) for number in range(len(files))]

        monkeypatch.setattr(mixed, "time_layers", layers)
        monkeypatch.setattr(mixed, "time_models", models)

    return give


def found_for(model: Path, **options: Any) -> tuple[Report, MixedReport]:
    report = optimize(model, DATA, output=model.with_name("q.onnx"), **{**LATENCY, **options})
    assert report.mixed is not None
    return report, report.mixed


def test_fewer_bits_that_save_no_time_are_not_taken(
    model: Path, given: Callable[..., None]
) -> None:
    """Four bits as fast as eight, float twice as slow: the smaller error wins in every layer."""
    given(lambda layer, level: 0.2 if level == "float" else 0.1)
    report, found = found_for(model, min_sqnr=1.0)
    assert report.ok
    assert {layer.bits for layer in found.layers} == {"w8a8"}
    assert set(widths(report.output).values()) == {8}
    assert not any("SIMULATED" in note for note in report.notes)  # no layer has four bits


def test_points_are_milliseconds_and_weights_keep_their_meaning(
    model: Path, given: Callable[..., None]
) -> None:
    fast = {"w4a8": 0.1, "w8a8": 0.2, "float": 0.4}
    given(lambda layer, level: fast[level] * (1 + int(layer == "c1")))
    _, found = found_for(model, min_sqnr=1.0)
    assert found.cost == "latency"
    sums = [point.layers_ms for point in found.points]
    assert sums == sorted(sums)
    chosen = next(point for point in found.points if point.chosen)
    of = {layer.name: dict(layer.level_ms) for layer in found.layers}
    assert of["c1"] == pytest.approx({"w4a8": 0.2, "w8a8": 0.4, "float": 0.8}, abs=2.0**-21)
    assert of["c0"].keys() == {"w8a8", "float"}  # the stem
    assert chosen.layers_ms == sum(of[layer.name][layer.bits] for layer in found.layers)
    bits = {"w4a8": 4, "w8a8": 8, "float": 32}
    weights = dict(zip(("c0", "c1", "c2", "c3", "head"), SHAPES.values(), strict=True))
    total = sum(np.prod(weights[layer.name]) * bits[layer.bits] / 8 for layer in found.layers)
    assert chosen.weight_bytes == total
    elements = sum(np.prod(shape) for shape in SHAPES.values())
    assert chosen.share_of_float == pytest.approx(total / (4 * elements), rel=1e-12)


def test_the_fastest_of_the_models_that_were_built_is_taken(
    model: Path, given: Callable[..., None]
) -> None:
    """By the layers float head and stem pay; as a whole the plan without them is faster."""

    def layer(name: str, level: str) -> float:
        return 0.1 if (level == "float") == (name in ("c0", "head")) else 0.2

    counts: list[int] = []

    def whole(number: int) -> float:
        counts.append(number)
        return 9.0 - number  # the last one is the plan that leaves nothing in float

    given(layer, whole)
    _, found = found_for(model, min_sqnr=1.0)
    assert {layer.bits for layer in found.layers} == {"w8a8"}
    timed = [point.model_ms for point in found.points if point.model_ms is not None]
    assert len(timed) == len(counts) >= 2
    chosen = next(point for point in found.points if point.chosen)
    assert chosen.model_ms == min(timed)
    assert chosen.layers_ms > min(point.layers_ms for point in found.points)
    assert chosen.measured is not None
    given(layer, lambda number: 1.0 + number)
    _, found = found_for(model, min_sqnr=1.0)
    assert {layer.name for layer in found.layers if layer.bits == "float"} == {"c0", "head"}


def test_where_float_is_faster_everywhere_one_plan_is_left(
    model: Path, given: Callable[..., None]
) -> None:
    given(lambda layer, level: 0.1 if level == "float" else 0.2)
    _, found = found_for(model, min_sqnr=1.0)
    assert {layer.bits for layer in found.layers} == {"w8a8"}
    assert len(found.points) == 1


def test_noise_is_a_note(model: Path, given: Callable[..., None]) -> None:
    given(lambda layer, level: 0.1, noisy=("c1", "c2"))
    report, _ = found_for(model, min_sqnr=1.0)
    assert any("NOISY TIMES: the runs of 2 of 5 layers" in note for note in report.notes)
    given(lambda layer, level: 0.1)
    report, _ = found_for(model, min_sqnr=1.0)
    assert not any("NOISY" in note for note in report.notes)


def test_with_the_real_clock(model: Path) -> None:
    report, found = found_for(model, min_sqnr=1.0)
    assert report.ok
    assert all(value > 0 for layer in found.layers for _, value in layer.level_ms)
    assert {name for layer in found.layers for name, _ in layer.level_ms} == {
        "w4a8", "w8a8", "float",
    }  # fmt: skip
    chosen = next(point for point in found.points if point.chosen)
    assert chosen.model_ms is not None
    assert report.cost.seconds_by_stage["layer latency"] > 0


def test_size_is_the_default_and_says_so(model: Path) -> None:
    _, found = found_for(model, min_sqnr=1.0, mixed_cost=None)
    assert found.cost == "size"
    assert {point.layers_ms for point in found.points} == {None}
    assert {layer.level_ms for layer in found.layers} == {()}


def test_a_target_that_cannot_be_timed_is_refused_at_once(model: Path) -> None:
    with pytest.raises(RecipeError, match="qnn-htp cannot be timed"):
        optimize(model, "no such data", target="qnn-htp", mixed=True, mixed_cost="latency",
                 min_sqnr=1.0)  # fmt: skip


def test_the_command_line_passes_it_on(model: Path) -> None:
    result = CliRunner().invoke(main, ["optimize", str(model), "--mixed-cost", "latency"])
    assert result.exit_code == 2
    assert "--mixed-cost latency is for --mixed" in " ".join(result.output.split())


def test_a_budget_is_met_where_float_is_faster_everywhere(
    model: Path, given: Callable[..., None]
) -> None:
    """By time the plan of 8 bits is all there is; the plans by size hold better ones."""
    given(lambda layer, level: 0.1 if level == "float" else 0.2)
    uniform = found_for(model, min_sqnr=1.0)[1].points[0].measured
    assert uniform is not None
    report, found = found_for(model, min_sqnr=uniform + 1.0)
    assert report.ok
    assert found.met
    assert {"float", "w8a8"} <= {layer.bits for layer in found.layers}
    chosen = next(point for point in found.points if point.chosen)
    assert chosen.layers_ms == pytest.approx(
        sum(dict(layer.level_ms)[layer.bits] for layer in found.layers)
    )
