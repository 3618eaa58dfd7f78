"""A file in its engine: census against plan, errors, timing; and why an op stayed in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from qpass.plan import NodeDecision, Plan
from qpass.verify.check import Reference, check_engine, leftovers
from qpass.verify.diagnose import Diagnosis
from qpass.verify.engines import EngineError


def plan_of(**precisions: str) -> Plan:
    nodes = tuple(
        NodeDecision(name=name, op="MatMul", precision=precision, because="test")  # type: ignore[arg-type]
        for name, precision in precisions.items()
    )
    return Plan(target="t", precision="w8a8", decisions=(), nodes=nodes)


@pytest.mark.parametrize(("case", "batch", "left"), [
    ("matmul_float_output", None, []), ("matmul_bias_trap", 1, ["fc"]),
    ("matmul_bias_trap", "N", []),
])  # fmt: skip
def test_what_was_planned_and_what_ran(saved, feeds, tmp_path: Path, case, batch, left) -> None:
    model, path = saved(case, **({} if batch is None else {"batch": batch}))
    names = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    reference = Reference.run(path, [feeds(model), feeds(model, seed=8)])
    report = check_engine(
        "ort", float_model=path, quantized=path, plan=plan_of(**dict.fromkeys(names, "integer")),
        reference=reference, workdir=tmp_path, seconds=0.02,
    )  # fmt: skip
    assert [op.node for op in leftovers(report)] == left
    assert all("MatMulAddFusion" in op.reason for op in leftovers(report))
    assert report.planned_integer_ops == len(names)
    assert report.integer_ops == len(names) - len(left)
    assert report.sqnr_db == 200.0 or report.sqnr_db == float("inf")  # a file against itself
    assert report.speedup is not None
    assert report.latency_ms is not None


def test_without_reference_samples_nothing_is_compared(saved, tmp_path: Path) -> None:
    _, path = saved("gemm")
    report = check_engine(
        "ort", float_model=path, quantized=path, plan=None, reference=Reference.run(path, []),
        workdir=tmp_path, seconds=1.0,
    )  # fmt: skip
    assert report.integer_ops == 2
    assert (report.sqnr_db, report.optimizer_diff_db, report.latency_ms) == (None, None, None)
    assert report.outputs == ()


def test_nodes_that_the_plan_left_in_float_are_named_but_not_left_over(
    saved, tmp_path: Path
) -> None:
    _, path = saved("matmul_bias_trap")
    report = check_engine(
        "ort", float_model=path, quantized=path, plan=plan_of(fc="float"),
        reference=Reference.run(path, []), workdir=tmp_path, seconds=0.0,
    )  # fmt: skip
    assert [(op.node, op.planned, op.reason) for op in report.float_ops] == [("fc", False, "test")]
    assert list(leftovers(report)) == []


def test_integers_that_the_plan_simulates_count_where_an_engine_takes_them(
    saved, tmp_path: Path
) -> None:
    _, path = saved("gemm")
    nodes = tuple(
        NodeDecision(name=name, op="Gemm", precision="integer", because="rule t/Gemm", bits=bits)
        for name, bits in (("fc0", "w4a8"), ("fc1", "w8a8"))
    )
    plan = Plan(target="t", precision="w4a8", decisions=(), nodes=nodes)
    assert set(plan.engine_nodes()) == {"fc1"}
    options = {"float_model": path, "quantized": path, "reference": Reference.run(path, [])}
    report = check_engine("ort", plan=plan, workdir=tmp_path, seconds=0.0, **options)
    assert report.integer_ops == report.planned_integer_ops == 2


def test_simulated_integers_that_run_in_float_say_why(saved, tmp_path: Path) -> None:
    _, path = saved("matmul_bias_trap")
    node = NodeDecision(
        name="fc", op="MatMul", precision="integer", because="rule t/MatMul", bits="w4a8"
    )
    report = check_engine(
        "ort", float_model=path, quantized=path, workdir=tmp_path, seconds=0.0,
        plan=Plan(target="t", precision="w4a8", decisions=(), nodes=(node,)),
        reference=Reference.run(path, []),
    )  # fmt: skip
    ((found),) = report.float_ops
    assert (found.rule, found.planned) == ("ort/MatMul", False)
    assert "MatMulAddFusion" in found.reason
    assert report.planned_integer_ops == 0


def test_openvino_is_compared_with_the_graph_as_it_is_written(saved, feeds, tmp_path: Path) -> None:
    model, path = saved("conv_chain")
    report = check_engine(
        "openvino", float_model=path, quantized=path, plan=None,
        reference=Reference.run(path, [feeds(model)]), workdir=tmp_path, seconds=0.0,
    )  # fmt: skip
    assert report.optimizer_diff_db is not None
    assert report.optimizer_diff_db > 25.0  # one step of 8 bits in a few values


def test_an_engine_that_refuses(tmp_path: Path) -> None:
    path = tmp_path / "no.onnx"
    path.write_bytes(b"no")
    with pytest.raises(EngineError, match=r"load no\.onnx"):
        Reference.run(path, [])


@pytest.mark.parametrize(
    ("case", "node", "engine", "words"),
    [
        ("conv_without_output_q", "conv", "ort", "no Q as the only reader"),
        ("float_weight_between_quantized", "conv", "ort", "an input is float"),
        ("residual_signed_symmetric", "conv", "ort", "not made redundant by the Q"),
        ("matmul_bias_trap", "fc", "ort", "MatMulAddFusion"),
        ("attention_unsigned", "scores", "openvino", "zero point of the left operand"),
        ("weight_only", "fc", "ort", "no rule that we know"),
        ("conv_chain", "conv0", "ort", "no rule that we know"),
        ("conv_chain", "gone", "ort", "not in the file"),
    ],
)
def test_reasons(saved, case: str, node: str, engine: str, words: str) -> None:
    model, _ = saved(case)
    rule, reason = Diagnosis(model).explain(engine, node)
    assert rule.startswith(f"{engine}/")
    assert words in reason


def test_narrow_integers_have_no_kernel(saved) -> None:
    model, _ = saved("gemm")
    for proto in model.graph.initializer:
        if proto.name.startswith("x_zero"):
            proto.CopyFrom(numpy_helper.from_array(np.uint16(128), proto.name))
    assert "no uint16 kernel" in Diagnosis(model).explain("ort", "fc0")[1]
