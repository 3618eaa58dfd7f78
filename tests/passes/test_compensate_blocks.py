"""Compensation of blocks: exact where it can be, gated, and what the file computes is the map."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from qpass.block_stage import integer_specs
from qpass.graph import Graph, array_of
from qpass.passes import compensate_blocks as module
from qpass.passes.block_rows import to_rows
from qpass.passes.compensate_blocks import compensate_blocks
from qpass.passes.model_gate import judge, outputs_of
from qpass.planner import plan as make_plan
from qpass.program import Precision
from qpass.quantize import build_quantized
from qpass.saturation import exact_entries
from qpass.submodel import Submodel
from qpass.targets import load_target
from qpass.verify import open_engine, read_back
from qpass.verify.metrics import sqnr_db
from tests.linear_blocks import MAPS, METHODS, ROWS, TOKENS, batches_of, linear_block, outputs
from tests.small_models import (
    Array,
    Feeds,
    feeds_of,
    from_text,
    minmax,
    policy_of,
    residual_cnn,
    transformer,
    weights,
)

ORT = load_target("ort-x86")


@pytest.mark.parametrize("text", [TOKENS, ROWS, MAPS], ids=["tokens", "rows", "maps"])
def test_a_linear_error_is_undone(text: str) -> None:
    reference, wrong = linear_block(text, seed=5), linear_block(text, seed=6)
    result = compensate_blocks(reference, wrong, batches_of(reference), ridges=(0.0,))
    assert result.method == "qwt"
    (block,) = result.blocks
    assert block.kind == "linear"
    assert block.r2 > 1.0 - 1e-10
    unseen = batches_of(reference, 2, seed=9)
    # Products of 16 values of size 1, all in float32.
    np.testing.assert_allclose(outputs(wrong, unseen), outputs(reference, unseen), atol=2e-5)


def test_costs_are_counted() -> None:
    reference, wrong = linear_block(MAPS, seed=5), linear_block(MAPS, seed=6)
    before = len(wrong.nodes)
    result = compensate_blocks(reference, wrong, batches_of(reference))
    assert (result.added_nodes, len(wrong.nodes) - before) == (2, 2)  # Conv and Add
    assert result.added_parameters == 16 * 32 + 32
    assert result.added_macs == 16 * 32 * 4 * 4
    conv = next(node for node in wrong.nodes if node.op == "Conv" and "qwt" in node.name)
    assert list(conv.attrs["strides"]) == [2, 2]


TWO_MLPS = """
<ir_version: 10, opset_import: ["": 21]>
mlps (float[N,5,16] x) => (float[N,5,16] y)
{
    h = MatMul (x, w1)  r = Relu (h)  f = MatMul (r, w2)  m = Add (x, f)
    i = MatMul (m, w3)  s = Relu (i)  g = MatMul (s, w4)  y = Add (m, g)
}
"""


def two_mlps(seed: int) -> Graph:
    random = np.random.default_rng(seed)
    return from_text(TWO_MLPS, **{f"w{i}": weights(random, 16, 16, fan_in=16) for i in range(1, 5)})


def test_one_float_and_two_quantized_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one forward more of the held-out samples, to judge the whole by."""
    executed: Counter[str] = Counter()
    real = Submodel.run

    def counting(self: Submodel, feeds: Feeds) -> dict[str, Array]:
        executed.update(self.ops)
        return real(self, feeds)

    monkeypatch.setattr(Submodel, "run", counting)
    reference, wrong = two_mlps(1), two_mlps(2)
    result = compensate_blocks(reference, wrong, batches_of(reference, 8))
    assert [block.kind for block in result.blocks] == ["linear", "linear"]
    # Relu stands once in each block: 2 blocks, 3 forwards of 8 batches, 1 of 2 held out.
    assert executed["Relu"] == 2 * (3 * 8 + 2)


