"""The gate: errors are those of the real arithmetic; what does not surely help is refused."""

from __future__ import annotations

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes.equalize.gate import choose_scales, ideal_gain_db
from qpass.passes.equalize.linear_error import row_weights
from qpass.passes.equalize.measure import Measure, Specs
from qpass.passes.equalize.rows import SiteRows, Wanted, collect_rows
from qpass.passes.equalize.site import Site
from qpass.passes.equalize.sites import find_sites
from qpass.passes.equalize.solve import Scales
from qpass.planner import plan
from qpass.qparams import choose_qparams, fake_quantize
from qpass.targets import load_target
from tests.small_models import policy_of

CHANNELS = 16


def norm_graph(gain: np.ndarray) -> Graph:
    """A norm whose gain makes some channels large, and a linear op behind it."""
    random = np.random.default_rng(0)
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,6,{CHANNELS}] x) '
        "=> (float[N,6,8] y) { n = LayerNormalization (x, g, b)  [fc] h = MatMul (n, w)"
        "  y = Add (h, c) }"
    )
    graph = Graph.from_text(
        text,
        g=gain.astype(np.float32),
        b=np.zeros(CHANNELS, np.float32),
        w=(random.standard_normal((CHANNELS, 8)) / gain[:, None]).astype(np.float32),
        c=np.zeros(8, np.float32),
    )
    graph.infer_shapes()
    return graph


def samples(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [
        {"x": random.standard_normal((1, 6, CHANNELS)).astype(np.float32)} for _ in range(count)
    ]


def looked_at(
    graph: Graph, count: int = 16, precision: str = "w8a8"
) -> tuple[Site, SiteRows, Specs]:
    made = plan(graph, load_target("ort-x86"), policy_of("w8a8"))
    (site,), _ = find_sites(graph, ["fc"])
    wanted = Wanted(groups=site.groups, readers=site.readers, products=site.products)
    (rows,) = collect_rows(graph, [wanted], samples(count), count, threads=1)
    return site, rows, Specs.of(made, graph.nodes)


OUTLIER = np.where(np.arange(CHANNELS) == 3, 60.0, 1.0)


def test_the_error_is_that_of_the_integers():
    graph = norm_graph(OUTLIER)
    site, rows, specs = looked_at(graph, 4)
    measure = Measure(readers=site.readers, products=(), rows=rows, specs=specs)
    random = np.random.default_rng(2)
    scale = np.concatenate([[1.0], random.uniform(0.5, 4, CHANNELS)]).astype(np.float32)
    scales = Scales(method="x", scale=scale.astype(np.float64), shift=np.zeros(CHANNELS + 1))
    weight = array_of(graph.node("fc").inputs[1]) * scale[1:, None]
    kept = rows.linear["fc"]
    whole = np.concatenate(kept.inputs)[:, :, 0] / scale[1:]
    numbers = choose_qparams(specs.activations["fc", 0], whole.min(), whole.max())
    w_numbers = choose_qparams(specs.weights["fc"], weight.min(axis=0), weight.max(axis=0))
    exact = [inputs[:, :, 0] / scale[1:] @ weight for inputs in kept.inputs]
    power = np.concatenate([np.square(y).sum(axis=1) for y in exact])
    row = 1 / (power + np.sort(power)[power.size // 2 - 1])
    row /= (row * power).sum() / 4  # six rows a sample: all of them are kept, each counts once
    wanted = []
    for i, inputs in enumerate(kept.inputs):
        noisy = fake_quantize(inputs[:, :, 0] / scale[1:], numbers) @ fake_quantize(
            weight, w_numbers
        )
        wanted.append(np.square(noisy - exact[i]).sum(axis=1) @ row[6 * i : 6 * i + 6])
    found = measure.errors(scales, range(4))
    # What is wanted is summed in float32: 16 products and 6 rows.
    np.testing.assert_allclose(found, wanted, rtol=22 * 2.0**-24)


def test_a_huge_row_does_not_drown_the_others():
    power = np.array([1.0, 1.0, 1.0, 1.0, 1e6])
    weights = row_weights(power, np.ones(5))
    assert weights @ power == pytest.approx(1.0)
    assert weights[4] * power[4] == pytest.approx(2 * weights[0] * power[0], rel=1e-3)


def bounds(rows: SiteRows) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of each channel."""
    low, high = rows.extremes["fc", 0].over(range(rows.samples))
    return low[1:], high[1:]


def test_an_outlier_is_found_and_the_gain_holds_on_other_samples():
    site, rows, specs = looked_at(norm_graph(OUTLIER))
    choice = choose_scales(site.readers, (), rows, specs, shift=site.shift is not None)
    assert choice.sure
    assert choice.gain_db > 6.0
    assert ideal_gain_db(site.readers[0], *bounds(rows), specs) >= choice.gain_db - 1.0


def test_alike_channels_leave_nothing_to_gain():
    site, rows, specs = looked_at(norm_graph(np.ones(CHANNELS)))
    assert ideal_gain_db(site.readers[0], *bounds(rows), specs) < 3.0


@pytest.mark.parametrize("count", [2, 16])
def test_a_harmful_migration_is_never_sure(count, monkeypatch):
    harmful = np.exp2(np.linspace(-6, 6, CHANNELS + 1)).astype(np.float32).astype(np.float64)
    harmful[0] = 1.0
    monkeypatch.setattr(
        "qpass.passes.equalize.gate.solve_candidates",
        lambda *_, **__: iter([Scales(method="bad", scale=harmful, shift=np.zeros(CHANNELS + 1))]),
    )
    site, rows, specs = looked_at(norm_graph(np.ones(CHANNELS)), count)
    choice = choose_scales(site.readers, (), rows, specs)
    assert choice.after > choice.before
    assert not choice.sure


def test_one_sample_to_judge_by_is_not_enough():
    site, rows, specs = looked_at(norm_graph(OUTLIER), 2)
    assert not choose_scales(site.readers, (), rows, specs).sure


def test_the_choice_is_the_same_every_time():
    graph = norm_graph(OUTLIER)
    first, second = (
        choose_scales(*(lambda s, r, p: (s.readers, (), r, p))(*looked_at(graph)), shift=True)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.scales.scale, second.scales.scale)
    assert first.sentence == second.sentence
