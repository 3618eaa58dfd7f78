"""Scales that pass a Clip: within their bounds nothing that calibration saw changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpass.calibrate import Samples, TensorStats, open_samples
from qpass.calibrate.inputs import input_specs
from qpass.equalization import Job, equalize
from qpass.evidence import taps_of
from qpass.frozen import FrozenScale
from qpass.graph import Graph
from qpass.migration_trial import Trials
from qpass.passes.absorb_scales import absorb_scales
from qpass.passes.equalize.apply import apply_scales
from qpass.passes.equalize.bounds import SMALLEST, smallest_scales
from qpass.passes.equalize.site import Bound, Site
from qpass.passes.equalize.sites import find_sites
from qpass.passes.equalize.solve import Scales, bound_candidates, solve_candidates
from qpass.targets import load_target
from tests.oracle import ort, ort_plain, reference, relative_error
from tests.small_models import policy_of

CHANNELS = 12
TEXT = """
<ir_version: 10, opset_import: ["": 21]>
block (float[N,3,10,10] x) => (float[N,5,10,10] y)
{
    [expand] a = Conv (x, a_w, a_b)
    a6 = Clip (a, low, high)
    [depthwise] b = Conv <group = 12, pads = [1, 1, 1, 1]> (a6, b_w, b_b)
    b6 = Clip (b, low, high)
    [project] y = Conv (b6, c_w, c_b)
}
"""


def block(low: float = 0.0, high: float = 6.0) -> Graph:
    """Expand, depthwise, project with ReLU6, as in MobileNetV2; channels of unlike sizes."""
    random = np.random.default_rng(4)
    sizes = np.geomspace(0.02, 8.0, CHANNELS)[:, None, None, None]
    graph = Graph.from_text(
        TEXT,
        low=np.float32(low),
        high=np.float32(high),
        a_w=(random.standard_normal((CHANNELS, 3, 1, 1)) * sizes).astype(np.float32),
        a_b=(0.1 * sizes.ravel()).astype(np.float32),
        b_w=(random.standard_normal((CHANNELS, 1, 3, 3)) / 3 / sizes).astype(np.float32),
        b_b=np.zeros(CHANNELS, np.float32),
        c_w=random.standard_normal((5, CHANNELS, 1, 1)).astype(np.float32),
        c_b=np.zeros(5, np.float32),
    )
    graph.infer_shapes()
    return graph


def samples(graph: Graph, count: int = 24) -> Samples:
    random = np.random.default_rng(8)
    feeds = [{"x": random.standard_normal((1, 3, 10, 10)).astype(np.float32)} for _ in range(count)]
    return open_samples(feeds, input_specs(graph.to_model(stub_above=1024)))


def job_of(graph: Graph, precision: str) -> Job:
    found = samples(graph)
    job = Job(
        target=load_target("ort-x86"),
        policy=policy_of(precision, low_bit_edges=True),
        taps=taps_of,
        samples=found,
        rows=16,
        held=list(found)[16:],
        threads=1,
    )
    return replace(job, stats=job.calibrate(graph, taps_of(graph, job.plan(graph))))


def site_of(graph: Graph, reader: str) -> Site:
    sites, _ = find_sites(graph, ["expand", "depthwise", "project"])
    return next(site for site in sites if site.name == reader)


@pytest.mark.parametrize("ends", [(0.0, 6.0), (-1.0, 1.0), (-2.0, 6.0)], ids=str)
@pytest.mark.parametrize("reader", ["depthwise", "project"])
def test_within_its_bounds_a_clip_is_passed_exactly(reader, ends):
    graph = block(*ends)
    job = job_of(graph, "w8a8")
    site = site_of(graph, reader)
    floor = smallest_scales(site, job.stats)
    assert floor is not None
    assert floor.min() < 0.5
    assert floor.max() == 1.0
    scales = Scales(
        method="own", scale=np.concatenate([[1.0], floor]), shift=np.zeros(site.groups + 1)
    )
    after = graph.copy()
    nodes = {node.name: node for node in after.nodes}
    assert not apply_scales(after, site.of(nodes), scales)
    for feeds in samples(graph):
        wanted = reference(graph.to_model(), feeds)
        for engine in (reference, ort_plain, ort):
            # About a hundred float32 roundings, each 6e-8 of terms that cancel by half.
            assert relative_error(engine(after.to_model(), feeds), wanted) < 1e-5


def test_a_channel_at_the_end_keeps_its_scale_and_the_others_reach_it():
    graph = block()
    job = job_of(graph, "w8a8")
    site = site_of(graph, "depthwise")
    floor, stats = smallest_scales(site, job.stats), job.stats["a6"]
    assert floor is not None
    assert stats.channel_high is not None
    saturated = stats.channel_high == 6.0
    assert 0 < saturated.sum() < CHANNELS
    np.testing.assert_array_equal(floor[saturated], 1.0)
    rest = np.maximum(stats.channel_high[~saturated] / 6.0, SMALLEST)
    # Rounded up to the next float32 number.
    np.testing.assert_allclose(floor[~saturated], rest, rtol=2.0**-22)
    assert (floor[~saturated] >= rest).all()


def test_what_was_not_measured_is_fixed():
    graph = block()
    site = site_of(graph, "depthwise")
    np.testing.assert_array_equal(smallest_scales(site, {}), 1.0)
    stats = job_of(graph, "w8a8").stats["a6"]
    blind: TensorStats = replace(stats, channel_low=None, channel_high=None)
    np.testing.assert_array_equal(smallest_scales(site, {"a6": blind}), 1.0)
    assert stats.channel_high is not None
    unseen = replace(stats, channel_high=np.where(np.arange(CHANNELS) == 0, -np.inf, 6.0))
    np.testing.assert_array_equal(smallest_scales(site, {"a6": unseen}), 1.0)


def test_a_site_without_clip_has_no_bounds():
    sites, _ = find_sites(block(), ["expand", "depthwise", "project"])
    assert all(site.bounds for site in sites)
    free = replace(sites[0], bounds=())
    assert smallest_scales(free, {}) is None


def test_groups_beside_the_clip_are_free():
    labels = np.array([0, 1, 2]).reshape(1, 3, 1, 1)
    stats = job_of(block(), "w8a8").stats["a6"]
    three = replace(stats, channel_low=np.zeros(3), channel_high=np.array([6.0, 3.0, 1.5]))
    bound = Bound(tensor="a6", low=0.0, high=6.0, labels=labels)
    site = Site(tensor="t", kind="linear", groups=3, bounds=(bound,))
    floor = smallest_scales(site, {"a6": three})
    np.testing.assert_allclose(floor, [0.5, 0.25, 0.0], rtol=2.0**-22)


@given(
    st.lists(st.sampled_from([0.0, SMALLEST, 0.1, 0.5, 1.0]), min_size=3, max_size=8),
    st.integers(0, 99),
)
def test_candidates_stay_within_bounds(floors, seed):
    floor = np.array([*floors, 0.25])
    random = np.random.default_rng(seed)
    high, weight = random.uniform(0.1, 6, floor.size), random.uniform(0.01, 1, floor.size)
    plain = list(solve_candidates(np.zeros(floor.size), high, weight))
    found = list(bound_candidates(plain, floor))
    assert len(found) == len(plain) + 4
    bounded = floor > 0
    for scales in found:
        one = scales.scale[1:]
        assert scales.scale[0] == 1.0
        assert (one > 0).all()
        assert (one[bounded] <= 1.0).all()
        # `floor` is not a float32 number here: half a unit in the last place.
        assert (one[bounded] >= floor[bounded] * (1 - 2.0**-24)).all()
    full = next(s for s in found if s.method == "bound 1.0")
    np.testing.assert_allclose(full.scale[1:], np.where(bounded, floor, 1.0), rtol=2.0**-24)


@pytest.mark.parametrize("precision", ["w4a4", "w8a8"])
def test_the_whole_model_gains(precision):
    graph = block()
    result = equalize(graph, job_of(graph, precision))
    assert result.report.changed >= 1
    assert set(result.scaled) & {"expand", "depthwise"}
    before, after = (
        float(text.split()[0]) for text in result.notes[0].split(": ")[1].split(" -> ")
    )
    assert after > before + 1.0  # dB


def test_scales_of_a_trained_network_do_not_pass_a_clip():
    graph = block()
    entry = FrozenScale(scale=np.geomspace(0.01, 0.1, CHANNELS), zero_point=0)
    kept, report = absorb_scales(graph, {"a6": entry})
    assert not kept
    assert "Clip" in report.refusals[0].reason


@pytest.mark.parametrize(
    ("precision", "judged"),
    [("w4a4", "w8a4"), ("w4a8", "w8a8"), ("w8a8", "w8a8"), ("w8a4", "w8a4")],
)
def test_weights_of_eight_bits_judge(precision, judged):
    graph = block()
    job = job_of(graph, precision)
    assert str(job.judged.precision) == judged
    trials = Trials(job=job, make=lambda _: (graph, frozenset()), everything=frozenset())
    weights = {d.spec.bits for d in trials.build(frozenset()).plan.weights() if d.kind == "weight"}
    assert weights == {job.judged.precision.weight}
