"""An edited plan file: the policy that it asks for, and whether that policy gives this plan.

A plan follows from the model, the target, the options and what can be edited in the file (see
`read_plan`). What else was changed in the file has no effect; that is an error rather than a plan
that is not the one in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qpass.errors import RecipeError
from qpass.plan import EDITABLE, NODE_FIXED, TENSOR_FIXED, Plan, PlanFile, read_plan
from qpass.planner import plan as make_plan
from qpass.program import Policy, Precision, chosen
from qpass.run import Run

Row = Mapping[str, Any]


def take_edits(run: Run, path: Path) -> None:
    """Give `run` the policy with the edits of a plan file.

    A file of `--mixed` gives its bits later (`take_found_bits`): scales and ranges are learned with
    the precision of the run first, as they were in the search, so that it comes to the same result.

    Raises:
        RecipeError: see `edited_policy`.
    """
    given, file = run.policy, read_plan(path)
    edited = edited_policy(run, path, file)
    if file.searched and not run.options.mixed:
        run.found = edited
        edited = replace(edited, node_bits=given.node_bits, float_nodes=given.float_nodes)
    run.policy = edited


def take_found_bits(run: Run) -> None:
    """Plan the bits of a file of `--mixed`, where there is one."""
    if run.found is None:
        return
    assert run.graph is not None
    run.policy = replace(
        run.policy, node_bits=run.found.node_bits, float_nodes=run.found.float_nodes
    )
    run.plan = make_plan(run.graph, run.target, run.policy)


def edited_policy(run: Run, path: Path, file: PlanFile) -> Policy:
    """Return the policy of `run` with the edits of a plan file, which was read from `path`.

    Where the user names bits for a node beside the file (`--bits`), these count.

    Raises:
        RecipeError: the plan was made for something else or with other options, or has an entry
            that is not what becomes of it.
    """
    assert run.graph is not None
    given = run.policy
    names = {node.name for node in run.graph.nodes}
    unknown = sorted(file.node_names - names)
    if file.target != run.target.name or unknown:
        what = f"target {file.target}" if file.target != run.target.name else unknown[0]
        raise RecipeError(
            f"the plan was made for something else: {what}",
            where=str(path),
            fix=f"make it again: qpass plan {run.source} --target {run.target.name} -o {path}",
        )
    plain = replace(given, keep=(), node_bits={}, float_nodes={}, ranges={})
    try:
        _check_settings(file, given)
        own = replace(
            plain, float_nodes=file.float_nodes, node_bits=file.node_bits, ranges=file.ranges
        )
        usual = make_plan(run.graph, run.target, plain)
        _check_effect(file, make_plan(run.graph, run.target, own), usual)
    except RecipeError as error:
        raise RecipeError(error.what, where=error.where or str(path), fix=error.fix) from error
    left = {name: bits for name, bits in file.node_bits.items() if given.own_bits(name) is None}
    return replace(own, keep=given.keep, node_bits={**given.node_bits, **left})


def _check_settings(file: PlanFile, policy: Policy) -> None:
    mine = {"precision": str(policy.precision), **policy.settings}
    for key, value in file.settings.items():
        if mine[key] == value:
            continue
        name = f"--{key.replace('_', '-')}"
        here = f"and {name} is {mine[key]}"
        fix = f"give {name} {value}, or leave {name} out"
        if not value:
            here, fix = f"and {name} is given", f"leave {name} out"
        raise RecipeError(
            f"the plan has the {key} {value}, {here}",
            fix=f"{fix}; for another plan: qpass plan with {name}",
        )


def _check_effect(file: PlanFile, result: Plan, usual: Plan) -> None:
    """Raise RecipeError for the first entry of `file` that is not what becomes of it.

    Args:
        file: the edited plan.
        result: the plan for what can be edited in it.
        usual: the plan without edits, which the rest of an edited file may still show.
    """
    (nodes, tensors), (usual_nodes, usual_tensors) = result.rows(), usual.rows()
    becomes = {row["name"]: row for row in nodes}
    defaults = {row["name"]: row for row in usual_nodes}
    for row in file.nodes:
        _check_node(row, becomes[row["name"]], defaults[row["name"]])
    _check_precision(file, defaults)
    if not file.intact:
        _check_rows("node", file.nodes, nodes, usual_nodes, NODE_FIXED)
        _check_rows("tensor", file.tensors, tensors, usual_tensors, TENSOR_FIXED)
    specs = {d.tensor: d.spec for d in result.activations()}
    for name in file.ranges:
        if name not in specs or specs[name].fixed is not None:
            why = "it is float, or its range is found at run time"
            if name in specs:
                why = f"it is fixed to {list(specs[name].fixed or ())}"
            raise RecipeError(
                f"the range of tensor {name} has no effect in this plan: {why}",
                fix="set the range to null",
            )


def _check_node(row: Row, becomes: Row, usual: Row) -> None:
    name, precision, bits = row["name"], row["precision"], row["bits"]
    if precision not in (becomes["precision"], usual["precision"]):
        raise RecipeError(
            f"node {name} is {precision} in the plan, and becomes {becomes['precision']}: "
            f"{becomes['because']}",
            fix=EDITABLE,
        )
    if "float" in (precision, becomes["precision"]):
        meant = not bits or bool(usual["bits"])  # what was there before the node became float
    else:
        meant = bits == becomes["bits"]
    if not meant:
        raise RecipeError(
            f"node {name} has the bits {bits!r} in the plan, and becomes "
            f"{becomes['bits'] or 'float'}: {becomes['because']}",
            fix=EDITABLE,
        )


def _check_precision(file: PlanFile, usual: Mapping[str, Row]) -> None:
    """Check that the precision of the plan is that of a layer, where nobody has chosen otherwise.

    The bits in the entries of the nodes decide; the precision in the head is edited in vain.
    """
    layers = [
        row
        for row in file.nodes
        if row["precision"] != "float" and usual[row["name"]]["bits"] == file.precision
    ]
    if not layers or any(_is_meant(row, file.precision) for row in layers):
        return
    first = layers[0]
    raise RecipeError(
        f"the plan has the precision {file.precision}, and none of its layers has: node "
        f"{first['name']} has {first['bits']}",
        fix=f"write {first['bits']} as precision, or make the plan again: qpass plan --precision "
        f"{file.precision}",
    )


def _is_meant(row: Row, precision: str) -> bool:
    if row["bits"] == precision:
        return True
    return bool(row["bits"]) and chosen(Precision.parse(row["bits"])) in str(row["because"])


def _check_rows(
    kind: str, rows: Sequence[Row], result: Sequence[Row], usual: Sequence[Row], keys: Sequence[str]
) -> None:
    """Check that `rows` are those of the result, or what the plan without edits has there."""
    there, expected, before = (_by_content(some, keys) for some in (rows, result, usual))
    for content, row in there.items():
        if content not in expected and content not in before:
            raise _strange(kind, row, result, keys)
    for content, row in expected.items():
        if content in before and content not in there:
            raise RecipeError(f"{kind} {row[keys[0]]} is missing in the plan", fix=EDITABLE)
    if kind == "tensor":  # something was edited: what follows from the bits is no longer told apart
        for content, row in there.items():
            if content not in expected:
                raise _strange(kind, row, result, keys)


def _strange(kind: str, row: Row, result: Sequence[Row], keys: Sequence[str]) -> RecipeError:
    """Return the error that says what of `row` this plan does not have."""
    name = row[keys[0]]
    near = next((other for other in result if other[keys[0]] == name), None)
    if near is None:
        return RecipeError(f"this plan has no {kind} {name}", fix=EDITABLE)
    key = next(key for key in keys if near[key] != row[key])
    return RecipeError(
        f"{kind} {name} has the {key} {row[key]!r}, and becomes {near[key]!r}", fix=EDITABLE
    )


def _by_content(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, Row]:
    return {json.dumps([row[key] for key in keys]): row for row in rows}
