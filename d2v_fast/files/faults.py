"""Points in the code at which a test can kill the process or raise an error of the system.

`D2V_FAULT=save.rename:2` kills the process (SIGKILL) at its second pass of the point `save.rename`.
`D2V_FAULT=save.manifest:1:ENOSPC` raises OSError with that number instead. Without the variable, a point costs one
comparison.
"""

from __future__ import annotations

import errno
import os
import signal


class Fault:
    """A fault at the `count`-th pass of `point`."""

    def __init__(self, text: str) -> None:
        parts = text.split(":")
        how = parts[2] if len(parts) == 3 else "kill"
        known = how == "kill" or hasattr(errno, how)
        if len(parts) not in (2, 3) or not parts[1].isdigit() or not known:
            raise ValueError(f"`D2V_FAULT` must be POINT:COUNT or POINT:COUNT:ERRNO, but is {text} instead.")
        self.point, self.count = parts[0], int(parts[1])
        self.number = None if how == "kill" else int(getattr(errno, how))

    def passed(self, point: str) -> None:
        """Count a pass of `point`, and raise or kill at the right one."""
        if point != self.point:
            return
        self.count -= 1
        if self.count == 0:
            if self.number is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise OSError(self.number, os.strerror(self.number))


_fault = Fault(os.environ["D2V_FAULT"]) if "D2V_FAULT" in os.environ else None


def fault_point(name: str) -> None:
    """Mark a point at which a test can inject a fault."""
    if _fault is not None:
        _fault.passed(name)
