"""Scales that suit weights of few bits: exact in float, and worth it when really rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qpass
from qpass.calibrate import collect, input_specs, open_samples
from qpass.choose import weight_range
from qpass.graph import Graph, Node, array_of
from qpass.passes.equalize.measure import Specs
from qpass.passes.equalize.suit_weights import NAME, SuitedSites, find_suited, suit_weights
from qpass.plan import Plan
from qpass.planner import plan as make_plan
from qpass.qparams import choose_qparams, fake_quantize
from qpass.targets import load_target
from tests.oracle import openvino, ort, ort_plain, reference, relative_error
from tests.small_models import from_text, policy_of, transformer, weights

Array = np.ndarray[Any, Any]
WIDTH = 24

NETWORK = """
<ir_version: 10, opset_import: ["": 21]>
net (float[N,8,10,10] x) => (float[N,12,10,10] y)
{
    a = Conv <pads = [1,1,1,1]> (x, wa, ba)
    ra = Relu (a)
    b = Conv <pads = [1,1,1,1]> (ra, wb, bb)
    s = Add (b, ra)
    rs = Relu (s)
    c = Conv (rs, wc, bc)
    d = Conv <pads = [1,1,1,1], group = 2> (rs, wd, bd)
    e = Concat <axis = 1> (c, d)
    re = Relu (e)
    z = Conv (re, wz, bz)
    y = Relu (z)
}
"""


def network(seed: int = 0, *, spread: float = 1.2) -> Graph:
    """A residual stream that is read by a dense and a grouped convolution, then Concat."""
    random = np.random.default_rng(seed)
    shapes = {
        "wa": (WIDTH, 8, 3, 3),
        "wb": (WIDTH, WIDTH, 3, 3),
        "wc": (WIDTH, WIDTH, 1, 1),
        "wd": (WIDTH, WIDTH // 2, 3, 3),
        "wz": (12, 2 * WIDTH, 1, 1),
    }
    constants = {}
    for name, shape in shapes.items():
        uneven = np.exp(random.normal(0, spread, (shape[0], 1, 1, 1)))  # energies of its channels
        constants[name] = weights(random, *shape, fan_in=int(np.prod(shape[1:]))) * uneven
        constants[name.replace("w", "b")] = random.normal(0, 0.2, shape[0])
    return from_text(NETWORK, **{k: v.astype(np.float32) for k, v in constants.items()})


def feeds(count: int, seed: int = 1) -> list[dict[str, Array]]:
    random = np.random.default_rng(seed)
    shape = (1, 8, 10, 10)
    return [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def suited(
    graph: Graph, precision: str = "w4a8", samples: Any = None, **options: Any
) -> tuple[Graph, SuitedSites, list[Any], list[Any], Plan]:
    """Scale a copy of `graph` with the statistics of a few samples."""
    draft = graph.copy()
    plan = make_plan(draft, load_target("ort-x86"), policy_of(precision, **options))
    specs = Specs.of(plan, draft.nodes)
    found = find_suited(draft, specs)
    model = graph.to_model()
    opened = open_samples(samples or feeds(16), input_specs(model))
    first, second = (collect(model, found.taps(), opened.view(i, 16, 2)).stats for i in (0, 1))
    done, refusals = suit_weights(draft, found.sites, specs, (first, second))
    return draft, found, done, refusals, plan


def error_of(graph: Graph, name: str, bits: int) -> float:
    """Return the share of its output that an op loses by weights to nearest, on unseen samples."""
    node: Node = next(n for n in graph.nodes if n.name == name)
    plan = make_plan(graph, load_target("ort-x86"), policy_of(f"w{bits}a8", low_bit_edges=True))
    spec = Specs.of(plan, graph.nodes).weights[name]
    outputs = []
    for rounded in (False, True):
        copy = graph.copy()
        twin = next(n for n in copy.nodes if n.name == name)
        weight = array_of(twin.inputs[1])
        if rounded:
            weight = fake_quantize(weight, choose_qparams(spec, *weight_range(weight, spec)))
        copy.set_input(twin, 1, copy.constant("other", weight))
        model = copy.to_model(taps=[twin.outputs[0].name])
        outputs.append(ort_plain(model, batch())[node.outputs[0].name])
    wanted, got = (out - out.mean(axis=(0, 2, 3), keepdims=True) for out in outputs)
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def batch() -> dict[str, Array]:
    return {"x": np.concatenate([one["x"] for one in feeds(8, seed=7)])}


def test_the_float_function_stays() -> None:
    graph = network()
    draft, _, done, _, _ = suited(graph, low_bit_edges=True)
    assert {one.site.kind for one in done} == {"stream", "linear"}
    assert draft.fingerprint() != graph.fingerprint()
    wanted = reference(graph.to_model(), batch())
    # Sums of up to 216 products of numbers that were rounded once more.
    for engine in (reference, ort_plain, ort, openvino):
        assert relative_error(engine(draft.to_model(), batch()), wanted) < 1e-5


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_really_loses_less(bits: int) -> None:
    """Predicted on the samples that chose them; measured by rounding on others."""
    graph = network()
    draft, _, done, _, _ = suited(graph, f"w{bits}a8", low_bit_edges=True)
    names = [reader.linear.node.name for one in done for reader in one.site.readers]
    assert {"node_b", "node_c", "node_z"} <= set(names)
    gains = [
        10 * np.log10(error_of(graph, name, bits) / error_of(draft, name, bits)) for name in names
    ]
    assert np.mean(gains) > 0.5


def test_blocks_of_weights_alone() -> None:
    random = np.random.default_rng(3)
    uneven = np.exp(random.normal(0, 1.2, 64)).astype(np.float32)
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,64] x) => (float[N,48] y)
    {
        n = LayerNormalization (x, gain, offset)
        y = MatMul (n, w)
    }
    """
    graph = from_text(
        text,
        gain=uneven,
        offset=np.zeros(64, np.float32),
        w=weights(random, 64, 48, fan_in=64),
    )
    samples = [{"x": random.standard_normal((1, 64)).astype(np.float32)} for _ in range(16)]
    options = {"block_size": 16, "low_bit_edges": True}
    draft, _, done, refusals, plan = suited(graph, "w4", samples, **options)
    assert len(done) == 1, refusals
    spec = Specs.of(plan, graph.nodes).weights["node_y"]
    assert spec.granularity == "per_block"
    test = {"x": random.standard_normal((64, 64)).astype(np.float32)}
    errors = []
    for one in (graph, draft):
        node = next(n for n in one.nodes if n.op == "MatMul")
        weight = array_of(node.inputs[1])
        rounded = fake_quantize(weight, choose_qparams(spec, *weight_range(weight, spec)))
        inputs = ort_plain(one.to_model(taps=["n"]), test)["n"]
        errors.append(np.square(inputs @ (rounded - weight)).sum())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("biased", [False, True])
