"""Errors whose message is written for the user: what is wrong, what is allowed, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can mend. Commands print its message without a traceback.

    Attributes:
        status: exit status of a command that ends with this error.
        by_all: whether every process of a run raises it, so that only the first prints it.
    """

    status = 1
    by_all = False


class OptionError(UserError, ValueError):
    """A wrong option of a command: its value, or its combination with another option."""

    status = 2


class DataError(UserError, ValueError):
    """Data that cannot be trained on."""


class RunError(UserError, RuntimeError):
    """A run that cannot start or continue."""

    by_all = True
