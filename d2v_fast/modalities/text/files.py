"""Reading of .txt, JSON lines and .parquet files of any size, in pieces; unreadable entries are counted."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from d2v_fast.data.files import NUM_NAMED, NUM_NEIGHBORS, UnreadableFile, find_files, refuse_system_error
from d2v_fast.data.listing import ARCHIVES, FileKinds, Listing, count_endings, describe_listing, name_list
from d2v_fast.errors import DataError
from d2v_fast.files.reading import parse_json, printable
from d2v_fast.modalities.text.parquet import parquet_rows
from d2v_fast.modalities.text.streams import (
    COMPRESSED,
    MAX_LINE,
    check_byte_order_mark,
    check_text,
    checked_text,
    not_utf8,
    open_text,
    reason_of,
    text_ending,
    whole_line,
)

if TYPE_CHECKING:
    from d2v_fast.modalities.text.config import TextDataConfig

__all__ = ["KINDS", "PIECE", "BadText", "Piece", "TextFiles", "pieces_of"]

_CONVERT = "convert them to .txt or .jsonl"
_JSON_LINES = (".jsonl", ".ndjson", ".json")
KINDS = FileKinds(
    "text",
    read=(*(kind + ending for kind in (".txt", *_JSON_LINES) for ending in ("", *COMPRESSED)), ".parquet"),
    unread={
        **ARCHIVES,
        **dict.fromkeys((".arrow", ".csv", ".doc", ".docx", ".epub", ".htm", ".html", ".md"), _CONVERT),
        **dict.fromkeys((".odt", ".pdf", ".rst", ".rtf", ".tex", ".tsv", ".warc", ".xml"), _CONVERT),
    },
)

# most characters of a piece; longer documents are divided, at white space if there is any
PIECE = 1 << 16
# stop reading early once the unreadable entries exceed this many times the allowance of all text
EARLY_STOP = 2
# replaces invalid bytes and zero bytes
REPLACEMENT = "\ufffd"
# lines of a .json file that are examined to find out whether it holds JSON lines
NUM_PEEKED = 10

_log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A part of a document, and whether it ends the document."""

    text: str
    ends: bool


