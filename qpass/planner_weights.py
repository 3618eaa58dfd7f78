"""What the constants of a plan become: weights of linear ops, and constant inputs of followers.

One decision serves all readers that want the same integers of a constant; a reader that wants
others (another width, another axis) gets a decision of its own, with integers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from qpass.bits import EDGE_BITS
from qpass.choose import WIDE_BITS
from qpass.dtypes import storage_for
from qpass.graph import Constant, Node
from qpass.matching import weight_axis
from qpass.plan import Decision, DecisionKind, Edge
from qpass.program import Policy
from qpass.qparams import TensorSpec
from qpass.targets.schema import OpRule, Target, WeightRule, with_bits

DEFAULT_BLOCK: Final = 32  # rows of a weight below 8 bits that share a scale
WIDE_BLOCK: Final = 128  # the same for tables at 8 bits


def is_nibble(bits: int) -> bool:
    """True when integers of so many bits are stored in four."""
    return storage_for(bits, signed=True).bits < EDGE_BITS


class Keys:
    """The keys of the decisions of one plan; each is given once."""

    def __init__(self) -> None:
        """Start with none taken."""
        self._taken: set[str] = set()

    def free(self, tensor: str) -> str:
        """Return the tensor's name, with a number when it has a decision already."""
        key, number = tensor, 1
        while key in self._taken:
            key, number = f"{tensor}#{number}", number + 1
        self._taken.add(key)
        return key


def weight_spec(
    node: Node, weight: Constant, rule: OpRule, target: Target, bits: int, *, static: bool
) -> TensorSpec:
    """Return what the weight of a linear op becomes with at most `bits` bits.

    A target may hold fewer (7 bits without VNNI). The axis is that of the output channels. The most
    negative integer is left out from 7 bits on. Behind activations with `static` ranges, channels
    of very few bits get zero points where the target lets them (`Target.zero_points_below`).
    """
    assert rule.weight is not None
    spec, rank = with_bits(rule.weight, min(bits, rule.weight.bits)), len(weight.shape)
    if spec.bits < WIDE_BITS:
        # One integer of 256 is no loss, one of 8 or 16 is; kernels of int4 read all of them.
        spec = replace(spec, narrow_range=False)
    per_channel = spec.granularity == "per_channel" and (rank == 2 or node.op != "MatMul")
    if node.op == "MatMul" and not target.per_channel_matmul:
        per_channel = False
    if not per_channel:
        return replace(spec, granularity="per_tensor", axis=None)
    symmetric = spec.symmetric and not (static and spec.bits < target.zero_points_below)
    return replace(spec, symmetric=symmetric, axis=weight_axis(node, rank))


def contraction_axis(node: Node, rank: int) -> int:
    """Return the axis of the input channels in the weight of a linear op (ONNX operators)."""
    if node.op == "Conv":
        return 1
    if node.op == "ConvTranspose":
        return 0
    if node.op == "Gemm":
        return 1 if node.attrs.get("transB", 0) else 0
    return rank - 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOnly:
    """How a weight behind float activations is stored, and whether a kernel reads it so."""

    spec: TensorSpec
    precision: Literal["weights", "stored"]
    because: str


def weight_only(
    node: Node, weight: Constant, rule: OpRule, target: Target, policy: Policy, bits: int
) -> WeightOnly:
    """Decide for a linear op with float activations: `bits`, granularity, kernel.

    Blocks run along the contraction axis. Where the target takes no block of the wanted size for
    this many rows, the next smaller one is taken, and one scale a channel when there is none; with
    8 bits, where the target takes fewer in blocks only.
    """
    rank = len(weight.shape)
    axis = contraction_axis(node, rank)
    own = target.weight_rule_for(node.op)
    symmetric = not policy.asymmetric_weights
    wanted = policy.block_size or (DEFAULT_BLOCK if bits < EDGE_BITS else None)
    block, because = None, ""
    if own is not None and wanted is not None:
        block, because = _block(node, weight, own, bits, wanted)
    if own is not None and own.narrow_in_blocks and block is None:
        if is_nibble(bits):
            bits, because = EDGE_BITS, f"{because}, so 8 bits"
        own = replace(own, kernel="")  # it reads narrow weights alone
    if block is not None or not symmetric:
        spec = TensorSpec(
            storage=storage_for(bits, signed=symmetric), symmetric=symmetric, bits=bits
        )
    else:
        spec = weight_spec(node, weight, rule, target, bits, static=False)
    if block is not None:
        assert own is not None
        half = own.half_scales
        spec = replace(spec, granularity="per_block", axis=axis, block_size=block, half_scale=half)
    elif not symmetric and (rank == 2 or node.op != "MatMul"):
        spec = replace(spec, granularity="per_channel", axis=weight_axis(node, rank))
    obstacle = _no_kernel(node, rank, own)
    kernel = own.kernel if own is not None else ""
    if obstacle:
        text = f"integer weights in the file, {obstacle}"
        return WeightOnly(spec=spec, precision="stored", because=text + because)
    text = f"integer weights, float activations ({kernel})"
    return WeightOnly(spec=spec, precision="weights", because=text + because)


