"""The network that frozen activation scales aim at: what it is, and what aiming at it does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qpass.dtypes import UINT8
from qpass.frozen import FrozenScale, meant_decisions
from qpass.graph import Graph
from qpass.passes.compensate import compensate
from qpass.passes.compensate_blocks import compensate_blocks
from qpass.passes.model_gate import Verdict
from qpass.passes.round_weights import Method, round_weights
from qpass.passes.rounding.layer import Layer, find_layers
from qpass.stream import Pair, Step, Stream
from qpass.submodel import SKIPPED_OPTIMIZERS
from qpass.targets import TARGETS, Target
from qpass.units import split_into_units
from qpass.verify.metrics import sqnr_db
from qpass.weights_float import weights_float
from tests.frozen_networks import Frozen, frozen, on_the_grid, outputs, with_float_weights
from tests.jobs import optimize, saved
from tests.linear_blocks import METHODS
from tests.planning import FULL, ORT, cnn, planned
from tests.small_models import Array, Feeds, feeds_of, residual_cnn, transformer

MODELS: tuple[Callable[[], Graph], ...] = (residual_cnn, transformer)
LINEAR = {f"node_{name}" for name in ("stem", "a", "b", "c", "logits")}
ANY = FrozenScale(scale=np.array(1.0))
SKIPS = {residual_cnn: 1, transformer: 2}
ROUNDINGS: tuple[Method, ...] = ("auto", "gptq", "erq", "unit")
BETTER = Verdict(before_db=20.0, after_db=30.0, gain_db=10.0, gain_error_db=0.1)
TWO_READERS = "a = Conv (x, w) m = Conv (a, v) s = Add (a, m) c = Conv (s, v) y = Conv (c, w)"


def whole(graph: Graph, name: str, feeds: Feeds, *, fused: bool) -> Array:
    """Run a whole graph up to one tensor, node by node or as the engine fuses it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if fused:  # as `Submodel` does, so that float weights stay float
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    else:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = graph.to_model(taps=[name]).SerializeToString()
    session = ort.InferenceSession(model, options, disabled_optimizers=SKIPPED_OPTIMIZERS)
    result: Array = session.run([name], dict(feeds))[0]
    return result


def quarters(graph: Graph, count: int) -> list[dict[str, Array]]:
    """Samples in quarters: all sums of products with weights on a grid are exact in float32."""
    return [
        {k: np.rint(v * 4) / np.float32(4) for k, v in f.items()} for f in feeds_of(graph, count)
    ]


# ------------------------------------------------------------------ what is in it


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target", [ORT, FULL])
def test_it_is_the_quantized_graph_with_float_weights(
    model: Callable[[], Graph], target: Target
) -> None:
    case = frozen(model(), "w4a8", target)
    explicit = with_float_weights(case)
    ops = [node.op for node in case.aim.nodes]
    assert ops.count("QuantizeLinear") == ops.count("DequantizeLinear") > 4
    for feeds in feeds_of(case.reference, 2):
        for tensor in case.reference.outputs:
            got, wanted = (whole(g, tensor.name, feeds, fused=False) for g in (case.aim, explicit))
            np.testing.assert_array_equal(got, wanted)


def test_quantizers_that_the_file_does_not_name_are_left_out() -> None:
    graph = cnn("c = Conv (x, w) r = Relu (c) y = Conv (r, v)")
    plan = planned(graph, ranges={"x": (-4.0, 3.96875), "r": (0.0, 7.96875)})
    entries = {"r": FrozenScale(scale=np.array(1 / 32), zero_point=0)}
    aim = weights_float(graph, plan, meant_decisions(entries, plan))
    (quantizer,) = [node for node in aim.nodes if node.op == "QuantizeLinear"]
    assert quantizer.inputs[0].name == "r"


@pytest.mark.parametrize(("storage", "bits"), [(None, 4), (UINT8, 8)])
def test_of_two_quantizers_the_one_that_the_scale_was_made_for_is_in_it(
    storage: Any, bits: int
) -> None:
    """A sum of 8 bits that a product reads with 4: the network was trained with one of them."""
    plan = planned(cnn(TWO_READERS), precision="w4a4")
    entry = FrozenScale(scale=np.array(0.5), zero_point=0, storage=storage)
    assert [d.spec.bits for d in meant_decisions({"s": entry}, plan)] == [bits]


# ------------------------------------------------------------------ how it is run


