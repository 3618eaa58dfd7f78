"""Training helpers for torch (extra ``qpass[torch]``): Unified Normalization and its export."""

from __future__ import annotations

from qpass.torch.convert import Conversion, convert_layernorm
from qpass.torch.export import export_onnx
from qpass.torch.finetune import Finetuning, finetune_unified
from qpass.torch.unified_norm import UnifiedNorm

__all__ = [
    "Conversion",
    "Finetuning",
    "UnifiedNorm",
    "convert_layernorm",
    "export_onnx",
    "finetune_unified",
]
