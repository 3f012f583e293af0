"""English text that every Python carries: the reference pages behind `help()`, real data that needs no download.

`pydoc_data.topics` holds some 80 topics, about 370 kB without what it says twice. Which words they are depends on the
version of Python, so that everything made of them is named by its digest. A fixed part of every topic is held out:
pre-training sees only the rest, and never a label. `docs_for_probe` is the one door to the labels.
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
from d2v_fast.modalities.text.config import TextDataConfig, TextModelConfig
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
    from d2v_fast.config import D2VConfig

__all__ = ["DocsSource", "TextProbeData", "docs_for_probe", "docs_tokenizer"]

_log = logging.getLogger(__name__)

Split = Literal["train", "test"]

# held out are the same paragraphs in every run with one version of Python, so that figures can be compared
SPLIT_SEED = 0
# characters after which a passage, which is held out or not as a whole, ends with its paragraph
PASSAGE = 1000
_MAX_DIGEST_BYTES = 100
# topics of fewer passages are trained on as a whole
MIN_PASSAGES = 4
# tokens of the tokenizer that is made for it, where the configuration does not say
VOCAB_SIZE = 1024
# of the probe: characters of a paragraph, and such paragraphs of a topic
MIN_PARAGRAPH, MIN_PARAGRAPHS = 100, 16


class Passage(NamedTuple):
    """Paragraphs of a topic that follow each other; `number` counts the passages of the topic."""

    topic: str
    number: int
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class TextProbeData:
    """Paragraphs for a probe: which topic are they from?

    Attributes:
        tokens: int64 `[T]` each, with begin and end token, at most `data.block_size`; `S` of them.
        labels: int64 `[S]`, positions in `names`.
        names: of the topics.
        train_indices, test_indices: int64, positions in `tokens`. Pre-training saw the train part only.
        specials: of the tokenizer.
    """

    tokens: list[Tensor]
    labels: Tensor
    names: tuple[str, ...]
    train_indices: Tensor
    test_indices: Tensor
    specials: Specials


class DocsSource:
    """The documents of one split, as a `TextSource`: of every topic, what lies between parts of the other split."""

    listing = Listing()

    def __init__(self, data: TextDataConfig, split: Split) -> None:
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


def docs_tokenizer(data: TextDataConfig, model: TextModelConfig, patience_s: float = PATIENCE_S) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, or a byte-level BPE of `model.vocab_size` tokens for the sample set,
    of `VOCAB_SIZE` where the model follows the tokenizer.

    The latter is trained on what pre-training sees when it is first needed, and kept below `data.tokens_path`.

    Raises:
        DataError: it cannot be read, made or written, or is not what was written.
    """
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
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
    folder = made_once(data.tokens_path, name, make, patience_s=patience_s)
    try:
        written = read_text(folder / "digest", _MAX_DIGEST_BYTES).strip()
        tokenizer = load_tokenizer(folder)
    except OSError as error:
        # the tokenizer itself may be as it was
        raise DataError(f"the tokenizer in '{folder}' cannot be read: {error_text(error)}") from None
    except ValueError as error:
        raise DataError(f"{error} Remove the folder '{folder}'; it will be made again.") from None
    if tokenizer.digest != written:
        raise DataError(
            f"the tokenizer in '{folder}' must be as it was written, but is not. Remove that folder; it will be made "
            f"again."
        )
    return tokenizer


def docs_for_probe(config: D2VConfig) -> TextProbeData:
    """Paragraphs of those topics that have enough, and the split that pre-training respects.

    Raises:
        DataError: if `config` is not for text, or see `docs_tokenizer`.
    """
    data, model = config.data, config.model
    if not isinstance(data, TextDataConfig) or not isinstance(model, TextModelConfig):
        raise DataError("`d2v.model` must be a text model to be probed on text, but is another one instead.")
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
    """All paragraphs, each once, by topic and in their order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"the sample set is what Python says of itself, but this Python has no `pydoc_data.topics` ({error}): use "
            f'another one, or `d2v.data.kind` "text".'
        ) from None
    seen: set[str] = set()
    found: list[Passage] = []
    # some topics hold others as a whole: what two have in common belongs to the smaller
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
    """The passages of the test part, the same share of every topic."""
    held_out: list[Passage] = []
    for index, (_, group) in enumerate(groupby(_passages(), key=lambda passage: passage.topic)):
        passages = list(group)
        if len(passages) >= MIN_PASSAGES:
            order = permutation(SPLIT_SEED, SPLIT, index, len(passages))
            num_test = min(max(1, round(test_fraction * len(passages))), len(passages) - 1)
            held_out += [passages[position] for position in order[:num_test].tolist()]
    return frozenset(held_out)
