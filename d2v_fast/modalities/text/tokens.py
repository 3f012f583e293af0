"""Tokenized text: memory-mapped shards of token ids with a manifest, verified before use.

A folder holds numbered shards, starting with `tokens-00000.bin` (uint16 or uint32, little-endian, the concatenated
tokens of the documents, without special tokens) and `documents-00000.bin` (int64, the lengths of the documents), and
`manifest.json` with the settings, the counts and the SHA-256 of every file. The name of the folder is a digest of the
inputs, the tokenizer and the settings, so a change of any of them creates another folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from d2v_fast.data.cache import PATIENCE_S, made_once
from d2v_fast.data.listing import Listing
from d2v_fast.data.progress import Progress
from d2v_fast.errors import DataError
from d2v_fast.files.faults import fault_point
from d2v_fast.files.io_errors import error_text
from d2v_fast.files.reading import open_regular, printable, read_json
from d2v_fast.modalities.text.files import PIECE, BadText, Piece
from d2v_fast.modalities.text.round_trip import RoundTrip
from d2v_fast.modalities.text.tokenizer import Tokenizer

__all__ = ["TextSource", "Tokens", "tokenized"]

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16_000_000
# increment when the format of the shards or the processing of the text changes
FORMAT = 2
# a shard ends with the document that reaches it
SHARD_TOKENS = 1 << 26
# characters of a batch: per core, at least and at most; two more batches wait
BATCH_PER_CORE, MIN_BATCH, MAX_BATCH = 1 << 18, 1 << 20, 1 << 23
HASH_CHUNK = 1 << 22

_Ids = npt.NDArray[np.unsignedinteger]
# token ids of pieces, their lengths, and whether each ends its document
_Batch = tuple[_Ids, npt.NDArray[np.int64], npt.NDArray[np.bool_]]

_log = logging.getLogger(__name__)


class TextSource(Protocol):
    """A source of documents, such as `TextFiles`.

    Attributes:
        num_bytes, num_read: Bytes in all, and read so far.
        bad, num_empty: Unreadable entries, and the number of documents without text, after `pieces`.
        listing: The files that are used, and those that are not.
    """

    num_bytes: int
    num_read: int
    bad: BadText
    num_empty: int
    listing: Listing

    def digest(self) -> str:
        """Return a digest of everything that determines `pieces`."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents in pieces."""
        ...


