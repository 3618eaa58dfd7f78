"""Write a patch embedding as a product of matrices, where the engine wants integers behind a Conv.

What it does
    A Conv whose windows tile its input, and whose output is transposed into tokens (flattened or
    not), becomes Reshape, Transpose, Reshape, MatMul, Add.
Why it is correct
    Windows that do not overlap meet every value once: row p of the product is the dot product of
    patch p with each filter, in the order that Reshape and Transpose bring it to. Sums of the same
    terms; float32 may add them in another order.
What it is good for
    onnxruntime fuses an integer Conv only with a Q behind it, while an integer MatMul gives floats.
    The embedding is the widest tensor of a vision transformer: on vit_tiny, with everything else in
    8 bits, rounding it made 11 % of the error at the outputs.
Preconditions
    The graph is normalized: the Conv has a bias. Heights and widths are known; the number of
    samples may be open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qpass.graph import Constant, Graph, Node, Tensor, array_of
from qpass.passes.normalize.folding import FoldResult, sole_reader
from qpass.report.model import PassReport

NAME: Final = "patch-matmul"
RULE: Final = "patches as a product"
KEPT: Final = 0  # in the target of a Reshape: the size that is there


@dataclass(frozen=True, slots=True, kw_only=True)
class _Embedding:
    """A Conv over tiles, and what makes tokens of its output.

    tiles
        How many and how large along each axis of the image.
    rows
        The axes between samples and channels of the tokens.
    movers
        The nodes behind the Conv that make them, in order.
    """

    conv: Node
    tiles: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    movers: tuple[Node, ...]


def patches_to_matmul(graph: Graph) -> PassReport:
    """Rewrite every patch embedding; the MatMul has the name of the Conv."""
    result = FoldResult()
    for conv in list(graph.nodes):
        found = _find(graph, conv)
        if isinstance(found, str):
            result.refuse(RULE, conv, found)
        elif found is not None:
            _rewrite(graph, found)
            result.changed += 1
    graph.remove_unused()
    return PassReport(name=NAME, changed=result.changed, refusals=tuple(result.refusals))


def _find(graph: Graph, conv: Node) -> _Embedding | str | None:
    """Return the embedding that `conv` is, why it cannot be rewritten, or None: it is none."""
    if conv.op != "Conv" or not isinstance(conv.inputs[1], Constant):
        return None
    kernel = tuple(int(size) for size in conv.inputs[1].shape[2:])
    strides = tuple(int(stride) for stride in conv.attrs.get("strides", [1] * len(kernel)))
    if strides != kernel or max(kernel) == 1:
        return None
    movers = _movers_behind(graph, conv)
    if not movers:
        return None
    if len(conv.inputs) < 3 or not isinstance(conv.inputs[2], Constant):
        return "its bias is computed at run time"
    if int(conv.attrs.get("group", 1)) != 1:
        return "it has groups"
    padded = any(conv.attrs.get("pads", ())) or conv.attrs.get("auto_pad", "NOTSET") != "NOTSET"
    if padded or any(int(d) != 1 for d in conv.attrs.get("dilations", ())):
        return "its windows are padded or dilated"
    shape = conv.inputs[0].shape
    if shape is None or not all(isinstance(size, int) for size in shape[1:]):
        return "height and width are open"
    if any(size % step for size, step in zip(shape[2:], kernel, strict=True)):
        return "its windows leave an edge of the input out"
    tiles = tuple((size // step, step) for size, step in zip(shape[2:], kernel, strict=True))
    rows = tuple(count for count, _ in tiles)
    if len(movers) > 1:
        rows = (int(np.prod(rows)),)
        flat = movers[0].outputs[0].shape
        if flat is None or len(flat) != 3 or list(flat[1:]) != [conv.inputs[1].shape[0], *rows]:
            return "its output is not flattened into one row for each channel"
    return _Embedding(conv=conv, tiles=tiles, rows=rows, movers=movers)


def _movers_behind(graph: Graph, conv: Node) -> tuple[Node, ...]:
    """Return the nodes that put the channels of a Conv last, none if there are none."""
    out, movers = conv.outputs[0], []
    reader = sole_reader(graph, out)
    if reader is not None and reader.op == "Reshape" and reader.inputs[0] is out:
        movers.append(reader)
        reader = sole_reader(graph, reader.outputs[0])
    if reader is None or reader.op != "Transpose":
        return ()
    axes = 1 if movers else len(conv.inputs[1].shape) - 2
    if list(reader.attrs.get("perm", ())) != [0, *range(2, 2 + axes), 1]:
        return ()
    return (*movers, reader)


def _rewrite(graph: Graph, found: _Embedding) -> None:
    conv, name = found.conv, found.conv.name
    image, (weight, bias) = conv.inputs[0], (array_of(tensor) for tensor in conv.inputs[1:3])
    channels, samples = image.shape[1], image.shape[0]
    counts, sizes = zip(*found.tiles, strict=True)
    axes = range(2, 2 + 2 * len(counts))  # of the image split into tiles: count, size, count, ...
    order = [0, *axes[::2], 1, *axes[1::2]]
    split = [KEPT, channels, *(size for tile in found.tiles for size in tile)]
    inputs, tokens = int(weight[0].size), found.movers[-1].outputs[0]

    def tensor(what: str, shape: list[object]) -> Tensor:
        return graph.variable(f"{name}_{what}", image.dtype, shape)

    def sizes_of(what: str, target: list[int]) -> Constant:
        return graph.constant(f"{name}_{what}_shape", np.array(target, np.int64))

    tiled = tensor("tiles", [samples, *split[1:]])
    moved = tensor("tiles_first", [samples, *counts, channels, *sizes])
    patches = tensor("patches", [samples, *found.rows, inputs])
    product = tensor("product", [samples, *found.rows, len(weight)])
    matrix = graph.constant(
        f"{conv.inputs[1].name}_matrix", np.ascontiguousarray(weight.reshape(len(weight), -1).T)
    )
    added = graph.constant(conv.inputs[2].name, bias)
    made = [
        graph.make("Reshape", [image, sizes_of("tiles", split)], [tiled], name=f"{name}_to_tiles"),
        graph.make("Transpose", [tiled], [moved], name=f"{name}_order", attrs={"perm": order}),
        graph.make(
            "Reshape",
            [moved, sizes_of("patches", [KEPT, *found.rows, inputs])],
            [patches],
            name=f"{name}_to_patches",
        ),
    ]
    for node in made:
        graph.add(node, before=conv)
    for node in reversed(found.movers):
        graph.remove(node)
    multiply = graph.make("MatMul", [patches, matrix], [product], name=f"{name}_product")
    add = graph.make("Add", [product, added], [tokens], name=f"{name}_bias")
    graph.add(multiply, before=conv)
    graph.add(add, before=conv)
    graph.remove(conv)
    multiply.name = name