def _block(
    node: Node, weight: Constant, rule: WeightRule, bits: int, wanted: int
) -> tuple[int | None, str]:
    """Return how many rows of a weight share a scale (None: all), and why that is not `wanted`."""
    rank = len(weight.shape)
    rows = int(weight.shape[contraction_axis(node, rank)])
    block, obstacle = rule.block_for(rows, wanted), f"{rows} rows take no blocks of {wanted} here"
    if rule.narrow_in_blocks:
        if not rule.blocks or rank != 2:
            block, obstacle = None, "blocks are for matrices"
        elif not is_nibble(bits):
            block, obstacle = None, f"weights of {bits} bits take no blocks here"
        elif weight.shape[-1] % 2:
            block, obstacle = None, f"blocks take no odd last dimension ({weight.shape[-1]})"
    if block is not None and node.op.startswith("Conv") and rows < block:
        block = None  # a scale for each place of the kernel would weigh more than the weights
    if block == wanted:
        return block, ""
    found = "one scale a channel" if block is None else f"blocks of {block}"
    return block, f"; {obstacle}: {found}"


def embedding(node: Node, table: Constant, target: Target, policy: Policy, bits: int) -> WeightOnly:
    """Decide for the table of an embedding: blocks along its rows, or one scale a row.

    Eight bits are stored unsigned, because the kernel takes no signed bytes; 128 stands for 0.
    """
    own = target.weight_rule_for(node.op)
    assert own is not None
    symmetric = not policy.asymmetric_weights
    wanted = policy.block_size or (DEFAULT_BLOCK if bits < EDGE_BITS else WIDE_BLOCK)
    block = own.block_for(int(table.shape[1]), wanted)
    signed = symmetric and (bits < EDGE_BITS or not own.kernel)
    spec = TensorSpec(storage=storage_for(bits, signed=signed), symmetric=symmetric, bits=bits)
    if block is None:
        spec = replace(spec, granularity="per_channel", axis=0)
    else:
        spec = replace(spec, granularity="per_block", axis=1, block_size=block, half_scale=True)
    if not own.kernel or block is None:
        text = f"integer rows in the file, no kernel reads them for {node.op}"
        return WeightOnly(spec=spec, precision="stored", because=text)
    return WeightOnly(spec=spec, precision="weights", because=f"integer rows ({own.kernel})")


def _no_kernel(node: Node, rank: int, rule: WeightRule | None) -> str:
    """Return why no kernel reads integer weights of `node`, "" where one does."""
    if rule is None or not rule.kernel:
        return f"no kernel reads them for {node.op}"
    if rank != 2:
        return f"{rule.kernel} takes matrices only"
    if node.op == "Gemm" and node.attrs.get("transB", 0) and not rule.transposed:
        return f"{rule.kernel} takes no transposed weight"
    return ""


class ConstantDecisions:
    """The decisions about constants, in the order in which they were made."""

    def __init__(self, keys: Keys) -> None:
        """Take free keys from `keys`."""
        self._keys = keys
        self._made: dict[tuple[str, TensorSpec, str], Decision] = {}

    def add(
        self,
        node: Node,
        index: int,
        tensor: Constant,
        spec: TensorSpec,
        kind: DecisionKind,
        because: str,
        *,
        shared: bool = True,
    ) -> None:
        """Decide that input `index` of `node` reads `tensor` as `spec`.

        Without `shared` the node gets integers that no other reads: onnxruntime 1.31 makes a
        MatMulNBits only of constants with one reader.
        """
        place = (tensor.name, spec, "" if shared else node.name)
        edge, known = Edge(node=node.name, index=index), self._made.get(place)
        if known is not None:
            self._made[place] = replace(known, edges=(*(known.edges or ()), edge))
            return
        self._made[place] = Decision(
            key=self._keys.free(tensor.name),
            tensor=tensor.name,
            kind=kind,
            spec=spec,
            edges=(edge,),
            because=because,
        )

    def add_weight(self, node: Node, weight: Constant, spec: TensorSpec) -> None:
        """Decide that a linear op behind quantized activations reads its weight as `spec`."""
        reason = f"weight of {node.name}"
        if not spec.symmetric:
            reason += "; asymmetric: behind integers no kernel of the target reads so few bits"
        self.add(node, 1, weight, spec, "weight", reason)

    def all(self) -> tuple[Decision, ...]:
        """Return the decisions."""
        return tuple(self._made.values())
