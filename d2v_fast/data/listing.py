"""Count what a data set uses and leaves out, and describe it in the lines that every command prints first."""

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

# endings that a line names; the rest is only counted
NUM_ENDINGS = 8
_NUM_FIELDS = 10
# these follow the ending of the compressed file
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".lz4")

_UNPACK = "unpack them"
ARCHIVES: Mapping[str, str] = dict.fromkeys(
    (".7z", ".bz2", ".gz", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"), _UNPACK
)
"""Endings of archives and compressed files, which may hold samples of any modality, with advice."""

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
    """A number of files or samples that are left out for one reason.

    Attributes:
        count: number of files or samples.
        what: a singular noun, such as `recording`.
        why: the rest of the sentence, such as `shorter than 1 s`.
    """

    count: int
    what: str
    why: str


@dataclass(frozen=True)
class Listing:
    """What a data set uses and what it leaves out.

    Attributes:
        used: number of files by ending. Empty for a sample set that ships with the library.
        unread: number of files by ending that look like samples but are not read.
        advice: what to do about unread files, by ending.
        others: number of all other files by ending.
        left_out: files and samples that are left out for another reason than their ending.
        bad_files: files that were unreadable when the data set was listed, as `path: reason`.
        notes: further lines, such as what a table holds beside the samples.
    """

    used: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    advice: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    bad_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def noted(self, note: str) -> Listing:
        """Return the listing with one more note."""
        return replace(self, notes=(*self.notes, note))

    def without(self, count: int, what: str, why: str) -> Listing:
        """Return the listing with one more `LeftOut`, or unchanged if `count` is 0."""
        return replace(self, left_out=(*self.left_out, LeftOut(count, what, why))) if count else self


def ending_of(path: str) -> str:
    """Return the ending of a file name in lower case with its dot, such as `.jsonl.gz`; "" if there is none."""
    stem, ending = os.path.splitext(os.path.basename(path).lower())
    if ending in COMPRESSIONS:
        inner = os.path.splitext(stem)[1]
        # `notes 1.5 of may.gz` has no inner ending
        if 1 < len(inner) <= 8 and inner[1:].isalnum():
            return inner + ending
    return ending if len(ending) > 1 else ""


def counted(count: int, what: str) -> str:
    """Return a count with its noun: `1 file`, `1,000 files`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def describe_listing(listing: Listing, samples: str) -> list[str]:
    """Describe a listing. The first line says what is used, the others what is left out.

    Args:
        listing: of a data set.
        samples: the samples with their number, such as `2 recordings`.
    """
    lines = [samples]
    if listing.used:
        lines[0] += f" in {counted(sum(listing.used.values()), 'file')} ({_endings(listing.used)})"
    by_advice: dict[str, dict[str, int]] = {}
    for ending, count in listing.unread.items():
        by_advice.setdefault(listing.advice.get(ending, ""), {})[ending] = count
    for advice, endings in by_advice.items():
        # name every ending, because each needs the advice
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
    return [*lines, *listing.notes]


def print_listing(listing: Listing, samples: str, file: TextIO | None = None) -> None:
    """Print `describe_listing` to the standard output, or to `file`."""
    first, *others = describe_listing(listing, samples)
    print("\n".join([f"data: {first}", *(f"  {line}" for line in others)]), file=file, flush=True)


def _endings(counts: Mapping[str, int], limit: int = NUM_ENDINGS) -> str:
    """Return counts such as `60 .opus, 2 .wav`, the most frequent first."""
    order = sorted(counts, key=lambda ending: (-counts[ending], ending))
    parts = [f"{counts[ending]:,} {printable(ending) or 'without ending'}" for ending in order[:limit]]
    rest = sum(counts[ending] for ending in order[limit:])
    return ", ".join([*parts, *([f"{rest:,} more"] if rest else [])])


def count_endings(paths: Iterable[str]) -> dict[str, int]:
    """Return the number of paths by ending."""
    counts: dict[str, int] = {}
    for path in paths:
        ending = ending_of(path)
        counts[ending] = counts.get(ending, 0) + 1
    return counts


def name_list(names: Iterable[str]) -> str:
    """Return the first names in quotes, for messages."""
    names = list(names)
    more = ", ..." if len(names) > _NUM_FIELDS else ""
    return ", ".join(f"'{name[:80]}'" for name in names[:_NUM_FIELDS]) + more if names else "none"
