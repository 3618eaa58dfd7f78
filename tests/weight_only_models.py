"""Graphs with weights that become integers behind float activations, and what is asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpass.graph import Graph, array_of
from qpass.modelfile import save_model
from qpass.plan import NodeDecision, Plan
from qpass.qparams import QParams
from qpass.targets import TARGETS, Target
from qpass.verify import available_engines, read_back
from qpass.verify.session import ACCURACY_LEVEL
from tests.small_models import Quantized, from_text
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