@pytest.mark.parametrize("fused", [False, True])
def test_float_weights_stay_float_in_one_piece(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a DQ and a Q onnxruntime would round them to 8 bits when it fuses.

    On processors that saturate no piece is fused so; here none does.
    """
    monkeypatch.setattr("qpass.submodel.saturates", lambda: False)
    reference = residual_cnn()
    for node in reference.nodes:
        for index, tensor in enumerate(node.inputs[1:3] if node.name in LINEAR else (), start=1):
            short = np.rint(tensor.values * 512.0) / np.float32(512.0)  # no grid of 8 bits
            reference.set_input(node, index, reference.constant(tensor.name, short))
    case = frozen(reference, "w4a8")
    last = case.reference.nodes[-1].name
    ((unit,), batches) = split_into_units(reference, [last]), quarters(reference, 2)
    with Stream(
        reference, case.graph, batches, optimize=fused, aim=case.aim, units=[unit]
    ) as stream:
        for _ in stream:
            pass
        for feeds, (wanted, _) in zip(batches, stream.outputs(), strict=True):
            explicit = whole(with_float_weights(case), "logits", feeds, fused=False)
            np.testing.assert_array_equal(wanted["logits"], explicit)


@pytest.mark.parametrize("fused", [False, True])
def test_a_walk_runs_it_on_the_float_side(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in float that are off the grid of the integers, but short: sums stay exact.

    Integer kernels, which other processors have, round once where `whole` rounds twice.
    """
    monkeypatch.setattr("qpass.submodel.saturates", lambda: True)
    reference = on_the_grid(residual_cnn(), "w8a8")
    case = frozen(reference, "w4a8")
    explicit, batches = with_float_weights(case), quarters(reference, 2)
    quantized = {node.name: node for node in case.graph.nodes}
    differ = 0
    with Stream(reference, case.graph, batches, optimize=fused, aim=case.aim) as stream:
        for step in stream:
            node = quantized[str(step.unit.linear)]
            inside = node.outputs[0].name
            for tap in step.taps(inside, local=True):
                feeds = batches[tap.batch]
                np.testing.assert_array_equal(
                    tap.float, whole(explicit, inside, feeds, fused=fused)
                )
                got = whole(case.graph, inside, feeds, fused=fused)
                np.testing.assert_array_equal(tap.quantized, got)
                local = local_output(case, explicit, node.name, feeds, fused=fused)
                np.testing.assert_array_equal(tap.local, local)
                differ += not np.array_equal(tap.float, tap.quantized)
        for feeds, (wanted, _) in zip(batches, stream.outputs(), strict=True):
            np.testing.assert_array_equal(
                wanted["logits"], whole(explicit, "logits", feeds, fused=fused)
            )
    assert differ == len(batches) * len(case.numbers)


def local_output(case: Frozen, explicit: Graph, name: str, feeds: Feeds, *, fused: bool) -> Array:
    """Return what an op with its float weight makes of what the quantized graph has in front."""
    before = case.graph.node(name).inputs[0].name
    piece = explicit.copy()
    node = piece.node(name)
    tensor = node.inputs[0]
    given = piece.variable("given", tensor.dtype, tensor.shape)
    piece.set_input(node, 0, given)
    piece.inputs.append(given)
    seen = whole(case.graph, before, feeds, fused=fused)
    return whole(piece, node.outputs[0].name, {**feeds, "given": seen}, fused=fused)


# ------------------------------------------------------------------ what aiming at it does


@functools.cache
def on_its_grid(model: Callable[[], Graph], target: Target) -> Frozen:
    """A case that several tests read and none changes: its integers hold the weights exactly."""
    return frozen(on_the_grid(model(), "w4a4", target), "w4a4", target)


def rounded(case: Frozen, aim: Graph | None, method: Method, batches: list[Any]) -> Graph:
    graph = case.graph.copy()
    round_weights(case.reference, graph, batches, case.numbers, method=method, aim=aim)
    return graph


def compensated(case: Frozen, aim: Graph | None, method: Any, batches: list[Any]) -> Graph:
    graph = case.graph.copy()
    if method in METHODS:
        compensate_blocks(case.reference, graph, batches, method=method, aim=aim)
    else:
        compensate(case.reference, graph, batches, method=method, aim=aim)
    return graph


FITS = [
    *((rounded, method) for method in ROUNDINGS),
    *((compensated, method) for method in ("cwac", "bias")),
]


@pytest.mark.parametrize(("fit", "method"), FITS)
def test_unseen_samples_are_closer_to_it(fit: Any, method: Any) -> None:
    case = frozen(residual_cnn(), "w4a4", TARGETS["openvino"])
    batches, unseen = feeds_of(case.reference, 32), feeds_of(case.reference, 24, seed=99)
    graphs = [case.graph, *(fit(case, aim, method, batches) for aim in (None, case.aim))]
    wanted = outputs(case.aim, unseen)
    nearest, old, new = (sqnr_db(wanted, outputs(graph, unseen)) for graph in graphs)
    assert graphs[1].fingerprint() != graphs[2].fingerprint()
    assert new > old + 0.5
    assert new > nearest + 3.0


# In the transformer a full target rounds constants of norms and biases too: those are off the grid.
@pytest.mark.parametrize(
    ("target", "model"), [(ORT, residual_cnn), (ORT, transformer), (FULL, residual_cnn)]
)
@pytest.mark.parametrize(("fit", "method"), FITS)
def test_weights_on_the_grid_need_nothing(
    fit: Any,
    method: Any,
    target: Target,
    model: Callable[[], Graph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The quantized graph is the network that is aimed at: any change would be a wrong one.

    The model's outputs could not get better and would refuse all, so they are not asked here.
    """
    monkeypatch.setattr("qpass.passes.model_verdict.judge", lambda *_: BETTER)
    case = on_its_grid(model, target)
    batches = quarters(case.reference, 8)
    assert fit(case, case.aim, method, batches).fingerprint() == case.graph.fingerprint()


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_weights_on_the_grid_need_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps learn from many samples; against the float network they would find something."""
    monkeypatch.setattr("qpass.passes.model_verdict.judge", lambda *_: BETTER)
    case = on_its_grid(transformer, ORT)
    batches = quarters(case.reference, 48)
    aimed, other = (compensated(case, aim, method, batches) for aim in (case.aim, None))
    assert aimed.fingerprint() == case.graph.fingerprint()
    assert other.fingerprint() != case.graph.fingerprint()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target", [ORT, TARGETS["qnn-htp"]])
def test_layers_know_what_is_aimed_at(target: Target, model: Callable[[], Graph]) -> None:
    """Of the skip what the sum reads, behind its Q; of the output of the graph what is in front."""
    case = frozen(model(), "w4a8", target)
    aims = {node.name: node for node in case.aim.nodes}
    layers, _ = find_layers(case.reference, case.graph, case.numbers, aims)
    assert sum(layer.skip is not None for layer in layers.values()) == SKIPS[model]
    for layer in layers.values():
        assert layer.output == layer.site.tap
        assert layer.skip is None or layer.skip.float_name == layer.skip.quantized_name


def test_rounding_asks_for_what_is_aimed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Layer] = []

    def spy(*arguments: Any) -> Any:
        layers, refused = find_layers(*arguments)
        found.extend(layers.values())
        return layers, refused

    monkeypatch.setattr("qpass.passes.round_weights.find_layers", spy)
    case = frozen(residual_cnn(), "w4a8")
    rounded(case, case.aim, "gptq", feeds_of(case.reference, 4))
    (skip,) = [layer.skip for layer in found[: len(case.numbers)] if layer.skip is not None]
    assert skip.float_name == skip.quantized_name == "x0_dequantized"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target", [ORT, TARGETS["qnn-htp"]])
def test_compensation_looks_at_both_sides_in_the_same_place(
    target: Target, model: Callable[[], Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all scales frozen a tensor has one name: skips, inputs, operands of scores, outputs."""
    seen: list[Pair] = []
    look, taps = Step.look, Step.taps

    def spy_look(step: Step, pairs: Any, *rest: Any) -> Any:
        seen.extend(pairs)
        return look(step, pairs, *rest)

    def spy_taps(step: Step, quantized_tap: str, **options: Any) -> Any:
        name = step._stream.made(str(step.unit.tap))
        seen.extend([Pair(float_name=name, quantized_name=quantized_tap), *options["also"]])
        return taps(step, quantized_tap, **options)

    monkeypatch.setattr(Step, "look", spy_look)
    monkeypatch.setattr(Step, "taps", spy_taps)
    case = frozen(model(), "w4a8", target)
    compensated(case, case.aim, "cwac", feeds_of(case.reference, 8))
    assert len(seen) >= len(case.numbers)
    assert [pair for pair in seen if pair.float_name != pair.quantized_name] == []


# ------------------------------------------------------------------ whole runs


def scales_of(case: Frozen) -> dict[str, Any]:
    """Return the entries of a file with the scales of a case."""
    found = {}
    for d in meant_decisions({d.tensor: ANY for d in case.plan.activations()}, case.plan):
        numbers = case.activations[d.key]
        kind = numbers.storage.name
        found[d.tensor] = {
            "scale": float(numbers.scale), "zero_point": int(numbers.zero_point), "type": kind,
        }  # fmt: skip
    return found


@pytest.mark.parametrize(
    "how", [{"round": "erq", "compensate": "none"}, {"round": "rtn", "compensate": "cwac"}]
)
def test_a_run_with_a_file_aims_at_it(how: dict[str, Any], tmp_path: Path) -> None:
    """With weights on the grid the result is as good as the network can be, and says so."""
    case = frozen(on_the_grid(residual_cnn(), "w4a8"), "w4a8", coarse=8.0)
    model = saved(case.reference.to_model(), tmp_path)
    file = tmp_path / "scales.json"
    file.write_text(json.dumps(scales_of(case)))
    options = {"precision": "w4a8", "low_bit_edges": True, **how}
    samples = quarters(case.reference, 24)
    results = [
        optimize(model, samples, output=tmp_path / f"{i}.onnx", activation_scales=given, **options)
        for i, given in enumerate([str(file), None])
    ]
    (note,) = [n for n in results[0].notes if "activation quantizers" in n]
    assert "200.0 dB" in note
    assert not [n for n in results[1].notes if "activation quantizers" in n]
