"""Integer weights behind float activations: what a plan makes of them, by target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.bits import bits_of_nodes
from qpass.embeddings import embeddings, tied_tables
from qpass.errors import RecipeError
from qpass.lint import lint
from qpass.options import Options
from qpass.program import Precision
from qpass.targets import TARGETS, Target
from tests.small_models import from_text, policy_of
from tests.weight_only_models import (
    HEAD,
    OPENVINO,
    ORT,
    built,
    language_model,
    matrix,
    nodes,
    product,
    saved,
)


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
