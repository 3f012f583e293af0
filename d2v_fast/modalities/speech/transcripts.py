"""Read what a user's recordings are labeled with: transcripts, or a class per recording.

Transcripts come from fairseq's `.ltr` beside its manifest, from LibriSpeech's `*.trans.txt`, or from a table. A class
comes from a table, or is the first folder of a recording.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from d2v_fast.data.labels import class_of
from d2v_fast.data.listing import counted, name_list
from d2v_fast.errors import DataError
from d2v_fast.files.reading import is_text, open_regular, parse_json, printable, refuse_pointer

__all__ = ["Labels", "folder_labels", "letter_labels", "librispeech_labels", "table_labels"]

# in bytes; longer than any sentence
MAX_LINE = 1_000_000
TRANSCRIPTS = ".trans.txt"
TABLES = (".tsv", ".jsonl")


@dataclass(frozen=True)
class Labels:
    """The labels of recordings, in the order of their names.

    Attributes:
        texts: transcript or class of each recording; None where there is none.
        notes: a line for what the labels hold beside these recordings.
    """

    texts: tuple[str | None, ...]
    notes: tuple[str, ...] = ()


def letter_labels(path: str, listed: Sequence[str], names: Sequence[str]) -> Labels:
    """Read fairseq's transcripts: a line of letters for each line of the manifest, with `|` after each word.

    Args:
        path: the `.ltr` file.
        listed: names of the manifest's recordings, in its order.
        names: recordings to label.
    Raises:
        DataError: the file cannot be read, or has another number of lines than the manifest.
    """
    lines = [line for _, line in _lines(path)]
    while lines and not lines[-1].strip() and len(lines) > len(listed):
        lines.pop()
    if len(lines) != len(listed):
        raise DataError(
            f"'{printable(path)}' must hold a line for each of the {counted(len(listed), 'recording')} of its "
            f"manifest, but holds {counted(len(lines), 'line')}. Make both again from the same recordings."
        )
    texts = {name: line.replace(" ", "").replace("|", " ").strip() for name, line in zip(listed, lines, strict=True)}
    return Labels(tuple(texts.get(name) for name in names))


def librispeech_labels(root: str, names: Sequence[str]) -> Labels:
    """Read LibriSpeech's transcripts: files `*.trans.txt` beside the recordings, with lines `NAME TEXT`.

    A recording is named without its ending.

    Raises:
        DataError: there is no such file, one cannot be read, or a recording has two transcripts.
    """
    texts: dict[str, str] = {}
    num_files = 0
    for folder in sorted({os.path.dirname(name) for name in names}):
        for entry in sorted(os.listdir(os.path.join(root, folder))):
            if not entry.lower().endswith(TRANSCRIPTS):
                continue
            num_files += 1
            path = os.path.join(root, folder, entry)
            for number, line in _lines(path):
                name, _, text = line.strip().partition(" ")
                if name and texts.setdefault(os.path.join(folder, name), text) != text:
                    raise _twice(number, path, name)
    if not num_files:
        raise DataError(
            f"the recordings must have transcripts, but '{printable(root)}' holds no `*{TRANSCRIPTS}`. Name a table "
            "(.tsv or .jsonl) with columns of path and text by `d2v.data.labels_path`, or put NAME.ltr beside a "
            "manifest NAME.tsv."
        )
    return _matched(texts, {os.path.splitext(name)[0]: name for name in names}, names, f"of `*{TRANSCRIPTS}`")


def table_labels(path: str, root: str, names: Sequence[str], fields: tuple[str, str]) -> Labels:
    """Read a table with a row per recording: .tsv with a line of column names, or .jsonl.

    Args:
        path: the table.
        root: folder of the recordings.
        names: recordings to label, relative to `root`.
        fields: columns of the recording's path and of its label. Paths are relative to `root` or absolute, with or
            without their ending.
    Raises:
        DataError: the table cannot be read, lacks a column, or gives a recording two labels.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in TABLES:
        raise DataError(
            f"`d2v.data.labels_path` must be a table ({' or '.join(TABLES)}), but is '{printable(path)}' instead."
        )
    rows = _tsv(path, fields) if ending == ".tsv" else _jsonl(path, fields)
    by_name = {os.path.splitext(name)[0]: name for name in names}
    by_name.update((name, name) for name in names)
    texts: dict[str, str] = {}
    for number, name, text in rows:
        if os.path.isabs(name):
            name = os.path.relpath(name, root)
        name = os.path.normpath(name)
        # one name for a recording, whether its row has the ending or not
        name = by_name.get(name, name)
        if texts.setdefault(name, text) != text:
            raise _twice(number, path, name)
    return _matched(texts, by_name, names, f"of '{printable(os.path.basename(path))}'")


