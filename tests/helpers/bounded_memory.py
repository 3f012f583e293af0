"""Measure the memory that a call needs."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable


def measured(call: Callable[[], object]) -> tuple[int, str]:
    """Call a function in a forked process; return its peak memory in bytes and its message.

    The message is the text of its exception or of its return value.
    """

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        said, before = "", peak()
        try:
            said = str(call())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, f"{peak() - before} {said[:10_000]}".encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        used, _, said = answer.read().decode().partition(" ")
    assert os.waitpid(process, 0)[1] == 0
    return int(used), said
