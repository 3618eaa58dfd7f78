"""A report as a run on a small network makes it, with hostile names and numbers in it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qpass.report.model import (
    Cost,
    EngineReport,
    FileSizes,
    FloatOp,
    Gate,
    Latency,
    LayerReport,
    MapNode,
    Metric,
    NodeCounts,
    PassReport,
    Refusal,
    Report,
    TensorHistogram,
)

HOSTILE = "<script>alert('node')</script>"
MARKUP = "block[red]/conv[/red]"
BLOCKS = 6


def layer_names() -> list[str]:
    return [f"/encoder/layers.{index}/mlp/fc1/Conv" for index in range(BLOCKS)] + [HOSTILE, MARKUP]


def make_layers() -> tuple[LayerReport, ...]:
    before = [31.5, 30.25, 27.0, 24.5, 22.0, 21.0, math.nan, 12.5]
    after = [36.0, 34.5, 33.0, 30.0, 29.5, 27.75, math.inf, 18.5]
    rows = zip(layer_names(), before, after, strict=True)
    return tuple(
        LayerReport(name=name, op="Conv", sqnr_db_before=low, sqnr_db_after=high, cosine=0.999)
        for name, low, high in rows
    )


def make_histogram(name: str = "relu_3_output", seed: int = 0) -> TensorHistogram:
    values = np.random.default_rng(seed).normal(0.0, 1.0, 20_000)
    counts, edges = np.histogram(values, bins=1024, range=(-5.0, 5.0))
    return TensorHistogram(
        name=name,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        low=-2.5,
        high=2.5,
        method="mse",
        spec="uint8 asymmetric per tensor",
        sqnr_db=33.5,
    )


def make_engines() -> tuple[EngineReport, ...]:
    softmax = [
        FloatOp(
            node=f"/encoder/layers.{index}/attn/Softmax",
            op="Softmax",
            rule="ort-x86 has no integer kernel",
            reason="Softmax stays in float: the engine has no 8-bit kernel for it",
        )
        for index in range(BLOCKS)
    ]
    broken = FloatOp(
        node=MARKUP,
        op="Conv",
        rule="bias scale",
        reason="the bias is not int32 with scale s_x * s_w",
        planned=True,
    )
    ort = EngineReport(
        name="ort",
        version="1.31.1",
        integer_ops=7,
        planned_integer_ops=8,
        float_ops=(*softmax, broken),
        op_counts={"QLinearConv": 7, "Conv": 1, "Softmax": 6},
        latency_ms=Latency(float=12.34, quantized=4.56),
        speedup=2.706,
        sqnr_db=31.25,
        cosine=0.999612,
        optimizer_diff_db=44.5,
        outputs=(("logits", 31.25), ("boxes", 35.0)),
    )
    openvino = EngineReport(
        name="openvino",
        version="2026.4.1",
        integer_ops=8,
        planned_integer_ops=8,
        latency_ms=Latency(float=10.0, quantized=4.0),
        speedup=2.5,
        sqnr_db=30.75,
        cosine=0.9994,
    )
    return ort, openvino


def make_map() -> tuple[MapNode, ...]:
    rows = [
        MapNode(name=name, op="Conv", precision="integer", because="conv rule")
        for name in layer_names()
    ]
    rows += [
        MapNode(name=op.node, op=op.op, precision="float", because=op.reason)
        for op in make_engines()[0].float_ops
        if not op.planned
    ]
    rows.append(
        MapNode(name="reshape", op="Reshape", precision="passthrough", because="moves integers")
    )
    return tuple(rows)


@pytest.fixture
def report() -> Report:
    return Report(
        model="models/small.onnx",
        output="models/small.int8.rejected.onnx",
        target="ort-x86",
        precision="w8a8",
        passes=(
            PassReport(name="normalize", changed=14, seconds=0.125),
            PassReport(
                name="compensate",
                changed=7,
                refusals=(Refusal(rule="compensate", where=HOSTILE, reason="no bias to fold"),),
                seconds=1.5,
            ),
        ),
        nodes=NodeCounts(float=60, quantized=118, added_at_runtime=0),
        engines=make_engines(),
        layers=make_layers(),
        cost=Cost(
            seconds_total=12.5,
            seconds_by_stage={"load": 0.5, "calibrate": 4.0, "quantize": 2.0, "verify": 6.0},
            float_forward_seconds=1.75,
            peak_rss_bytes=512 * 1024 * 1024,
            samples=128,
            peak_rss_by_stage={
                "load": 100 << 20,
                "calibrate": 400 << 20,
                "quantize": 450 << 20,
                "verify": 512 << 20,
            },
        ),
        gates=(
            Gate(name="ort: planned ops in integers", wanted="all", got="1 in float", passed=False),
            Gate(name="min-sqnr", wanted=30.0, got=31.25, passed=True),
            Gate(name="min-speedup", wanted=2.0, got=None, passed=False),
        ),
        sizes=FileSizes(float_bytes=4_000_000, quantized_bytes=1_040_000),
        metric=Metric(name="accuracy", float=0.981, quantized=0.978, drop=0.003),
        histograms=(make_histogram(), make_histogram(HOSTILE, 1), make_histogram("logits", 2)),
        graph_map=make_map(),
        rounds=("round 1: 1 node goes to float, its bias does not fit",),
        notes=("RANDOM DATA: accuracy means nothing", "the mse ranges won the trial"),
        options={"target": "ort-x86", "keep": ["/head/*"], "samples": 128, "report": None},
        versions={"qpass": "0.1.0", "onnxruntime": "1.31.1"},
    )
