"""Labeled texts and pairs of texts as tokens: `<s> a </s>`, and `<s> a </s></s> b </s>` as RoBERTa does for pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.data.listing import Listing, count_endings
from d2v_fast.data.once import read_once
from d2v_fast.data.samples import digest_of
from d2v_fast.errors import DataError
from d2v_fast.files.reading import printable
from d2v_fast.modalities.text.config import TextModelSection
from d2v_fast.modalities.text.config_finetune import TableSection
from d2v_fast.modalities.text.files import BadText
from d2v_fast.modalities.text.reference_pages import docs_for_probe
from d2v_fast.modalities.text.round_trip import RoundTrip
from d2v_fast.modalities.text.tables import Table, TableRow, class_name, score_of
from d2v_fast.modalities.text.tasks import tokenizer_of
from d2v_fast.modalities.text.tokenizer import Specials, Tokenizer

__all__ = ["Framed", "LabeledTokens", "frame", "labeled_tokens", "shares"]

# rows that are tokenized together, and characters of a text per token that is kept: tokens average far fewer
_ROWS, _CHARACTERS = 4096, 32
# special tokens of a single text and of a pair
_SINGLE, _PAIR = 2, 4

_log = logging.getLogger(__name__)


class Framed(NamedTuple):
    """Token ids of texts or pairs with their special tokens, each in one array.

    Attributes:
        rows: int64 `[T]` each.
        num_cut: Number of texts or pairs that were cut.
    """

    rows: list[npt.NDArray[np.int64]]
    num_cut: int


class LabeledTokens:
    """Labeled texts or pairs, tokenized.

    Args:
        rows: Tokens of each sample.
        labels: Name of the class of each, or score.
        tokenizer: What the tokens mean.
        listing: What was read, and what was left out.
    Attributes:
        lengths: int64 `[S]`, tokens of each sample.
    """

    def __init__(
        self, rows: Sequence[npt.NDArray[np.int64]], labels: Sequence[Any], tokenizer: Tokenizer, listing: Listing
    ) -> None:
        self.labels, self.tokenizer, self.listing = list(labels), tokenizer, listing
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        # one array, which worker processes share
        empty = np.empty(0, dtype=tokenizer.dtype)
        self._ids = np.concatenate([empty, *(row.astype(tokenizer.dtype) for row in rows)])
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of some samples, int64 `[B, T]`, padded to the longest of them."""
        lengths = self.lengths[sample_ids]
        width = int(lengths.max(initial=0))
        found = np.full((len(sample_ids), width), self.tokenizer.specials.pad, dtype=np.int64)
        for row, length, end in zip(found, lengths.tolist(), self._ends[sample_ids].tolist(), strict=True):
            row[:length] = self._ids[end - length : end]
        return found

    def names_digest(self) -> str:
        """See `SampleSource`: of tokens and labels, since rows have no names."""
        return digest_of(self._ids, "\n".join(map(repr, self.labels)).encode())

    def sizes_digest(self) -> str:
        """See `SampleSource`."""
        return digest_of(self.lengths)


