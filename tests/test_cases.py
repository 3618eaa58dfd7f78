"""Golden cases: one text file per behaviour, four checks per file.

A case is a header, a model in ONNX text, and behind `# output` the structure that the pass makes
of it. Values that are declared and neither made nor given become seeded constants. Checked are:

structure   the printed graph equals the golden text (`pytest --update-golden` rewrites that);
report      the count of changes, and the refusals with place and reason, equal the header;
meaning     the outputs are the same before and after;
stability   a second run changes nothing.

Header: `# pass:` and `# changed:`, then as needed `# refused: rule | where | reason`,
`# engine: ort_plain` where the reference evaluator has no such op, and `# tolerance:`.
Other passes add themselves to `PASSES`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper, parser
from onnx.printer import to_text

from qpass.graph import Graph
from qpass.passes.normalize import normalize
from qpass.report.model import PassReport
from tests import oracle

PASSES: Final[dict[str, Callable[[Graph], PassReport]]] = {"normalize": normalize}

CASES: Final = sorted((Path(__file__).parent / "cases" / "folds").glob("*.onnxtxt"))
FREE_SIZE: Final = 2  # what named sizes of inputs become
# A fold rounds each constant once, and sums of up to a hundred terms come out in another order:
# 100 half units in the last place of float32 are 6e-6 of the largest value.
TOLERANCE: Final = 1e-5
SHOWN_SIZE: Final = 8  # integer constants up to this length are printed with their values


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A parsed case file."""

    run: Callable[[Graph], PassReport]
    changed: int
    refused: tuple[str, ...]
    engine: oracle.Run
    tolerance: float
    source: str
    output: str


def read_case(path: Path) -> Case:
    text, _, output = path.read_text().partition("# output\n")
    lines = text.splitlines(keepends=True)
    header = [re.fullmatch(r"# (\w+): (.*)\n", line) for line in lines if line.startswith("#")]
    entries = [(m[1], m[2]) for m in header if m is not None]
    assert len(entries) == len(header), f"{path}: a header line is not `# key: value`"
    flags = dict(entries)
    assert flags.keys() <= {"pass", "changed", "refused", "engine", "tolerance"}
    return Case(
        run=PASSES[flags["pass"]],
        changed=int(flags.get("changed", 0)),
        refused=tuple(value for key, value in entries if key == "refused"),
        engine=getattr(oracle, flags.get("engine", "reference")),
        tolerance=float(flags.get("tolerance", TOLERANCE)),
        source="".join(line for line in lines if not line.startswith("#")),
        output=output,
    )


def seeded(value: ValueInfoProto) -> np.ndarray[Any, Any]:
    """Return values that depend on the name alone; variances (named so) are positive."""
    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else FREE_SIZE for d in kind.shape.dim]
    random = np.random.default_rng(zlib.crc32(value.name.encode()))
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if kind.elem_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL):
        return random.integers(0, 2, shape).astype(dtype)
    values = random.standard_normal(shape)
    return (np.abs(values) + 0.5 if "variance" in value.name else values).astype(dtype)


def parse(text: str) -> Graph:
    model = parser.parse_model(text)
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    made |= {tensor.name for tensor in graph.initializer}
    missing = [value for value in graph.value_info if value.name not in made]
    del graph.value_info[:]
    graph.initializer.extend(numpy_helper.from_array(seeded(v), v.name) for v in missing)
    for node in graph.node:
        node.name = node.name or f"node_{node.output[0]}"
    checker.check_model(model)
    return Graph(model)


def structure(graph: Graph) -> str:
    """Print ops, edges and constants, without node names and the types of what is computed."""
    model = graph.to_model()
    checker.check_model(model, full_check=True)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        model.ClearField(field)
    del model.graph.value_info[:]
    constants = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    for tensor, values in zip(model.graph.initializer, constants, strict=True):
        if values.dtype.kind == "i" and values.size <= SHOWN_SIZE:
            shown = helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values.ravel())
            tensor.CopyFrom(shown)
        else:
            model.graph.value_info.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    hidden = {value.name for value in model.graph.value_info}
    shown_tensors = [t for t in model.graph.initializer if t.name not in hidden]
    del model.graph.initializer[:]
    model.graph.initializer.extend(shown_tensors)
    for node in model.graph.node:
        node.ClearField("name")
        _round_attributes(node)
    return to_text(model).strip() + "\n"


def _round_attributes(node: NodeProto) -> None:
    """Print 1e-05, not the digits that float32 adds."""
    for attribute in node.attribute:
        if attribute.HasField("f"):
            attribute.f = float(f"{attribute.f:.6g}")


def evaluate(case: Case, graph: Graph) -> dict[str, np.ndarray[Any, Any]]:
    model = graph.to_model()
    return case.engine(model, {value.name: seeded(value) for value in model.graph.input})


def rewrite(path: Path, graph: Graph, report: PassReport) -> None:
    """Write what the pass did into the case file."""
    text = path.read_text().partition("# output\n")[0]
    kept = [line for line in text.splitlines() if not line.startswith(("# changed", "# refused"))]
    refused = [f"# refused: {r.rule} | {r.where} | {r.reason}" for r in report.refusals]
    lines = [kept[0], f"# changed: {report.changed}", *refused, *kept[1:], "# output"]
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n" + structure(graph))
    new.replace(path)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path, update_golden: bool) -> None:
    case = read_case(path)
    graph = parse(case.source)
    before = evaluate(case, graph)

    report = case.run(graph)

    if update_golden:
        rewrite(path, graph, report)
        case = read_case(path)
    assert structure(graph) == case.output
    assert report.changed == case.changed
    assert tuple(f"{r.rule} | {r.where} | {r.reason}" for r in report.refusals) == case.refused
    assert oracle.relative_error(evaluate(case, graph), before) <= case.tolerance
    assert case.run(graph).changed == 0
    assert structure(graph) == case.output


def test_there_are_cases() -> None:
    assert CASES
