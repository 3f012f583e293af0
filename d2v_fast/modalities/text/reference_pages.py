"""The sample set: the English reference pages behind Python's `help()`, real data that needs no download.

`pydoc_data.topics` holds some 80 topics, about 370 kB without repetitions. The text depends on the version of Python,
so everything derived from it is named by its digest. A fixed part of every topic is held out: pre-training sees only
the rest, and never a label. Only `docs_for_probe` returns labels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2v_fast.data.cache import PATIENCE_S, made_once
from d2v_fast.data.listing import Listing
from d2v_fast.errors import DataError
from d2v_fast.files.io_errors import error_text
from d2v_fast.files.reading import read_text
from d2v_fast.masking.streams import SPLIT, permutation
from d2v_fast.modalities.text.config import TextDataConfig, TextModelSection
from d2v_fast.modalities.text.files import BadText, Piece, pieces_of
from d2v_fast.modalities.text.tokenizer import (
    MIN_VOCAB_SIZE,
    Specials,
    Tokenizer,
    load_tokenizer,
    missing_tokens,
    train_tokenizer,
)

if TYPE_CHECKING:
    from d2v_fast.modalities.text.config_finetune import TableSection

__all__ = ["DocsSource", "TextProbeData", "docs_for_probe", "docs_tokenizer", "docs_tokenizer_folder"]

_log = logging.getLogger(__name__)

Split = Literal["train", "test"]

# fixed, so that all runs with one version of Python hold out the same paragraphs and can be compared
SPLIT_SEED = 0
# a passage, the unit of the split, ends with the paragraph that reaches this many characters
PASSAGE = 1000
_MAX_DIGEST_BYTES = 100
# topics with fewer passages are used for training only
MIN_PASSAGES = 4
# vocabulary of the tokenizer of the sample set if the configuration gives none
VOCAB_SIZE = 1024
# least characters of a paragraph in the probe, and least such paragraphs of a topic
MIN_PARAGRAPH, MIN_PARAGRAPHS = 100, 16


class Passage(NamedTuple):
    """Consecutive paragraphs of a topic; `number` is the index of the passage in its topic."""

    topic: str
    number: int
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class TextProbeData:
    """Paragraphs with their topics, for the topic probe.

    Attributes:
        tokens: `S` tensors, int64 `[T]`, with begin and end token, T <= `data.block_size`.
        labels: int64 `[S]`, indices into `names`.
        names: Names of the topics.
        train_indices, test_indices: int64, indices into `tokens`. Pre-training saw the train part only.
        specials: Special tokens of the tokenizer.
    """

    tokens: list[Tensor]
    labels: Tensor
    names: tuple[str, ...]
    train_indices: Tensor
    test_indices: Tensor
    specials: Specials


class DocsSource:
    """The documents of one split, as a `TextSource`: runs of passages between those of the other split."""

    listing = Listing()

    def __init__(self, data: TextDataConfig | TableSection, split: Split) -> None:
        self.bad = BadText(0.0, False, "documents")
        self.num_empty = self.num_read = 0
        self._texts = list(_documents(data.test_fraction, split))
        self.num_bytes = sum(len(text.encode()) for text in self._texts)

    def digest(self) -> str:
        """See `TextSource`."""
        return hashlib.sha256(json.dumps(self._texts).encode()).hexdigest()

    def pieces(self) -> Iterator[Piece]:
        """See `TextSource`."""
        self.bad.num_entries = len(self._texts)
        return pieces_of(part for text in self._texts for part in (text, None))


def docs_tokenizer(
    data: TextDataConfig | TableSection, model: TextModelSection, patience_s: float = PATIENCE_S
) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names, or that of the sample set; see `docs_tokenizer_folder`.

    Args:
        data, model: The run's configuration.
        patience_s: See `made_once`.
    Raises:
        DataError: The tokenizer cannot be read, trained or written, or differs from what was written.
    """
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    folder = docs_tokenizer_folder(data, model, patience_s)
    try:
        written = read_text(folder / "digest", _MAX_DIGEST_BYTES).strip()
        tokenizer = load_tokenizer(folder)
    except OSError as error:
        # not a sign of damage, so no advice to remove the folder
        raise DataError(f"the tokenizer in '{folder}' cannot be read: {error_text(error)}") from None
    except ValueError as error:
        raise DataError(f"{error} Remove the folder '{folder}'; it will be made again.") from None
    if tokenizer.digest != written:
        raise DataError(
            f"the tokenizer in '{folder}' must be as it was written, but has changed. Remove that folder; it will be "
            f"made again."
        )
    return tokenizer


