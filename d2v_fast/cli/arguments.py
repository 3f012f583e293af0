"""Types of argparse arguments. Numbers have limits that all later computation can hold."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from d2v_fast.files.paths import PathError, expand_path

_MAX_DIGITS = 9
_MAX_SECONDS = 86_400


def count_argument(text: str) -> int:
    """Read a whole number from 1 on.

    Raises:
        ArgumentTypeError: it is not one, or has too many digits.
    """
    if not text.isdecimal() or len(text) > _MAX_DIGITS or int(text) < 1:
        largest = 10**_MAX_DIGITS - 1
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {largest}, but is {text} instead")
    return int(text)


def seconds_argument(text: str) -> float:
    """Read a time in seconds: above 0, at most a day.

    Raises:
        ArgumentTypeError: it is not one.
    """
    seconds = _number(text)
    if not 0 < seconds <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most {_MAX_SECONDS}, but is {text} instead")
    return seconds


def number_argument(text: str) -> float:
    """Read a finite number.

    Raises:
        ArgumentTypeError: it is not one.
    """
    number = _number(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, but is {text} instead")
    return number


def path_argument(text: str) -> Path:
    """Read a path; `~` and environment variables are expanded.

    Raises:
        ArgumentTypeError: it cannot be expanded.
    """
    try:
        return Path(expand_path(text))
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(text: str) -> float:
    """Return a number, or NaN for a text that is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
