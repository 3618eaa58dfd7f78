"""Large models for `bench.py scale`: made here, written as a stream, never whole in memory.

`write_transformer` writes a pre-LayerNorm transformer whose weights lie in one external file;
`write_chain` a graph of many small nodes. Both are seeded: the same call gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import onnx
from bench_jobs import run_job
from bench_run import Row, file_bytes
from onnx import TensorProto, helper, numpy_helper

ALIGNMENT: Final = 4096  # external tensors start on a page, so that they can be mapped
OPSET: Final = 17
HEAD: Final = 64
WIDE, NARROW = 2048, 512  # width of a large model, and of one for a trial
CHAIN_WIDTH: Final = 16
NODES_PER_LINK: Final = 4
WIDE_FROM_GB: Final = 1.0


class Writer:
    """Collects nodes and small constants; large weights go straight to the external file."""

    def __init__(self, stream: BinaryIO, location: str, seed: int) -> None:
        """Write weights to `stream`, which the model will know as `location`."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._stream = stream
        self._location = location
        self._random = np.random.default_rng(seed)

    def weight(self, name: str, rows: int, columns: int) -> str:
        """Write a (rows, columns) matrix of variance 1 / rows; less than a page stays inside."""
        values = self._random.standard_normal((rows, columns), dtype=np.float32)
        values *= np.float32(rows**-0.5)
        if values.nbytes < ALIGNMENT:
            return self.constant(name, values)
        self._stream.write(b"\0" * (-self._stream.tell() % ALIGNMENT))
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
        tensor.data_location = TensorProto.EXTERNAL
        place = (self._location, self._stream.tell(), values.nbytes)
        for key, value in zip(("location", "offset", "length"), place, strict=True):
            tensor.external_data.add(key=key, value=str(value))
        self._stream.write(values.data)
        self.constants.append(tensor)
        return name

    def constant(self, name: str, values: Any) -> str:
        """Add a small constant, stored in the model file."""
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def op(self, kind: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output, which gets the name of the node."""
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def norm(self, name: str, x: str, width: int) -> str:
        """Add a LayerNormalization with its scale and bias."""
        scale = self.constant(f"{name}.scale", np.ones(width, np.float32))
        bias = self.constant(f"{name}.bias", np.zeros(width, np.float32))
        return self.op("LayerNormalization", name, [x, scale, bias])

    def linear(self, name: str, x: str, rows: int, columns: int) -> str:
        """Add MatMul and Add."""
        product = self.op("MatMul", f"{name}.matmul", [x, self.weight(f"{name}.w", rows, columns)])
        bias = self.constant(f"{name}.b", np.zeros(columns, np.float32))
        return self.op("Add", name, [product, bias])

    def save(self, path: Path, width: int, result: str) -> None:
        """Write the model file: float `x` (batch, tokens, width) to `result`."""
        ports = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", width])
            for name in ("x", result)
        ]
        graph = helper.make_graph(self.nodes, path.stem, ports[:1], ports[1:], self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def write_transformer(path: Path, *, size_gb: float) -> Path:
    """Write a transformer of about `size_gb` GB of float32 weights; return `path`."""
    width = WIDE if size_gb >= WIDE_FROM_GB else NARROW
    blocks = max(1, round(size_gb * 1e9 / (12 * width * width * 4)))
    with path.with_suffix(".data").open("wb") as stream:
        writer = Writer(stream, path.with_suffix(".data").name, seed=0)
        writer.constant("split", np.array([0, 0, width // HEAD, HEAD], np.int64))
        writer.constant("joined", np.array([0, 0, width], np.int64))
        writer.constant("scale", np.float32(HEAD**-0.5))
        x = "x"
        for number in range(blocks):
            x = _block(writer, f"b{number}", x, width)
        writer.save(path, width, writer.norm("y", x, width))
    return path


def _block(writer: Writer, name: str, x: str, width: int) -> str:
    normed = writer.norm(f"{name}.norm1", x, width)
    heads = []
    for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        flat = writer.linear(f"{name}.{part}", normed, width, width)
        split = writer.op("Reshape", f"{name}.{part}.split", [flat, "split"])
        heads.append(writer.op("Transpose", f"{name}.{part}.heads", [split], perm=order))
    scores = writer.op("MatMul", f"{name}.scores", heads[:2])
    scaled = writer.op("Mul", f"{name}.scaled", [scores, "scale"])
    weights = writer.op("Softmax", f"{name}.softmax", [scaled], axis=-1)
    mixed = writer.op("MatMul", f"{name}.mixed", [weights, heads[2]])
    turned = writer.op("Transpose", f"{name}.turned", [mixed], perm=[0, 2, 1, 3])
    joined = writer.op("Reshape", f"{name}.joined", [turned, "joined"])
    attended = writer.linear(f"{name}.proj", joined, width, width)
    x = writer.op("Add", f"{name}.add1", [x, attended])
    normed = writer.norm(f"{name}.norm2", x, width)
    up = writer.linear(f"{name}.up", normed, width, 4 * width)
    hidden = writer.op("Relu", f"{name}.relu", [up])
    down = writer.linear(f"{name}.down", hidden, 4 * width, width)
    return writer.op("Add", f"{name}.add2", [x, down])


def write_chain(path: Path, *, nodes: int) -> Path:
    """Write a chain of MatMul, Add, Relu, LayerNormalization with `nodes` nodes in all."""
    with path.with_suffix(".data").open("wb") as stream:
        writer = Writer(stream, path.with_suffix(".data").name, seed=0)
        x = "x"
        for number in range(max(1, nodes // NODES_PER_LINK)):
            y = writer.linear(f"l{number}", x, CHAIN_WIDTH, CHAIN_WIDTH)
            x = writer.norm(f"n{number}", writer.op("Relu", f"r{number}", [y]), CHAIN_WIDTH)
        writer.save(path, CHAIN_WIDTH, x)
    return path


def scale_rows(folder: Path, *, size_gb: float, nodes: int, timeout: float) -> list[Row]:
    """Make both models in `folder` and put qpass through them, one process for each command."""
    large = write_transformer(folder / "transformer.onnx", size_gb=size_gb)
    small = folder / "transformer.w8.onnx"
    commands = {
        "qpass inspect": ["inspect", str(large), "--json"],
        "qpass optimize --precision w8": [
            "optimize", str(large), "-o", str(small), "--precision", "w8", "--json",
        ],
    }  # fmt: skip
    rows = []
    for label, arguments in commands.items():
        row: Row = {"kind": "scale", "model": large.stem, "contestant": label}
        row["float_bytes"] = file_bytes(large)
        row |= run_job({"job": "command", "arguments": arguments}, folder=folder, timeout=timeout)
        if small.exists():
            row["size_ratio"] = file_bytes(small) / row["float_bytes"]
        rows.append(row)
    chain = write_chain(folder / "chain.onnx", nodes=nodes)
    row = {"kind": "scale", "model": chain.stem, "contestant": "plan and rewrite"}
    row["float_bytes"] = file_bytes(chain)
    row |= run_job({"job": "rewrite", "model": str(chain)}, folder=folder, timeout=timeout)
    rows.append(row)
    for row in rows:
        row["status"] = "failed" if "error" in row else "ok"
    return rows
