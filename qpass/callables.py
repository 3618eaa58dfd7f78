"""Functions of the user, named as `module:callable`: imported, called, and their errors said.

Whatever goes wrong inside them is a mistake of the user's, `sys.exit` included.
"""

from __future__ import annotations

import importlib
import inspect
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpass.errors import RecipeError, SampleError, UserError


@contextmanager
def user_code(doing: str, kind: type[UserError], fix: str = "") -> Iterator[None]:
    """Turn what the code of the body raises into an error of `kind`, with the line it is from.

    Modules of the current folder can be imported in the body.

    Args:
        doing: what went wrong then, as the beginning of the message.
        kind: of the error.
        fix: what to do about it.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    except kind:
        raise
    except (Exception, SystemExit) as error:
        what = f"{doing}: {type(error).__name__}: {error}"
        raise kind(what, where=_place(error), fix=fix) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _place(error: BaseException) -> str:
    """Return file and line of the last frame that is the user's: no library's and not ours."""
    libraries = (sys.prefix, sys.base_prefix, str(Path(__file__).parent), "<")
    frames = [
        f"{frame.filename}, line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries)
    ]
    return frames[-1] if frames else ""


def load_callable(
    text: str, option: str, kind: type[UserError] = RecipeError
) -> Callable[..., Any]:
    """Import `module:callable`.

    Raises:
        UserError: of `kind`: no such module or callable, or the module fails.
    """
    module_name, _, name = text.partition(":")
    if not (module_name and name):
        raise kind(f"{option} {text!r} is not of the form module:callable")
    searched = "check the name; modules of the current folder are found, too"
    with user_code(f"cannot import {option} {text}", kind, searched):
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    if not callable(found):
        raise kind(f"{option} {text} is not callable")
    function: Callable[..., Any] = found
    return function


def call_for_samples(text: str) -> Iterable[Any]:
    """Return what the `module:callable` of --data returns.

    Raises:
        SampleError: no such module or callable, it fails (now, or while it is iterated), or it
            returns nothing that can be iterated.
    """
    function = load_callable(text, "--data", SampleError)
    with user_code(f"--data {text} failed", SampleError):
        batches: Any = function()
    if not isinstance(batches, Iterable):
        raise SampleError(f"--data {text} returned a {type(batches).__name__}", where=text)
    return batches if isinstance(batches, list | tuple) else _iterate(batches, text)


def _iterate(batches: Iterable[Any], text: str) -> Iterator[Any]:
    done = object()
    with user_code(f"--data {text} failed", SampleError):
        iterator = iter(batches)
    for number in range(sys.maxsize):
        with user_code(f"--data {text} failed at item {number}", SampleError):
            batch = next(iterator, done)
        if batch is done:
            return
        yield batch


def load_metric(text: str) -> Callable[..., Any]:
    """Import the `module:callable` of --eval, which takes the path of a model.

    Raises:
        RecipeError: no such module or callable, or it does not take one argument.
    """
    function = load_callable(text, "--eval")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions that are not written in Python have none
        return function
    try:
        signature.bind("model.onnx")
    except TypeError as error:
        raise RecipeError(
            f"--eval {text} cannot be called with one path: {error}",
            fix="it takes the path of a model and returns a number",
        ) from error
    return function


def score_file(text: str, path: Path) -> tuple[str, float]:
    """Return name and value of the metric `module:callable` for one file; larger is better.

    A mapping counts with its first entry, whose key names the metric.

    Raises:
        RecipeError: it cannot be imported, fails, or returns no finite number.
    """
    function = load_metric(text)
    with user_code(f"--eval {text} failed for {path}", RecipeError):
        value = function(str(path))
    returned = f"--eval {text} returned {reprlib.repr(value)} for {path}"
    with user_code(returned, RecipeError, "return one number"):
        name, number = next(iter(value.items())) if isinstance(value, dict) else (text, value)
        number = float(number)
    if not math.isfinite(number):
        raise RecipeError(f"--eval {text} returned {number} for {path}", fix="return one number")
    return str(name), number
