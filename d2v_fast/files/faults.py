"""Places in the code at which a test can end the process, to show that nothing is lost.

`D2V_FAULT=save.rename:2` kills the process (SIGKILL) when it passes the point `save.rename` for the second
time; `D2V_FAULT=save.manifest:1:ENOSPC` raises the error of a full disk there instead, as every name of an error number
does. Unset, a point costs one comparison.
"""

from __future__ import annotations

import errno
import os
import signal


class Fault:
    """What is to happen at the `count`-th passage of `point`."""

    def __init__(self, text: str) -> None:
        parts = text.split(":")
        how = parts[2] if len(parts) == 3 else "kill"
        known = how == "kill" or hasattr(errno, how)
        if len(parts) not in (2, 3) or not parts[1].isdigit() or not known:
            raise ValueError(f"`D2V_FAULT` must be POINT:COUNT or POINT:COUNT:ERRNO, but is {text} instead.")
        self.point, self.count = parts[0], int(parts[1])
        self.number = None if how == "kill" else int(getattr(errno, how))

    def passed(self, point: str) -> None:
        """Count a passage of `point`, and act when its turn has come."""
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
    """Mark a place where a test may end the process."""
    if _fault is not None:
        _fault.passed(name)
