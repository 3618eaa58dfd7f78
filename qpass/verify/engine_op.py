"""What an engine made of a model: its own ops, as data, and which op types are linear.

`LINEAR` ops are where integers pay: convolutions, matrix products, their fused forms and the
recurrent cells. The three tables hold every name under which onnxruntime 1.31 runs one, standard
or contributed, and so decide what the word "integer" means in a report.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

Precision = Literal["integer", "float", "other"]
Kind = Literal["linear", "weight_only", "other"]

# Multiply integers by integers.
INTEGER_LINEAR: Final = frozenset({
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulInteger16",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearConvTranspose",
    "QLinearMatMul",
})  # fmt: skip
# Keep the weights as small integers and the activations in float.
WEIGHT_ONLY_LINEAR: Final = frozenset({
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulNBits",
    "QMoE",
})  # fmt: skip
FLOAT_LINEAR: Final = frozenset({
    "Attention",
    "AttnLSTM",
    "Conv",
    "ConvTranspose",
    "DecoderMaskedMultiHeadAttention",
    "DeformConv",
    "Einsum",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "FusedMatMulActivation",
    "GRU",
    "Gemm",
    "GroupQueryAttention",
    "LSTM",
    "MatMul",
    "MoE",
    "MultiHeadAttention",
    "NhwcFusedConv",
    "RNN",
    "TransposeMatMul",
})  # fmt: skip
LINEAR: Final = INTEGER_LINEAR | WEIGHT_ONLY_LINEAR | FLOAT_LINEAR


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOp:
    """One op of the engine's optimized graph.

    name
        The engine's name of it; onnxruntime's profile uses the same one.
    op
        Op type in the engine's words (``QLinearConv``, ``FullyConnected``).
    precision
        ``integer`` or ``float``: what it computes in. ``other``: Q, DQ and moving of data.
    kind
        ``linear``; ``weight_only``: linear, with integer weights (hence precision ``integer``)
        and float activations; ``other``: everything else.
    covers
        Names of nodes and tensors of the original model that this op can be recognized by.
    """

    name: str
    op: str
    precision: Precision
    kind: Kind = "other"
    covers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """All ops of the engine's optimized graph, bodies of If and Loop included where they show."""

    engine: str
    version: str
    ops: tuple[EngineOp, ...]

    def counts(self) -> dict[str, int]:
        """Return how many ops there are of each type, most frequent first."""
        return dict(Counter(op.op for op in self.ops).most_common())

    @property
    def integer_compute(self) -> tuple[EngineOp, ...]:
        """Linear ops whose operands are both integers."""
        return tuple(op for op in self.ops if op.kind == "linear" and op.precision == "integer")

    @property
    def float_compute(self) -> tuple[EngineOp, ...]:
        """Linear ops in float."""
        return tuple(op for op in self.ops if op.kind == "linear" and op.precision == "float")

    @property
    def weight_only_compute(self) -> tuple[EngineOp, ...]:
        """Linear ops with integer weights and float activations."""
        return tuple(op for op in self.ops if op.kind == "weight_only")
