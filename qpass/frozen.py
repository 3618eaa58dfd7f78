"""Activation scales from outside: read them, and turn them into ranges that a plan pins.

A network that was trained with quantized activations (LSQ, or the first stage of GPLQ, Liang et
al., 2025) brings its own scales; weights are quantized afterwards with these kept. The file says,
for tensors by name::

    {"/relu_1": 0.031,                                    symmetric: integers around zero
     "/softmax": {"scale": 0.0039, "zero_point": 0},      zero point in the integers of the plan
     "/norm_3": {"scale": [0.02, 0.05], "zero_point": 0, "type": "int4"}}

``type`` is the ONNX type that the zero point counts in; integers of the other sign are shifted by
half of their range, which changes no value. In an npz file the scale of NAME is the entry ``NAME``
and its zero point the entry ``NAME.zero_point``. A scale may be a vector, one for each channel.

Rounding and compensation then aim at the network with these quantizers and float weights (see
`weights_float`).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.dtypes import STORAGE_TYPES, StorageType
from qpass.errors import RecipeError
from qpass.plan import Decision, Plan
from qpass.qparams import MIN_SCALE, TensorSpec

Array = NDArray[Any]

ZERO_POINT: Final = ".zero_point"
KEYS: Final = frozenset({"scale", "zero_point", "type"})
TYPES: Final = {storage.name: storage for storage in STORAGE_TYPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenScale:
    """Scale float64, a scalar or [channels]; `zero_point` None: integers around zero."""

    scale: Array
    zero_point: int | None = None
    storage: StorageType | None = None


def read_scales(path: Path) -> dict[str, FrozenScale]:
    """Read a file of scales (.json or .npz).

    Raises:
        RecipeError: the file cannot be read, or an entry is no scale.
    """
    try:
        entries = _npz_entries(path) if path.suffix == ".npz" else json.loads(path.read_text())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RecipeError(f"cannot read the scales: {error}", where=str(path)) from error
    if not isinstance(entries, dict) or not entries:
        raise RecipeError("a file of scales maps names of tensors to scales", where=str(path))
    found = {}
    for name, entry in entries.items():
        try:
            found[name] = _frozen(entry)
        except (TypeError, ValueError, KeyError) as error:
            raise RecipeError(
                f"the entry of {name} is no scale: {error}",
                where=str(path),
                fix='write a positive number, or {"scale": s, "zero_point": z, "type": "uint8"}',
            ) from error
    return found


def _npz_entries(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        file = np.load(stream, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds one array without a name")
        arrays = {name: file[name] for name in file.files}
    entries: dict[str, Any] = {}
    for name, array in arrays.items():
        owner = name.removesuffix(ZERO_POINT)
        if owner == name or owner not in arrays:
            entries.setdefault(name, {})["scale"] = array
        else:
            entries.setdefault(owner, {})["zero_point"] = array
    return entries


def _frozen(entry: Any) -> FrozenScale:
    if not isinstance(entry, dict):
        entry = {"scale": entry}
    unknown = sorted(set(entry) - KEYS)
    if unknown:
        raise ValueError(f"{unknown[0]} is not one of {', '.join(sorted(KEYS))}")
    _check_numbers(entry["scale"])
    scale = np.asarray(entry["scale"], np.float64)
    if scale.ndim > 1:
        scale = scale.squeeze()
    if scale.ndim > 1 or not scale.size or not (scale > 0).all():
        raise ValueError("scales are positive numbers, one or one for each channel")
    if not ((scale >= MIN_SCALE) & (scale <= np.finfo(np.float32).max)).all():
        raise ValueError(f"scales are float32 numbers from {MIN_SCALE:g} on")
    if scale.size == 1:
        scale = scale.reshape(())
    zero_points = entry.get("zero_point")
    zero_point = None
    if zero_points is not None:
        _check_numbers(zero_points)
        distinct = np.unique(np.asarray(zero_points, np.float64))
        whole = np.isfinite(distinct) & (distinct == np.rint(distinct))
        if distinct.size != 1 or not whole.all():
            raise ValueError("zero points are one integer for all channels")
        zero_point = int(distinct[0])
    kind = entry.get("type")
    return FrozenScale(
        scale=scale, zero_point=zero_point, storage=None if kind is None else TYPES[kind]
    )


def _check_numbers(values: Any) -> None:
    """Raise ValueError for text and for true and false, which NumPy would make numbers of."""
    for value in np.asarray(values, object).ravel():
        if isinstance(value, bool | np.bool_ | str):
            raise ValueError(f"{value!r} is no number")


def check_names(names: Iterable[str], plan: Plan) -> None:
    """Raise RecipeError for the first tensor that the plan does not quantize."""
    known = {decision.tensor for decision in plan.activations()}
    for name in names:
        if name not in known:
            near = get_close_matches(name, sorted(known), 3, cutoff=0.4)
            raise RecipeError(
                f"there is a scale for {name}, which is no activation that this plan quantizes",
                fix=f"did you mean {', '.join(near)}?" if near else "`qpass plan` lists them",
            )


def solve_ranges(frozen: Mapping[str, FrozenScale], plan: Plan) -> dict[str, tuple[float, float]]:
    """Return the real range of each tensor that gives its scale and zero point back exactly.

    A tensor with several decisions (8 bits for a sum, 4 for a product) has the range of its
    narrowest one, or of the one that the entry's type says.

    Raises:
        RecipeError: a type that the plan does not use there, a zero point outside of the integers,
            a scale or zero point that the target's kind of integers cannot have.
    """
    meant = {decision.tensor: decision.spec for decision in meant_decisions(frozen, plan)}
    return {name: _range(name, entry, meant[name]) for name, entry in frozen.items()}


def meant_decisions(frozen: Mapping[str, FrozenScale], plan: Plan) -> tuple[Decision, ...]:
    """Return the quantizers that the scales were made for, in the order of the plan.

    Of a tensor with several they are the narrowest ones, or those of the entry's type.

    Raises:
        RecipeError: a type that the plan does not use there.
    """
    bits: dict[str, list[int]] = {}
    for decision in plan.activations():
        bits.setdefault(decision.tensor, []).append(decision.spec.bits)
    wanted = {name: _bits(name, entry, bits[name]) for name, entry in frozen.items()}
    return tuple(d for d in plan.activations() if wanted.get(d.tensor) == d.spec.bits)


def _bits(name: str, entry: FrozenScale, bits: list[int]) -> int:
    wanted = min(bits) if entry.storage is None else entry.storage.bits
    if wanted not in bits:
        raise RecipeError(
            f"the scale of {name} counts {wanted} bits, the plan has {sorted(set(bits))}",
            fix="change --precision, or the bits of the nodes that read it (--bits, or a plan)",
        )
    return wanted


def _range(name: str, entry: FrozenScale, spec: TensorSpec) -> tuple[float, float]:
    if entry.scale.ndim:
        raise ValueError(f"{name} still has a scale for each channel")
    middle = 0 if spec.storage.signed else 1 << (spec.bits - 1)
    zero_point = middle if entry.zero_point is None else entry.zero_point
    if entry.zero_point is not None and entry.storage is not None:
        signed = entry.storage.signed
        zero_point += (int(signed) - int(spec.storage.signed)) << (spec.bits - 1)
    if not spec.qmin <= zero_point <= spec.qmax:
        raise RecipeError(
            f"the zero point of {name} is outside of {spec.describe()}",
            fix='say in which type it counts: "type": "int8" or "uint8"',
        )
    scale = float(np.float32(entry.scale))
    if spec.power_of_two and np.exp2(np.rint(np.log2(scale))) != scale:
        raise RecipeError(f"the scale of {name} is no power of two, which the target wants")
    if not spec.symmetric:
        return (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale
    if zero_point != middle:
        raise RecipeError(f"the target wants {name} symmetric, its zero point is {zero_point}")
    reach = float(spec.qmax if spec.storage.signed else spec.qmax // 2) * scale
    return -reach, reach
