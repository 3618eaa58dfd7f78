"""What goes back to float, and that the pipeline does it, and keeps what helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpass.report.model import EngineReport, FloatOp, Latency, PassReport
from qpass.verify.repair import (
    OP_LOSS,
    OP_LOSS_US,
    SMALLEST_MS,
    repair_leftovers,
    repair_slow,
    worth_repairing,
)
from tests.jobs import model_of, normal, op_types, optimize, precision_of
from tests.jobs import saved as save

TRAP = """
<ir_version: 10, opset_import: ["": 21]>
g (float[1,5,32] x) => (float[1,5,32] y) {
  [fc] a = MatMul(x, w)
  [bias] b = Add(a, c)
  [act] d = Tanh(b)
  [out] y = MatMul(d, v)
}
"""


def report_of(
    *, speedup: float = 0.8, ms: float = 1.0, ops: tuple[FloatOp, ...] = ()
) -> EngineReport:
    return EngineReport(
        name="ort", version="1", integer_ops=2, float_ops=ops, speedup=speedup,
        latency_ms=Latency(float=ms, quantized=ms / speedup),
    )  # fmt: skip


def left(name: str, *, planned: bool = True) -> FloatOp:
    return FloatOp(node=name, op="MatMul", rule="r", reason="because", planned=planned)


def test_leftovers_go_back_to_float() -> None:
    repair = repair_leftovers(report_of(ops=(left("a"), left("b", planned=False))))
    assert repair is not None
    assert repair.float_nodes == {"a": "ort ran it in float: because"}
    assert repair_leftovers(report_of(ops=(left("b", planned=False),))) is None


def test_only_what_is_surely_slower_is_repaired() -> None:
    assert worth_repairing(report_of(speedup=0.9, ms=SMALLEST_MS))
    assert not worth_repairing(report_of(speedup=0.98, ms=SMALLEST_MS))  # noise
    assert not worth_repairing(report_of(speedup=0.5, ms=SMALLEST_MS / 2))  # too small to time


def test_ops_that_lose_time_go_back_to_float() -> None:
    loss = OP_LOSS * 10.0 + OP_LOSS_US
    repair = repair_slow(report_of(), [("a", 10.0, loss + 1), ("b", 10.0, loss - 1)])
    assert repair is not None
    assert repair.float_nodes.keys() == {"a"}
    assert repair_slow(report_of(), [("b", 10.0, loss - 1)]) is None
    assert repair_slow(report_of(), []) is None


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose first MatMul becomes a float Gemm: the pass against it is taken away."""
    monkeypatch.setattr(
        "qpass.quantize.raise_matmul_biases",
        lambda graph, rank: PassReport(name="raise_matmul_biases", changed=0),
    )
    return save(model_of(TRAP, w=(32, 32), c=(32,), v=(32, 32)), tmp_path)


def test_a_leftover_is_repaired(trap: Path) -> None:
    report = optimize(trap, normal((12, 5, 32)))
    kinds = precision_of(report)
    assert (kinds["fc"], kinds["out"]) == ("float", "integer")
    assert report.ok, report.gates
    assert "round 1" in report.rounds[0]
    assert "fc" in report.rounds[0]
    assert op_types(report.output).count("QuantizeLinear") == 1


def test_without_repair_the_gate_names_it(trap: Path) -> None:
    report = optimize(trap, normal((12, 5, 32)), repair=False)
    assert [gate.name for gate in report.gates if not gate.passed] == [
        "ort: planned ops in integers"
    ]
    assert report.rounds == ()
    (op,) = [op for op in report.engines[0].float_ops if op.planned]
    assert (op.node, op.op) == ("fc", "MatMul")
    assert "MatMulAddFusion" in op.reason


def test_nothing_left_is_not_repaired_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qpass.quantize.raise_matmul_biases",
        lambda graph, rank: PassReport(name="raise_matmul_biases", changed=0),
    )
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[1,5,32] x) => (float[1,5,32] y) { [fc] a = MatMul(x, w) b = Add(a, c) y = Tanh(b) }"""
    path = save(model_of(text, w=(32, 32), c=(32,)), tmp_path)
    report = optimize(path, normal((12, 5, 32)))
    assert "Given up" in report.rounds[-1]
    assert not report.ok
