"""Integer weights behind float activations: the plan, the graph, the engine, and the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.bits import bits_of_nodes
from qpass.embeddings import embeddings, tied_tables
from qpass.errors import RecipeError
from qpass.graph import Graph, array_of
from qpass.lint import lint
from qpass.modelfile import save_model
from qpass.options import Options
from qpass.passes.weight_only import gather_blocks, half_scales, straighten_gemms
from qpass.plan import NodeDecision, Plan
from qpass.program import Precision
from qpass.qparams import QParams, dequantize
from qpass.targets import TARGETS, Target
from qpass.verify import available_engines, open_engine, read_back
from qpass.verify.session import ACCURACY_LEVEL
from tests.small_models import Quantized, from_text, policy_of, run
from tests.small_models import quantize as quantize_graph

ORT, OPENVINO = TARGETS["ort-x86"], TARGETS["openvino"]
HEAD = '<ir_version: 10, opset_import: ["": 21]>'
EXACT = {ACCURACY_LEVEL: "0"}  # float32 inside of MatMulNBits
needs_openvino = pytest.mark.skipif("openvino" not in available_engines(), reason="needs openvino")


def matrix(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def language_model(*, tied: bool = False, width: int = 64) -> Graph:
    """Embedding, rotary factors, two layers and a head."""
    table = matrix(40, width, 2)
    return from_text(
        f"""
        {HEAD} lm (int64[1,5] ids, int64[1,5] places) => (float[1,5,40] y)
        {{
            e = Gather (table, ids)
            cos = Gather (factors, places)
            a = MatMul (e, w1)
            turned = Mul (a, cos)
            act = Gelu (turned)
            z = MatMul (act, w2)
            s = Add (z, e)
            y = MatMul (s, head)
        }}
        """,
        table=table,
        factors=np.cos(matrix(16, width, 3)),
        w1=matrix(width, width, 4) / 8,
        w2=matrix(width, width, 5) / 8,
        head=np.ascontiguousarray(table.T) if tied else matrix(width, 40, 6),
    )


IDS = {"ids": np.array([[3, 1, 39, 0, 7]]), "places": np.arange(5)[None]}


def built(graph: Graph, target: Target = ORT, precision: str = "w4", **options: Any) -> Quantized:
    return quantize_graph(graph, target, [], precision, **options)


def nodes(plan: Plan) -> dict[str, NodeDecision]:
    return {n.name.removeprefix("node_"): n for n in plan.nodes}


def saved(quantized: Quantized, folder: Path) -> Path:
    path = folder / "m.onnx"
    save_model(quantized.graph, path)
    return path


def counts(path: Path, engine: str = "ort") -> dict[str, int]:
    return read_back(engine, path, path.parent).counts()


def product(rows: int, columns: int, body: str = "y = MatMul (x, w)", **constants: Any) -> Graph:
    text = f"{HEAD} g (float[2,3,{rows}] x) => (float[2,3,{columns}] y) {{ {body} }}"
    return from_text(text, **{"w": matrix(rows, columns), **constants})


def weights(quantized: Quantized) -> dict[str, tuple[np.ndarray, QParams]]:
    """Integers as they are stored, and their numbers, by decision key."""
    tensors = quantized.graph.tensors()
    return {
        d.key: (array_of(tensors[f"{d.key}_quantized"]), quantized.table.qparams[d.key])
        for d in quantized.plan.weights()
    }


# ------------------------------------------------------------------ plan


def test_the_plan_of_a_language_model() -> None:
    plan = built(language_model()).plan
    table = {
        d.tensor: (d.spec.describe(), [f"{e.node}[{e.index}]" for e in d.edges or ()])
        for d in plan.decisions
    }
    assert table == {
        "table": ("s4 symmetric per_block(1,32)", ["node_e[0]"]),
        "w1": ("s4 symmetric per_block(0,32)", ["node_a[1]"]),
        "w2": ("s4 symmetric per_block(0,32)", ["node_z[1]"]),
        "head": ("s8 symmetric per_channel(1)", ["node_y[1]"]),
    }
    found = nodes(plan)
    assert {k: v.precision for k, v in found.items() if v.precision != "float"} == {
        "e": "weights", "a": "weights", "z": "weights", "y": "weights",
    }  # fmt: skip
    assert {k: v.bits for k, v in found.items() if v.bits} == {
        "e": "w4", "a": "w4", "z": "w4", "y": "w8",
    }  # fmt: skip
    assert "head of the model" in nodes(plan)["y"].because
    assert set(plan.engine_nodes()) == {"node_e", "node_a", "node_z", "node_y"}


def test_a_tied_embedding_has_the_bits_of_its_head() -> None:
    plan = built(language_model(tied=True)).plan
    assert nodes(plan)["e"].bits == "w8"
    assert "tied to the head node_y" in nodes(plan)["e"].because
    assert nodes(built(language_model(tied=True), low_bit_edges=True).plan)["e"].bits == "w4"


def test_rotary_factors_are_no_embedding() -> None:
    graph = language_model()
    assert set(embeddings(graph)) == {"node_e"}
    assert tied_tables(graph, {"node_y"}) == {}
    assert tied_tables(language_model(tied=True), {"node_y"}) == {"node_e": "node_y"}


def test_an_embedding_that_is_normalized_by_itself_stays_one() -> None:
    """RMSNorm multiplies rows with a number that was made of them."""
    graph = from_text(
        f"""{HEAD} g (int64[4] ids) => (float[4,16] y)
        {{
            e = Gather (table, ids) q = Mul (e, e) m = ReduceMean <keepdims = 1> (q, axes)
            r = Sqrt (m) i = Reciprocal (r) n = Mul (e, i) y = MatMul (n, w)
        }}""",
        table=matrix(8, 16),
        w=matrix(16, 16),
        axes=np.array([-1]),
    )
    assert set(embeddings(graph)) == {"node_e"}


def test_eight_bits_have_one_scale_a_column() -> None:
    plan = built(product(64, 48), precision="w8").plan
    assert [d.spec.describe() for d in plan.decisions] == ["s8 symmetric per_channel(1)"]
    plan = built(product(64, 48), precision="w8", block_size=64).plan
    assert [d.spec.describe() for d in plan.decisions] == ["s8 symmetric per_block(0,64)"]


@pytest.mark.parametrize(
    ("target", "rows", "wanted", "found"),
    [
        (ORT, 80, 32, "per_block(0,32)"),  # the last block is shorter
        (ORT, 24, 32, "per_block(0,32)"),
        (ORT, 256, 128, "per_block(0,128)"),
        (OPENVINO, 96, 32, "per_block(0,32)"),
        (OPENVINO, 80, 32, "per_block(0,16)"),
        (OPENVINO, 100, 32, "per_channel(1)"),
    ],
)
def test_blocks_that_do_not_divide_the_rows(
    target: Target, rows: int, wanted: int, found: str
) -> None:
    options = {"low_bit_edges": True, "block_size": wanted}
    plan = built(product(rows, 48), target, **options).plan
    (spec,) = (d.spec for d in plan.decisions)
    assert spec.describe() == f"s4 symmetric {found}"
    said = "take no blocks" in nodes(plan)["y"].because
    assert said == (spec.block_size != wanted)


TENSORRT_WEIGHTS = [
    # body, weight, bits, what the weight becomes, what the plan says of it
    ("y = MatMul (x, w)", (64, 48), "w4", "s4 symmetric per_block(0,32)", "GEMM of INT4 weights"),
    ("y = Gemm <transB = 1> (x, w)", (48, 64), "w4", "s4 symmetric per_block(1,32)", "GEMM"),
    ("y = MatMul (x, w)", (64, 48), "w3", "s3 symmetric per_block(0,32)", "GEMM"),
    ("y = MatMul (x, w)", (80, 48), "w4", "s4 symmetric per_block(0,16)", "blocks of 16"),
    ("y = MatMul (x, w)", (100, 48), "w4", "s8 symmetric per_channel(1)", "100 rows take no"),
    ("y = MatMul (x, w)", (64, 33), "w4", "s8 symmetric per_channel(1)", "odd last dimension"),
    ("y = MatMul (x, w)", (16, 64, 48), "w4", "s8 symmetric", "for matrices"),
    ("y = MatMul (x, w)", (64, 48), "w8", "s8 symmetric per_channel(1)", "no kernel reads them"),
    ("y = Conv (x, w)", (16, 16, 3, 3), "w4", "s8 symmetric per_channel(0)", "so 8 bits"),
]


@pytest.mark.parametrize(("body", "shape", "bits", "spec", "reason"), TENSORRT_WEIGHTS)
def test_tensorrt_takes_narrow_weights_in_blocks_only(
    tmp_path: Path, body: str, shape: tuple[int, ...], bits: str, spec: str, reason: str
) -> None:
    weight = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    given = {"Conv": "1,16,8,8", "Gemm": "3,64"}.get(body.split()[2], f"1,3,{shape[-2]}")
    graph = from_text(f"{HEAD} g (float[{given}] x) => (float y) {{ {body} }}", w=weight)
    made = built(graph, TARGETS["tensorrt"], bits, low_bit_edges=True)
    (decision,) = made.plan.decisions
    node = nodes(made.plan)["y"]
    assert decision.spec.describe() == spec
    assert reason in node.because
    assert node.bits == f"w{decision.spec.bits}"
    assert node.precision == ("weights" if decision.spec.storage.bits == 4 else "stored")
    found = {finding.rule for finding in lint(saved(made, tmp_path), "tensorrt")}
    assert found <= {"QP034"}  # weights that are integers in the file only
    assert found == set() or "Conv" in body


@pytest.mark.parametrize("size", [16, 64, 128])
def test_tensorrt_takes_the_block_size_of_the_user(size: int) -> None:
    options = {"low_bit_edges": True, "block_size": size}
    made = built(product(256, 48), TARGETS["tensorrt"], **options)
    assert [d.spec.block_size for d in made.plan.decisions] == [size]


def test_tensorrt_takes_no_zero_points() -> None:
    with pytest.raises(RecipeError, match="tensorrt takes no zero points"):
        built(product(64, 48), TARGETS["tensorrt"], asymmetric_weights=True)


@pytest.mark.parametrize("name", ["qnn-htp", "vitis-xint8"])
@pytest.mark.parametrize("precision", ["w4", "w8"])
def test_targets_that_want_all_in_integers_refuse_weights_alone(name: str, precision: str) -> None:
    with pytest.raises(RecipeError, match=f"{precision} leaves activations in float") as caught:
        built(product(64, 48), TARGETS[name], precision)
    fits = "w4a8" if (name, precision) == ("qnn-htp", "w4") else "w8a8"
    assert f"such as {fits}" in str(caught.value)
    single = {"node_bits": {"node_y": Precision.parse(precision)}}
    with pytest.raises(RecipeError, match=f"{precision} leaves activations in float"):
        built(product(64, 48), TARGETS[name], "w8a8", **single)


def test_weights_without_a_kernel_are_stored_only() -> None:
    stack = np.stack([matrix(64, 48)] * 2)
    graph = from_text(
        f"{HEAD} g (float[2,3,64] x) => (float[2,3,48] y) {{ y = MatMul (x, w) }}", w=stack
    )
    plan = built(graph, low_bit_edges=True).plan
    assert nodes(plan)["y"].precision == "stored"
    assert "takes matrices only" in nodes(plan)["y"].because
    assert plan.engine_nodes() == {}


def test_the_users_bits_hold_for_embeddings_too() -> None:
    policy = policy_of("w4", node_bits={"node_e": Precision.parse("w8")})
    assert str(bits_of_nodes(language_model(), policy, ORT)["node_e"].precision) == "w8"


@pytest.mark.parametrize("size", [1, 8, 24, 256])
def test_other_block_sizes_are_refused(size: int) -> None:
    with pytest.raises(RecipeError, match="block-size"):
        Options(precision="w4", block_size=size)


@pytest.mark.parametrize("options", [{"block_size": 32}, {"asymmetric_weights": True}])
@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w8a16"])
def test_what_concerns_weights_alone_is_refused_beside_activations(
    precision: str, options: dict[str, Any]
) -> None:
    Options(precision="w4", **options)
    name = next(iter(options)).replace("_", "-")
    with pytest.raises(RecipeError, match=f"--{name} is for weights alone.*{precision}"):
        Options(precision=precision, **options)


# ------------------------------------------------------------------ engines and numbers


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (80, 47), (33, 5), (16, 16)])
@pytest.mark.parametrize("precision", ["w4", "w3", "w8"])
def test_products_are_those_of_the_dequantized_weight(
    tmp_path: Path, precision: str, rows: int, columns: int, asymmetric: bool
) -> None:
    """In the engine's kernel, in the reference evaluator, and with numpy in float64."""
    options = {"low_bit_edges": True, "asymmetric_weights": asymmetric, "block_size": 32}
    quantized = built(product(rows, columns), precision=precision, **options)
    path = saved(quantized, tmp_path)
    assert counts(path) == {"MatMulNBits": 1}
    ((integers, numbers),) = weights(quantized).values()
    x = np.random.default_rng(3).standard_normal((2, 3, rows)).astype(np.float32)
    wanted = x.astype(np.float64) @ dequantize(integers, numbers).astype(np.float64)
    tolerance = 1e-5 * np.abs(x).sum(-1).max()  # float32 sums of `rows` products
    for engine, config in (("ort", EXACT), ("reference", None)):
        (got,) = open_engine(engine, path, session_config=config).run({"x": x})
        np.testing.assert_allclose(got, wanted, atol=tolerance)


