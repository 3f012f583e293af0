"""The text data set of a run: blocks of tokens from files or the sample set, and the run's tokenizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

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
    from d2v_fast.modalities.text.config import DocumentsConfig, TextDataConfig, TextModelSection
    from d2v_fast.modalities.text.config_finetune import TableSection, TextFinetuneConfig

ConfigT = TypeVar("ConfigT", bound="DocumentsConfig | TextFinetuneConfig")

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
    """Blocks padded to one length.

    Attributes:
        tokens: int64 `[B, T]`, padded at the end of each block.
        lengths: int64 `[B]`, tokens of each block without padding.
        offsets: int32 `[segments + 1]`, starts of the documents among all tokens without padding, and the number of
            these tokens; None if the documents of a block attend to each other.
    """

    tokens: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int32] | None


class TextDataset:
    """The blocks of all documents, in the order of the files and of the documents in them.

    The first use tokenizes the text on all cores, with a progress bar, and writes the tokens below `data.tokens_path`;
    later uses, also by other processes, read them. The tokens are memory-mapped, so workers share them.

    Attributes:
        lengths: int64 `[S]`, tokens of each block, special tokens included.
        block_size: Most tokens of a block.
        tokenizer, specials, vocab_size: The tokenizer, its special tokens and vocabulary size.
        tokens: The tokens of all documents.
        listing: The files that are used, and what is left out: other files, and documents that are empty, too short or
            unreadable.

    Args:
        data, model: The run's configuration.
        split: "train", or "test" for the held-out part of the sample set; files have no test part.
        verify: Compare all stored tokens with their checksums now.
        patience_s: Seconds to wait for another process that writes the same tokens but makes no progress.
    Raises:
        DataError: There is no text or no tokenizer, too much is unreadable, the tokenizer does not fit the model, or
            the tokens cannot be written or differ from what was written.
    """

    def __init__(
        self,
        data: TextDataConfig,
        model: TextModelSection,
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
        """Return a digest of the tokens, since blocks have no names."""
        return self.tokens.content_digest()

    def sizes_digest(self) -> str:
        """Return a digest of how the tokens are divided into blocks."""
        return digest_of(repr(self._division).encode(), self.lengths)

    def read(self, sample_ids: npt.NDArray[np.int64]) -> TokenBlocks:
        """Read blocks, padded to the longest of them.

        Args:
            sample_ids: int64 `[B]`, indices of the blocks.
        Raises:
            IndexError: There is no such block.
            DataError: A token is outside of the vocabulary: the files were changed after they were checked.
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
    """Return the listing of the files, extended by the documents that were left out according to the manifest."""
    example = "".join(f", such as {text}" for text in manifest["unreadable"][:1])
    listing = files.without(manifest["num_empty"], "document", "without text")
    listing = listing.without(manifest["num_short"], "document", f"shorter than `d2v.data.min_tokens` ({min_tokens})")
    return listing.without(manifest["num_unreadable"], "unreadable text", f"(files, lines or rows){example}")


def tokenize(config: DocumentsConfig) -> TextDataset:
    """Print the files that a run will read, and tokenize them into the run's cache.

    Raises:
        DataError: See `TextDataset`.
    """
    if config.data.kind != "docs":
        print_listing(TextFiles(config.data).listing, "text")
    return TextDataset(config.data, config.model, patience_s=config.run.timeout_s)


def run_tokenizer(
    config: DocumentsConfig | TextFinetuneConfig, path: Path | None, digest: str | None, where: str
) -> Tokenizer:
    """Return the tokenizer of a run.

    Args:
        config: The run's configuration.
        path: Path of the tokenizer; None uses the one that `config` names.
        digest: The digest that the tokenizer must have; None accepts any.
        where: Name of the run, for messages.
    Raises:
        ValueError: The tokenizer cannot be read, or has another digest.
    """
    try:
        found = tokenizer_of(config.data, config.model) if path is None else load_tokenizer(path)
        if digest is not None:
            found.require(digest, where)
        return found
    except ValueError as error:
        raise ValueError(f"{error} If the run's tokenizer has moved, name it with `--tokenizer`.") from None


def tokenizer_of(
    data: TextDataConfig | TableSection, model: TextModelSection, patience_s: float = PATIENCE_S
) -> Tokenizer:
    """Return the tokenizer that a configuration names, or that of the sample set.

    Args:
        data, model: The run's configuration.
        patience_s: See `made_once`.
    Raises:
        DataError: The tokenizer is missing, cannot be read, or does not fit the model.
    """
    if data.kind == "docs":
        tokenizer = docs_tokenizer(data, model, patience_s)
    elif data.tokenizer is None:
        raise DataError("`d2v.data.tokenizer` must be a file or a folder, but is null instead.")
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    tokenizer.fit(model)
    return tokenizer


def with_vocabulary(config: ConfigT) -> ConfigT:
    """Return a configuration with the tokenizer's vocabulary size and padding id in place of null.

    Raises:
        DataError: See `tokenizer_of`.
    """
    tokenizer = tokenizer_of(config.data, config.model, config.run.timeout_s)
    follows = {"vocab_size": tokenizer.vocab_size, "padding_id": tokenizer.specials.pad}
    found = {key: value for key, value in follows.items() if getattr(config.model, key) is None}
    # the type of a copy of a union is the union
    return cast("ConfigT", config.model_copy(update={"model": config.model.model_copy(update=found)}))


def make_tokenizer(data: TextDataConfig, vocab_size: int, to: str | Path, max_length: int = 512) -> Tokenizer:
    """Train a byte-level BPE on all text of `data.path`, and write it into a new folder atomically.

    Args:
        data: The text. Only `path`, `field`, `documents`, `encoding_errors` and the limits on unreadable text are used.
        vocab_size: See `train_tokenizer`.
        to: The folder, for `data.tokenizer` of a run and for `transformers.AutoTokenizer`.
        max_length: Longest sequence of the model, in tokens.
    Raises:
        DataError: The folder exists or cannot be written, there is no text, or too much is unreadable.
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
        text = "left out %d unreadable of %d files, lines and rows"
        _log.warning(text, source.bad.num_bad, source.bad.num_entries)
    return load_tokenizer(target)
