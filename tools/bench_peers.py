"""The contestants of `bench.py`: how each of them turns a float file into a quantized one.

A contestant is written ``KIND[:ARGUMENT[,KEY=VALUE...]]``:

    float                                the model itself
    qpass:ort-x86,activations=dynamic    qpass, a target and any options of `qpass.optimize`
    ort:minmax|entropy|percentile        onnxruntime.quantization, static QDQ, U8S8, per channel
    ort:dynamic                          the same package, MatMul and Gemm with dynamic ranges
    nncf[,preset=performance][,accurate=true]    nncf.quantize, fast or accurate bias correction
    quark[:minmax|entropy|percentile][,bias=true]   quark.onnx, U8S8, per channel
    file:PATH                            a file made elsewhere; {model} in PATH is the model's name

Every function runs in a process of its own, in the Python that has the peer; this module therefore
needs numpy and onnx only, the rest is imported where it is used. Peers get one sample a batch, as
their documentation does it; qpass gets the batch size of its own options.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx
from bench_samples import Feeds, StoredSamples

# Per-channel QuantizeLinear and DequantizeLinear came with this opset.
PER_CHANNEL_OPSET: Final = 13
PERCENTILE: Final = 99.999
QPASS_BATCH: Final = 4  # its default
HELD_SHARE: Final = 0.25  # of the calibration samples that qpass holds out, its default
DEFAULT_CONTESTANTS: Final = (
    "float",
    "qpass:ort-x86",
    "qpass:openvino",
    "ort:minmax",
    "ort:entropy",
    "ort:percentile",
    "ort:dynamic",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A parsed contestant; `text` is what the user wrote and what rows are labelled with."""

    text: str
    kind: str
    argument: str
    options: dict[str, Any]

    @property
    def batch(self) -> int:
        """Samples that it takes at a time while it calibrates."""
        return int(self.options.get("batch_size", QPASS_BATCH)) if self.kind == "qpass" else 1

    @property
    def package(self) -> str | None:
        """The package that has to be there, where it may be missing."""
        return {"nncf": "nncf", "quark": "quark"}.get(self.kind)