@needs_openvino
@pytest.mark.parametrize("asymmetric", [False, True])
def test_openvino_reads_the_integers(tmp_path: Path, asymmetric: bool) -> None:
    options = {"low_bit_edges": True, "asymmetric_weights": asymmetric}
    quantized = built(product(80, 48), OPENVINO, **options)
    path = saved(quantized, tmp_path)
    census = read_back("openvino", path, tmp_path)
    assert [(op.op, op.kind) for op in census.weight_only_compute] == [
        ("FullyConnected", "weight_only")
    ]
    x = np.random.default_rng(3).standard_normal((2, 3, 80)).astype(np.float32)
    outputs = [open_engine(name, path).run({"x": x})[0] for name in ("openvino", "reference")]
    np.testing.assert_allclose(*outputs, atol=1e-3)


def test_a_weight_with_two_readers_is_stored_for_each(tmp_path: Path) -> None:
    graph = product(64, 64, "t = MatMul (x, w) r = Relu (t) y = MatMul (r, w)")
    quantized = built(graph, low_bit_edges=True)
    assert [d.key for d in quantized.plan.weights()] == ["w", "w#1"]
    assert counts(saved(quantized, tmp_path))["MatMulNBits"] == 2


@pytest.mark.parametrize(
    ("activation", "ops"),
    [
        ("Relu (t)", {"Max": 1}),
        ("Clip (t, low, high)", {"Max": 1, "Min": 1}),
        ("Clip (t, low)", {"Max": 1}),
        ("Clip (t, , high)", {"Min": 1}),
    ],
)
@pytest.mark.parametrize("bias", ["", "t = Add (t0, b)"])
def test_an_activation_behind_the_product_does_not_hide_it(
    tmp_path: Path, activation: str, ops: dict[str, int], bias: str
) -> None:
    limits = {"low": np.float32(-0.5), "high": np.float32(6), "b": matrix(1, 64)[0]}
    body = f"{'t0' if bias else 't'} = MatMul (x, w) {bias} r = {activation} y = MatMul (r, v)"
    used = {k: v for k, v in limits.items() if k in body.replace("MatMul", "")}
    graph = product(64, 48, body, w=matrix(64, 64), v=matrix(64, 48), **used)
    quantized = built(graph, low_bit_edges=True)
    path = saved(quantized, tmp_path)
    found = counts(path)
    assert found["MatMulNBits"] == 2
    assert {op: found[op] for op in ("Max", "Min") if op in found} == ops
    feeds = {"x": np.random.default_rng(3).standard_normal((2, 3, 64)).astype(np.float32)}
    plain = graph.copy()
    for key, (integers, numbers) in weights(quantized).items():
        node = plain.node({"w": "node_t0" if bias else "node_t", "v": "node_y"}[key])
        plain.set_input(node, 1, plain.constant("d", dequantize(integers, numbers)))
    outputs = [
        open_engine("ort", path, session_config=EXACT).run(feeds)[0],
        run(plain.to_model(), feeds)["y"],
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-3)


