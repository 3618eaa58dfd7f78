"""The recipe file: every option of `optimize` as a key of a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from qpass.errors import RecipeError
from qpass.options import Options
from qpass.plan import read_plan

LISTS: Final = ("keep", "bits", "engines")
# Of one run, and not of how to make it: these stand on the command line.
NO_KEYS: Final = {"model": "MODEL", "data": "--data", "output": "-o", "json": "--json"}


def make_options(recipe: str | Path | None = None, **options: Any) -> Options:
    """Build the options of a run: a recipe file first, explicit options win.

    What shapes a plan and is given by neither comes from the plan file, where there is one.

    Raises:
        RecipeError: an unknown or contradicting option.
    """
    if not isinstance(recipe, str | Path | None):
        raise RecipeError(f"a recipe is the path of a file, not a {type(recipe).__name__}")
    values: dict[str, Any] = dict(read_recipe(Path(recipe))) if recipe is not None else {}
    known = {field.name for field in dataclasses.fields(Options)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise RecipeError(f"there is no option {unknown[0]}", fix=", ".join(sorted(known)))
    given = {key: _plain(value) for key, value in options.items() if value is not None}
    values.update(_checked(given, "option", "see `qpass.options.Options`"))
    if values.get("plan") is not None:
        values = {**read_plan(Path(values["plan"])).settings, **values}
    return Options(**values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe(Options):
    """The options of a file, to which others may be added."""

    def __post_init__(self) -> None:
        """Check each by itself."""
        self.check_values()


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe; keys are the long option names with `-` or `_`, and `engines` for `--engine`.

    Raises:
        RecipeError: no TOML, an unknown key, a key that is there twice, or a value of the wrong
            type.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read the recipe: {error}", where=str(path)) from error
    keys: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        name = "engines" if name == "engine" else name  # several on the command line, too
        if name in keys:
            raise RecipeError(
                f"the recipe has {name.replace('_', '-')} and {name}, which is one option",
                where=str(path),
                fix="leave one of them out",
            )
        keys[name] = value
    _check_keys(keys, path)
    try:
        return _checked(keys, "recipe key", "`qpass optimize -h` explains the options")
    except RecipeError as error:
        raise RecipeError(error.what, where=error.where or str(path), fix=error.fix) from error


def _plain(value: Any) -> Any:
    """Return paths as text and numbers of numpy as Python's: both are common in scripts."""
    if isinstance(value, Path):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def _checked(values: Mapping[str, Any], kind: str, usual: str) -> dict[str, Any]:
    """Return values with the types that options have; RecipeError for one that has no such form."""
    strict = validated(_Recipe, frozen=True, config=ConfigDict(extra="forbid"))
    try:
        options = TypeAdapter(strict).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place, what, fix = ".".join(str(part) for part in first["loc"]), first["msg"], usual
        if first["loc"][0] in LISTS:
            what, fix = "a list of strings is wanted", f'write for example {place} = ["..."]'
            if isinstance(first["input"], str):
                fix = f'write {place} = ["{first["input"]}"]'
        if kind == "option" and first["type"] == "literal_error":
            name = f"--{place.replace('_', '-')}"
            raise RecipeError(
                f"there is no {name} {first['input']}", fix=f"use {first['ctx']['expected']}"
            ) from error
        raise RecipeError(f"{kind} {place}: {what}", fix=fix) from error
    return {key: getattr(options, key) for key in values}


def _check_keys(keys: Mapping[str, Any], path: Path) -> None:
    names = sorted(field.name for field in dataclasses.fields(Options))
    for key in keys:
        if key in names:
            continue
        if key in NO_KEYS:
            raise RecipeError(
                f"recipe key {key}: a recipe says how results are made, not of what, nor where to",
                where=str(path),
                fix=f"give {NO_KEYS[key]} on the command line",
            )
        near = get_close_matches(key, names, 3, cutoff=0.7)
        hint = f"did you mean {' or '.join(near)}?" if near else f"keys: {', '.join(names)}"
        raise RecipeError(f"recipe key {key}: there is no such option", where=str(path), fix=hint)
