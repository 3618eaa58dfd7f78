"""Products with wide weights in bfloat16, their sums in float32: faster steps of gradients.

What it does
    Convolutions (not transposed ones) and matrix products round both operands to bfloat16, and
    their result once more. Biases and all that lies between products stay float32.
Why that is enough to learn by
    An element is off by at most 2^-8 of itself, on average 55 dB below it; the errors that are
    learned from are 10 to 30 dB below. What has been learned is judged in float32.
Where
    On CPUs with instructions for it, and where each output sums up enough products to pay for the
    rounding of operands: with 16 and 32 products a tenth to a quarter more time, with 64 and more
    a twentieth to a half less. Products with more than a matrix on their right stay: those
    are of two activations, and a softmax follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

Attrs = Mapping[str, Any]
Operator = Callable[..., torch.Tensor]
INSTRUCTIONS: Final = ("avx512_bf16", "amx_bf16")
WIDE: Final = 64  # products that each output sums up


def narrow_pays(device: str) -> bool:
    """True where products of bfloat16 are faster than those of float32, as far as is known."""
    capabilities = torch.cpu.get_capabilities()
    return device == "cpu" and any(capabilities.get(name, False) for name in INSTRUCTIONS)


def narrowed(op: str, function: Operator) -> Operator:
    """Return `function`, of an op in the table of the executor, with products in bfloat16."""
    if op == "MatMul":
        return lambda attrs, a, b: _product(function, attrs, a, b, b.shape[0] if b.ndim == 2 else 0)
    if op == "Gemm":
        return lambda attrs, a, b, *c: _with_bias(
            _product(function, attrs, a, b, a.shape[0 if attrs.get("transA", 0) else 1]),
            *(attrs.get("beta", 1.0) * one for one in c),
        )
    if op == "Conv":
        return lambda attrs, x, weight, *bias: _with_bias(
            _product(function, attrs, x, weight, weight.shape[1:].numel()),
            *(one.reshape(-1, *[1] * (x.ndim - 2)) for one in bias),
        )
    return function


def _product(
    function: Operator, attrs: Attrs, a: torch.Tensor, b: torch.Tensor, length: int
) -> torch.Tensor:
    if length < WIDE:
        return function(attrs, a, b)
    return function(attrs, a.bfloat16(), b.bfloat16()).to(a.dtype)


def _with_bias(product: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
    return product + bias[0] if bias else product