def gemm() -> Graph:
    return from_text(
        f"""{HEAD} g (float[4,64] x) => (float[4,48] y)
        {{ t = Gemm <transB = 1> (x, w, b) r = Relu (t) y = Gemm <transB = 1> (r, v) }}""",
        w=matrix(80, 64),
        v=matrix(48, 80),
        b=matrix(1, 80)[0],
    )


def test_gemm_is_turned_so_that_it_fuses(tmp_path: Path) -> None:
    graph = gemm()
    plan = built(graph.copy(), low_bit_edges=True).plan
    assert {n.precision for n in plan.nodes if n.op == "Gemm"} == {"stored"}
    assert "takes no transposed weight" in nodes(plan)["t"].because
    feeds = {"x": matrix(4, 64, 9)}
    before = run(graph.to_model(), feeds)["y"]
    assert straighten_gemms(graph, {node.name for node in graph.nodes}).changed == 2
    np.testing.assert_allclose(run(graph.to_model(), feeds)["y"], before, rtol=1e-4, atol=1e-3)
    assert counts(saved(built(graph, low_bit_edges=True), tmp_path))["MatMulNBits"] == 2


def test_computed_weights_of_gemm_stay_turned() -> None:
    graph = from_text(
        f"{HEAD} g (float[4,8] x) => (float[4,4] y) {{ y = Gemm <transB = 1> (x, x) }}"
    )
    report = straighten_gemms(graph, {node.name for node in graph.nodes})
    assert (report.changed, [r.reason for r in report.refusals]) == (0, ["its weight is computed"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 80])
