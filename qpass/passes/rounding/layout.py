"""Every linear op as a matrix product: weights as [groups, inputs, outputs], activations as rows.

``y[n, g, o] = sum_i x[n, g, i] * w[g, i, o]`` holds for MatMul and Gemm (one group), and for Conv
with the patches under its kernel as rows: ``i`` counts channel, then kernel position, in the order
of the weight. A depthwise convolution has a group for each channel and so one small problem each.

Patches are views of the padded input until rows are picked, so that a convolution never exists
unfolded as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qpass.graph import Node

Array = NDArray[Any]
CHUNK_BYTES: Final = 1 << 26  # rows are unfolded to float64 in pieces of this size


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The matrix form of one linear op with constant weights.

    `groups`, `inputs` and `outputs` are the sizes of the weight matrix (the last two per group),
    `shape` is that of the weight as the graph has it.
    """

    op: str
    shape: tuple[int, ...]
    groups: int
    inputs: int
    outputs: int
    transposed: bool = False  # Gemm with transB
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"

    # ------------------------------------------------------------------ weights

    def matrix(self, weight: Array) -> Array:
        """Return an array of the weight's shape as [groups, inputs, outputs]."""
        if self.op == "Conv":
            rows = weight.reshape(self.groups, self.outputs, self.inputs)
            return np.ascontiguousarray(rows.transpose(0, 2, 1))
        return np.ascontiguousarray(weight.T if self.transposed else weight)[None]

    def restore(self, matrix: Array) -> Array:
        """Undo `matrix`."""
        if self.op == "Conv":
            return np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(self.shape)
        return np.ascontiguousarray(matrix[0].T if self.transposed else matrix[0])

    # ------------------------------------------------------------------ activations

    def positions(self, outputs: Array) -> int:
        """Return how many rows one output array has."""
        return outputs.size // (self.groups * self.outputs)

    def input_positions(self, inputs: Array) -> int:
        """Return how many rows the output of one input array has."""
        if self.op != "Conv":
            return int(inputs.size // inputs.shape[-1])
        windows = self.windows(inputs)
        return int(windows.shape[0] * np.prod(windows.shape[2 : 2 + len(self.strides)]))

    def output_rows(self, outputs: Array, picked: Array) -> Array:
        """Return the `picked` rows of an output array, float64 [groups, rows, outputs]."""
        if self.op == "Conv":
            flat = outputs.reshape(outputs.shape[0], outputs.shape[1], -1)
            sample, place = np.divmod(picked, flat.shape[2])
            rows = flat[sample, :, place]
        else:
            rows = outputs.reshape(-1, outputs.shape[-1])[picked]
        return self._grouped(rows, self.outputs)

    def input_rows(self, inputs: Array, picked: Array) -> Array:
        """Return what the `picked` rows of the output are made from, [groups, rows, inputs]."""
        if self.op != "Conv":
            return self._grouped(inputs.reshape(-1, inputs.shape[-1])[picked], self.inputs)
        windows = self.windows(inputs)
        spatial = windows.shape[2 : 2 + len(self.strides)]
        sample, *place = np.unravel_index(picked, (windows.shape[0], *spatial))
        # Advanced indices on both sides of a slice come first: [rows, channels, *kernel].
        index: tuple[Any, ...] = (sample, slice(None), *place)
        rows = windows[index]
        return self._grouped(rows.reshape(len(picked), -1), self.inputs)

    def along_channels(self, values: Array) -> Array:
        """Give one number for each output channel the shape that broadcasts over the output."""
        if self.op != "Conv" or values.size <= 1:
            return values
        return values.reshape(-1, *(1,) * len(self.strides))

    @property
    def chunk_rows(self) -> int:
        """How many rows `CHUNK_BYTES` hold as float64."""
        return max(1, CHUNK_BYTES // (8 * self.groups * max(self.inputs, self.outputs)))

    def windows(self, inputs: Array) -> Array:
        """Return the patches of a convolution as a view, [N, C, *output, *kernel]."""
        rank = len(self.strides)
        kernel = self.shape[2:]
        reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True))
        pads = self._pads(inputs.shape[2:], reach)
        padded = np.pad(inputs, ((0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)))
        views = np.lib.stride_tricks.sliding_window_view(
            padded, reach, axis=tuple(range(2, 2 + rank))
        )
        steps = (*self.strides, *self.dilations)
        picked: Array = views[(slice(None), slice(None), *(slice(None, None, s) for s in steps))]
        return picked

    def scatter(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """Add up all rows [groups, rows, inputs] where `input_rows` took them from.

        The adjoint of `input_rows` with all rows picked; `shape` is that of the input.
        """
        flat = np.ascontiguousarray(rows.transpose(1, 0, 2))
        if self.op != "Conv":
            return flat.reshape(shape)
        rank, kernel = len(self.strides), self.shape[2:]
        reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True))
        pads = self._pads(shape[2:], reach)
        sizes = [n + a + b for n, a, b in zip(shape[2:], pads[:rank], pads[rank:], strict=True)]
        places = [
            (size - span) // step + 1
            for size, span, step in zip(sizes, reach, self.strides, strict=True)
        ]
        parts = flat.reshape(shape[0], *places, shape[1], *kernel)
        parts = np.moveaxis(parts, 1 + rank, 1)  # [N, C, *output, *kernel]
        padded = np.zeros((*shape[:2], *sizes))
        for offset in np.ndindex(*kernel):
            window = tuple(
                slice(o * d, o * d + (n - 1) * step + 1, step)
                for o, d, n, step in zip(offset, self.dilations, places, self.strides, strict=True)
            )
            padded[(slice(None), slice(None), *window)] += parts[(..., *offset)]
        inner = tuple(slice(a, a + n) for a, n in zip(pads[:rank], shape[2:], strict=True))
        return padded[(slice(None), slice(None), *inner)]

    def channel_columns(self) -> Array:
        """Return, for each input channel, its group and the first of its inputs: [channels, 2]."""
        width = self.columns_per_channel
        group, place = np.divmod(
            np.arange(self.groups * self.inputs // width), self.inputs // width
        )
        return np.stack([group, place * width], axis=1)

    @property
    def columns_per_channel(self) -> int:
        """How many inputs of the matrix one channel has: the size of the kernel."""
        return int(np.prod(self.shape[2:], dtype=np.int64)) if self.op == "Conv" else 1

    def _pads(self, spatial: tuple[int, ...], reach: tuple[int, ...]) -> tuple[int, ...]:
        if self.auto_pad in ("NOTSET", ""):
            return self.pads
        if self.auto_pad == "VALID":
            return (0,) * (2 * len(spatial))
        needed = [
            max(0, (-(-size // step) - 1) * step + span - size)
            for size, step, span in zip(spatial, self.strides, reach, strict=True)
        ]
        small, large = [n // 2 for n in needed], [n - n // 2 for n in needed]
        return (*small, *large) if self.auto_pad == "SAME_UPPER" else (*large, *small)

    def _grouped(self, rows: Array, width: int) -> Array:
        split = rows.reshape(len(rows), self.groups, width)
        return np.ascontiguousarray(split.transpose(1, 0, 2), dtype=np.float64)


def layout_of(node: Node) -> Layout | str:
    """Return the layout of a linear op of the float graph, or why it has none."""
    shape = tuple(int(size) for size in node.inputs[1].shape)
    if node.op == "Conv":
        rank = len(shape) - 2
        groups = int(node.attrs.get("group", 1))
        return Layout(
            op="Conv",
            shape=shape,
            groups=groups,
            inputs=int(np.prod(shape[1:])),
            outputs=shape[0] // groups,
            strides=tuple(node.attrs.get("strides", (1,) * rank)),
            dilations=tuple(node.attrs.get("dilations", (1,) * rank)),
            pads=tuple(node.attrs.get("pads", (0,) * (2 * rank))),
            auto_pad=str(node.attrs.get("auto_pad", "NOTSET")),
        )
    if node.op not in ("Gemm", "MatMul"):
        return f"no rows of inputs are made for {node.op}: rounded to nearest"
    if len(shape) != 2:
        return f"its weight has {len(shape)} dimensions: rounded to nearest"
    if node.op == "Gemm" and (node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0):
        return "Gemm with transA or alpha: rounded to nearest"
    transposed = node.op == "Gemm" and bool(node.attrs.get("transB", 0))
    inputs, outputs = reversed(shape) if transposed else shape
    return Layout(
        op=node.op, shape=shape, groups=1, inputs=inputs, outputs=outputs, transposed=transposed
    )