def parse_contestant(text: str) -> Contestant:
    """Parse the notation above.

    Raises:
        ValueError: an unknown kind or argument, or an option without value.
    """
    head, *pairs = text.split(",") if not text.startswith("file:") else [text]
    kind, _, argument = head.partition(":")
    known: dict[str, tuple[str, ...] | None] = {
        "float": ("",),
        "qpass": None,
        "ort": ("minmax", "entropy", "percentile", "dynamic"),
        "nncf": ("",),
        "quark": ("", "minmax", "entropy", "percentile"),
        "file": None,
    }
    if kind not in known:
        raise ValueError(f"contestant {text!r}: {kind!r} is none of {', '.join(known)}")
    wanted = known[kind]
    if wanted is not None and argument not in wanted:
        raise ValueError(f"contestant {text!r}: {argument!r} is none of {', '.join(wanted)}")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ValueError(f"contestant {text!r}: option {pair!r} is not of the form KEY=VALUE")
        options[key] = _value(value)
    return Contestant(text=text, kind=kind, argument=argument, options=options)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a contestant has to do: quantize `model` with `samples` into `output`.

    `spare` further samples lie behind these in the same file, for whoever verifies its own work.
    """

    contestant: Contestant
    model: Path
    samples: StoredSamples
    spare: int
    output: Path
    scratch: Path
    batched: bool


def quantizer(contestant: Contestant) -> Callable[[Task], dict[str, Any]]:
    """Import what the contestant needs; return the function to be timed.

    The function returns facts for the row, such as the path where it differs from `task.output`.

    Raises:
        ImportError: the package is not in this Python.
    """
    return {"qpass": _qpass, "ort": _ort, "nncf": _nncf, "quark": _quark}[contestant.kind]()


def _qpass() -> Callable[[Task], dict[str, Any]]:
    from qpass.api import optimize

    def run(task: Task) -> dict[str, Any]:
        contestant = task.contestant
        options = {"batch_size": contestant.batch if task.batched else 1, **contestant.options}
        count = int(options.pop("samples", len(task.samples)))
        # It holds samples out for itself: the ones behind, so that all calibrate with the same.
        held = min(task.spare, math.ceil(count * float(options.get("holdout", HELD_SHARE))))
        report = optimize(
            task.model,
            data=replace(task.samples, count=count + held),
            samples=count,
            target=contestant.argument or None,
            output=task.output,
            **options,
        )
        failed = [gate.name for gate in report.gates if not gate.passed]
        return {
            "output": report.output,
            "gates_failed": "; ".join(failed),
            "samples_used": report.cost.samples,
            **{f"stage_{k}_seconds": v for k, v in report.cost.seconds_by_stage.items()},
        }

    return run


def _ort() -> Callable[[Task], dict[str, Any]]:
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    def run(task: Task) -> dict[str, Any]:
        method = task.contestant.argument
        model = _with_opset(task, PER_CHANNEL_OPSET)
        if method == "dynamic":
            # Not the convolutions: dynamic ones run many times slower than float.
            quantize_dynamic(
                model,
                task.output,
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
            )
            return {}
        extra = {"CalibPercentile": PERCENTILE} if method == "percentile" else {}
        quantize_static(
            model,
            task.output,
            _Reader(task.samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method={
                "minmax": CalibrationMethod.MinMax,
                "entropy": CalibrationMethod.Entropy,
                "percentile": CalibrationMethod.Percentile,
            }[method],
            extra_options=extra,
        )
        return {}

    return run


def _nncf() -> Callable[[Task], dict[str, Any]]:
    nncf: Any = importlib.import_module("nncf")

    def run(task: Task) -> dict[str, Any]:
        model = onnx.load(_with_opset(task, PER_CHANNEL_OPSET))
        preset = str(task.contestant.options.get("preset", "mixed")).upper()
        attention = any(node.op_type == "Softmax" for node in model.graph.node)
        quantized = nncf.quantize(
            model,
            nncf.Dataset(list(task.samples)),
            preset=nncf.QuantizationPreset[preset],
            subset_size=len(task.samples),
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            fast_bias_correction=not task.contestant.options.get("accurate"),
        )
        onnx.save(quantized, task.output)
        return {}

    return run


def _quark() -> Callable[[Task], dict[str, Any]]:
    quark: Any = importlib.import_module("quark.onnx")

    def run(task: Task) -> dict[str, Any]:
        method = {"entropy": "Entropy", "percentile": "Percentile"}.get(
            task.contestant.argument, "MinMax"
        )
        activation = quark.UInt8Spec(
            symmetric=False, calibration_method=getattr(quark.CalibMethod, method)
        )
        weight = quark.Int8Spec(
            symmetric=True,
            calibration_method=quark.CalibMethod.MinMax,
            quant_granularity=quark.QuantGranularity.Channel,
        )
        correct = [quark.BiasCorrectionConfig()] if task.contestant.options.get("bias") else []
        layer = quark.QLayerConfig(activation=activation, weight=weight)
        config = quark.QConfig(global_config=layer, algo_config=correct)
        model = str(_with_opset(task, PER_CHANNEL_OPSET))
        quark.ModelQuantizer(config).quantize_model(model, str(task.output), _Reader(task.samples))
        return {}

    return run


class _Reader:
    """The reader that onnxruntime.quantization, and those built on it, want: one batch a call."""

    def __init__(self, samples: StoredSamples) -> None:
        self._samples = samples
        self.rewind()

    def rewind(self) -> None:
        self._iterator: Iterator[Feeds] = iter(self._samples)

    def get_next(self) -> Feeds | None:
        return next(self._iterator, None)


def _with_opset(task: Task, least: int) -> Path:
    """Return the model file, or a copy converted to opset `least` when it is older."""
    model = onnx.load(task.model, load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset >= least:
        return task.model
    from onnx import version_converter

    path = task.scratch / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task.model.stem)}.opset{least}.onnx"
    onnx.save(version_converter.convert_version(onnx.load(task.model), least), path)
    return path