def test_an_embedding_gathers_integers(tmp_path: Path, tied: bool, width: int) -> None:
    graph = language_model(tied=tied, width=width)
    quantized = built(graph)
    path = saved(quantized, tmp_path)
    found = counts(path)
    assert (found["GatherBlockQuantized"], found["MatMulNBits"]) == (1, 3)
    integers, numbers = weights(quantized)["table"]
    assert integers.dtype == (np.uint8 if tied else np.dtype(numbers.storage.numpy))
    wanted = dequantize(integers, numbers)[IDS["ids"]]
    got = run(quantized.graph.to_model(taps=["e"]), IDS)["e"]
    np.testing.assert_array_equal(got, wanted)
    # The rest computes what an explicitly dequantized float model computes.
    plain = graph.copy()
    for decision in quantized.plan.weights():
        edge = (decision.edges or ())[0]
        values = dequantize(*weights(quantized)[decision.key])
        plain.set_input(plain.node(edge.node), edge.index, plain.constant("d", values))
    outputs = [
        open_engine("ort", path, session_config=EXACT).run(IDS)[0],
        run(plain.to_model(), IDS)["y"],
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)


def test_gather_without_blocks_is_refused() -> None:
    graph = built(language_model(), OPENVINO).graph
    report = gather_blocks(graph)
    assert report.changed == 0
    assert "no blocks along the rows" in report.refusals[0].reason