def test_means_count_where_no_bias_makes_up_for_them(biased: bool) -> None:
    random = np.random.default_rng(4)
    offset, gain = np.zeros(32, np.float32), np.ones(32, np.float32)
    offset[0], gain[1] = 6.0, 6.0  # a channel that is large because of its mean, and one that moves
    text = f"""
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,32] x) => (float[N,24] y)
    {{
        n = LayerNormalization (x, gain, offset)
        {"z = MatMul (n, w) y = Add (z, b)" if biased else "y = MatMul (n, w)"}
    }}
    """
    constants = {"b": np.zeros(24, np.float32)} if biased else {}
    weight = weights(random, 32, 24, fan_in=32)
    graph = from_text(text, gain=gain, offset=offset, w=weight, **constants)
    samples = [{"x": random.standard_normal((1, 32)).astype(np.float32)} for _ in range(16)]
    _, _, done, refusals, _ = suited(graph, "w4", samples, block_size=32, low_bit_edges=True)
    assert len(done) == 1, refusals
    mean, moving, *others = done[0].scales.scale[1:]
    assert moving > 1.1 * np.mean(others)
    assert bool(mean > 1.1 * np.mean(others)) is not biased


def test_what_gains_little_stays_and_says_how_much() -> None:
    graph = network(spread=0.0)
    _, found, done, refusals, _ = suited(graph, low_bit_edges=True)
    assert len(done) + len(refusals) == len(found.sites)
    assert refusals
    assert all("rounding would lose" in refusal.reason for refusal in refusals)


def test_only_weights_of_few_bits_ask_for_it() -> None:
    graph = network()
    for precision, edges, sites in (("w8a8", True, 0), ("w4a8", False, 1), ("w4a8", True, 2)):
        policy = policy_of(precision, low_bit_edges=edges)
        plan = make_plan(graph, load_target("ort-x86"), policy)
        assert len(find_suited(graph, Specs.of(plan, graph.nodes)).sites) == sites


