"""Text files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from qpass.errors import RecipeError


def check_folder(path: Path) -> None:
    """Check that a file can be made at `path`.

    Raises:
        RecipeError: there is no such folder.
    """
    if not path.parent.is_dir():
        raise RecipeError(f"there is no folder {path.parent}", fix="make it, or choose another -o")


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name in the same folder, then rename.

    Raises:
        RecipeError: there is no such folder.
    """
    check_folder(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp makes files that only the owner can read
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
