"""Export torch modules to ONNX files fit to be shipped: one file, no trace of this machine.

Both exporters of torch are wrapped, since users have files of both: `export_legacy` (TorchScript,
`dynamo=False`) and `export_dynamo` (`torch.export`, `dynamo=True`). The second writes the stack
trace of every operation into the metadata of its node, absolute paths included; `strip_traces`
removes all metadata and doc strings, so that the bytes depend on the module alone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch


def export_legacy(
    module: torch.nn.Module, sample: torch.Tensor, *, input_name: str, output_name: str, opset: int
) -> onnx.ModelProto:
    """Export with the TorchScript exporter, BatchNormalization nodes kept.

    The exporter folds BatchNorm into the convolution before it whenever it is told that the
    export is for inference. `PRESERVE` leaves the module's own mode alone instead: the module is
    in evaluation mode, hence the nodes are in inference form and still there to be folded.

    Args:
        module: A module of one float32 input and one output; set to evaluation mode.
        sample: An input of at least two samples on axis 0, which becomes the dynamic axis.
        input_name: Name of the graph input.
        output_name: Name of the graph output.
        opset: ONNX opset; below 17 LayerNorm comes out as a chain, below 14 HardSwish as well.

    Returns:
        The checked model, all weights inside.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch advises to use the other exporter; here the old one is what is asked for.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            module.eval(),
            (sample,),
            buffer,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=opset,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_axes={input_name: {0: "batch"}, output_name: {0: "batch"}},
        )
    return _checked(onnx.load_model_from_string(buffer.getvalue()))


def export_dynamo(
    module: torch.nn.Module, sample: torch.Tensor, *, input_name: str, output_name: str
) -> onnx.ModelProto:
    """Export with the `torch.export` exporter at its default opset.

    Args:
        module: A module of one float32 input and one output; set to evaluation mode.
        sample: An input of at least two samples on axis 0, which becomes the dynamic axis.
        input_name: Name of the graph input.
        output_name: Name of the graph output.

    Returns:
        The checked model, all weights inside, without metadata.
    """
    program = torch.onnx.export(
        module.eval(),
        (sample,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[input_name],
        output_names=[output_name],
        verbose=False,
    )
    return _checked(program.model_proto)


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove every doc string and metadata property, in subgraphs and functions too."""
    model.doc_string = ""
    del model.metadata_props[:]
    for graph in _graphs(model.graph):
        for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
            item.doc_string = ""
            del item.metadata_props[:]
        for tensor in graph.initializer:
            tensor.doc_string = ""
            del tensor.metadata_props[:]
    for function in model.functions:
        for item in (function, *function.node):
            item.doc_string = ""
            del item.metadata_props[:]


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model as one file; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    onnx.save_model(model, partial)
    partial.replace(path)


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    strip_traces(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and all its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                if subgraph.node:
                    yield from _graphs(subgraph)
