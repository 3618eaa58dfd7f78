"""Text files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpass.errors import RecipeError


def check_folder(path: Path) -> None:
    """Check that a file can be made at `path`.

    Raises:
        RecipeError: it is a folder, there is no folder to hold it, or nobody can write there.
    """
    with _writing(path, "-o"):
        if path.is_dir():
            raise RecipeError(f"{path} is a folder", fix="give -o the name of a file")
        folder = path.parent
        if not folder.is_dir():
            raise RecipeError(f"there is no folder {folder}", fix="make it, or choose another -o")
        # Results have longer names on their way.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".rejected"):
            pass


def check_new_folder(path: Path, option: str) -> None:
    """Check that files can be made in a folder, which is made when it is not there.

    Raises:
        RecipeError: it is a file or below one, or nobody can write there.
    """
    with _writing(path, option):
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            raise RecipeError(f"{option} {path}: {there} is a file", fix="name a folder")
        with tempfile.NamedTemporaryFile(dir=there, prefix=".qpass-"):
            pass


@contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecipeError(
            f"cannot write {path}: {error.strerror}", fix=f"choose another {option}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name in the same folder, then rename.

    Raises:
        RecipeError: no file can be made there.
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
