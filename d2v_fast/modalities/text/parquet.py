"""Reading of rows from untrusted .parquet files, with limits that do not depend on their metadata.

A page may be compressed ten-thousandfold, and a dictionary can repeat a long text in every row at one bit each. pyarrow
decompresses whole pages and does not report their size first, so the headers of all pages are checked before reading.
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

# most rows and bytes of a batch: long rows come in smaller batches
MAX_ROWS, MAX_BATCH_BYTES = 256, 1 << 26
# of a decompressed page: writers put a thousand rows into a page, whatever their length
MAX_PAGE_BYTES = 1 << 30
# of the metadata at the end, which needs up to a hundred times as much memory
MAX_FOOTER_BYTES = 1 << 24
# bytes of a column that are read at a time
READ_AHEAD = 1 << 20
# limits of a page header: nesting depth, and entries of a list
MAX_DEPTH, MAX_LIST = 8, 1 << 16
_DATA, _DICTIONARY = 0, 2
# field numbers in a page header
_KIND, _BYTES, _COMPRESSED, _DATA_HEADER, _DATA_HEADER_2 = 1, 2, 3, 5, 8


def parquet_rows(file: IO[bytes], columns: Mapping[str, str]) -> Iterator[tuple[float, tuple[Any, ...]]]:
    """Read some columns of a file row by row.

    Args:
        file: A file, open in binary mode.
        columns: Column names with the configuration keys that name them, for messages.
    Yields:
        The share of the file that has been read, in [0, 1], and the values of a row. Text that is not UTF-8 is bytes.
    Raises:
        OSError: The file could not be read.
        UnreadableFile: The file is damaged, lacks a column, or expands to more than `MAX_RATIO` times its size.
        DataError: pyarrow is missing.
    """
    arrow = _import_parquet()
    size = os.fstat(file.fileno()).st_size
    limit = max(MIN_LIMIT, MAX_RATIO * size)
    try:
        _check_footer(file, size)
        # without a buffer, pyarrow would allocate a whole column at the size that the metadata claims
        with arrow.parquet.ParquetFile(file, buffer_size=READ_AHEAD) as table:
            _check_columns(arrow, table.schema_arrow, columns)
            pages = _Pages(file, table.metadata, columns, limit)
            left, number = limit, 0
            batches = table.iter_batches(batch_size=pages.num_rows, columns=list(columns), use_threads=False)
            for batch in batches:
                for row in zip(*(_values(batch.column(column)) for column in columns), strict=True):
                    number += 1
                    # count one per row: rows without text take time too
                    left -= 1 + sum(len(value) for value in row if isinstance(value, str | bytes))
                    if left < 0:
                        raise UnreadableFile(f"holds more than {limit:,} characters, {MAX_RATIO} times its size")
                    yield min(1.0, number / max(1, table.metadata.num_rows)), row
    except (OSError, ValueError, KeyError, NotImplementedError, MemoryError) as error:
        # Arrow raises these types, for example KeyError for two columns of one name
        if isinstance(error, (UnreadableFile, DataError)) or error_number(error) is not None:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableFile((reason.splitlines() or [type(error).__name__])[0][:300].rstrip(".")) from None


class _Pages:
    """The memory that the pages of some columns need.

    Attributes:
        num_rows: Number of rows to decode together.
    Raises:
        UnreadableFile: The pages exceed a limit, or a header is damaged.
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
                            f"a page of {page.num_bytes:,} bytes exceeds {MAX_PAGE_BYTES:,}: write "
                            "smaller pages (`write_batch_size` in pyarrow)"
                        )
                    if total > limit:
                        raise UnreadableFile(f"decompresses to more than {limit:,} bytes, {MAX_RATIO} times its size")
                    # worst case: one dictionary entry fills its page, and every row repeats it
                    longest = max(longest, page.num_bytes if page.is_dictionary else 0)
                    self._fit(page, longest)

    def _fit(self, page: _Page, longest: int) -> None:
        while self.num_rows > 1:
            num_pages = math.ceil(self.num_rows / max(1, page.num_values))
            # a single page is always in memory as a whole
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
    """A page by its header: decompressed size, kind, and number of values."""

    num_bytes: int
    is_dictionary: bool
    num_values: int


class _Header:
    """A parser of a structure in Thrift's compact protocol, which keeps integers, Booleans and structures.

    Args:
        file: A file at the beginning of the structure; `fields` leaves it at the end.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def fields(self, depth: int = 0) -> dict[int, Any]:
        """Return the values by field number."""
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
            # a string, such as the smallest or the largest text of the page
            self._skip(self._unsigned())
        elif kind in (3, 7):
            self._skip({3: 1, 7: 8}[kind])
        elif kind in (9, 10):
            head = self._bytes(1)[0]
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            if count > MAX_LIST:
                raise UnreadableFile("the header of a page is damaged")
            for _ in range(count):
                # in a list, a Boolean takes one byte
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
            raise UnreadableFile(f"metadata of {footer:,} bytes exceeds {MAX_FOOTER_BYTES:,}")
        file.seek(0)


def _check_columns(arrow: Any, schema: Any, columns: Mapping[str, str]) -> None:
    for column, key in columns.items():
        if column not in schema.names:
            raise UnreadableFile(f"no column '{column}' ({key}); it has {name_list(schema.names)}")
        for place in schema.get_all_field_indices(column):
            kind = schema.field(place).type
            # one row of a list column may hold any number of values
            if arrow.types.is_nested(kind):
                raise UnreadableFile(f"column '{column}' ({key}) holds {str(kind)[:80]} instead of single values")


def _values(column: Any) -> Iterator[Any]:
    """Yield the values of a column; text that is not UTF-8 is bytes."""
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