class BadText:
    """Count of unreadable entries, which raises DataError when there are too many.

    Args:
        max_fraction: Share of the entries that may be unreadable (`data.max_bad_fraction`).
        strict: Raise at the first unreadable entry (`data.strict`).
        what: The kind of entries, in the plural, for messages.
        share_read: Return the share of all text that has been read so far, in [0, 1].
    Attributes:
        named: The first unreadable entries, as `path: reason`.
        num_bad, num_entries: Number of unreadable entries, and of all entries.
        what: The kind of entries.
    """

    def __init__(
        self, max_fraction: float, strict: bool, what: str, share_read: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.named: list[str] = []
        self.num_bad = self.num_entries = 0
        self.what = what
        self._max_fraction, self._strict, self._share_read = max_fraction, strict, share_read

    def add(self, where: str, reason: str) -> None:
        """Count an entry that cannot be read.

        Raises:
            DataError: `strict` is set, or more entries are unreadable than the rest of the text can compensate.
        """
        self.num_entries += 1
        self.num_bad += 1
        if len(self.named) < NUM_NAMED:
            text = printable(f"{where}: {reason}")
            self.named.append(text)
            _log.warning("skipped unreadable text: %s", text)
        if self._strict:
            self.judge()
        share = self._share_read()
        if share > 0 and self.num_bad >= NUM_NEIGHBORS and self._max_fraction < 1:
            allowed = math.ceil(self._max_fraction * self.num_entries / min(share, 1.0))
            if self.num_bad > EARLY_STOP * allowed:
                self._stop()

    def judge(self) -> None:
        """Raise DataError if too many of all entries are unreadable."""
        if self._strict and self.num_bad:
            raise DataError(f"unreadable text, and `d2v.data.strict` is true:\n  {self.named[0]}")
        if self.num_bad > math.ceil(self._max_fraction * self.num_entries):
            self._stop()

    def _stop(self) -> None:
        more = self.num_bad - len(self.named)
        raise DataError(
            f"{self.num_bad} of {self.num_entries} {self.what} are unreadable, and `d2v.data.max_bad_fraction` is "
            f"{self._max_fraction}. Repair or remove them, or raise that limit:\n  "
            + "\n  ".join(self.named)
            + (f"\n  and {more} more" if more > 0 else "")
        )


class TextFiles:
    """The text files (`KINDS`) that `data.path` names or contains, ordered by path.

    Attributes:
        bad: Unreadable entries, after `pieces`.
        num_empty: Number of documents without text, after `pieces`.
        listing: The files that are used, and those that are not.
        num_bytes: Bytes of all files.
        num_read: Bytes read so far, while `pieces` is iterated.
    Raises:
        DataError: The file or folder does not exist, or the folder has no text file.
    """

    def __init__(self, data: TextDataConfig) -> None:
        if data.path is None:
            raise DataError("`d2v.data.path` must be a file or a folder that holds text, but is null instead.")
        path = os.path.abspath(data.path)
        if os.path.isfile(path):
            self.root, name = os.path.split(path)
            self._names, self._inside = [name], None
            self.listing = Listing(count_endings(self._names))
            if not path.lower().endswith(KINDS.read):
                raise DataError(
                    f"`d2v.data.path` must be a folder, or a file that ends with {', '.join(KINDS.read)}, but is "
                    f"'{printable(path)}' instead."
                )
        else:
            self.root = path
            self._inside = None if data.follow_outside else os.path.realpath(path)
            self._names, self.listing = find_files(path, self._inside, KINDS)
        self._data = data
        self._replaces = data.encoding_errors == "replace"
        self._leave_out_json()
        self._reset()
        self.num_bytes = sum(size for _, size, _ in self._listing())

    def _leave_out_json(self) -> None:
        """Leave out .json files without JSON lines that have the field: they usually hold metadata."""
        known = [name for name in self._names if text_ending(name) == ".json"]
        others = {name for name in known if not self._holds_lines(os.path.join(self.root, name))}
        if not others:
            return
        self._names = [name for name in self._names if name not in others]
        first = printable(min(others))
        why = f"without JSON lines that have the field '{self._data.field}' (`d2v.data.field`): {first}"
        listing = replace(self.listing, used=count_endings(self._names))
        self.listing = listing.without(len(others), ".json file", why)
        if not self._names:
            raise DataError(
                f"`d2v.data.path` must hold text, but '{printable(self.root)}' has none. A .json file is read if every "
                f"line is an object {{...}} with the field '{self._data.field}' (`d2v.data.field`)."
                + "".join(f"\n  {line}" for line in describe_listing(self.listing, "")[1:])
            )

    def _holds_lines(self, path: str) -> bool:
        """Return whether one of the first lines is one that `_jsonl` reads; True for a damaged file, to count it."""
        try:
            with open_text(path, self._inside) as stream:
                for number in range(NUM_PEEKED):
                    line = stream.content.readline(MAX_LINE)
                    if line.lstrip(codecs.BOM_UTF8).lstrip()[:1] not in (b"{", b""):
                        return False
                    with contextlib.suppress(UnreadableFile):
                        if self._field(line, first=number == 0) is not None:
                            return True
        except (OSError, UnreadableFile):
            return True
        return False

    def _reset(self) -> None:
        data = self._data
        self.bad = BadText(data.max_bad_fraction, data.strict, "files, lines and rows", self._share_read)
        self.num_empty = self.num_read = 0

    def __len__(self) -> int:
        return len(self._names)

    def _share_read(self) -> float:
        return self.num_read / max(1, self.num_bytes)

    def digest(self) -> str:
        """Return a SHA-256 of the names, sizes and modification times of all files, and of the settings for reading."""
        data = self._data
        settings = (data.field, data.documents, data.encoding_errors)
        state = hashlib.sha256(repr(settings).encode())
        for name, size, changed in self._listing():
            state.update(os.fsencode(name) + f"\0{size}\0{changed}\n".encode())
        return state.hexdigest()

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents in pieces of at most `PIECE` characters.

        Raises:
            DataError: Too many entries are unreadable, or there is no text at all.
        """
        self._reset()
        num_documents = before = 0
        for name in self._names:
            path = os.path.join(self.root, name)
            read = {".txt": self._txt, ".parquet": self._parquet}.get(text_ending(name), self._jsonl)
            parts = read(path)
            for piece in pieces_of(parts):
                if piece.ends and not piece.text:
                    self.num_empty += 1
                    continue
                num_documents += piece.ends
                yield piece
            before += _size(path)
            self.num_read = before
        self.bad.judge()
        if num_documents == 0:
            first = "".join(f"\n  {text}" for text in self.bad.named)
            raise DataError(
                f"`d2v.data.path` must hold text, but none of {len(self)} files in '{printable(self.root)}' has any "
                f"({self.num_empty} empty documents, {self.bad.num_bad} unreadable).{first}"
            )
        if self.num_empty:
            _log.info("left out %d empty documents", self.num_empty)

    def _listing(self) -> Iterator[tuple[str, int, int]]:
        for name in self._names:
            try:
                status = os.stat(os.path.join(self.root, name))
                yield name, status.st_size, status.st_mtime_ns
            except OSError:
                # reading the file will report the error
                yield name, 0, 0

    def _txt(self, path: str) -> Iterator[str | None]:
        try:
            with open_text(path, self._inside) as stream:
                check_text(stream.content, self._replaces)
            with open_text(path, self._inside) as stream:
                self.bad.num_entries += 1
                errors = "replace" if self._replaces else "strict"
                lines = io.TextIOWrapper(stream.content, encoding="utf-8-sig", errors=errors)
                yield from self._documents(iter(lambda: lines.readline(PIECE), ""), stream.file)
                lines.detach()
        except UnicodeDecodeError:
            raise DataError(f"'{printable(path)}' was changed while it was read. Start again.") from None
        except (OSError, UnreadableFile) as error:
            # the tokens are cached, so a file that is left out now stays left out
            refuse_system_error(error, path, is_lasting=True)
            self.bad.add(path, reason_of(error))

    def _documents(self, lines: Iterable[str], file: IO[bytes]) -> Iterator[str | None]:
        """Yield lines, and None at the end of each document. Lines longer than `PIECE` characters come in parts."""
        before = self.num_read
        kind, starts, is_open = self._data.documents, True, False
        for line in lines:
            is_empty = starts and line.isspace()
            starts = line.endswith("\n")
            if self._replaces:
                line = line.replace("\0", REPLACEMENT)
            if kind == "file" or not is_empty:
                yield line
                is_open = True
            if is_open and ((kind == "line" and starts) or (kind == "paragraph" and is_empty)):
                yield None
                is_open = False
            self.num_read = before + file.tell()
        if is_open or kind == "file":
            yield None

    def _jsonl(self, path: str) -> Iterator[str | None]:
        number, before = 0, self.num_read
        try:
            with open_text(path, self._inside) as stream:
                while line := stream.content.readline(MAX_LINE + 1):
                    number += 1
                    self.num_read = before + stream.file.tell()
                    if number == 1:
                        check_byte_order_mark(line)
                    try:
                        text = self._field(whole_line(line, stream.content), first=number == 1)
                    except UnreadableFile as error:
                        self.bad.add(f"{path}, line {number}", reason_of(error))
                        continue
                    if text is not None:
                        self.bad.num_entries += 1
                        yield text
                        yield None
        except (OSError, UnreadableFile) as error:
            # the tokens are cached, so a file that is left out now stays left out
            refuse_system_error(error, path, is_lasting=True)
            self.bad.add(path, reason_of(error))

    def _field(self, line: bytes, first: bool) -> str | None:
        """Return the text of a JSON line; None for an empty line."""
        if first and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        try:
            content = line.rstrip(b"\r\n").decode("utf-8", "replace" if self._replaces else "strict")
        except UnicodeDecodeError as error:
            raise UnreadableFile(not_utf8(line, error.start)) from None
        if not content.strip():
            return None
        if self._replaces:
            content = content.replace("\0", REPLACEMENT)
        try:
            # discard numbers: only the text matters, and other fields may hold numbers of twenty digits
            entry = parse_json(content, parse_int=_no_number)
        except ValueError as error:
            raise UnreadableFile(str(error)) from None
        field = self._data.field
        if not isinstance(entry, dict):
            raise UnreadableFile("not a JSON object {...}")
        if field not in entry:
            raise UnreadableFile(f"no field '{field}' (`d2v.data.field`); it has {name_list(entry)}")
        return checked_text(entry[field], f"field '{field}'", self._replaces)

    def _parquet(self, path: str) -> Iterator[str | None]:
        number, before, size = 0, self.num_read, _size(path)
        try:
            with open_text(path, self._inside) as stream:
                for share, row in parquet_rows(stream.file, self._columns()):
                    number += 1
                    try:
                        text = self._text_of_row(row)
                    except UnreadableFile as error:
                        self.bad.add(f"{path}, row {number}", reason_of(error))
                        continue
                    self.bad.num_entries += 1
                    yield text
                    yield None
                    self.num_read = before + int(share * size)
        except (OSError, UnreadableFile) as error:
            refuse_system_error(error, path, is_lasting=True)
            self.bad.add(path if number == 0 else f"{path}, after row {number}", reason_of(error))

    def _columns(self) -> dict[str, str]:
        """Return the columns to read from a .parquet file, the text first, with the keys that name them."""
        return {self._data.field: "`d2v.data.field`"}

    def _text_of_row(self, row: tuple[Any, ...]) -> str:
        """Return the text of a .parquet row, given the values of `_columns`."""
        return checked_text(row[0], f"column '{self._data.field}'", self._replaces)


def pieces_of(parts: Iterable[str | None]) -> Iterator[Piece]:
    """Yield documents in pieces of at most `PIECE` characters, without white space at the ends of a document.

    A document without text is a single empty piece.

    Args:
        parts: Parts of documents, of any length; None ends a document.
    """
    held: list[str] = []
    size, starts = 0, True
    for part in _ended(parts):
        if part is not None:
            held.append(part.lstrip() if starts and not held else part)
            size += len(held[-1])
            if size < 2 * PIECE:
                continue
        text = "".join(held)
        if starts:
            text = text.lstrip()
        begin, left = 0, len(text)
        while left >= 2 * PIECE or (part is None and left > PIECE):
            # index into the text: cutting off each yielded piece would take hours for a line of 64 MiB
            cut = _cut(text[begin : begin + PIECE + 1])
            yield Piece(text[begin : begin + cut], ends=False)
            begin, left, starts = begin + cut, left - cut, False
        text = text[begin:]
        held, size = [text], len(text)
        if part is None:
            # a piece after another one must not be empty
            yield Piece(text.rstrip() or text, ends=True)
            held, size, starts = [], 0, True


def _ended(parts: Iterable[str | None]) -> Iterator[str | None]:
    """Yield the parts, with a None added if the last document does not end."""
    part: str | None = None
    for part in parts:
        yield part
    if part is not None:
        yield None


def _cut(text: str) -> int:
    """Return where to cut a text, at most at `PIECE`, without changing how tokenizers divide it."""
    # at a single line break, which stays with the text before, or a single blank, which goes to the text after
    for mark, before in (("\n", 1), (" ", 0)):
        position = PIECE - 1
        for _ in range(64):
            position = text.rfind(mark, PIECE // 2, position)
            if position < 0:
                break
            if not text[position - 1].isspace() and not text[position + 1].isspace():
                return position + before
    return PIECE


def _no_number(digits: str) -> int:
    return 0


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
