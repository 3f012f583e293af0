"""Rows of .parquet files that others wrote, read with bounds that do not rely on what their metadata says.

A page may be compressed ten-thousandfold, and a dictionary repeats a long text in every row for a bit each. So the
headers of all pages that will be read are looked at first: pyarrow decompresses a page as a whole, and does not show
how large it becomes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

from d2v_fast.data.files import UnreadableFile
from d2v_fast.data.listing import name_list
from d2v_fast.errors import DataError
from d2v_fast.files.io_errors import error_number
from d2v_fast.modalities.text.streams import MAX_RATIO, MIN_LIMIT
from d2v_fast.packages import install_command

__all__ = ["parquet_rows"]

# rows that are decoded together, and bytes: fewer rows where they are long
MAX_ROWS, MAX_BATCH_BYTES = 256, 1 << 26
# of a page when it is decompressed: writers put a thousand rows into one, whatever their length
MAX_PAGE_BYTES = 1 << 30
# of the metadata at the end, which takes up to a hundred times as much memory
MAX_FOOTER_BYTES = 1 << 24
# bytes that are read of a column at a time
READ_AHEAD = 1 << 20
# of a header: fields inside of fields, and entries of a list
MAX_DEPTH, MAX_LIST = 8, 1 << 16
_DATA, _DICTIONARY = 0, 2
# numbers of fields in the header of a page
_KIND, _BYTES, _COMPRESSED, _DATA_HEADER, _DATA_HEADER_2 = 1, 2, 3, 5, 8


def parquet_rows(file: IO[bytes], columns: Mapping[str, str]) -> Iterator[tuple[float, tuple[Any, ...]]]:
    """Read some columns of a file row by row.

    Args:
        file: open in binary mode.
        columns: names of columns, the text first, and of the keys that chose them.
    Yields:
        How much of the file has been read, in [0, 1], and the values of a row; bytes where a text is not UTF-8.
    Raises:
        OSError: it could not be read.
        UnreadableFile: it is damaged, lacks a column, or has more than `MAX_RATIO` times its own size.
        DataError: pyarrow is missing.
    """
    arrow = _import_parquet()
    size = os.fstat(file.fileno()).st_size
    limit = max(MIN_LIMIT, MAX_RATIO * size)
    try:
        _check_footer(file, size)
        # a column at once would take as much memory as its size in the metadata
        with arrow.parquet.ParquetFile(file, buffer_size=READ_AHEAD) as table:
            _check_columns(arrow, table.schema_arrow, columns)
            pages = _Pages(file, table.metadata, columns, limit)
            left, number = limit, 0
            batches = table.iter_batches(batch_size=pages.num_rows, columns=list(columns), use_threads=False)
            for batch in batches:
                for row in zip(*(_values(batch.column(column)) for column in columns), strict=True):
                    number += 1
                    # a row without text takes time as well
                    left -= 1 + (len(row[0]) if isinstance(row[0], str | bytes) else 0)
                    if left < 0:
                        raise UnreadableFile(f"holds more than {limit:,} characters, {MAX_RATIO} times its size")
                    yield min(1.0, number / max(1, table.metadata.num_rows)), row
    except (OSError, ValueError, KeyError, NotImplementedError, MemoryError) as error:
        # Arrow's own errors are of these, such as KeyErrors for two columns of one name
        if isinstance(error, (UnreadableFile, DataError)) or error_number(error) is not None:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableFile((reason.splitlines() or [type(error).__name__])[0][:300].rstrip(".")) from None


class _Pages:
    """What the pages of some columns need.

    Attributes:
        num_rows: that can be decoded together.
    Raises:
        UnreadableFile: it is more than is allowed, or a header is damaged.
    """

    def __init__(self, file: IO[bytes], metadata: Any, columns: Mapping[str, str], limit: int) -> None:
        self.num_rows, self._file = MAX_ROWS, file
        total = 0
        places = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path in columns]
        for group in range(metadata.num_row_groups):
            for place in places:
                longest = 0
                for page in self._pages_of(metadata.row_group(group).column(place)):
                    total += page.num_bytes
                    if page.num_bytes > MAX_PAGE_BYTES:
                        raise UnreadableFile(
                            f"a page of {page.num_bytes:,} bytes is more than {MAX_PAGE_BYTES:,}: write "
                            "smaller pages (`write_batch_size` of pyarrow)"
                        )
                    if total > limit:
                        raise UnreadableFile(f"decompresses to more than {limit:,} bytes, {MAX_RATIO} times its size")
                    # of a dictionary, one entry may be all of it, and in every row
                    longest = max(longest, page.num_bytes if page.is_dictionary else 0)
                    self._fit(page, longest)

    def _fit(self, page: _Page, longest: int) -> None:
        while self.num_rows > 1:
            num_pages = math.ceil(self.num_rows / max(1, page.num_values))
            # a single page is in memory as a whole in any case
            decoded = 0 if num_pages == 1 else page.num_bytes * num_pages
            if max(longest * self.num_rows, decoded) <= MAX_BATCH_BYTES:
                return
            self.num_rows //= 2

    def _pages_of(self, chunk: Any) -> Iterator[_Page]:
        starts = [chunk.data_page_offset]
        if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None and chunk.dictionary_page_offset > 0:
            starts.append(chunk.dictionary_page_offset)
        position = min(starts)
        end, left = position + chunk.total_compressed_size, chunk.num_values
        if position < 0 or chunk.total_compressed_size < 0 or end > os.fstat(self._file.fileno()).st_size:
            raise UnreadableFile("a column that lies outside of the file")
        while position < end and left > 0:
            self._file.seek(position)
            header = _Header(self._file).fields()
            data = header.get(_DATA_HEADER) or header.get(_DATA_HEADER_2) or {}
            sizes = [header.get(_BYTES), header.get(_COMPRESSED), data.get(1, 0) if isinstance(data, dict) else None]
            num_bytes, compressed, num_values = (size if type(size) is int else -1 for size in sizes)
            if min(num_bytes, compressed, num_values) < 0:
                raise UnreadableFile("the header of a page is damaged")
            position = self._file.tell() + compressed
            left -= num_values
            yield _Page(num_bytes, header.get(_KIND) == _DICTIONARY, num_values)


class _Page(NamedTuple):
    """A page as its header describes it: its size when it is decompressed, and the values in it."""

    num_bytes: int
    is_dictionary: bool
    num_values: int


class _Header:
    """A structure in Thrift's compact protocol, of which integers and structures are kept.

    Args:
        file: at its beginning, and behind its end after `fields`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def fields(self, depth: int = 0) -> dict[int, Any]:
        """Values by the numbers of fields."""
        found: dict[int, Any] = {}
        number = 0
        while head := self._bytes(1)[0]:
            number = number + (head >> 4) if head >> 4 else self._integer()
            found[number] = self._value(head & 15, depth)
            if len(found) > MAX_LIST:
                break
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise UnreadableFile("the header of a page is damaged")
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.fields(depth + 1)
        if kind == 8:
            # the smallest and the largest text of the page
            self._skip(self._unsigned())
        elif kind in (3, 7):
            self._skip({3: 1, 7: 8}[kind])
        elif kind in (9, 10):
            head = self._bytes(1)[0]
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            if count > MAX_LIST:
                raise UnreadableFile("the header of a page is damaged")
            for _ in range(count):
                # a truth in a list takes a byte
                self._value(3 if head & 15 in (1, 2) else head & 15, depth + 1)
        else:
            raise UnreadableFile("the header of a page is damaged")
        return None

    def _integer(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._bytes(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise UnreadableFile("the header of a page is damaged")

    def _bytes(self, count: int) -> bytes:
        content = self._file.read(count)
        if len(content) < count:
            raise UnreadableFile("the header of a page is cut off")
        return content

    def _skip(self, count: int) -> None:
        self._file.seek(count, os.SEEK_CUR)


def _check_footer(file: IO[bytes], size: int) -> None:
    if size >= 8:
        file.seek(-8, os.SEEK_END)
        footer = int.from_bytes(file.read(4), "little")
        if file.read(4) == b"PAR1" and footer > MAX_FOOTER_BYTES:
            raise UnreadableFile(f"metadata of {footer:,} bytes are more than {MAX_FOOTER_BYTES:,}")
        file.seek(0)


def _check_columns(arrow: Any, schema: Any, columns: Mapping[str, str]) -> None:
    for column, key in columns.items():
        if column not in schema.names:
            raise UnreadableFile(f"no column '{column}' ({key}); it has {name_list(schema.names)}")
        for place in schema.get_all_field_indices(column):
            kind = schema.field(place).type
            # one row of a list may hold any number of values
            if arrow.types.is_nested(kind):
                raise UnreadableFile(f"column '{column}' ({key}) holds {str(kind)[:80]} instead of single values")


def _values(column: Any) -> Iterator[Any]:
    """The values of a column, one after the other; bytes where a text is not UTF-8."""
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield getattr(value, "value", value).as_buffer().to_pybytes()


def _import_parquet() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types
    except Exception as error:
        raise DataError(
            f".parquet files are read with pyarrow, which cannot be imported ({type(error).__name__}: {error}): "
            f"{install_command('pyarrow')}"
        ) from None
    return pyarrow