def docs_tokenizer_folder(
    data: TextDataConfig | TableSection, model: TextModelSection, patience_s: float = PATIENCE_S
) -> Path:
    """Return the folder of the tokenizer of the sample set, and train it if it does not exist yet.

    It is a byte-level BPE with `model.vocab_size` tokens, or `VOCAB_SIZE` if that is None. It is trained on the train
    split and stored below `data.tokens_path`.

    Args:
        data, model: The run's configuration.
        patience_s: See `made_once`.
    Raises:
        DataError: The tokenizer cannot be trained or written.
    """
    vocab_size = VOCAB_SIZE if model.vocab_size is None else model.vocab_size
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"`d2v.model.vocab_size` must be >= {MIN_VOCAB_SIZE} to train a tokenizer for the sample set, but is "
            f"{vocab_size} instead."
        )
    made_of = f"{DocsSource(data, 'train').digest()} {vocab_size}"

    def make(folder: Path) -> None:
        tokenizer = train_tokenizer(_documents(data.test_fraction, "train"), vocab_size)
        if short := missing_tokens(tokenizer, vocab_size):
            _log.warning("the tokenizer of the sample set has %s", short)
        tokenizer.save(folder, model.max_positions)
        (folder / "digest").write_text(tokenizer.digest + "\n")

    name = "docs-" + hashlib.sha256(made_of.encode()).hexdigest()[:24]
    return made_once(data.tokens_path, name, make, patience_s=patience_s)


def docs_for_probe(data: TextDataConfig | TableSection, model: TextModelSection) -> TextProbeData:
    """Return the paragraphs of all topics with enough of them, in the split that pre-training uses.

    Raises:
        DataError: The tokenizer cannot be made or does not fit the model; see `docs_tokenizer`.
    """
    tokenizer = docs_tokenizer(data, model)
    tokenizer.fit(model)
    held_out = _held_out(data.test_fraction)
    found = [
        (passage.topic, paragraph, passage in held_out)
        for passage in _passages()
        for paragraph in passage.paragraphs
        if len(paragraph) >= MIN_PARAGRAPH
    ]
    train, test = ([topic for topic, _, is_test in found if is_test == wanted] for wanted in (False, True))
    names = tuple(sorted(t for t in set(train) & set(test) if train.count(t) + test.count(t) >= MIN_PARAGRAPHS))
    chosen = [entry for entry in found if entry[0] in names]
    ids, lengths = tokenizer.encode([paragraph for _, paragraph, _ in chosen])
    bos, eos = (np.array([i], dtype=ids.dtype) for i in (tokenizer.specials.bos, tokenizer.specials.eos))
    rows = [row[: data.block_size - 2] for row in np.split(ids, np.cumsum(lengths)[:-1])]
    is_test = torch.tensor([is_test for _, _, is_test in chosen])
    return TextProbeData(
        tokens=[torch.from_numpy(np.concatenate([bos, row, eos]).astype(np.int64)) for row in rows],
        labels=torch.tensor([names.index(topic) for topic, _, _ in chosen]),
        names=names,
        train_indices=torch.nonzero(~is_test)[:, 0],
        test_indices=torch.nonzero(is_test)[:, 0],
        specials=tokenizer.specials,
    )


def _documents(test_fraction: float, split: Split) -> Iterator[str]:
    held_out = _held_out(test_fraction)
    for _, passages in groupby(_passages(), key=lambda passage: passage.topic):
        for is_test, run in groupby(passages, key=lambda passage: passage in held_out):
            if is_test == (split == "test"):
                yield "\n\n".join(paragraph for passage in run for paragraph in passage.paragraphs)


@lru_cache(maxsize=1)
def _passages() -> tuple[Passage, ...]:
    """Return all paragraphs, each once, grouped into passages and ordered by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"the sample set is Python's own reference pages, but this Python has no `pydoc_data.topics` ({error}). "
            f'Use another Python, or your own text with `d2v.data.kind` "text".'
        ) from None
    seen: set[str] = set()
    found: list[Passage] = []
    # some topics include others: a shared paragraph belongs to the smaller topic
    for topic, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        paragraphs = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph.strip("\n"))
        held: list[str] = []
        number = 0
        for paragraph in paragraphs:
            held.append(paragraph)
            if sum(map(len, held)) >= PASSAGE:
                found.append(Passage(topic, number, tuple(held)))
                held, number = [], number + 1
        if held:
            found.append(Passage(topic, number, tuple(held)))
    return tuple(sorted(found))


@lru_cache(maxsize=8)
def _held_out(test_fraction: float) -> frozenset[Passage]:
    """Return the passages of the test part, the same share of every topic."""
    held_out: list[Passage] = []
    for index, (_, group) in enumerate(groupby(_passages(), key=lambda passage: passage.topic)):
        passages = list(group)
        if len(passages) >= MIN_PASSAGES:
            order = permutation(SPLIT_SEED, SPLIT, index, len(passages))
            num_test = min(max(1, round(test_fraction * len(passages))), len(passages) - 1)
            held_out += [passages[position] for position in order[:num_test].tolist()]
    return frozenset(held_out)
