"""Peers with weights of fewer than 8 bits: AIMET, and two that keep activations in float.

    aimet[:minmax|enhanced][,bits=4][,cle=true]
         [,seqmse=true[,candidates=20]][,adaround=true[,iterations=300]]
    ort:nbits|rtn|gptq|hqq|kquant[,block=32][,symmetric=true][,ends=float]
    nncf:int4[,block=32[,least=4]][,symmetric=false][,awq=true][,scales=true][,all=true]

AIMET gets 8-bit activations, and keeps the first and the last linear op at 8 bits, as qpass does;
``enhanced`` is its scheme for the least error of ranges. The other two write weights in blocks:
onnxruntime's `MatMulNBitsQuantizer` (``ends=float`` leaves out the first and the last linear op),
and `nncf.compress_weights`, which puts embeddings and the last op in 8 bits unless ``all=true``,
and weights that blocks do not divide in smaller blocks of ``least`` (32) or in 8 bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from bench_peers import PER_CHANNEL_OPSET, Reader, Task, linear_ops, with_opset
from onnx import numpy_helper

BLOCK: Final = 32
BLOCKS_OPSET: Final = 21  # DequantizeLinear has blocks, and 4 bits, since this one
SEQMSE_CANDIDATES: Final = 20  # its default
AIMET_ITERATIONS: Final = 15_000  # a layer, what its documentation says for fewer than 8 bits
AIMET_SCHEMES: Final = {"": "min_max", "minmax": "min_max", "enhanced": "tf_enhanced"}
STORED_BITS: Final = (4, 8)  # the types of ONNX that AIMET writes

Fact = dict[str, Any]


def aimet() -> Callable[[Task], Fact]:
    """Scales and rounding by AIMET, in its simulation, written as QDQ."""
    aimet_onnx: Any = importlib.import_module("aimet_onnx")
    configuration: Any = importlib.import_module("aimet_onnx.common.quantsim_config")
    per_channel = Path(configuration.__file__).with_name("default_config_per_channel.json")

    def run(task: Task) -> Fact:
        options = task.contestant.options
        bits = int(options.get("bits", 8))
        model = onnx.load(with_opset(task, PER_CHANNEL_OPSET))
        name_nodes(model)
        aimet_onnx.batch_norm_fold.fold_all_batch_norms_to_weight(model)
        if options.get("cle"):
            equalization: Any = importlib.import_module("aimet_onnx.cross_layer_equalization")
            equalization.equalize_model(model)
        data = list(task.samples)
        narrow = narrow_inputs(model, bits)
        sim = aimet_onnx.QuantizationSimModel(
            model,
            param_type="int8",
            activation_type="int8",
            quant_scheme=AIMET_SCHEMES[task.contestant.argument],
            config_file=str(per_channel),
            dummy_input=data[0],
            providers=["CPUExecutionProvider"],
        )
        for name in narrow:
            sim.qc_quantize_op_dict[name].set_precision(aimet_onnx.qtype.int(bits))
        if options.get("seqmse"):
            count = int(options.get("candidates", SEQMSE_CANDIDATES))
            aimet_onnx.apply_seq_mse(sim, data, num_candidates=count)
        if options.get("adaround"):
            count = int(options.get("iterations", AIMET_ITERATIONS))
            aimet_onnx.apply_adaround(sim, data, num_iterations=count)
        sim.compute_encodings(data)
        found = store_narrow(sim, bits) if narrow else 0
        if found != len(narrow):
            raise RuntimeError(f"AIMET put {found} of {len(narrow)} weights on {bits} bits")
        onnx.save(sim.to_onnx_qdq(prequantize_constants=True), task.output)
        return {"narrow_weights": found}

    return run


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node without a name one, for tools that are told nodes by name."""
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{number}"


