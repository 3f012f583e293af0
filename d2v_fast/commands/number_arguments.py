"""Numbers on a command line: types for argparse, with limits that everything after them can hold."""

from __future__ import annotations

import argparse
import math

_MAX_DIGITS = 9
_MAX_SECONDS = 86_400


def count_argument(text: str) -> int:
    """Return a whole number from 1 on.

    Raises:
        ArgumentTypeError: it is none, or is too large.
    """
    if not text.isdecimal() or len(text) > _MAX_DIGITS or int(text) < 1:
        largest = 10**_MAX_DIGITS - 1
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {largest}, but is {text} instead")
    return int(text)


def seconds_argument(text: str) -> float:
    """Return a time in seconds, above 0 and of at most a day.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number above 0, of at most {_MAX_SECONDS}, but is {text} instead")
    return seconds
