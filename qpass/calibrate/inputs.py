"""The inputs of a model, and how the arrays that users have become samples of them.

A *sample* is one feed dict that the model takes as it is. An input has a **batch axis** when its
axis 0 is free or 1; there a sample has length 1. Other inputs (scalars, a state [2, B, 128], a
model exported with batch 8) take a sample whole.

Rows (`rows_of`): arrays hold many samples. Of an input with rank r, an array of
    rank r + 1          has one sample per entry of an extra axis 0;
    rank r              of a batch axis: one sample per entry of axis 0;
                        of a fixed axis 0 of length f: the same for all samples when it has f
                        entries, otherwise one sample per f entries;
                        of a scalar: the same for all samples.
All arrays that are not the same for all samples hold equally many.

Feeds (`samples_of`): a file, or what a loader yields, is a batch or one sample. An array without
the batch axis gets it. With an extra axis anywhere these are rows. Otherwise they are rows if all
inputs but scalars have a batch axis and equally many entries in it, and else one sample as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qpass.errors import ModelError, SampleError

Array = NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """Name, dtype and shape of a model input; None stands for a free dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    @property
    def has_batch_axis(self) -> bool:
        """True when a sample has length 1 along axis 0."""
        return bool(self.shape) and self.shape[0] in (None, 1)

    def describe(self) -> str:
        """Text such as ``float32 [?, 3, 224, 224]``."""
        return f"{self.dtype} [{', '.join('?' if d is None else str(d) for d in self.shape)}]"