def test_products_clips_and_fixed_ranges_are_left_alone() -> None:
    graph = transformer()
    plan = make_plan(graph, load_target("ort-x86"), policy_of("w4a8", low_bit_edges=True))
    specs = Specs.of(plan, graph.nodes)
    found = find_suited(graph, specs)
    reasons = {refusal.where: refusal.reason for refusal in found.refusals}
    assert any("multiplies two activations" in reason for reason in reasons.values())
    tensors = [site.tensor for site in found.sites]
    assert tensors
    pinned = find_suited(graph, specs, tensors)
    assert not pinned.sites
    assert sum("fixed by the plan" in r.reason for r in pinned.refusals) == len(tensors)

    clipped = network()
    for node in clipped.nodes:
        if node.outputs[0].name == "ra":
            ends = [clipped.constant(n, np.float32(v)) for n, v in (("low", 0), ("top", 6))]
            clip = clipped.make("Clip", [node.inputs[0], *ends], list(node.outputs), name="clip")
            clipped.add(clip, before=node)
            clipped.remove(node)
            break
    clipped.infer_shapes()
    plan = make_plan(clipped, load_target("ort-x86"), policy_of("w4a8", low_bit_edges=True))
    found = find_suited(clipped, Specs.of(plan, clipped.nodes))
    assert any("is clipped" in refusal.reason for refusal in found.refusals)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(network().to_model(), path)
    return path


OPTIONS: dict[str, Any] = {
    "precision": "w4a8",
    "engines": ("ort",),
    "jobs": 1,
    "compensate": "none",
    "low_bit_edges": True,
    "repair": False,
}


def passes_of(report: Any) -> dict[str, Any]:
    return {one.name: one for one in report.passes}


def test_the_model_comes_closer_and_the_file_says_what_was_scaled(saved, tmp_path) -> None:
    on, off = (
        qpass.optimize(
            saved, data=feeds(64), output=tmp_path / f"{flag}.onnx", equalize=flag, **OPTIONS
        )
        for flag in (True, False)
    )
    assert passes_of(on)[NAME].changed == 2
    assert NAME not in passes_of(off)
    assert any("suit the weights behind at 2 of 2 sites" in note for note in on.notes)
    assert on.engines[0].sqnr_db > off.engines[0].sqnr_db + 0.3
    scaled = {p.key: p.value for p in onnx.load(on.output).metadata_props}["qpass.scaled"]
    assert {"node_a", "node_b"} <= set(json.loads(scaled)["layers"])


def test_it_is_deterministic(saved, tmp_path) -> None:
    one, two = (
        qpass.optimize(saved, data=feeds(24), output=tmp_path / f"{i}.onnx", **OPTIONS)
        for i in (1, 2)
    )
    assert Path(one.output).read_bytes() == Path(two.output).read_bytes()


WIDE = {"low_bit_edges": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "w8a8", **WIDE},
        {"round": "rtn"},
        {"precision": "w4a4"},
        {"activations": "dynamic", "precision": "w8a8", "bits": ("*=w4a8",), **WIDE},
    ],
    ids=["w8a8", "rtn", "w4a4", "dynamic"],
)
def test_where_it_is_not_meant_for(changes, saved, tmp_path) -> None:
    report = qpass.optimize(
        saved, data=feeds(16), output=tmp_path / "o.onnx", calibrate="minmax",
        **{**OPTIONS, **changes},
    )  # fmt: skip
    assert NAME not in passes_of(report)


def test_statistics_of_a_file_belong_to_the_model_as_it_is(saved, tmp_path) -> None:
    data = tmp_path / "x.npz"
    np.savez(data, x=np.concatenate([one["x"] for one in feeds(16)]))
    stats = qpass.calibrate(saved, data=data, output=tmp_path / "s.npz", target="ort-x86")
    report = qpass.optimize(
        saved, data=data, output=tmp_path / "o.onnx", stats=str(stats), **OPTIONS
    )
    assert NAME not in passes_of(report)
    assert any("not migrated" in note for note in report.notes)


def test_few_samples_are_said_to_be_too_few(saved, tmp_path) -> None:
    report = qpass.optimize(saved, data=feeds(8), output=tmp_path / "o.onnx", **OPTIONS)
    assert NAME not in passes_of(report)
    assert any("scales were not chosen for weights" in note for note in report.notes)


def test_a_graph_that_would_not_be_exact_is_not_taken(saved, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("qpass.migration.same_outputs", lambda *_: False)
    report = qpass.optimize(saved, data=feeds(24), output=tmp_path / "o.onnx", **OPTIONS)
    found = passes_of(report)[NAME]
    assert found.changed == 0
    assert any("outputs would change" in refusal.reason for refusal in found.refusals)
