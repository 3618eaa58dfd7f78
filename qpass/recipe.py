"""The recipe file: every option of `optimize` as a key of a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from qpass.errors import RecipeError
from qpass.options import Options


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe(Options):
    """The options of a file, to which others may be added."""

    def __post_init__(self) -> None:
        """Check each by itself."""
        self.check_values()


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe; keys are the long option names with `-` or `_`.

    Raises:
        RecipeError: no TOML, an unknown key, or a value of the wrong type.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read the recipe: {error}", where=str(path)) from error
    keys = {key.replace("-", "_"): value for key, value in data.items()}
    strict = validated(_Recipe, frozen=True, config=ConfigDict(extra="forbid"))
    try:
        options = TypeAdapter(strict).validate_python(keys)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        names = ", ".join(sorted(field.name for field in dataclasses.fields(Options)))
        raise RecipeError(
            f"recipe key {place}: {first['msg']}", where=str(path), fix=f"known keys: {names}"
        ) from error
    return {key: getattr(options, key) for key in keys}
