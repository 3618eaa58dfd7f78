"""The recipe file: every option of `optimize` as a key of a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

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
    values: dict[str, Any] = dict(read_recipe(Path(recipe))) if recipe is not None else {}
    known = {field.name for field in dataclasses.fields(Options)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise RecipeError(f"there is no option {unknown[0]}", fix=", ".join(sorted(known)))
    values.update({key: value for key, value in options.items() if value is not None})
    for key in LISTS:
        if key in values:
            values[key] = tuple(values[key])
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
    """Read a recipe; keys are the long option names with `-` or `_`.

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
        if name in keys:
            raise RecipeError(
                f"the recipe has {name.replace('_', '-')} and {name}, which is one option",
                where=str(path),
                fix="leave one of them out",
            )
        keys[name] = value
    _check_keys(keys, path)
    strict = validated(_Recipe, frozen=True, config=ConfigDict(extra="forbid"))
    try:
        options = TypeAdapter(strict).validate_python(keys)
    except RecipeError as error:
        raise RecipeError(error.what, where=error.where or str(path), fix=error.fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        place, what = ".".join(str(part) for part in first["loc"]), first["msg"]
        fix = "`qpass optimize -h` explains the options"
        if first["loc"][0] in LISTS:
            what, fix = "a list of strings is wanted", f'write for example {place} = ["..."]'
            if isinstance(first["input"], str):
                fix = f'write {place} = ["{first["input"]}"]'
        raise RecipeError(f"recipe key {place}: {what}", where=str(path), fix=fix) from error
    return {key: getattr(options, key) for key in keys}


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
