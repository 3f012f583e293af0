"""Text for pre-training: blocks of tokens, from files or from the sample set, tokenized once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.data.cache import PATIENCE_S, made_once
from d2v_fast.data.listing import Listing, print_listing
from d2v_fast.data.progress import Progress
from d2v_fast.data.samples import digest_of
from d2v_fast.errors import DataError
from d2v_fast.files.paths import expand_path
from d2v_fast.files.reading import printable
from d2v_fast.modalities.text.files import TextFiles
from d2v_fast.modalities.text.packing import pack
from d2v_fast.modalities.text.reference_pages import DocsSource, Split, docs_tokenizer
from d2v_fast.modalities.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from d2v_fast.modalities.text.tokens import TextSource, tokenized

if TYPE_CHECKING:
    from d2v_fast.config import TextConfig
    from d2v_fast.modalities.text.config import TextDataConfig, TextModelConfig

__all__ = [
    "TextDataset",
    "TokenBlocks",
    "make_tokenizer",
    "run_tokenizer",
    "tokenize",
    "tokenizer_of",
    "with_vocabulary",
]

_log = logging.getLogger(__name__)


class TokenBlocks(NamedTuple):
    """Blocks, padded to one length.

    Attributes:
        tokens: int64 `[B, T]`, padding tokens behind the end of each.
        lengths: int64 `[B]`.
        offsets: int32 `[segments + 1]`, where the documents start in the row of all tokens that are not padding, and
            its length; None where documents of a block attend to each other.
    """

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int32] | None


class TextDataset:
    """The blocks of all documents, in the order of files and of documents in them.

    At the first use the text is tokenized, with all cores and a progress bar, and written below `data.tokens_path`;
    later uses, of other processes too, read what is there. What is mapped into memory is shared by the workers.

    Attributes:
        lengths: int64 `[S]`, tokens of every block, special ones included.
        block_size: most tokens of a block.
        tokenizer: see `Tokenizer`; also its `specials` and `vocab_size`.
        tokens: see `Tokens`.
        listing: which files are used, and what is left out: other files, and documents that are empty, too short or
            unreadable.

    Args:
        split: "test" is the held-out part of the sample set; files have none.
        verify: compare everything that is read with its checksum, once, now.
        patience_s: seconds for which another process that writes the same tokens may make no progress.
    Raises:
        DataError: there is no text or no tokenizer, too much is unreadable, the tokenizer does not fit the model, the
            tokens cannot be written or are not what was written.
    """

    def __init__(
        self,
        data: TextDataConfig,
        model: TextModelConfig,
        split: Split = "train",
        *,
        verify: bool = True,
        patience_s: float = PATIENCE_S,
    ) -> None:
        if data.block_size > model.max_positions:
            raise DataError(
                f"`d2v.data.block_size` must be <= `d2v.model.max_positions` ({model.max_positions}), but is "
                f"{data.block_size} instead."
            )
        if data.kind != "docs" and split != "train":
            raise DataError(f'`split` must be "train" for files, but is "{split}" instead.')
        self.tokenizer = tokenizer_of(data, model, patience_s)
        source: TextSource = DocsSource(data, split) if data.kind == "docs" else TextFiles(data)
        self.specials, self.vocab_size = self.tokenizer.specials, self.tokenizer.vocab_size
        limits: dict[str, Any] = {"min_tokens": data.min_tokens, "verify": verify, "patience_s": patience_s}
        self.tokens = tokenized(source, self.tokenizer, data.tokens_path, **limits)
        self.listing = _listing(source.listing, self.tokens.manifest, data.min_tokens)
        self.block_size, self._separate = data.block_size, data.separate_documents
        self._division = (data.block_size, data.packing, data.separate_documents)
        self._blocks = pack(
            self.tokens.document_lengths(),
            data.block_size,
            whole=data.packing == "document",
            separate=self._separate,
        )
        self.lengths = self._blocks.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def names_digest(self) -> str:
        """Return a digest of the tokens: blocks have no names."""
        return self.tokens.content_digest()

    def sizes_digest(self) -> str:
        """Return a digest of how the tokens are divided into blocks."""
        return digest_of(repr(self._division).encode(), self.lengths)

    def read(self, sample_ids: npt.NDArray[np.int64]) -> TokenBlocks:
        """The blocks of the given ids, int64 `[B]`, padded to the longest of them.

        Raises:
            IndexError: there is no such block.
            DataError: the tokens were changed since they were checked, to some that the tokenizer does not have.
        """
        if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < len(self):
            raise IndexError(f"`sample_ids` must be in [0, {len(self)}), but some are not.")
        lengths = self.lengths[sample_ids]
        rows = np.full((len(sample_ids), int(lengths.max(initial=0))), self.specials.pad, dtype=np.int64)
        segments = [np.zeros(1, dtype=np.int64)]
        for row, sample_id in zip(rows, sample_ids.tolist(), strict=True):
            part = self._blocks.part(sample_id)
            tokens = self.tokens.read(part.start, part.stop)
            if tokens.size and tokens.max() >= self.vocab_size:
                raise DataError(
                    f"the tokens in '{self.tokens.folder}' must be < {self.vocab_size}, but one is {tokens.max()}. "
                    f"Remove that folder; it will be made again."
                )
            segments.append(self._blocks.fill(row, part, tokens, self.specials.bos, self.specials.eos, self._separate))
        offsets = np.cumsum(np.concatenate(segments)).astype(np.int32) if self._separate else None
        return TokenBlocks(rows, lengths, offsets)


def _listing(files: Listing, manifest: Mapping[str, Any], min_tokens: int) -> Listing:
    """The files with what the manifest of their tokens says was left out of them."""
    example = "".join(f", such as {text}" for text in manifest["unreadable"][:1])
    listing = files.without(manifest["num_empty"], "document", "without text")
    listing = listing.without(manifest["num_short"], "document", f"shorter than `d2v.data.min_tokens` ({min_tokens})")
    return listing.without(manifest["num_unreadable"], "unreadable text", f"(files, lines or rows){example}")


def tokenize(config: TextConfig) -> TextDataset:
    """Print which text a run will read, and tokenize it into the run's cache.

    Raises:
        DataError: See `TextDataset`.
    """
    if config.data.kind != "docs":
        print_listing(TextFiles(config.data).listing, "text")
    return TextDataset(config.data, config.model, patience_s=config.run.timeout_s)


def run_tokenizer(config: TextConfig, path: Path | None, digest: str | None, where: str) -> Tokenizer:
    """Return the tokenizer of a run.

    Args:
        config: The run's.
        path: The tokenizer; None is the one that `config` names.
        digest: The digest that the tokenizer must have; None accepts any.
        where: The run, for messages.
    Raises:
        ValueError: The tokenizer cannot be read, or has another digest.
    """
    try:
        found = tokenizer_of(config.data, config.model) if path is None else load_tokenizer(path)
        if digest is not None:
            found.require(digest, where)
        return found
    except ValueError as error:
        raise ValueError(f"{error} `--tokenizer` names the run's tokenizer where it is now.") from None


def tokenizer_of(data: TextDataConfig, model: TextModelConfig, patience_s: float = PATIENCE_S) -> Tokenizer:
    """The tokenizer of a run: what `data.tokenizer` names, or that of the sample set (`docs_tokenizer`).

    Raises:
        DataError: there is none, it cannot be read, or it does not fit the model.
    """
    if data.kind == "docs":
        tokenizer = docs_tokenizer(data, model, patience_s)
    elif data.tokenizer is None:
        raise DataError("`d2v.data.tokenizer` must be a file or a folder, but is null instead.")
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    tokenizer.fit(model)
    return tokenizer


def with_vocabulary(config: TextConfig) -> TextConfig:
    """The configuration with the tokenizer's vocabulary size and padding id where it gives none of its own.

    Raises:
        DataError: see `tokenizer_of`.
    """
    tokenizer = tokenizer_of(config.data, config.model, config.run.timeout_s)
    follows = {"vocab_size": tokenizer.vocab_size, "padding_id": tokenizer.specials.pad}
    found = {key: value for key, value in follows.items() if getattr(config.model, key) is None}
    return config.model_copy(update={"model": config.model.model_copy(update=found)})


def make_tokenizer(data: TextDataConfig, vocab_size: int, to: str | Path, max_length: int = 512) -> Tokenizer:
    """Train a byte-level BPE on all text of `data.path`, and write it into a new folder, complete or not at all.

    Args:
        data: `path`, `field`, `documents`, `encoding_errors` and the limits for what is unreadable are used.
        vocab_size: see `train_tokenizer`.
        to: the folder; `data.tokenizer` of a run may name it, and so may `transformers.AutoTokenizer`.
        max_length: longest sequence of the model, in tokens.
    Raises:
        DataError: the folder exists or cannot be written; there is no text, or too much is unreadable.
        ValueError: `vocab_size` is too small.
    """
    target = Path(os.path.abspath(expand_path(to)))
    if os.path.lexists(target):
        raise DataError(f"the folder of a new tokenizer must not exist, but '{printable(str(target))}' does.")
    source = TextFiles(data)

    def texts(progress: Progress) -> Iterator[str]:
        for piece in source.pieces():
            yield piece.text
            progress.show(source.num_read, "read")

    def make(folder: Path) -> None:
        with Progress("training the tokenizer", source.num_bytes) as progress:
            tokenizer = train_tokenizer(texts(progress), vocab_size, f"'{printable(str(target))}'")
            progress.close(f"{tokenizer.vocab_size:,} tokens")
        tokenizer.save(folder, max_length)

    made_once(str(target.parent), target.name, make, "the folder of a new tokenizer")
    if source.bad.num_bad:
        text = "left out %d of %d files, lines and rows, which are unreadable"
        _log.warning(text, source.bad.num_bad, source.bad.num_entries)
    return load_tokenizer(target)
