"""Export a module with Unified Normalization to ONNX, with either exporter of torch.

What it does
    ``torch.onnx.export`` by itself writes each `UnifiedNorm` as Mul and Add with constant operands,
    which ``qpass optimize`` folds. `export_onnx` can also keep the layer's name: one node
    ``qpass::UnifiedNorm(X, scale, B, var)`` with attribute ``epsilon``, and its body as a function
    of the model, so that any engine runs the file.
Preconditions
    The module is exported for inference. ``keep_function`` needs float32 and opset 13 or newer.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import onnx
import torch
from torch import nn

from qpass.errors import RecipeError
from qpass.torch.kept_function import DOMAIN, VERSION, function_proto
from qpass.torch.unified_norm import UnifiedNorm

_OLDEST_OPSET: Final = 13


def export_onnx(
    module: nn.Module,
    args: tuple[Any, ...],
    *,
    dynamo: bool = True,
    keep_function: bool = False,
    **options: Any,
) -> onnx.ModelProto:
    """Export a module in evaluation mode; its mode is restored afterwards.

    Args:
        module: any module.
        args: example inputs.
        dynamo: the `torch.export` exporter; False: the TorchScript one.
        keep_function: write each `UnifiedNorm` as a node ``qpass::UnifiedNorm``.
        options: further keyword arguments of `torch.onnx.export`, such as ``input_names``.

    Returns:
        The model with its weights.

    Raises:
        RecipeError: `keep_function` without a `UnifiedNorm`, not in float32, or below opset 13.
    """
    norms = [part for part in module.modules() if isinstance(part, UnifiedNorm)]
    if keep_function:
        _check_keeping(norms, options.get("opset_version"))
    with _inference(module), _named(norms if keep_function else []):
        if dynamo:
            program = torch.onnx.export(module, args, dynamo=True, **{"verbose": False, **options})
            model: onnx.ModelProto = program.model_proto
        else:
            model = _export_legacy(module, args, options)
    if keep_function:
        _add_function(model)
    return model


def _check_keeping(norms: list[UnifiedNorm], opset: int | None) -> None:
    what, fix = "", ""
    if not norms:
        what = "the module has no UnifiedNorm to keep"
        fix = "leave keep_function out, or convert the module with convert_layernorm first"
    elif any(norm.weight.dtype != torch.float32 for norm in norms):
        what, fix = "keep_function=True is for float32", "export module.float()"
    elif opset is not None and opset < _OLDEST_OPSET:
        what = f"opset_version={opset} is too old for keep_function=True"
        fix = f"export at opset {_OLDEST_OPSET} or newer"
    if what:
        raise RecipeError(what, where="export_onnx", fix=fix)


def _export_legacy(
    module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> onnx.ModelProto:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch advises to use the other exporter; here the old one is what is asked for.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(module, args, buffer, dynamo=False, **options)
    return onnx.load_model_from_string(buffer.getvalue())


def _add_function(model: onnx.ModelProto) -> None:
    versions = {entry.domain: entry for entry in model.opset_import}
    imported = versions.get(DOMAIN) or model.opset_import.add(domain=DOMAIN)
    imported.version = VERSION
    model.functions.append(function_proto(versions[""].version))
    model.ir_version = max(model.ir_version, 8)  # the first with functions


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule gets its own mode back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _named(norms: list[UnifiedNorm]) -> Iterator[None]:
    for norm in norms:
        norm.as_function = True
    try:
        yield
    finally:
        for norm in norms:
            norm.as_function = False