def input_specs(model: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """Return the inputs that a caller must feed: graph inputs that are no initializers.

    Raises:
        ModelError: an input is no tensor of numbers, or its rank is unknown.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {tensor.values.name for tensor in graph.sparse_initializer}
    return tuple(_input_spec(value) for value in graph.input if value.name not in constants)


def _input_spec(value: onnx.ValueInfoProto) -> InputSpec:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or tensor.elem_type in (0, onnx.TensorProto.STRING):
        raise ModelError(
            f"input {value.name} is not a tensor of numbers of known rank",
            fix="export the model with typed tensor inputs",
        )
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        for dim in tensor.shape.dim
    )
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return InputSpec(name=value.name, dtype=dtype, shape=shape)


@dataclass(frozen=True, slots=True)
class Rows:
    """How an array is cut: each sample is the next `step` entries of axis 0, of shape `shape`.

    `step` 0: the array is the same for all samples.
    """

    step: int
    shape: tuple[int, ...]

    def take(self, array: Array, index: int) -> Array:
        """Return the part of sample `index`."""
        start = index * self.step
        part = array[start : start + self.step] if self.step else array
        return part.reshape(self.shape)


def rows_of(
    shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[InputSpec], where: str
) -> tuple[int, dict[str, Rows]]:
    """Return the number of samples and how each array is cut into them (see the module).

    Raises:
        SampleError: missing or unknown names, wrong rank, unequal numbers of samples.
    """
    require_names(shapes, inputs, where)
    cuts: dict[str, Rows] = {}
    counts: dict[str, int] = {}
    for spec in inputs:
        shape, rank = shapes[spec.name], len(spec.shape)
        if len(shape) == rank + 1:
            cuts[spec.name], counts[spec.name] = Rows(1, shape[1:]), shape[0]
        elif len(shape) != rank:
            raise SampleError(
                f"input {spec.name} has shape {list(shape)}, expected axis 0 = samples of "
                f"{spec.describe()}",
                where=where,
                fix="stack the samples along a first axis",
            )
        elif spec.has_batch_axis:
            cuts[spec.name], counts[spec.name] = Rows(1, (1, *shape[1:])), shape[0]
        else:
            fixed = spec.shape[0] if spec.shape else None
            if fixed is None or shape[0] == fixed:
                cuts[spec.name] = Rows(0, shape)
            elif shape[0] % fixed == 0:
                cuts[spec.name] = Rows(fixed, (fixed, *shape[1:]))
                counts[spec.name] = shape[0] // fixed
            else:
                raise SampleError(
                    f"input {spec.name} has {shape[0]} entries along axis 0, expected a multiple "
                    f"of {fixed}: {spec.describe()}",
                    where=where,
                    fix=f"leave the last {shape[0] % fixed} out, or export the model with a free "
                    "batch axis",
                )
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise SampleError(f"the inputs have different numbers of samples: {found}", where=where)
    return next(iter(counts.values()), 1), cuts


def feeds_of(
    shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[InputSpec], where: str
) -> tuple[int, dict[str, Rows]]:
    """Return the number of samples in a file or batch, and how it is cut (see the module).

    Raises:
        SampleError: missing or unknown names, wrong rank, unequal numbers of samples.
    """
    require_names(shapes, inputs, where)
    whole = {
        spec.name: (1, *shapes[spec.name])
        if spec.has_batch_axis and len(shapes[spec.name]) == len(spec.shape) - 1
        else shapes[spec.name]
        for spec in inputs
    }
    extra = any(len(whole[spec.name]) == len(spec.shape) + 1 for spec in inputs)
    batched = all(spec.has_batch_axis for spec in inputs if spec.shape)
    lengths = {whole[spec.name][:1] for spec in inputs if spec.shape}
    if extra or (batched and len(lengths) == 1 and whole == dict(shapes)):
        return rows_of(shapes, inputs, where)
    return 1, {name: Rows(0, shape) for name, shape in whole.items()}


def samples_of(arrays: Mapping[str, Array], inputs: Sequence[InputSpec], where: str) -> list[Feeds]:
    """Cut what a loader gave into samples, as `feeds_of` says."""
    shapes = {name: array.shape for name, array in arrays.items()}
    count, cuts = feeds_of(shapes, inputs, where)
    return [{name: cut.take(arrays[name], i) for name, cut in cuts.items()} for i in range(count)]


def require_names(arrays: Mapping[str, Any], inputs: Sequence[InputSpec], where: str) -> None:
    """Raise SampleError unless `arrays` has the inputs and nothing else."""
    wanted = [spec.name for spec in inputs]
    missing = [name for name in wanted if name not in arrays]
    unknown = [name for name in arrays if name not in wanted]
    if missing or unknown:
        text = f"input {missing[0]} is missing" if missing else f"there is no input {unknown[0]}"
        found = ", ".join(arrays) or "nothing"
        raise SampleError(
            f"{text}; expected {', '.join(wanted)}, found {found}",
            where=where,
            fix="name the arrays after the inputs of the model",
        )


def conform(feeds: Mapping[str, Array], inputs: Sequence[InputSpec], where: str) -> Feeds:
    """Return the sample as the model takes it, or say what is wrong with it.

    Floats are cast among floats; integers among integers when they fit. Nothing else is cast.

    Raises:
        SampleError: names, kind of dtype, rank, a fixed dimension, NaN or infinity.
    """
    require_names(feeds, inputs, where)
    return {spec.name: _conform(feeds[spec.name], spec, where) for spec in inputs}


def _conform(array: Array, spec: InputSpec, where: str) -> Array:
    fits = len(array.shape) == len(spec.shape) and all(
        wanted in (None, found) for wanted, found in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise SampleError(
            f"input {spec.name} has shape {list(array.shape)}, expected {spec.describe()}",
            where=where,
        )
    cast = array
    if array.dtype != spec.dtype:
        kinds = _kind(array.dtype), _kind(spec.dtype)
        if kinds[0] != kinds[1] or kinds[0] == "other":
            raise SampleError(
                f"input {spec.name} is {array.dtype}, expected {spec.describe()}",
                where=where,
                fix=f"convert it on purpose: array.astype({str(spec.dtype)!r})",
            )
        with np.errstate(over="ignore"):
            cast = array.astype(spec.dtype)
        if kinds[0] == "integer" and not np.array_equal(cast, array):
            raise SampleError(
                f"input {spec.name} has integers that {spec.dtype} cannot hold", where=where
            )
    if _kind(spec.dtype) == "float" and not np.isfinite(cast).all():
        bad = np.argwhere(~np.isfinite(cast))[0].tolist()
        raise SampleError(
            f"input {spec.name} has NaN or infinity (or overflows {spec.dtype}), first at {bad}",
            where=where,
            fix="leave the sample out, or repair the preprocessing",
        )
    return np.ascontiguousarray(cast) if cast.ndim else cast


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iu":
        return "integer"
    # ml_dtypes' bfloat16 says "V".
    return {"f": "float", "V": "float", "b": "bool"}.get(dtype.kind, "other")