def tokenized(
    source: TextSource,
    tokenizer: Tokenizer,
    root: str | None,
    *,
    min_tokens: int = 1,
    verify: bool = True,
    patience_s: float = PATIENCE_S,
) -> Tokens:
    """Return the tokens of all documents, and write them first unless they exist and nothing has changed.

    Logs a warning with an example if the tokenizer loses characters of the text. Memory does not grow with the text,
    but with the number of cores, up to `MAX_BATCH` characters per batch.

    Args:
        source: The documents.
        tokenizer: The tokenizer.
        root, patience_s: See `made_once`.
        min_tokens: Leave out shorter documents.
        verify: Compare all files with their checksums, also if they were written before.
    Raises:
        DataError: There is no text, too much is unreadable, the folder cannot be written, files changed meanwhile, or
            shards differ from what was written.
    """
    inputs = source.digest()
    settings = {"format": FORMAT, "inputs": inputs, "tokenizer": tokenizer.digest, "min_tokens": min_tokens}
    name = f"tokens-{_digest(settings)[:24]}"

    def make(folder: Path) -> None:
        writer, round_trip = _Writer(folder, tokenizer, min_tokens), RoundTrip()
        with Progress("tokenizing", source.num_bytes) as progress:
            for batch in _encoded(source, tokenizer, round_trip):
                writer.add(*batch)
                progress.show(source.num_read, f"{writer.num_added:,} tokens")
            writer.finish()
            progress.close(f"{writer.num_tokens:,} tokens, {writer.num_documents:,} documents")
        if source.digest() != inputs:
            raise DataError("`d2v.data.path` must not change while it is tokenized, but it did. Start again.")
        if writer.num_documents == 0:
            raise DataError(
                f"`d2v.data.min_tokens` must leave some documents, but all {writer.num_short} have fewer than "
                f"{min_tokens} tokens."
            )
        manifest = {
            **settings,
            "dtype": np.dtype(tokenizer.dtype).name,
            "vocab_size": tokenizer.vocab_size,
            "num_documents": writer.num_documents,
            "num_tokens": writer.num_tokens,
            "num_short": writer.num_short,
            "num_empty": source.num_empty,
            "num_entries": source.bad.num_entries,
            "num_unreadable": source.bad.num_bad,
            "unreadable": source.bad.named,
            "round_trip": round_trip.to_dict(),
            "files": writer.files,
        }
        fault_point("tokens.manifest")
        manifest["sha256"] = _digest(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    tokens = Tokens(made_once(root, name, make, patience_s=patience_s), settings, verify=verify)
    # judge again: the limits may have changed since the tokens were written
    bad, manifest = source.bad, tokens.manifest
    bad.num_entries, bad.num_bad = manifest["num_entries"], manifest["num_unreadable"]
    bad.named = manifest["unreadable"]
    bad.judge()
    if problem := RoundTrip.from_dict(manifest["round_trip"]).problem(tokenizer.name):
        _log.warning("%s", problem)
    return tokens


class Tokens:
    """Stored tokens, memory-mapped so that processes share them and none loads all of them.

    Args:
        folder: A folder that `tokenized` wrote.
        settings: Values that the manifest must have; None accepts any.
        verify: Compare all files with their checksums, in threads, at about the speed of the disk.
    Attributes:
        manifest: Content of the manifest.
        num_tokens, num_documents: Number of tokens and documents.
    Raises:
        DataError: A file is missing or differs from what was written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None, *, verify: bool = True) -> None:
        self.folder = folder
        try:
            self.manifest = read_json(folder / MANIFEST, MAX_MANIFEST_BYTES, below=folder)
            entries = [
                _Entry(folder, name, entry["bytes"], entry["sha256"]) for name, entry in sorted(self._files().items())
            ]
            self._dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.manifest["dtype"]])
            self.num_tokens, self.num_documents = self.manifest["num_tokens"], self.manifest["num_documents"]
            if self.manifest.pop("sha256") != _digest(self.manifest):
                raise ValueError("its SHA-256 differs")
            wrong = settings is not None and {key: self.manifest.get(key) for key in settings} != settings
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise self._damaged(MANIFEST, error.strerror or str(error)) from None
        except OSError as error:
            raise self._unreadable(error) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(MANIFEST, str(error)) from None
        if wrong:
            raise self._damaged(MANIFEST, "it belongs to other inputs")
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            try:
                problems = list(pool.map(_Entry.full_problem if verify else _Entry.problem, entries))
            except OSError as error:
                raise self._unreadable(error) from None
        for entry, problem in zip(entries, problems, strict=True):
            if problem:
                raise self._damaged(entry.name, problem)
        counts = [entry.num_bytes // self._dtype.itemsize for entry in entries if entry.name.startswith("tokens-")]
        self._ends = np.cumsum(np.array(counts, dtype=np.int64))
        self._paths = [str(folder / entry.name) for entry in entries if entry.name.startswith("tokens-")]
        self._maps: list[_Ids | None] = [None] * len(self._paths)
        if (
            not counts
            or int(self._ends[-1]) != self.num_tokens
            or int(self.document_lengths().sum()) != self.num_tokens
        ):
            raise self._damaged(MANIFEST, "its counts do not agree")

    def __getstate__(self) -> dict[str, Any]:
        # pickling a map would copy all of it to a worker
        return {**vars(self), "_maps": [None] * len(self._paths)}

    def content_digest(self) -> str:
        """Return a digest of all tokens and document lengths, independent of the files that they came from."""
        return _digest({name: entry["sha256"] for name, entry in self._files().items()})

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each document, int64 `[num_documents]`, in the order of `read`."""
        names = sorted(name for name in self._files() if name.startswith("documents-"))
        lengths = []
        for name in names:
            with open_regular(self.folder / name, below=self.folder) as file:
                lengths.append(np.fromfile(file, dtype="<i8").astype(np.int64))
        return np.concatenate(lengths)

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Read the tokens in `[start, stop)`, int64."""
        if start >= stop:
            # a block may hold nothing but the end of a document
            return np.empty(0, dtype=np.int64)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        parts = []
        for shard in range(first, last + 1):
            begin = int(self._ends[shard - 1]) if shard else 0
            parts.append(self._map(shard)[max(0, start - begin) : max(0, stop - begin)])
        return np.concatenate(parts).astype(np.int64)

    def _map(self, shard: int) -> _Ids:
        found = self._maps[shard]
        if found is None:
            with open_regular(self._paths[shard], below=self.folder) as file:
                found = self._maps[shard] = np.memmap(file, dtype=self._dtype, mode="r")
        return found

    def _files(self) -> dict[str, Any]:
        files: dict[str, Any] = self.manifest["files"]
        return files

    def _unreadable(self, error: OSError) -> DataError:
        # not a sign of damage, so making the tokens again would not help
        return DataError(f"the tokens in '{printable(str(self.folder))}' cannot be read: {error_text(error)}")

    def _damaged(self, file: str, reason: str) -> DataError:
        folder = printable(str(self.folder))
        return DataError(
            f"the tokens in '{folder}' must be as they were written, but {printable(file)} is not: "
            f"{printable(reason)}. Remove that folder; it will be made again."
        )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Entry(NamedTuple):
    """A file that the manifest lists."""

    folder: Path
    name: str
    num_bytes: int
    sha256: str

    def problem(self) -> str | None:
        """Return what is wrong with the name or the size; None if nothing is."""
        path = self.folder / self.name
        if not isinstance(self.name, str) or os.path.basename(self.name) != self.name or path.is_symlink():
            return "it is not a file in this folder"
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return "it is missing"
        return None if size == self.num_bytes else f"{size:,} bytes instead of {self.num_bytes:,}"

    def full_problem(self) -> str | None:
        """Return what is wrong after reading the whole file; None if nothing is."""
        problem = self.problem()
        if problem is not None:
            return problem
        state = hashlib.sha256()
        try:
            with open_regular(self.folder / self.name, below=self.folder) as file:
                while chunk := file.read(HASH_CHUNK):
                    state.update(chunk)
        except OSError as error:
            return error.strerror or str(error)
        return None if state.hexdigest() == self.sha256 else "its SHA-256 differs"


class _Writer:
    """A writer of documents into shards."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, min_tokens: int) -> None:
        self.files: dict[str, Any] = {}
        self.num_tokens = self.num_documents = self.num_short = 0
        self._folder, self._min_tokens = folder, min_tokens
        self._dtype = np.dtype(tokenizer.dtype).newbyteorder("<")
        # the unfinished document: its length so far, and its tokens until it has `min_tokens`
        self._length, self._held = 0, np.empty(0, dtype=self._dtype)
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._tokens: _File | None = None

    def add(self, ids: _Ids, lengths: npt.NDArray[np.int64], ends: npt.NDArray[np.bool_]) -> None:
        """Add the next pieces.

        Args:
            ids: Tokens of all pieces, concatenated.
            lengths: int64 `[B]`, number of tokens of each piece.
            ends: bool `[B]`, whether each piece ends its document.
        """
        # pieces up to the last end complete documents; the others begin an unfinished one
        num = int(np.flatnonzero(ends)[-1]) + 1 if ends.any() else 0
        cut = int(lengths[:num].sum())
        if num:
            document: npt.NDArray[np.int64] = np.cumsum(ends[:num]) - ends[:num]
            sizes = np.bincount(document, weights=lengths[:num]).astype(np.int64)
            self._add_whole(ids[:cut], sizes)
        self._length += int(lengths[num:].sum())
        self._held = np.concatenate([self._held, ids[cut:]])
        if self._length >= self._min_tokens:
            self._write(self._held)
            self._held = self._held[:0]

    @property
    def num_added(self) -> int:
        """Tokens so far, including the unfinished document."""
        return self.num_tokens + self._length

    def finish(self) -> None:
        """Close the current shard."""
        if self._tokens is None:
            return
        documents = _File(self._folder, f"documents-{self._number():05d}.bin")
        for lengths in self._lengths:
            documents.write(lengths.astype("<i8").tobytes())
        for file in (self._tokens, documents):
            self.files[file.name] = file.close()
        self._tokens, self._lengths = None, []
        fault_point("tokens.shard")

    def _add_whole(self, ids: _Ids, sizes: npt.NDArray[np.int64]) -> None:
        """Add the rest of the unfinished document and the whole documents after it."""
        ids = np.concatenate([self._held, ids])
        # part of the first document may be written already
        there = sizes.copy()
        there[0] += len(self._held)
        sizes[0] += self._length
        self._length, self._held = 0, self._held[:0]
        kept = sizes >= self._min_tokens
        if not kept.all():
            ids = ids[np.repeat(kept, there)]
        self._write(ids)
        self._lengths.append(sizes[kept])
        self.num_tokens += int(sizes[kept].sum())
        self.num_documents += int(kept.sum())
        self.num_short += int((~kept).sum())
        if self._tokens is not None and self._tokens.num_bytes >= SHARD_TOKENS * self._dtype.itemsize:
            self.finish()

    def _write(self, ids: _Ids) -> None:
        if len(ids) == 0:
            return
        if self._tokens is None:
            self._tokens = _File(self._folder, f"tokens-{self._number():05d}.bin")
        self._tokens.write(ids.astype(self._dtype, copy=False).tobytes())

    def _number(self) -> int:
        return len(self.files) // 2


class _File:
    """A file that is hashed while it is written."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.num_bytes = name, 0
        self._file: IO[bytes] = open(folder / name, "xb", buffering=HASH_CHUNK)  # noqa: SIM115 - closed by `close`
        self._state = hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._state.update(content)
        self.num_bytes += len(content)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self.num_bytes, "sha256": self._state.hexdigest()}


def _encoded(source: TextSource, tokenizer: Tokenizer, round_trip: RoundTrip) -> Iterator[_Batch]:
    """Yield batches of tokenized pieces, reading ahead meanwhile; count lost characters in `round_trip`."""
    batch_size = min(MAX_BATCH, max(MIN_BATCH, (os.cpu_count() or 1) * BATCH_PER_CORE))

    def encode(pieces: list[Piece]) -> tuple[_Batch, RoundTrip]:
        texts = [piece.text for piece in pieces]
        ids, lengths = tokenizer.encode(texts)
        return (ids, lengths, np.array([piece.ends for piece in pieces])), RoundTrip().add(tokenizer, texts)

    def result() -> _Batch:
        batch, found = waiting.popleft().result()
        round_trip.merge(found)
        return batch

    waiting: deque[Future[tuple[_Batch, RoundTrip]]] = deque()
    with ThreadPoolExecutor(2) as pool:
        for pieces in _batches(source.pieces(), batch_size):
            waiting.append(pool.submit(encode, pieces))
            if len(waiting) > 2:
                yield result()
        while waiting:
            yield result()


def _batches(pieces: Iterator[Piece], size: int) -> Iterator[list[Piece]]:
    """Yield lists of pieces that reach `size` characters; each piece also counts a constant, for its fixed cost."""
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece.text) + PIECE // 1024
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
