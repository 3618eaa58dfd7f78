"""The error of ops that the executor does not know."""

from __future__ import annotations

from qpass.errors import UserError


class UnsupportedOpError(UserError):
    """An op, or an attribute of one, that has no function in torch here."""
