"""How a path that a user wrote is read, in the configuration and on the command line alike."""

from __future__ import annotations

import os
import re
from pathlib import Path

from d2v_fast.files.reading import is_path, printable

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class PathError(ValueError):
    """A path that cannot be expanded. `must` says what it has to do instead, as `Problem.must` does."""

    def __init__(self, text: str, must: str) -> None:
        super().__init__(f"a path must {must}, but is '{printable(text)}' instead.")
        self.must = must


def expand_path(path: str | Path) -> str:
    """Replace a leading `~` or `~user` by the home folder, and `$NAME` and `${NAME}` by environment variables.

    A path that exists as it is written keeps its `$`, so that a file whose name holds one can be named. A folder that
    is really called `~` is `./~`.

    Args:
        path: as the user wrote it.
    Returns:
        the expanded path; a relative path stays relative.
    Raises:
        PathError: the system cannot hold such a path, or there is no such user or variable.
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
