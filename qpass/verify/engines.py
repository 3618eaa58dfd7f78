"""The engines a result is run in, behind one signature.

``ort``
    onnxruntime's CPU provider. With `optimize` off every graph transformer is disabled, so that
    Q, DQ and the float ops run one by one: what the file says, not what the optimizer made of it.
``openvino``
    OpenVINO's CPU plugin. ``INFERENCE_PRECISION_HINT=f32`` is set, for on machines with bfloat16
    instructions the plugin otherwise runs the float parts in bfloat16 and cannot be compared.
    Measured on 2026.4.1: a missing input is no error for the plugin (it computes on zeros) and a
    float64 input is cast silently; names are therefore checked here, for all engines alike.
``reference``
    The evaluator of the onnx package: slow, literal, the definition of every op.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Protocol, get_args

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from qpass.errors import QpassError
from qpass.verify.openvino_trial import crash_of

Array = NDArray[Any]
EngineName = Literal["ort", "openvino", "reference"]

_LONGEST_MESSAGE: Final = 600
_LONGEST_CAUSE: Final = 200
_FRAME: Final = re.compile(
    r"Exception from|Check '|FrontEnd API failed|Model wasn't fully converted|-- |While validating"
    r"|Summary:"
)
# The exceptions of onnxruntime share no base below Exception; wrong feeds raise Python's own.
ORT_ERRORS: Final[tuple[type[Exception], ...]] = (
    *(t for t in vars(ort_state).values() if isinstance(t, type) and issubclass(t, Exception)),
    RuntimeError,
    TypeError,
    ValueError,
)
_OPENVINO_ERRORS: Final = (RuntimeError, TypeError, ValueError)
# The evaluator is Python code: a damaged model fails wherever the op's implementation trips.
_REFERENCE_ERRORS: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    onnx.checker.ValidationError,
)


# On x86-64 onnxruntime turns S8 activations into U8. Version 1.31 then refuses a Reshape between
# a Conv and its Q ("output_dtype INT8 does not match y_zero_point type UINT8"); so where it is not
# the speed on this machine that counts, they stay S8.
KEEP_SIGNED: Final[Mapping[str, str]] = {"session.qdqisint8allowed": "1"}


class EngineError(QpassError):
    """An engine refused to load or to run a model; the message is the engine's own, trimmed.

    `cause` is the first line of it that says what the engine stumbled over.
    """

    def __init__(self, engine: str, action: str, reason: object) -> None:
        """Say which `engine` failed at which `action`, and the `reason` it gave."""
        # OpenVINO starts with the source lines that the exception passed through.
        lines = [line.strip() for line in str(reason).splitlines()]
        text = " ".join(line for line in lines if line and not line.startswith("Exception from"))
        if len(text) > _LONGEST_MESSAGE:
            text = text[:_LONGEST_MESSAGE] + " ..."
        self.engine, self.action, self.reason = engine, action, text or type(reason).__name__
        # What it stumbles over stands between the source lines that it went through.
        told = (line for line in lines if line and not _FRAME.match(line))
        self.cause = next(told, self.reason)[:_LONGEST_CAUSE]
        super().__init__(f"{engine} failed to {action}: {self.reason}")


class Engine(Protocol):
    """A loaded model, ready to run."""

    @property
    def name(self) -> str:
        """``ort``, ``openvino`` or ``reference``."""

    @property
    def version(self) -> str:
        """Version of the engine."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph outputs, in their order."""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Return the outputs in the order of `output_names`.

        Raises:
            EngineError: an input is missing or unknown, or the engine failed.
        """


def openvino_module() -> Any | None:
    """Return the openvino package, or None where it is not installed or does not load."""
    try:
        return importlib.import_module("openvino")
    except (ImportError, OSError):
        return None


def available_engines() -> tuple[EngineName, ...]:
    """Return the engines that can be opened here."""
    return ("ort", "reference") if openvino_module() is None else get_args(EngineName)


def open_engine(
    name: EngineName,
    model: Path,
    *,
    optimize: bool = True,
    threads: int = 1,
    session_config: Mapping[str, str] | None = None,
) -> Engine:
    """Load a model file in an engine.

    Args:
        name: one of `available_engines`.
        model: the ONNX file; external data is found beside it.
        optimize: False disables all graph transformers of onnxruntime. The reference evaluator
            never optimizes.
        threads: threads inside one op; 0 leaves the number to the engine.
        session_config: session configuration entries of onnxruntime, or properties of OpenVINO
            (they win over the ones set here).

    Raises:
        ValueError: `optimize` is False for OpenVINO, which cannot run without its transformations,
            or `session_config` is given to the reference evaluator, which has none.
        EngineError: the engine is not installed, or refused the model.
    """
    config = dict(session_config or {})
    if name == "ort":
        return _Ort(model, session_options(optimize=optimize, threads=threads, config=config))
    if name == "openvino":
        if not optimize:
            raise ValueError("OpenVINO has no switch for its transformations")
        return _OpenVino(model, openvino_config(threads=threads, config=config))
    if config:
        raise ValueError("the reference evaluator takes no session_config")
    return _Reference(model)


def session_options(
    *, optimize: bool = True, threads: int = 1, config: Mapping[str, str] | None = None
) -> Any:
    """Return onnxruntime's SessionOptions: sequential, silent below fatal errors."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # its errors come back as exceptions
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return options


