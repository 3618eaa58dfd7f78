"""The contestants of `bench.py`: how each of them turns a float file into a quantized one.

A contestant is written ``KIND[:ARGUMENT[,KEY=VALUE...]]``:

    float                                the model itself
    qpass:ort-x86,activations=dynamic    qpass, a target and any options of `qpass.optimize`
    ort:minmax|entropy|percentile        onnxruntime.quantization, static QDQ, U8S8, per channel
    ort:dynamic                          the same package, MatMul and Gemm with dynamic ranges
    nncf[,preset=performance][,accurate=true]    nncf.quantize, fast or accurate bias correction
    quark[:minmax|entropy|percentile][,bias=true]   quark.onnx, U8S8, per channel
    quark,bits=4[,adaround=true[,iterations=1000]]   the same, weights on a grid of 4 bits
    aimet,bits=4[,adaround=true]         AIMET, and ort:gptq, nncf:int4: see bench_peers_low_bits
    file:PATH                            a file made elsewhere; {model} in PATH is the model's name

Every function runs in a process of its own, in the Python that has the peer; this module therefore
needs numpy and onnx only, the rest is imported where it is used. Peers get one sample a batch, as
their documentation does it; qpass gets the batch size of its own options.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from bench_samples import Feeds, StoredSamples
from onnx import numpy_helper

# Per-channel QuantizeLinear and DequantizeLinear came with this opset.
PER_CHANNEL_OPSET: Final = 13
PERCENTILE: Final = 99.999
QPASS_BATCH: Final = 4  # its default
HELD_SHARE: Final = 0.25  # of the calibration samples that qpass holds out, its default
ADAROUND_ITERATIONS: Final = 1000  # a layer, the default of quark.onnx
SCALE_MARGIN: Final = 1e-5  # keeps the largest weight below its code, so that no code is added
EIGHT: Final = "w8a8"
ORT_BLOCKS: Final = ("nbits", "rtn", "gptq", "hqq", "kquant")  # weights of 4 bits in blocks
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
        return {"nncf": "nncf", "quark": "quark", "aimet": "aimet_onnx"}.get(self.kind)


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
        "ort": ("minmax", "entropy", "percentile", "dynamic", *ORT_BLOCKS),
        "nncf": ("", "int4"),
        "quark": ("", "minmax", "entropy", "percentile"),
        "aimet": ("", "minmax", "enhanced"),
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


def bits_of(contestant: Contestant) -> str:
    """Return the precision of a contestant in qpass' notation; a float model counts as 8 bits."""
    if contestant.kind == "qpass":
        return str(contestant.options.get("precision", EIGHT))
    if contestant.argument in (*ORT_BLOCKS, "int4"):
        return "w4"
    return f"w{contestant.options.get('bits', 8)}a8"


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
    import bench_peers_low_bits as low_bits  # which needs this module

    if contestant.kind == "ort" and contestant.argument in ORT_BLOCKS:
        return low_bits.ort_blocks()
    if contestant.kind == "nncf" and contestant.argument:
        return low_bits.nncf_weights()
    known = {"qpass": _qpass, "ort": _ort, "nncf": _nncf, "quark": _quark, "aimet": low_bits.aimet}
    return known[contestant.kind]()


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
        model = with_opset(task, PER_CHANNEL_OPSET)
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
            Reader(task.samples),
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
        model = onnx.load(with_opset(task, PER_CHANNEL_OPSET))
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
        options = task.contestant.options
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
        algorithms = [quark.BiasCorrectionConfig()] if options.get("bias") else []
        if options.get("adaround"):
            count = int(options.get("iterations", ADAROUND_ITERATIONS))
            algorithms.append(quark.AdaRoundConfig(num_iterations=count))
        model = with_opset(task, PER_CHANNEL_OPSET).resolve()
        bits, overrides = int(options.get("bits", 8)), {}
        if bits != 8:
            model = _folded(model, task.scratch.resolve())
            overrides = narrow_weights(onnx.load(model), bits)
        config = quark.QConfig(
            global_config=quark.QLayerConfig(activation=activation, weight=weight),
            algo_config=algorithms,
            extra_options={"TensorQuantOverrides": overrides},
        )
        output = str(task.output.resolve())
        reader = Reader(replace(task.samples, path=task.samples.path.resolve()))
        with contextlib.chdir(task.scratch):  # it leaves a list of what it did where it runs
            quark.ModelQuantizer(config).quantize_model(str(model), output, reader)
        _check_codes(onnx.load(output), overrides, bits)
        return {}

    return run