def test_a_block_sees_the_compensated_one_before_it() -> None:
    """Only the first block is wrong, so what the second one sees is right once that is mended."""
    reference, wrong = two_mlps(1), two_mlps(1)
    gain = np.linspace(-0.5, 0.5, 16).astype(np.float32)
    skewed = wrong.variable("skewed", np.dtype(np.float32), ["N", 5, 16])
    scaled = wrong.make(
        "Mul", [wrong.inputs[0], wrong.constant("gain", gain)], [skewed], name="mul"
    )
    wrong.add(scaled, before=wrong.nodes[0])
    shifted = wrong.variable("shifted", np.dtype(np.float32), ["N", 5, 16])
    branch = wrong.tensors()["f"]
    wrong.add(
        wrong.make("Add", [branch, skewed], [shifted], name="add"), before=wrong.node("node_m")
    )
    wrong.set_input(wrong.node("node_m"), 1, shifted)
    result = compensate_blocks(reference, wrong, batches_of(reference), ridges=(0.0,))
    # x + f + gain x: the error of the first block is linear in its input, to the last digit.
    first, *rest = result.blocks
    assert (first.kind, first.r2 > 1.0 - 1e-9) == ("linear", True)
    unseen = batches_of(reference, 2, seed=9)
    np.testing.assert_allclose(outputs(wrong, unseen), outputs(reference, unseen), atol=5e-5)
    assert all(block.gain < 1.0 for block in rest)


def test_the_offset_of_tokens_is_free() -> None:
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    compensate_blocks(reference, wrong, batches_of(reference))
    assert Counter(node.op for node in wrong.nodes) == {"MatMul": 2, "Add": 3}
    assert not np.array_equal(
        array_of(wrong.tensors()["b"]), array_of(linear_block(TOKENS, seed=6).tensors()["b"])
    )