@needs_openvino
def test_an_embedding_in_openvino(tmp_path: Path) -> None:
    path = saved(built(language_model(), OPENVINO), tmp_path)
    # With VNNI OpenVINO rounds the activations in front of integer weights to 8 bits by default.
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    outputs = [
        open_engine("openvino", path, session_config=exact).run(IDS)[0],
        open_engine("reference", path).run(IDS)[0],
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ scales in float16


def stored_scales(graph: Graph) -> list[np.dtype[Any]]:
    return [array_of(n.inputs[0]).dtype for n in graph.nodes if n.op == "Cast"]


def test_scales_of_blocks_take_16_bits() -> None:
    quantized = built(product(64, 48), low_bit_edges=True)
    assert stored_scales(quantized.graph) == [np.float16]
    ((_, numbers),) = weights(quantized).values()
    assert numbers.scale.dtype == np.float32
    np.testing.assert_array_equal(
        numbers.scale.astype(np.float16).astype(np.float32), numbers.scale
    )


def test_scales_that_float16_does_not_hold_stay_wide(tmp_path: Path) -> None:
    graph = product(64, 48, w=matrix(64, 48) * 1e-6)
    quantized = built(graph, low_bit_edges=True)
    assert stored_scales(quantized.graph) == []
    assert half_scales(quantized.graph).refusals[0].reason == "its scales are no numbers of float16"
    assert counts(saved(quantized, tmp_path)) == {"MatMulNBits": 1}


def test_blocks_without_zero_points_store_none() -> None:
    for asymmetric, inputs in ((False, 2), (True, 3)):
        made = built(product(64, 48), low_bit_edges=True, asymmetric_weights=asymmetric)
        dequantizer = next(n for n in made.graph.nodes if n.op == "DequantizeLinear")
        assert len(dequantizer.inputs) == inputs