def narrow_inputs(model: onnx.ModelProto, bits: int) -> list[str]:
    """Return the names of the weights that get `bits`; none of them for 8.

    Raises:
        ValueError: `bits` is not between 2 and 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is not between 2 and 8")
    names = [node.input[1] for node in linear_ops(model)]
    kept = {*names[:1], *names[-1:]}
    return [] if bits == 8 else [name for name in dict.fromkeys(names) if name not in kept]


def store_narrow(sim: Any, bits: int) -> int:
    """Return how many weights AIMET has with `bits`; where ONNX has no such type, widen it.

    The values do not change: the same scale, and codes that leave the wider type's ends unused.
    """
    narrow = {
        name: quantizer
        for name, quantizer in sim.qc_quantize_op_dict.items()
        if name in sim.param_names and quantizer.enabled and quantizer.bitwidth == bits
    }
    if bits in STORED_BITS:
        return len(narrow)
    wider = min(stored for stored in STORED_BITS if stored > bits)
    values = {tensor.name: tensor for tensor in sim.model.model.graph.initializer}
    for name, quantizer in narrow.items():
        weight = quantizer.quantize_dequantize(numpy_helper.to_array(values[name]))
        values[name].CopyFrom(numpy_helper.from_array(np.asarray(weight), name))
        encodings = quantizer.get_encodings()
        for encoding in encodings:
            encoding.bw, encoding.offset = wider, -(2.0 ** (wider - 1))
            encoding.min = encoding.offset * encoding.delta
            encoding.max = -(encoding.offset + 1) * encoding.delta
        quantizer._is_encoding_frozen = False
        symmetric, kind = quantizer.use_symmetric_encodings, quantizer.data_type
        quantizer.update_quantizer_and_load_encodings(encodings, symmetric, False, False, kind)
    return len(narrow)


def ort_blocks() -> Callable[[Task], Fact]:
    """Weights of MatMul in blocks of 4 bits, by onnxruntime."""
    nbits: Any = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")

    def run(task: Task) -> Fact:
        options, method = task.contestant.options, task.contestant.argument
        block = int(options.get("block", BLOCK))
        model = onnx.load(task.model)
        name_nodes(model)
        algorithm: Any = {
            "nbits": lambda: None,
            "rtn": nbits.RTNWeightOnlyQuantConfig,
            "kquant": nbits.KQuantWeightOnlyQuantConfig,
            "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=block),
            "gptq": lambda: nbits.GPTQWeightOnlyQuantConfig(
                calibration_data_reader=Reader(task.samples),
                mse=bool(options.get("mse")),
                actorder=bool(options.get("actorder")),
            ),
        }[method]()
        quantizer = nbits.MatMulNBitsQuantizer(
            model,
            block_size=block,
            is_symmetric=bool(options.get("symmetric")),
            nodes_to_exclude=end_nodes(model) if options.get("ends") == "float" else [],
            algo_config=algorithm,
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(task.output), False)
        return {}

    return run


def end_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the first and the last linear op."""
    ops = linear_ops(model)
    return list(dict.fromkeys(node.name for node in (*ops[:1], *ops[-1:])))


def nncf_weights() -> Callable[[Task], Fact]:
    """Weights in blocks of 4 bits by NNCF, with its data-aware methods where wanted."""
    nncf: Any = importlib.import_module("nncf")

    def run(task: Task) -> Fact:
        options = task.contestant.options
        model = onnx.load(with_opset(task, BLOCKS_OPSET))
        aware = {"awq": options.get("awq"), "scale_estimation": options.get("scales")}
        chosen = {name: True for name, value in aware.items() if value}
        modes = nncf.CompressWeightsMode
        compressed = nncf.compress_weights(
            model,
            mode=modes.INT4_ASYM if options.get("symmetric") is False else modes.INT4_SYM,
            ratio=1.0,
            group_size=int(options.get("block", BLOCK)),
            all_layers=bool(options.get("all")),
            dataset=nncf.Dataset(list(task.samples)) if chosen else None,
            subset_size=len(task.samples),
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST,
                min_adjusted_group_size=int(options.get("least", BLOCK)),
            ),
            **chosen,
        )
        onnx.save(compressed, task.output)
        return {}

    return run