def test_an_offset_alone_costs_nothing() -> None:
    reference, shifted = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=5)
    offset = np.linspace(-1, 1, 16).astype(np.float32)
    bias = shifted.node("node_f")
    shifted.set_input(bias, 1, shifted.constant("b2", array_of(bias.inputs[1]) - offset))
    structure = Counter(node.op for node in shifted.nodes)
    result = compensate_blocks(reference, shifted, batches_of(reference))
    # The error does not depend on the input at all: there is nothing left for a map.
    assert [block.kind for block in result.blocks] == ["offset"]
    assert (result.added_nodes, result.added_parameters, result.added_macs) == (0, 0, 0)
    assert Counter(node.op for node in shifted.nodes) == structure
    unseen = batches_of(reference, 2, seed=9)
    np.testing.assert_allclose(outputs(shifted, unseen), outputs(reference, unseen), atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_the_verdict_is_that_of_the_judges(apart: bool) -> None:
    reference, wrong = linear_block(TOKENS, seed=5), linear_block(TOKENS, seed=6)
    batches, plain = batches_of(reference), wrong.copy()
    judges = [{name: array * np.float32(3) for name, array in batches[0].items()}]
    result = compensate_blocks(reference, wrong, batches, judges=judges if apart else ())
    judged = judges if apart else batches[-max(1, len(batches) // 4) :]
    names = [tensor.name for tensor in reference.outputs]
    expected = judge(*(outputs_of(g, judged, names) for g in (reference, plain, wrong)))
    assert result.verdict is not None
    assert result.verdict.before_db == pytest.approx(expected.before_db, abs=1e-3)


def quantized(
    reference: Graph,
    precision: str,
    batches: list[Feeds],
    method: str | None,
    aim: Graph | None = None,
    **options: object,
) -> tuple[Graph, list[object]]:
    """Build the graph of ort-x86 by min/max, with a compensation of blocks towards `aim`."""
    policy = policy_of(precision)
    plan = make_plan(reference, ORT, policy)
    table = minmax(reference, plan, batches[:4])
    results: list[object] = []
    specs = integer_specs(ORT, Precision.parse(precision))

    def compensation(graph: Graph):
        results.append(
            compensate_blocks(
                aim or reference, graph, batches, **{"method": method, "integer": specs, **options}
            )
        )
        return results[0].report

    graph, _ = build_quantized(
        reference, plan, table, ORT, policy,
        block_compensation=compensation if method else None,
    )  # fmt: skip
    return graph, results


@pytest.fixture(scope="module", params=["transformer", "residual_cnn"])
def network(request: pytest.FixtureRequest) -> tuple[Graph, list[Feeds]]:
    reference = {"transformer": transformer, "residual_cnn": residual_cnn}[request.param]()
    return reference, feeds_of(reference, 64)


@pytest.mark.parametrize("method", METHODS)
def test_four_bit_weights_come_closer_on_unseen_samples(network, method: str) -> None:
    reference, batches = network
    unseen = feeds_of(reference, 16, seed=77)
    wanted = outputs(reference, unseen)
    plain, _ = quantized(reference, "w3a8", batches, None)
    better, (result,) = quantized(reference, "w3a8", batches, method)
    assert result.method == method
    assert result.verdict.helps
    before, after = (sqnr_db(wanted, outputs(graph, unseen)) for graph in (plain, better))
    assert after > before + 0.3
    grown = len(compute_ops(better)) - len(compute_ops(plain))
    assert grown == result.added_nodes > 0


def compute_ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes if n.op not in ("QuantizeLinear", "DequantizeLinear")]


@pytest.mark.parametrize("method", METHODS)
def test_the_file_computes_the_map(network, method: str, monkeypatch, tmp_path: Path) -> None:
    """Against numpy, on onnxruntime with optimizations off and on, and on OpenVINO."""
    reference, batches = network
    fits = []
    original = module.fit_block

    def remember(*arguments, **options):
        fits.append((arguments[1], original(*arguments, **options)))
        return fits[-1][1]

    monkeypatch.setattr(module, "fit_block", remember)
    graph, _ = quantized(reference, "w3a8", batches, method)
    ((place, fit),) = fits
    tensors = graph.tensors()
    sum_name = f"{place.sum}_uncompensated"
    taps = [name for name in (place.x, sum_name, place.sum) if name in tensors]
    path = tmp_path / "q.onnx"
    onnx.save(graph.to_model(taps=taps), path)
    axis = place.block.axis
    for engine, optimize in (("ort", False), ("ort", True), ("openvino", True)):
        if engine == "openvino" and method == "qwt":
            continue  # its integers may saturate on a CPU without VNNI
        config = exact_entries() if engine == "ort" else None
        session = open_engine(engine, path, optimize=optimize, session_config=config)
        values = dict(zip(session.output_names, session.run(batches[0]), strict=True))
        strides = fit.mapped.strides
        rows = to_rows(values[place.x], axis, strides)
        wanted = fit.mapped(rows)
        ones = (1,) * len(strides)
        got = to_rows(values[place.sum] - values[sum_name], axis, ones)
        tolerance = 2e-4
        if place.integer_sum:
            tolerance = sum(float(numbers.scale) for numbers in fit.numbers)
        elif axis == -1 and method == "qwt":
            wanted = wanted - fit.mapped.linear.offset  # it went into the bias of the branch
        elif axis == -1:
            wanted = wanted - fit.mapped.refit.offset
        np.testing.assert_allclose(got, wanted, atol=tolerance)


def test_the_map_runs_in_integers(network, tmp_path: Path) -> None:
    """The Q of the block's input is used again; no Conv, MatMul or Add joins those in float."""
    reference, batches = network
    aim = reference.copy()  # eight bits leave little to correct: the branch gets another weight
    name = "down_w" if "down_w" in aim.tensors() else "b_w"
    (last,) = [node for node, _ in aim.consumers(aim.tensors()[name])]
    aim.set_input(last, 1, aim.constant("other_w", array_of(aim.tensors()[name]) * 1.5))
    counts = []
    for method in (None, "qwt"):
        path = tmp_path / f"{method}.onnx"
        graph, _ = quantized(reference, "w8a8", batches, method, aim)
        onnx.save(graph.to_model(), path)
        counts.append(Counter(read_back("ort", path, tmp_path).counts()))
    added = counts[1] - counts[0]
    if name == "b_w":
        assert added == {"QLinearConv": 1, "QLinearAdd": 1}
    else:
        assert added == {"MatMulIntegerToFloat": 1, "Add": 1}


def test_integer_sums_take_no_float_map() -> None:
    reference = residual_cnn()
    _, (result,) = quantized(reference, "w3a8", feeds_of(reference, 16), "qwt", integer=None)
    assert result.method == "none"
    assert "its sum runs in integers" in result.report.refusals[0].reason


def test_the_integers_of_a_target() -> None:
    specs = integer_specs(ORT, Precision.parse("w4a8"))
    assert (specs.matmul.bits, specs.conv.bits, specs.activation.bits) == (8, 8, 8)
    simulated = integer_specs(ORT, Precision.parse("w4a6"))
    assert simulated.activation.bits == 6
