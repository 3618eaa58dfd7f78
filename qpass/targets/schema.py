"""A target is a frozen table of rules; every rule names the source that justifies it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qpass.dtypes import storage_for
from qpass.qparams import TensorSpec

Role = Literal["linear", "follow", "passthrough"]
OutputQ = Literal["required", "float", "follow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRule:
    """How one family of ops is run in integers by a target.

    role
        ``linear``: starts an integer region, for it is where integers pay (Conv, Gemm, MatMul).
        ``follow``: runs in integers only when all its inputs are integers already (Add, Concat).
        ``passthrough``: moves integers without computing; input and output share qparams.
    output
        ``required``: the engine fuses only with a QuantizeLinear behind the op.
        ``float``: no Q behind the op by itself (a consumer may still ask for one).
        ``follow``: Q behind the op when a later integer op reads it.
    activation
        Spec of the activation inputs; `lhs` and `rhs` are the specs of the operands of a MatMul
        where both are activations (``None``: as `activation`).
    min_channels
        Counts the first two axes of the weight, so input channels of a Conv are those per group.
    """

    ops: frozenset[str]
    role: Role
    source: str
    activation: TensorSpec | None = None
    lhs: TensorSpec | None = None  # left operand of activation x activation
    lhs_nonnegative: TensorSpec | None = None  # the same where it comes from Softmax, Relu, ...
    rhs: TensorSpec | None = None  # right operand of activation x activation
    weight: TensorSpec | None = None  # axis is filled in per op
    output: OutputQ = "follow"
    absorbs: tuple[str, ...] = ()  # activations that fuse between the op and its Q
    tie: bool = False  # inputs and outputs share one scale and zero point
    constant_weight: bool = True  # False: also activation x activation
    min_channels: int = 0  # fewer input or output channels stay float
    skip_input_only: bool = False  # quantize only the input that no linear op computes directly
    attributes: tuple[tuple[str, int | str], ...] = ()  # values that the node must have
    shrinks: bool = False  # worth it with float behind: the output is far smaller than the input
    min_bits: int = 2  # narrowest weights and activations; CPUs simulate what they do not have
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRule:
    """How one family of ops is run with integer weights behind float activations.

    kernel
        The op of the engine's own graph that reads the integers. Empty: there is none, the engine
        makes floats of them first, and only the file is smaller.
    blocks
        Block sizes (rows of the contraction axis with one scale) that the engine takes; empty: one
        scale for each output channel.
    ragged
        The last block may be shorter than the others, as ONNX allows it.
    transposed
        A Gemm may hold its weight transposed (transB = 1).
    activations_apart
        Relu and Clip behind a product hide its kernel, this one and that for integer activations;
        Max and Min do not.
    narrow_in_blocks
        Weights below 8 bits are taken as matrices with blocks and an even last dimension only;
        others have 8 bits, for which one scale a channel is the rule.
    half_scales
        Scales of blocks may be float16 constants behind a Cast.
    zero_points
        Weights may have zero points.
    """

    ops: frozenset[str]
    source: str
    kernel: str = ""
    blocks: tuple[int, ...] = ()
    ragged: bool = False
    transposed: bool = True
    activations_apart: bool = False
    narrow_in_blocks: bool = False
    half_scales: bool = True
    zero_points: bool = True
    note: str = ""

    def block_for(self, length: int, wanted: int) -> int | None:
        """Return the largest block up to `wanted` that `length` rows can have here, or None."""
        sizes = sorted((size for size in self.blocks if size <= wanted), reverse=True)
        return next((size for size in sizes if self.ragged or length % size == 0), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One engine on one kind of hardware: what it runs in integers and how the graph must look.

    zero_points_below
        Weights of fewer bits than this may have a zero point for each channel: behind quantized
        activations no kernel of the engine reads them, so none asks for symmetric ones.
    """

    name: str
    title: str
    engine: Literal["onnxruntime", "openvino", "none"]  # "none": cannot be run here, lint only
    opset: int
    rules: tuple[OpRule, ...]
    bias: Literal["int32", "float"]
    activation: TensorSpec
    scheme: Literal["islands", "full"] = "islands"  # full: inputs, outputs and all ops in QDQ
    weight_rules: tuple[WeightRule, ...] = ()  # integer weights behind float activations
    matmul_bias_rank: int | None = None  # reshape MatMul biases to this rank (see lower.py)
    per_channel_matmul: bool = True
    zero_points_below: int = 0
    sum_before_norm: bool = False  # see lower.py
    needs_vnni: bool = False  # 8-bit weights: other x86 CPUs saturate, see saturation.py
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def rule_for(self, op: str) -> OpRule | None:
        """Return the first rule that covers `op`, or None: the op stays float."""
        return next((rule for rule in self.rules if op in rule.ops), None)

    def weight_rule_for(self, op: str) -> WeightRule | None:
        """Return the rule for integer weights of `op` behind float activations, or None."""
        return next((rule for rule in self.weight_rules if op in rule.ops), None)

    @property
    def narrowest(self) -> int:
        """Bits of the narrowest weights and activations of an integer product."""
        return min(rule.min_bits for rule in self.rules if rule.role == "linear")

    @property
    def own_engine(self) -> Literal["ort", "openvino"]:
        """The engine that judges a result; onnxruntime stands in for one that does not run here."""
        return "openvino" if self.engine == "openvino" else "ort"

    @property
    def straight_gemms(self) -> bool:
        """True when the kernel that reads integer weights takes no transposed ones."""
        rule = self.weight_rule_for("Gemm")
        return rule is not None and bool(rule.kernel) and not rule.transposed

    @property
    def rounds_convolutions(self) -> bool:
        """True when a Q has to stand behind an integer Conv, but not behind a MatMul."""
        conv, product = self.rule_for("Conv"), self.rule_for("MatMul")
        if conv is None or product is None:
            return False
        return conv.output == "required" and product.output == "float"

    @property
    def gathers_blocks(self) -> bool:
        """True when a kernel gathers rows from integer tables."""
        rule = self.weight_rule_for("Gather")
        return rule is not None and bool(rule.kernel)

    @property
    def parts_activations(self) -> bool:
        """True when the kernel is not found where Relu or Clip stand behind the product."""
        return any(rule.activations_apart for rule in self.weight_rules)


def with_bits(spec: TensorSpec, bits: int) -> TensorSpec:
    """Return `spec` at another bit width, in the smallest storage type that holds it."""
    if bits == spec.bits:
        return spec
    return replace(spec, bits=bits, storage=storage_for(bits, signed=spec.storage.signed))
