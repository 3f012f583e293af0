"""Expand paths in the configuration and on the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path

from d2v_fast.files.reading import is_path, printable

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class PathError(ValueError):
    """A path that cannot be expanded.

    Attributes:
        must: what the path must do, for a sentence such as "a path must ...".
    """

    def __init__(self, text: str, must: str) -> None:
        super().__init__(f"a path must {must}, but is '{printable(text)}' instead.")
        self.must = must


def expand_path(path: str | Path) -> str:
    """Expand a leading `~` or `~user` and environment variables `$NAME` and `${NAME}`.

    A path that exists as written keeps its `$`. Write `./~` for a folder called `~`.

    Args:
        path: as the user wrote it.
    Returns:
        The expanded path; a relative path stays relative.
    Raises:
        PathError: the path is impossible on this system, or the user or variable does not exist.
    """
    text = str(path)
    if not is_path(text):
        raise PathError(text, "be a path that the system can hold")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise PathError(text, f"begin with the home folder of a user of this machine, or with `./{user}` for a folder")
    names = [match[1] or match[2] for match in _VARIABLE.finditer(expanded)]
    if not names or os.path.lexists(expanded):
        return expanded
    unset = [name for name in names if name not in os.environ]
    if unset:
        raise PathError(text, f"name environment variables that are set, which `{unset[0]}` is not")
    return _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], expanded)