def folder_labels(names: Sequence[str]) -> Labels:
    """Return the first folder of each recording as its class."""
    return Labels(tuple(class_of(name) or None for name in names))


def _twice(number: int, path: str, name: str) -> DataError:
    return DataError(
        f"line {number} of '{printable(path)}' gives '{printable(name)}' a second label. Keep one of both."
    )


def _matched(texts: Mapping[str, str], by_name: Mapping[str, str], names: Sequence[str], where: str) -> Labels:
    found = {by_name[name]: text for name, text in texts.items() if name in by_name}
    num_without = len(texts) - len(found)
    if not found and texts:
        raise DataError(
            f"the rows {where} must name recordings, but none of the {counted(len(texts), 'row')} does. They name "
            f"{name_list(list(texts)[:3])}; the recordings are {name_list(names[:3])}."
        )
    notes = (f"not used: {counted(num_without, 'row')} {where} without a recording",) if num_without else ()
    return Labels(tuple(found.get(name) for name in names), notes)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the number and text of every line of a UTF-8 file."""
    number = 0
    try:
        refuse_pointer(path)
        with open_regular(path) as content:
            while line := content.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise DataError(f"line {number} of '{printable(path)}' is longer than {MAX_LINE:,} bytes.")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(
            f"line {number} of '{printable(path)}' must be UTF-8 text, but is not. Save the file as UTF-8."
        ) from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise DataError(f"the labels '{printable(path)}' cannot be read: {why}.") from None


def _tsv(path: str, fields: tuple[str, str]) -> Iterator[tuple[int, str, str]]:
    columns: list[int] = []
    for number, line in _lines(path):
        # quotes are text, as in the tables of Common Voice
        cells = next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE), [])
        if not columns:
            missing = [field for field in fields if field not in cells]
            if missing:
                raise _no_field(path, missing[0], fields, cells)
            columns = [cells.index(field) for field in fields]
        elif cells:
            if len(cells) <= max(columns):
                raise DataError(
                    f"line {number} of '{printable(path)}' must hold {max(columns) + 1} columns or more, separated by "
                    f"tabs, but holds {len(cells)}."
                )
            yield number, cells[columns[0]], cells[columns[1]]


def _jsonl(path: str, fields: tuple[str, str]) -> Iterator[tuple[int, str, str]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise DataError(f"line {number} of '{printable(path)}' is {error}") from None
        entry = entry if isinstance(entry, dict) else {}
        missing = [field for field in fields if field not in entry]
        if missing:
            raise _no_field(path, missing[0], fields, list(entry), number)
        values = [entry[field] for field in fields]
        for field, value in zip(fields, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, (str, int)) or not is_text(str(value)):
                raise DataError(
                    f"line {number} of '{printable(path)}' must hold a string in '{printable(field)}', but holds "
                    f"{printable(repr(value)[:80])}."
                )
        yield number, str(values[0]), str(values[1])


def _no_field(path: str, field: str, fields: tuple[str, str], found: Sequence[str], number: int = 1) -> DataError:
    key = "path_field" if field == fields[0] else "label_field"
    return DataError(
        f"line {number} of '{printable(path)}' must have a column '{printable(field)}' (`d2v.data.{key}`), but has "
        f"{name_list(printable(name) for name in found)}."
    )
