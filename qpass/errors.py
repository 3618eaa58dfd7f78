"""The errors of qpass: a mistake of the user and a bug of ours are different exceptions.

A `UserError` says what is wrong, where, and what to do; the command line prints it and exits
with 2.
An `InternalError` is a bug in qpass: it keeps its traceback.
"""

from __future__ import annotations


class QpassError(Exception):
    """Base of every error that qpass raises on purpose."""


class UserError(QpassError):
    """Bad input or bad usage, with the place and the way out."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        """Build the message from `what` happened, `where`, and the `fix` that helps."""
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  what to do: {fix}")
        super().__init__("\n".join(lines))


class ModelError(UserError):
    """The model file cannot be used: damaged, incomplete, already quantized, unsupported."""


class SampleError(UserError):
    """The samples cannot be used: missing input, wrong shape or dtype, NaN or infinity."""


class NotFiniteError(SampleError):
    """A tensor of the float model is NaN or infinite on a sample: its fault, or that of weights."""


class RecipeError(UserError):
    """An option, recipe, plan or statistics file is wrong."""


class InternalError(QpassError):
    """A bug in qpass: please report it together with the model."""


class PreconditionError(InternalError):
    """A pass was started on a graph that it cannot work on."""


class PostconditionError(InternalError):
    """A pass left behind a graph that breaks its own promise."""