def shares(first: int, second: int, most: int) -> tuple[int, int]:
    """Return how many tokens of the two texts of a pair are kept: the longer one is cut first, to the other's length.

    If both must be cut, each keeps half, and an odd token goes to the longer one or, of equal ones, to the second. This
    is what `truncation="longest_first"` of Hugging Face's tokenizers does.
    """
    if first + second <= most:
        return first, second
    short, long = min(first, second), max(first, second)
    short, long = (short, most - short) if 2 * short <= most else (most // 2, most - most // 2)
    return (long, short) if first > second else (short, long)


def frame(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, block_size: int) -> Framed:
    """Tokenize texts or pairs of texts, cut them to `block_size` tokens, and add the special tokens.

    Args:
        tokenizer: The tokenizer.
        texts: The texts, or the first text of each pair.
        pairs: The second text of each pair; None for single texts.
        block_size: Largest number of tokens, special tokens included.
    """
    most = _CHARACTERS * block_size
    sides = [_split(tokenizer, [text[:most] for text in side]) for side in (texts, pairs) if side is not None]
    num_long = [max(map(len, row)) > most for row in zip(*(side for side in (texts, pairs) if side), strict=True)]
    framed = [_framed([side[index] for side in sides], tokenizer.specials, block_size) for index in range(len(texts))]
    num_cut = sum(is_cut or is_long for (_, is_cut), is_long in zip(framed, num_long, strict=True))
    return Framed([row for row, _ in framed], num_cut)


def _split(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
    ids, lengths = tokenizer.encode(texts)
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []


def _framed(
    parts: Sequence[npt.NDArray[np.unsignedinteger]], specials: Specials, block_size: int
) -> tuple[npt.NDArray[np.int64], bool]:
    """Return a text or a pair with its special tokens, and whether it was cut."""
    lengths = [len(part) for part in parts]
    bos, eos = (np.array([token], dtype=np.int64) for token in (specials.bos, specials.eos))
    if len(parts) == 1:
        kept: tuple[int, ...] = (min(lengths[0], block_size - _SINGLE),)
        pieces: list[npt.NDArray[Any]] = [bos, parts[0][: kept[0]], eos]
    else:
        kept = shares(lengths[0], lengths[1], block_size - _PAIR)
        pieces = [bos, parts[0][: kept[0]], eos, eos, parts[1][: kept[1]], eos]
    return np.concatenate(pieces).astype(np.int64), list(kept) != lengths


@read_once
def labeled_tokens(
    data: TableSection, model: TextModelSection, path: str | None, *, is_train: bool, key: str, scores: bool = False
) -> LabeledTokens:
    """Read and tokenize labeled texts.

    Args:
        data, model: The run's configuration.
        path: The file; None is the sample set.
        is_train: Of the sample set, the part that pre-training saw, or the held-out part.
        key: The configuration key that names the file, for messages.
        scores: Whether the labels are numbers instead of names of classes.
    Raises:
        DataError: The file cannot be read, has no such columns or no rows, or too many rows are bad.
    """
    return _docs(data, model, is_train) if path is None else _table(data, model, path, key, scores)


def _docs(data: TableSection, model: TextModelSection, is_train: bool) -> LabeledTokens:
    found = docs_for_probe(data, model)
    chosen = (found.train_indices if is_train else found.test_indices).tolist()
    labels = [found.names[found.labels[index]] for index in chosen]
    rows = [found.tokens[index].numpy() for index in chosen]
    return LabeledTokens(rows, labels, tokenizer_of(data, model), Listing())


def _table(data: TableSection, model: TextModelSection, path: str, key: str, scores: bool) -> LabeledTokens:
    tokenizer = tokenizer_of(data, model)
    bad = BadText(data.max_bad_fraction, data.strict, f"rows of '{printable(path)}'")
    replaces = data.encoding_errors == "replace"
    parse = score_of if scores else class_name
    table = Table(path, data.fields(), bad, parse_label=parse, key=key, replaces=replaces)
    rows: list[npt.NDArray[np.int64]] = []
    labels: list[Any] = []
    num_cut, round_trip = 0, RoundTrip()
    for chunk in _chunks(table.rows()):
        texts = [row.text for row in chunk]
        pairs = [str(row.pair) for row in chunk] if data.pair_field is not None else None
        framed = frame(tokenizer, texts, pairs, data.block_size)
        rows += framed.rows
        labels += [row.label for row in chunk]
        num_cut += framed.num_cut
        round_trip.add(tokenizer, texts)
    if not rows:
        raise DataError(f"{key} must hold labeled texts, but '{printable(path)}' has none.")
    if problem := round_trip.problem(tokenizer.name):
        _log.warning("%s", problem)
    if num_cut:
        what = "pairs" if data.pair_field is not None else "texts"
        _log.warning("cut %d of %d %s to %d tokens (`d2v.data.block_size`)", num_cut, len(rows), what, data.block_size)
    example = "".join(f"such as {name}" for name in bad.named[:1])
    listing = Listing(count_endings([path])).without(bad.num_bad, "row", f"that cannot be read, {example}")
    return LabeledTokens(rows, labels, tokenizer, listing)


def _chunks(rows: Iterable[TableRow]) -> Iterator[list[TableRow]]:
    """Yield the rows `_ROWS` at a time."""
    chunk: list[TableRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