def _folded(model: Path, folder: Path) -> Path:
    """Return a copy with normalizations in the weights, as overrides need the final weights.

    quark.onnx folds in the same way itself, and drops without an error the overrides of weights
    that have other names then.
    """
    import onnxruntime

    path = folder / "folded.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return path


def _check_codes(model: onnx.ModelProto, overrides: dict[str, Any], bits: int) -> None:
    """Raise RuntimeError if a weight that was to be narrow holds wider codes."""
    written = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in overrides:
        tensor = written.get(f"{name}_quantized")
        codes = np.array(127) if tensor is None else np.int32(numpy_helper.to_array(tensor))
        if np.abs(codes).max() >= 2 ** (bits - 1):
            raise RuntimeError(f"quark.onnx did not put {name} on the grid of {bits} bits")


def narrow_weights(model: onnx.ModelProto, bits: int) -> dict[str, list[dict[str, Any]]]:
    """Return overrides that put weights on a grid of fewer than 8 bits, one scale a channel.

    quark.onnx has no type of 4 bits for weights between float layers, and its AdaRound reads types
    of 8 bits and more only. With these scales its INT8 holds no other codes than -7 to 7. The first
    and the last linear op keep 8 bits, as they do in qpass.

    Raises:
        ValueError: `bits` is not between 2 and 7.
    """
    if not 2 <= bits < 8:
        raise ValueError(f"bits={bits} is not between 2 and 7")
    from onnxruntime.quantization import QuantType

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    linear = linear_ops(model)
    kept = {node.input[1] for node in (*linear[:1], *linear[-1:])}
    largest = 2 ** (bits - 1) - 1
    overrides = {}
    for node in linear:
        name = node.input[1]
        if name in kept:
            continue
        values = np.abs(numpy_helper.to_array(weights[name]))
        transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else values.ndim - 1
        peaks = values.max(axis=tuple(other for other in range(values.ndim) if other != axis))
        scales = np.where(peaks > 0, peaks / largest * (1 + SCALE_MARGIN), 1).astype(np.float32)
        fixed = {"axis": axis, "quant_type": QuantType.QInt8, "zero_point": np.int8(0)}
        overrides[name] = [{**fixed, "scale": scale} for scale in scales]
    return overrides


def linear_ops(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the ops with constant weights, in the order of the graph."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
    ]


class Reader:
    """The reader that onnxruntime.quantization, and those built on it, want: one batch a call."""

    def __init__(self, samples: StoredSamples) -> None:
        """Read `samples`, one at a time."""
        self._samples = samples
        self._iterator: Iterator[Feeds] | None = None  # none yet, for some copy the reader

    def __iter__(self) -> Iterator[Feeds]:
        """Read all of them from the first on."""
        return iter(self._samples)

    def rewind(self) -> None:
        """Begin again."""
        self._iterator = None

    def get_next(self) -> Feeds | None:
        """Return the next sample, None behind the last."""
        if self._iterator is None:
            self._iterator = iter(self._samples)
        return next(self._iterator, None)


def with_opset(task: Task, least: int) -> Path:
    """Return the model file, or a copy converted to opset `least` when it is older."""
    model = onnx.load(task.model, load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset >= least:
        return task.model
    from onnx import version_converter

    path = task.scratch / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task.model.stem)}.opset{least}.onnx"
    onnx.save(version_converter.convert_version(onnx.load(task.model), least), path)
    return path
