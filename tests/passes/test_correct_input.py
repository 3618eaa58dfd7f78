"""What linear ops read is corrected in their weights, where outputs surely get better by it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.passes import compensate as compensate_module
from qpass.passes import correct_input as module
from qpass.passes.compensate import compensate
from qpass.passes.fold_linear import InputSite, find_input_site
from qpass.stream import Stream
from qpass.submodel import Submodel
from qpass.verify.metrics import sqnr_db
from tests.folds import graph_of, normal, rounded, run

Array = np.ndarray[Any, Any]
WIDTH, OUTPUTS = 8, 12
BODY = "[act] a = Gelu (x) {drift} [op] h = MatMul (d, w) y = Add (h, b)"
# A factor for each channel that no op in front can take back, and that no output channel can.
DRIFT = "scaled = Mul (a, factors) d = Add (scaled, noise)"


def model(*, quantized: bool, spread: float = 0.4, body: str = BODY, bits: int = 8) -> Graph:
    """GELU and a product; in the quantized graph the channels between them are off by factors."""
    weight = normal((WIDTH, OUTPUTS), seed=7)
    constants: dict[str, Array] = {"b": np.zeros(OUTPUTS, np.float32)}
    drift = "d = Identity (a)"
    if quantized:
        steps = 2 ** (bits - 1) - 1
        constants |= rounded("w", weight, 1, steps=steps)
        # By position and channel, so that the Mul is no chain that could take the correction.
        factors = np.linspace(1 - spread, 1 + spread, WIDTH) * np.ones((5, 1))
        constants["factors"] = factors.astype(np.float32)
        constants["noise"] = normal((5, WIDTH), seed=3) / 100
        drift = DRIFT
        body = f"[dq] w = DequantizeLinear <axis = 1> (w_int, w_scale, w_zero) {body}"
    else:
        constants["w"] = weight
    shape = f"float[B,5,{WIDTH}] x", f"float[B,5,{OUTPUTS}] y"
    return graph_of(*shape, body.format(drift=drift), **constants)


def batches_of(count: int = 12, *, seed: int = 0) -> list[dict[str, Array]]:
    return [{"x": normal((8, 5, WIDTH), seed=seed + i)} for i in range(count)]


def score(reference: Graph, graph: Graph) -> float:
    pairs = [(run(reference, b)[0], run(graph, b)[0]) for b in batches_of(4, seed=50)]
    return sqnr_db(*(np.concatenate(side) for side in zip(*pairs, strict=True)))


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate_module, "correct_input", lambda *_, **__: ([], []))


def reasons(result: Any) -> list[str]:
    return [r.reason for r in result.report.refusals if r.rule == module.RULE]


def test_an_error_that_differs_between_input_channels_is_undone_in_the_weight(monkeypatch):
    scores = []
    for off in (False, True):
        if off:
            without(monkeypatch)
        reference, quantized = model(quantized=False), model(quantized=True)
        structure = quantized.to_text()
        integers = array_of(quantized.node("dq").inputs[0]).copy()
        result = compensate(reference, quantized, batches_of())
        assert result.method == "cwac"
        assert quantized.to_text() == structure
        changed = (array_of(quantized.node("dq").inputs[0]) != integers).any()
        assert changed == (not off)
        scores.append(score(reference, quantized))
    assert scores[0] > scores[1] + 10.0


@pytest.mark.parametrize("bits", [8, 4])
def test_where_rounding_the_weight_again_costs_as_much_nothing_changes(bits):
    """Coarse weights, factors within half a percent: the input could win, the output does not."""
    reference = model(quantized=False)
    quantized = model(quantized=True, spread=0.002, bits=bits)
    integers = array_of(quantized.node("dq").inputs[0]).copy()
    result = compensate(reference, quantized, batches_of())
    np.testing.assert_array_equal(array_of(quantized.node("dq").inputs[0]), integers)
    (reason,) = reasons(result)
    assert "would fall by" in reason or "no channel" in reason


def test_the_gate_looks_at_the_output_and_at_what_rounding_does_there(monkeypatch):
    """The input promises a lot; the new weight is worse: the correction is refused."""
    real = module.InputSite.scaled

    def coarse(self: Any, gain: Array) -> Any:
        found = real(self, gain)
        return type(found)(
            stands_for=np.rint(found.stands_for), values=found.values, scale=found.scale
        )

    monkeypatch.setattr(module.InputSite, "scaled", coarse)
    reference, quantized = model(quantized=False), model(quantized=True)
    (reason,) = reasons(compensate(reference, quantized, batches_of()))
    assert "the error of its output would fall by -" in reason


def test_a_common_factor_is_left_to_the_output():
    """One gain for all input channels is one for all outputs: scales take it without rounding."""
    reference, quantized = model(quantized=False), model(quantized=True, spread=0.0)
    quantized.producer(quantized.tensors()["scaled"]).inputs[1] = quantized.constant(
        "factors", np.full((5, WIDTH), 0.7, np.float32)
    )
    result = compensate(reference, quantized, batches_of())
    (reason,) = reasons(result)
    assert "the error of its output would fall by" in reason
    assert score(reference, quantized) > 30.0


def test_no_linear_op_runs_once_more_for_it(monkeypatch):
    executed: Counter[str] = Counter()
    real = Submodel.run
    counts = []

    def counting(self: Submodel, feeds: Any) -> Any:
        executed.update(self.ops)
        return real(self, feeds)

    monkeypatch.setattr(Submodel, "run", counting)
    for off in (False, True):
        if off:
            without(monkeypatch)
        executed.clear()
        reference, quantized = model(quantized=False), model(quantized=True)
        batches = batches_of()
        assert compensate(reference, quantized, batches).method == "cwac"
        counts.append(executed["MatMul"])
        # One float and one quantized forward, and the uncorrected model on what was held out.
        assert executed["MatMul"] == 2 * len(batches) + len(batches) // 4
    assert counts[0] == counts[1]


def test_offsets_alone_leave_weights_as_they_are():
    reference, quantized = model(quantized=False), model(quantized=True)
    integers = array_of(quantized.node("dq").inputs[0]).copy()
    result = compensate(reference, quantized, batches_of(), method="bias")
    np.testing.assert_array_equal(array_of(quantized.node("dq").inputs[0]), integers)
    assert reasons(result) == []


def test_one_held_group_cannot_judge():
    """Batches of one sample, of which every second is read: one of the two that are held out."""
    place = f"float[1,{WIDTH}] x", f"float[1,{OUTPUTS}] y"
    body = "[act] a = Gelu (x) d = Mul (a, k) [op] h = MatMul (d, w) y = Add (h, b)"
    constants = {"w": normal((WIDTH, OUTPUTS), seed=7), "b": np.zeros(OUTPUTS, np.float32)}
    reference, quantized = (
        graph_of(*place, body, **constants, k=factors.astype(np.float32).reshape(1, WIDTH))
        for factors in (np.ones(WIDTH), np.linspace(0.5, 1.5, WIDTH))
    )
    batches = [{"x": normal((1, WIDTH), seed=i)} for i in range(64)]
    site = find_input_site(quantized, {"op": quantized.node("op")}, reference.node("op"))
    with Stream(reference, quantized, batches) as stream:
        found = [
            module.correct_input(
                step, quantized, {"op": quantized.node("op")}, reference.node("op"),
                first_held=62, ridge=1e-4,
            )
            for step in stream
        ]  # fmt: skip
    assert isinstance(site, InputSite)
    ((changes, (refusal,)),) = found
    assert changes == []
    assert "nothing to judge by" in refusal.reason


def test_a_refused_input_is_named_with_its_reason():
    reference, quantized = model(quantized=False), model(quantized=True)
    dq = quantized.node("dq")
    quantized.set_input(dq, 1, quantized.constant("s", np.float32(0.02)))
    quantized.set_input(dq, 2, quantized.constant("z", np.int8(0)))
    del dq.attrs["axis"]
    result = compensate(reference, quantized, batches_of())
    assert any("one scale for all its outputs" in reason for reason in reasons(result))


CHAINS = {
    "relu of a product": ("h = MatMul (x, w) t = Add (h, b) a = Relu (t)", True),
    "moved": ("h = MatMul (x, w) a = Transpose <perm = [0, 2, 1]> (h)", True),
    "norm": ("a = LayerNormalization (x, b)", True),
    "through Q and DQ": (
        "h = MatMul (x, w) t = QuantizeLinear (h, s, z) a = DequantizeLinear (t, s, z)", True,
    ),
    "integer weight": (
        "v = DequantizeLinear (q, s) a = MatMul (x, v)", True,
    ),
    "GELU": ("h = MatMul (x, w) a = Gelu (h)", False),
    "sum": ("h = MatMul (x, w) a = Add (h, x)", False),
    "gate": ("h = MatMul (x, w) a = Mul (h, x)", False),
    "product of activations": ("h = Transpose <perm = [0, 2, 1]> (x) a = MatMul (x, h)", False),
    "input": ("a = Identity (x)", False),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_inputs_that_a_corrected_op_makes_are_known(name):
    body, corrected = CHAINS[name]
    constants = {
        "w": normal((WIDTH, WIDTH)), "b": np.ones(WIDTH, np.float32), "s": np.float32(0.1),
        "z": np.uint8(128), "q": np.ones((WIDTH, WIDTH), np.int8),
    }  # fmt: skip
    words = body.replace(",", " ").replace("(", " ").replace(")", " ").split()
    used = {key: values for key, values in constants.items() if key in words}
    shape = f"float[{WIDTH},{WIDTH},{WIDTH}]"
    graph = graph_of(f"{shape} x", f"{shape} y", f"{body} y = Neg (a)", **used)
    assert module.is_corrected(graph, graph.tensors()["a"]) is corrected
