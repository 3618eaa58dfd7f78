"""What the pipeline hands from pass to pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

from qpass.errors import RecipeError

Activations = Literal["static", "dynamic"]
Progress = Callable[[str, int, int | None], None]  # stage, samples done, samples in all

PRECISION: Final = re.compile(r"w(?P<weight>\d+)(a(?P<activation>\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """`wNaM`: N-bit weights and M-bit activations; `wN`: weights only (`activation` is None)."""

    weight: int
    activation: int | None

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Parse `w8a8`, `w4`, ...; RecipeError on anything else."""
        match = PRECISION.fullmatch(text)
        if match is None:
            lower = text.strip().lower()
            raise RecipeError(
                f"precision {text!r} is not understood",
                fix=f"write {lower}"
                if PRECISION.fullmatch(lower)
                else "write wNaM (N-bit weights, M-bit activations) or wN (weights only), "
                "for example w8a8, w8a16, w4a8 or w8",
            )
        weight = int(match["weight"])
        activation = int(match["activation"]) if match["activation"] else None
        if not 2 <= weight <= 8:
            raise RecipeError(f"{weight}-bit weights are not supported", fix="choose w2 to w8")
        if activation is not None and not 2 <= activation <= 16:
            raise RecipeError(f"{activation}-bit activations are not supported", fix="a2 to a16")
        return cls(weight=weight, activation=activation)

    @property
    def simulated(self) -> bool:
        """True when the CPU engines compute it in float: they multiply 8-bit integers only."""
        return self.activation is not None and (self.activation != 8 or self.weight <= 4)

    def __str__(self) -> str:
        return f"w{self.weight}" + ("" if self.activation is None else f"a{self.activation}")


def chosen(precision: Precision) -> str:
    """Return the reason why a node has a precision that the user, or a search, gave it."""
    return f"{precision} by choice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the user wants, whatever the target.

    `keep` are patterns (shell style) of node names that stay float; `float_nodes` are exact names
    with the reason, as verify-and-repair and an edited plan file give them. `ranges` pins the real
    range of tensors by name. `node_bits` gives nodes a precision of their own, by name or pattern;
    an exact name comes before patterns, an earlier pattern before a later one. `low_bit_edges` lets
    stem and head go below 8 bits (see `qpass.bits`). `block_size` and `asymmetric_weights` concern
    weights behind float activations: how many rows share a scale (None: 32 below 8 bits, all rows
    at 8), and whether a block has a zero point of its own. `tied` are embeddings that read the
    weight of a head in the model as it came, with the name of the head: rewrites may turn each of
    the two its own way.
    """

    precision: Precision
    activations: Activations = "static"
    keep: tuple[str, ...] = ()
    float_nodes: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    node_bits: Mapping[str, Precision] = field(default_factory=dict)
    low_bit_edges: bool = False
    block_size: int | None = None
    asymmetric_weights: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise RecipeError where a node wants integer activations and the run has none."""
        if self.precision.activation is not None:
            return
        for name, precision in self.node_bits.items():
            if precision.activation is not None:
                raise RecipeError(
                    f"{name} is to have {precision}, and --precision {self.precision} leaves all "
                    "activations in float",
                    fix=f"write w{precision.weight} there, or choose a precision with activations "
                    f"(w8a8) and give it to the others by --bits '*={self.precision}'",
                )

    @property
    def settings(self) -> dict[str, Any]:
        """The options besides the precision that shape a plan as a whole, by name."""
        return {
            "activations": self.activations,
            "block_size": self.block_size,
            "asymmetric_weights": self.asymmetric_weights,
        }

    def with_wide_weights(self) -> Policy:
        """Return the same with wide weights where activations are integers: 8 bits.

        7 bits beside dynamic activations: with 8 more ops would find their ranges at run time.
        """
        bits = 8 if self.activations == "static" else 7

        def wide(one: Precision) -> Precision:
            return one if one.activation is None else replace(one, weight=max(one.weight, bits))

        node_bits = {name: wide(one) for name, one in self.node_bits.items()}
        return replace(self, precision=wide(self.precision), node_bits=node_bits)

    def own_bits(self, name: str) -> tuple[Precision, str] | None:
        """Return the precision that `node_bits` gives node `name`, with the reason, or None."""
        if name in self.node_bits:
            return self.node_bits[name], chosen(self.node_bits[name])
        for pattern, precision in self.node_bits.items():
            if fnmatchcase(name, pattern):
                return precision, f"{chosen(precision)}: {pattern}"
        return None

    def reason_to_keep(self, name: str) -> str | None:
        """Return why node `name` has to stay float, or None."""
        if name in self.float_nodes:
            return self.float_nodes[name]
        for pattern in self.keep:
            if name == pattern or fnmatchcase(name, pattern):
                return f"user: --keep {pattern}"
        return None
