"""Integer weights behind float activations for some nodes of a run, and ties that rewrites undo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.jobs import engine, model_of, normal, optimize, saved

LAYERS = """
<ir_version: 10, opset_import: ["": 21]>
g (float[N,32] x) => (float[N,8] y) {
  [stem] a = MatMul(x, w0)
  [alone] b = FIRST
  [act] c = Relu(b)
  [head] y = MatMul(c, w2)
}
"""
MATRICES = {"w0": (32, 64), "w2": (48, 8)}
TIED = """
<ir_version: 10, opset_import: ["": 21]>
g (int64[N,6] ids) => (float[N,6,40] y) {
  [emb] e = Gather(table, ids)
  [up] a = MatMul(e, w1)
  [act] b = Relu(a)
  [down] c = MatMul(b, w2)
  [sum] s = Add(c, e)
  [turned] t = Transpose<perm = [1,0]>(table)
  [head] y = MatMul(s, t)
}
"""
QUICK = {"compensate": "none", "equalize": False, "calibrate": "minmax", "round": "rtn"}


def stored(path: str) -> dict[str, int]:
    """Bits of the matrices, by name; scales of blocks are float16."""
    bits = {onnx.TensorProto.FLOAT: 32, onnx.TensorProto.INT8: 8, onnx.TensorProto.UINT8: 8}
    bits |= {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
    graph = onnx.load(path).graph
    return {
        t.name: bits[t.data_type]
        for t in graph.initializer
        if len(t.dims) == 2 and t.data_type in bits
    }


@pytest.mark.parametrize(
    ("first", "weight"), [("MatMul(a, w1)", (64, 48)), ("Gemm<transB = 1>(a, w1)", (48, 64))]
)
def test_a_product_with_integer_weights_alone_beside_integer_ones(
    tmp_path: Path, first: str, weight: tuple[int, int]
) -> None:
    """Neither a transposed weight nor a Relu in front of a Q that begins at zero hides it."""
    model = model_of(LAYERS.replace("FIRST", first), **MATRICES, w1=weight)
    path = saved(model, tmp_path)
    report = optimize(path, normal((32, 32)), bits=("alone=w4",), **QUICK)
    assert report.ok
    assert not report.rounds
    found = engine(report)
    assert [op for op in found.float_ops if op.planned] == []
    assert (found.integer_ops, found.op_counts["MatMulNBits"]) == (3, 1)
    said = {row.name: row.precision for row in report.layers}
    assert said == {"stem": "integer", "alone": "weights", "head": "integer"}


def test_an_embedding_with_integer_weights_beside_integer_products(tmp_path: Path) -> None:
    text = TIED.replace("[turned] t = Transpose<perm = [1,0]>(table)\n", "")
    model = model_of(text, table=(40, 32), w1=(32, 64), w2=(64, 32), t=(32, 40))
    data = {"ids": np.random.default_rng(2).integers(0, 40, (32, 6))}
    path = saved(model, tmp_path)
    report = optimize(path, data, bits=("emb=w4",), **QUICK)
    assert report.ok
    assert {bits for name, bits in stored(report.output).items() if "table" in name} == {4}
    plain = optimize(path, data, output=tmp_path / "plain.onnx", **QUICK)
    assert {bits for name, bits in stored(plain.output).items() if "table" in name} == {32}


def test_a_tie_that_a_rewrite_undoes_still_gives_the_table_the_bits_of_the_head(
    tmp_path: Path,
) -> None:
    """A stream without norms gets another basis: table and head are no longer the same numbers."""
    path = saved(model_of(TIED, table=(40, 32), w1=(32, 64), w2=(64, 32)), tmp_path)
    report = optimize(path, None, precision="w4")
    assert next(p for p in report.passes if p.name == "balance").changed
    tables = {bits for name, bits in stored(report.output).items() if "table" in name}
    assert tables == {8}
    fewer = optimize(path, None, precision="w4", low_bit_edges=True, output=tmp_path / "fewer.onnx")
    assert 4 in {bits for name, bits in stored(fewer.output).items() if "table" in name}


@pytest.mark.parametrize("bias", ["", ", bias"])
@pytest.mark.parametrize("precision", ["w4", "w8"])
def test_a_transpose_in_front_does_not_hide_the_product(
    tmp_path: Path, bias: str, precision: str
) -> None:
    """The engine would make Gemm with transA of the two, which no kernel of integer weights has."""
    text = f"""
    <ir_version: 10, opset_import: ["": 21]>
    g (float[64,12] x) => (float[12,8] y) {{
      [turn] t = Transpose<perm = [1,0]>(x)
      [first] a = Gemm<transB = 1>(t, w1{bias})
      [act] b = Relu(a)
      [head] y = MatMul(b, w2)
    }}"""
    constants = {"bias": (48,)} if bias else {}
    path = saved(model_of(text, w1=(48, 64), w2=(48, 8), **constants), tmp_path)
    report = optimize(path, [{"x": normal((64, 12))["x"]}], precision=precision)
    assert report.ok
    assert engine(report).op_counts["MatMulNBits"] == 2
