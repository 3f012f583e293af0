"""Rows of labeled tables: .tsv, JSON lines and .parquet with named columns. Bad rows are counted and named."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

from d2v_fast.data.files import UnreadableFile, refuse_system_error
from d2v_fast.data.listing import name_list
from d2v_fast.errors import DataError
from d2v_fast.files.reading import parse_json, printable
from d2v_fast.modalities.text.config_finetune import TableFields
from d2v_fast.modalities.text.files import REPLACEMENT, BadText
from d2v_fast.modalities.text.labels import class_name
from d2v_fast.modalities.text.parquet import parquet_rows
from d2v_fast.modalities.text.streams import (
    COMPRESSED,
    MAX_LINE,
    check_byte_order_mark,
    checked_text,
    not_utf8,
    open_text,
    reason_of,
    text_ending,
    whole_line,
)

__all__ = ["TABLE_ENDINGS", "Table", "TableRow", "class_name", "score_of"]

_LINES = (".tsv", ".jsonl", ".ndjson", ".json")
TABLE_ENDINGS = (*(kind + ending for kind in _LINES for ending in ("", *COMPRESSED)), ".parquet")


class TableRow(NamedTuple):
    """A row of a table.

    Attributes:
        number: Line of the file, or row of a .parquet file; both start at 1.
        text, pair: The text, and the second text of a pair; `pair` is None for single texts.
        label: What `parse_label` returned; None if no labels are read.
    """

    number: int
    text: str
    pair: str | None
    label: Any


class Table:
    """A .tsv, JSON-lines or .parquet file, all but the last also as .gz or .zst.

    A field of a .tsv file is all that lies between two tabs: quotes are ordinary characters.

    Args:
        path: The file.
        fields: The columns to read.
        bad: Counts the rows that cannot be read.
        parse_label: Returns the label of a raw value (a string, or a value of JSON or .parquet), given the name of the
            column for messages; raises UnreadableFile.
        key: The configuration key or option that named the file, for messages.
        replaces: Replace invalid bytes and zero bytes by U+FFFD instead of counting their rows as bad.
    Raises:
        DataError: The file's ending is another one, or two columns of `fields` are the same.
    """

    def __init__(
        self,
        path: str,
        fields: TableFields,
        bad: BadText,
        *,
        parse_label: Callable[[Any, str], Any] = class_name,
        key: str = "`d2v.data.path`",
        replaces: bool = False,
    ) -> None:
        if not path.lower().endswith(TABLE_ENDINGS):
            raise DataError(
                f"{key} must be a file that ends with {', '.join(TABLE_ENDINGS)}, but is '{printable(path)}' instead."
            )
        wanted = [name for name in (fields.text, fields.pair, fields.label) if name is not None]
        if len(set(wanted)) < len(wanted):
            keys = ", ".join(TableFields("a", "b", "c").columns().values())
            raise DataError(f"{keys} must be different columns, but two of them are '{printable(_twice(wanted))}'.")
        self.path, self.fields, self.bad = path, fields, bad
        self._parse, self._key, self._replaces = parse_label, key, replaces

    def rows(self) -> Iterator[TableRow]:
        """Yield the readable rows; count the others, and at the end raise if they are too many.

        Raises:
            DataError: The file cannot be read, a column does not exist, or too many rows are bad.
        """
        read = {".tsv": self._tsv, ".parquet": self._parquet}.get(text_ending(self.path), self._jsonl)
        try:
            with open_text(self.path, None) as stream:
                yield from read(stream.content)
        except (OSError, UnreadableFile) as error:
            refuse_system_error(error, self.path)
            text = f"{self._key} cannot be read: '{printable(self.path)}': {printable(reason_of(error))}."
            raise DataError(text) from None
        self.bad.judge()

    def _tsv(self, file: IO[bytes]) -> Iterator[TableRow]:
        header = self.fields.header
        places = None if not header else self._places(header)
        for number, line in _lines(file):
            try:
                cells = self._decoded(whole_line(line, file)).rstrip("\r\n").split("\t")
                if places is None or (number == 1 and set(self.fields.columns()) <= set(cells)):
                    # some files of a data set have a header line and others have none, such as CoLA's
                    header = tuple(name.strip() for name in cells)
                    places = self._places(header)
                    continue
                if cells == [""]:
                    continue
                if len(cells) != len(header):
                    raise UnreadableFile(f"{len(cells)} fields instead of {len(header)}")
                row = self._row(number, tuple(cells[place] for place in places))
            except UnreadableFile as error:
                self.bad.add(f"{self.path}, line {number}", reason_of(error))
                if places is None:
                    raise UnreadableFile(f"the header cannot be read: {error}") from None
                continue
            self.bad.num_entries += 1
            yield row

    def _jsonl(self, file: IO[bytes]) -> Iterator[TableRow]:
        columns = self.fields.columns()
        for number, line in _lines(file):
            try:
                text = self._decoded(whole_line(line, file))
                if not text.strip():
                    continue
                row = self._row(number, _members(text, columns))
            except UnreadableFile as error:
                self.bad.add(f"{self.path}, line {number}", reason_of(error))
                continue
            self.bad.num_entries += 1
            yield row

    def _parquet(self, file: IO[bytes]) -> Iterator[TableRow]:
        number = 0
        for _, values in parquet_rows(file, self.fields.columns()):
            number += 1
            try:
                row = self._row(number, values)
            except UnreadableFile as error:
                self.bad.add(f"{self.path}, row {number}", reason_of(error))
                continue
            self.bad.num_entries += 1
            yield row

    def _places(self, header: Sequence[str]) -> tuple[int, ...]:
        """Return the positions of the columns in a header."""
        for name, key in self.fields.columns().items():
            if header.count(name) != 1:
                problem = "has no such column" if name not in header else "has it twice"
                raise DataError(
                    f"{key} must name a column of '{printable(self.path)}', but is '{printable(name)}', and the file "
                    f"{problem}; it has {name_list(header)}. For a file without a header line, `d2v.data.columns` "
                    "lists the names of its columns."
                )
        return tuple(header.index(name) for name in self.fields.columns())

    def _decoded(self, line: bytes) -> str:
        try:
            text = line.decode("utf-8", "replace" if self._replaces else "strict")
        except UnicodeDecodeError as error:
            raise UnreadableFile(not_utf8(line, error.start)) from None
        if "\0" in text:
            if not self._replaces:
                raise UnreadableFile("not text: it has zero bytes")
            text = text.replace("\0", REPLACEMENT)
        return text

    def _row(self, number: int, values: tuple[Any, ...]) -> TableRow:
        """Return the row of the values of `TableFields.columns`."""
        fields, found = self.fields, dict(zip(self.fields.columns(), values, strict=True))
        texts = []
        for name in (fields.text, fields.pair):
            if name is not None:
                texts.append(checked_text(found[name], f"column '{name}'", self._replaces).strip())
                if not texts[-1]:
                    raise UnreadableFile(f"column '{name}' is empty")
        label = None if fields.label is None else self._parse(found[fields.label], fields.label)
        return TableRow(number, texts[0], texts[1] if fields.pair is not None else None, label)


def score_of(value: Any, field: str) -> float:
    """Return a label as a number, for regression.

    Args:
        value: A number, or a string that spells one.
        field: Column of the label, for messages.
    Raises:
        UnreadableFile: It is no finite number.
    """
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    shown = printable(str(value)[:40]) if isinstance(value, (str, int, float)) else type(value).__name__
    raise UnreadableFile(f"the label '{field}' holds {shown} instead of a finite number")


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of every line, without a byte order mark."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if number == 1:
            check_byte_order_mark(line)
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line


def _members(text: str, columns: dict[str, str]) -> tuple[Any, ...]:
    """Return some values of the object on a JSON line."""
    try:
        # as text: a label may have any number of digits, and other fields numbers that fit no integer
        entry = parse_json(text, parse_int=_integer)
    except ValueError as error:
        raise UnreadableFile(str(error)) from None
    if not isinstance(entry, dict):
        raise UnreadableFile("not a JSON object {...}")
    for name, key in columns.items():
        if name not in entry:
            raise UnreadableFile(f"no field '{name}' ({key}); it has {name_list(entry)}")
    return tuple(entry[name] for name in columns)


def _integer(digits: str) -> int | str:
    # a string of more digits than Python converts stays a string
    return int(digits) if len(digits) <= 18 else digits


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
