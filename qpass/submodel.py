"""Run a piece of a graph: the backward slice from some tensors to others, without a graph copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qpass.arena import USE_ARENA, share_arena
from qpass.errors import InternalError
from qpass.graph import Constant, Graph, Node, array_of
from qpass.protos import has_narrow_activations
from qpass.saturation import saturates

Array = NDArray[Any]
Feeds = Mapping[str, Array]

_ERRORS_ONLY: Final = 3  # onnxruntime's log level
# Where integer products saturate, Q, DQ and the ops between them run one by one, in float, which is
# what the file says. The exact integer kernels of `qpass.saturation` will not do: version 1.31
# fails to make them where weights have no zero points or share them. It also keeps float weights
# behind a DQ as they are: the engine rounds them to 8 bits at load where a Q follows
# (WeightBiasQuantization, microsoft/onnxruntime pull request 22969).
_QDQ_IN_FLOAT: Final = ("session.disable_quant_qdq", "1")
_FLOAT_ACTIVATIONS: Final = ("session.qdq_matmulnbits_accuracy_level", "1")
# With static shapes it turns an integer MatMul in front of a float Add into a float Gemm, and
# where the activations are signed version 1.31 then refuses the Q in front ("output_dtype INT8
# does not match y_zero_point type UINT8"). Results rewrite such biases, see `lower`.
# The other one fuses Clip with the Q behind it and takes a zero point of 4 bits for an error.
SKIPPED_OPTIMIZERS: Final = ["MatMulAddFusion", "ClipQuantRewrite"]


def slice_nodes(
    graph: Graph, available: Mapping[str, Any], outputs: Sequence[str]
) -> tuple[list[Node], list[str]]:
    """Return the nodes that make `outputs` from `available`, in order, and the inputs they use.

    Raises:
        InternalError: an output needs a tensor that is neither available nor made by a node.
    """
    tensors = graph.tensors()
    wanted: dict[int, Node] = {}
    used: dict[str, None] = {}
    waiting = []
    for name in outputs:
        if name not in tensors:
            raise InternalError(f"the graph has no tensor {name}")
        waiting.append(tensors[name])
    while waiting:
        tensor = waiting.pop()
        if isinstance(tensor, Constant) or not tensor.name:
            continue
        if tensor.name in available:
            used[tensor.name] = None
            continue
        node = graph.producer(tensor)
        if node is None:
            raise InternalError(f"nothing makes {tensor.name} at this place of the walk")
        if id(node) not in wanted:
            wanted[id(node)] = node
            waiting.extend((*node.inputs, *node.captured))
    return [node for node in graph.nodes if id(node) in wanted], list(used)


def cut(
    graph: Graph, available: Feeds, outputs: Sequence[str], *, static: bool = False
) -> onnx.ModelProto:
    """Return the slice of a graph from available tensors to `outputs` as a model of its own.

    Args:
        graph: where the slice is taken from.
        available: tensors that can be fed, with an array of the dtype and rank they have.
        outputs: names of the tensors to compute.
        static: give the inputs the shapes of the arrays; otherwise only their rank is said.

    Raises:
        InternalError: an output needs a tensor that is neither available nor made by a node.
    """
    nodes, inputs = slice_nodes(graph, available, outputs)
    tensors = graph.tensors()
    read = [tensor for node in nodes for tensor in (*node.inputs, *node.captured)]
    read += [tensors[name] for name in outputs]  # a constant may be an output
    constants = {tensor.name: tensor for tensor in read if isinstance(tensor, Constant)}
    piece = helper.make_graph(
        [graph.proto_of(node) for node in nodes],
        "piece",
        [_input_info(name, available[name], static=static) for name in inputs],
        # Engines infer what outputs are; a wrong guess here would be an error there.
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array_of(c), name) for name, c in constants.items()],
    )
    return helper.make_model(
        piece, opset_imports=graph.header.opset_import, ir_version=graph.header.ir_version
    )


class Submodel:
    """A session for the slice of a graph from available tensors to `outputs`.

    The constants are those of the graph at this moment: after an edit, make a new one.
    """

    def __init__(
        self,
        graph: Graph,
        available: Feeds,
        outputs: Sequence[str],
        *,
        optimize: bool = True,
        threads: int | None = None,
        qdq_in_float: bool = False,
    ) -> None:
        """Build the session.

        Args:
            graph: where the slice is taken from.
            available: tensors that can be fed, with an array of the dtype and rank they have.
            outputs: names of the tensors to compute.
            optimize: let the engine fuse; False runs node by node as the graph says.
            threads: threads of the session, None for the engine's choice.
            qdq_in_float: run Q and DQ one by one, and what is between them in float: for a graph
                with activation quantizers and float weights.
        """
        model = cut(graph, available, outputs)
        self.outputs = tuple(outputs)
        self.inputs = tuple(value.name for value in model.graph.input)
        self.ops = tuple(node.op_type for node in model.graph.node)
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # Runs are short and many: threads that wait in a loop take the time of those that work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        share_arena()
        options.add_session_config_entry(*USE_ARENA)
        # Where weights alone are integers, the engine's default rounds the activations to 8 bits
        # for the product on a CPU with VNNI: corrections would chase that noise.
        options.add_session_config_entry(*_FLOAT_ACTIVATIONS)
        if qdq_in_float or saturates() or has_narrow_activations(model):
            options.add_session_config_entry(*_QDQ_IN_FLOAT)
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=SKIPPED_OPTIMIZERS,
        )

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Compute the outputs for one batch; `feeds` may hold more than the inputs."""
        arrays = self._session.run(list(self.outputs), {name: feeds[name] for name in self.inputs})
        return dict(zip(self.outputs, arrays, strict=True))


def _input_info(name: str, array: Array, *, static: bool) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype)
    shape = np.shape(array) if static else [None] * np.ndim(array)
    return helper.make_tensor_value_info(name, dtype, shape)
