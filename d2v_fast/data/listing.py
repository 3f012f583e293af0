"""What a data set consists of and what it leaves out, counted, and in words for the start of every command."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TextIO

from d2v_fast.files.reading import printable

__all__ = [
    "ARCHIVES",
    "VIDEOS",
    "FileKinds",
    "LeftOut",
    "Listing",
    "count_endings",
    "counted",
    "describe_listing",
    "ending_of",
    "name_list",
    "print_listing",
]

# endings or reasons that are named before the rest is only counted
NUM_ENDINGS = 8
_NUM_FIELDS = 10
# in front of these endings stands the one that says what was compressed
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".lz4")

_UNPACK = "unpack them"
ARCHIVES: Mapping[str, str] = dict.fromkeys(
    (".7z", ".bz2", ".gz", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"), _UNPACK
)
"""Endings of archives and compressed files, with advice: they may hold samples of any modality."""

VIDEOS = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
"""Endings of videos, which may hold both images and sound."""


@dataclass(frozen=True)
class FileKinds:
    """The files of one modality, by their endings in lower case.

    Attributes:
        what: the files in the plural, for messages.
        read: endings of the files that are read.
        unread: endings of files that may be taken for samples but are not read, each with advice (or "").
    """

    what: str
    read: tuple[str, ...]
    unread: Mapping[str, str]


@dataclass(frozen=True)
class LeftOut:
    """So many files or samples that are left out, and why.

    Attributes:
        count: how many.
        what: one of them, such as `recording`.
        why: the rest of the sentence, such as `shorter than 1 s`.
    """

    count: int
    what: str
    why: str


@dataclass(frozen=True)
class Listing:
    """What a data set consists of and what it leaves out.

    Attributes:
        used: number of files by ending; empty for a sample set that ships with the library.
        unread: the same for files that may be taken for samples but are not read.
        advice: what to do about them, by ending.
        others: the same for all other files.
        left_out: files and samples that are left out for another reason than their ending.
        bad_files: files that were found unreadable when the data set was listed, as `path: reason`.
    """

    used: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    advice: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    bad_files: tuple[str, ...] = ()

    def without(self, count: int, what: str, why: str) -> Listing:
        """Return the listing with one more reason why something is left out, if `count` is not 0."""
        return replace(self, left_out=(*self.left_out, LeftOut(count, what, why))) if count else self


def ending_of(path: str) -> str:
    """The ending of a file's name in lower case with its dot, `.jsonl.gz` in one piece; "" if there is none."""
    stem, ending = os.path.splitext(os.path.basename(path).lower())
    if ending in COMPRESSIONS:
        inner = os.path.splitext(stem)[1]
        # `notes 1.5 of may.gz` has no inner ending
        if 1 < len(inner) <= 8 and inner[1:].isalnum():
            return inner + ending
    return ending if len(ending) > 1 else ""


def counted(count: int, what: str) -> str:
    """`1 file`, `2 files`, `1,000 files`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def describe_listing(listing: Listing, samples: str) -> list[str]:
    """Word a listing, one line per fact; the first says what is used, the others what is not.

    Args:
        listing: of a data set.
        samples: how many samples there are and of what kind, such as `2 recordings`.
    """
    lines = [samples]
    if listing.used:
        lines[0] += f" in {counted(sum(listing.used.values()), 'file')} ({_endings(listing.used)})"
    by_advice: dict[str, dict[str, int]] = {}
    for ending, count in listing.unread.items():
        by_advice.setdefault(listing.advice.get(ending, ""), {})[ending] = count
    for advice, endings in by_advice.items():
        # each ending is named, however many there are
        named = _endings(endings, limit=len(endings))
        why = f"not read, {advice}" if advice else "not read"
        lines.append(f"left out: {counted(sum(endings.values()), 'file')} ({named}): {why}")
    lines += [f"left out: {counted(entry.count, entry.what)} {entry.why}" for entry in listing.left_out]
    if listing.bad_files:
        count, total = len(listing.bad_files), sum(listing.used.values())
        share = f" of {total:,} ({100 * count / total:.2g} %)" if total else ""
        lines.append(f"left out: {counted(count, 'unreadable file')}{share}, such as {listing.bad_files[0]}")
    if listing.others:
        lines.append(f"not data: {counted(sum(listing.others.values()), 'other file')} ({_endings(listing.others)})")
    return lines


def print_listing(listing: Listing, samples: str, file: TextIO | None = None) -> None:
    """Print `describe_listing` to the standard output, or to `file`."""
    first, *others = describe_listing(listing, samples)
    print("\n".join([f"data: {first}", *(f"  {line}" for line in others)]), file=file, flush=True)


def _endings(counts: Mapping[str, int], limit: int = NUM_ENDINGS) -> str:
    """`60 .opus, 2 .wav`, the most frequent first."""
    order = sorted(counts, key=lambda ending: (-counts[ending], ending))
    parts = [f"{counts[ending]:,} {printable(ending) or 'without ending'}" for ending in order[:limit]]
    rest = sum(counts[ending] for ending in order[limit:])
    return ", ".join([*parts, *([f"{rest:,} more"] if rest else [])])


def count_endings(paths: Iterable[str]) -> dict[str, int]:
    """Number of paths by ending."""
    counts: dict[str, int] = {}
    for path in paths:
        ending = ending_of(path)
        counts[ending] = counts.get(ending, 0) + 1
    return counts


def name_list(names: Iterable[str]) -> str:
    """Return the names of fields or columns in quotes, of many of them the first, for messages."""
    names = list(names)
    more = ", ..." if len(names) > _NUM_FIELDS else ""
    return ", ".join(f"'{name[:80]}'" for name in names[:_NUM_FIELDS]) + more if names else "none"