def open_session(model: Path, options: Any) -> Any:
    """Return an onnxruntime session on the CPU provider; EngineError when it is refused."""
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise EngineError("ort", f"load {model.name}", error) from error


def openvino_config(*, threads: int = 1, config: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the properties of the CPU plugin that make its runs comparable."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        **(config or {}),
    }


def compile_openvino(model: Path, config: Mapping[str, Any]) -> Any:
    """Return OpenVINO's compiled model on the CPU; EngineError when it is refused."""
    openvino = openvino_module()
    if openvino is None:
        raise EngineError("openvino", f"load {model.name}", "the package is not installed")
    try:
        return openvino.Core().compile_model(model, "CPU", dict(config))
    except _OPENVINO_ERRORS as error:
        raise EngineError("openvino", f"load {model.name}", error) from error


def _check_names(engine: str, wanted: tuple[str, ...], feeds: Mapping[str, Array]) -> None:
    missing = [name for name in wanted if name not in feeds]
    unknown = [name for name in feeds if name not in wanted]
    if missing or unknown:
        reason = f"missing inputs {missing}, unknown inputs {unknown}; the model has {list(wanted)}"
        raise EngineError(engine, "run", reason)


class _Ort:
    """A session of onnxruntime."""

    name: Final = "ort"

    def __init__(self, model: Path, options: Any) -> None:
        self._session = open_session(model, options)
        self.version = str(ort.__version__)
        self._inputs = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        _check_names(self.name, self._inputs, feeds)
        try:
            return list(self._session.run(None, dict(feeds)))
        except ORT_ERRORS as error:
            raise EngineError(self.name, "run", error) from error


class _OpenVino:
    """A compiled model of OpenVINO."""

    name: Final = "openvino"

    def __init__(self, model: Path, config: Mapping[str, Any]) -> None:
        crash = crash_of(model, config)
        if crash is not None:
            raise EngineError(self.name, f"load {model.name}", crash)
        compiled = compile_openvino(model, config)
        self.version = openvino_version()
        # One tensor may carry several names there; the file knows which one is the output.
        graph = onnx.load(model, load_external_data=False).graph
        self.output_names = tuple(value.name for value in graph.output)
        known = {name for port in compiled.inputs for name in port.get_names()}
        self._inputs = tuple(value.name for value in graph.input if value.name in known)
        self._request = compiled.create_infer_request()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        _check_names(self.name, self._inputs, feeds)
        try:
            results = self._request.infer(dict(feeds))
        except _OPENVINO_ERRORS as error:
            raise EngineError(self.name, "run", error) from error
        return list(results.to_tuple())


def openvino_version() -> str:
    """Return OpenVINO's version without its build number."""
    return str(getattr(openvino_module(), "__version__", "")).partition("-")[0]


class _Reference:
    """The evaluator of the onnx package."""

    name: Final = "reference"

    def __init__(self, model: Path) -> None:
        try:
            self._evaluator = ReferenceEvaluator(str(model))
        except _REFERENCE_ERRORS as error:
            raise EngineError(self.name, f"load {model.name}", error) from error
        self.version = str(onnx.__version__)
        self._inputs = tuple(str(name) for name in self._evaluator.input_names)
        self.output_names = tuple(str(name) for name in self._evaluator.output_names)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        _check_names(self.name, self._inputs, feeds)
        try:
            results: Any = self._evaluator.run(None, dict(feeds))
        except _REFERENCE_ERRORS as error:
            raise EngineError(self.name, "run", error) from error
        return [np.asarray(value) for value in results]
