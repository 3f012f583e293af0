"""The text probes: masked words and topics of the sample set, or a user's own labels.

The word probe masks single tokens of held-out blocks and predicts from the encoder's output at each mask which of the
most frequent words it was. An encoder of data2vec 2.0 never sees a mask: it encodes the other tokens only, as in its
training, and its decoder fills the gaps, whose prediction takes the place of the output at the mask. Baselines are the
untrained network and the most frequent word. The topic probe averages features over a paragraph; its baseline is a bag
of words, which is token counts weighted by rarity.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from d2v_fast.data.labels import LabeledSet
from d2v_fast.evaluation.classifiers import ProbeReport, ProbeReports, Task, most_frequent, score
from d2v_fast.evaluation.features import evaluating, sequence_features
from d2v_fast.evaluation.inputs import Rows, Sample, Source
from d2v_fast.evaluation.probing import Labeled, Probed, Probing
from d2v_fast.files.reading import printable
from d2v_fast.modalities.text.config import DocumentsConfig
from d2v_fast.modalities.text.embed import Lines
from d2v_fast.modalities.text.encoder2 import MaskedTextModel
from d2v_fast.modalities.text.labels import labeled_texts
from d2v_fast.modalities.text.reference_pages import TextProbeData, docs_for_probe
from d2v_fast.modalities.text.tasks import TextDataset, tokenizer_of
from d2v_fast.models.student import Student
from d2v_fast.models.visible import Places

_log = logging.getLogger(__name__)

NUM_WORDS = 200
MASKED_SHARE = 0.15
UNIGRAM, BAG_OF_WORDS = "most frequent word", "bag of words"
# most masked tokens of each part
MAX_TRAIN, MAX_TEST = 8000, 4000
# columns of a bag of words: classifying with 50,000 would take longer than computing all features
MAX_BAG = 5000


class MaskedWords(NamedTuple):
    """Blocks in which frequent words are masked.

    Attributes:
        tokens: int64 `[T]` each.
        places: int64, the masked positions of each block.
        words: int64 `[S]`, the class of the word at each masked position of all blocks.
        num_train: Number of `words` in the blocks that pre-training saw, which come first.
    """

    tokens: list[Tensor]
    places: list[Tensor]
    words: NDArray[np.int64]
    num_train: int


def masked_words(config: DocumentsConfig) -> MaskedWords:
    """Mask up to `MASKED_SHARE` of each block's tokens, chosen among the most frequent words, the same in every run."""
    parts = [TextDataset(config.data, config.model, split) for split in ("train", "test")]
    blocks = []
    for part in parts:
        read = part.read(np.arange(len(part), dtype=np.int64))
        blocks.append([row[:length] for row, length in zip(read.tokens, read.lengths, strict=True)])
    counts = np.bincount(np.concatenate(blocks[0]), minlength=parts[0].vocab_size)
    is_word = np.zeros(len(counts), dtype=np.bool_)
    for token in np.argsort(-counts, kind="stable").tolist():
        is_word[token] = counts[token] > 0 and _is_word(parts[0].tokenizer.decode([token, token]))
        if is_word.sum() == NUM_WORDS:
            break
    number = np.cumsum(is_word) - 1
    rng = np.random.default_rng(0)
    tokens, places, words, totals = [], [], [], []
    for rows, most in zip(blocks, (MAX_TRAIN, MAX_TEST), strict=True):
        total = 0
        for index in rng.permutation(len(rows)).tolist():
            row = rows[index].copy()
            candidates = np.flatnonzero(is_word[row])
            size = min(len(candidates), int(MASKED_SHARE * len(row)), most - total)
            if size == 0:
                continue
            chosen = np.sort(rng.choice(candidates, size, replace=False))
            words.append(number[row[chosen]])
            row[chosen] = parts[0].specials.mask
            tokens.append(torch.from_numpy(row))
            places.append(torch.from_numpy(chosen))
            total += size
        totals.append(total)
    return MaskedWords(tokens, places, np.concatenate(words or [np.empty(0, np.int64)]), totals[0])


def _is_word(twice: str) -> bool:
    """Return whether a token is a whole word, given the decoded text of the token twice: word parts would be joined."""
    parts = twice.split()
    return len(parts) == 2 and parts[0] == parts[1] and parts[0].isalpha()


def run_text_probe(probed: Probed, data: TextProbeData, config: DocumentsConfig) -> ProbeReports:
    """Score the features of every model on both tasks.

    Args:
        probed: Encoders and heads.
        data: Labeled paragraphs.
        config: The run's configuration.
    Returns:
        A report for topics, and one for words if the tokenizer has frequent words.
    """
    masked, padding = masked_words(config), data.specials.pad
    has_words = 0 < masked.num_train < len(masked.words)
    if not has_words:
        _log.warning("the probe of masked words is skipped: no token of this tokenizer is a frequent word")
    order = np.arange(len(masked.words))
    word = Task(masked.words, order[: masked.num_train], order[masked.num_train :])
    topic = Task(*map(np.asarray, (data.labels, data.train_indices, data.test_indices)))
    of_words, of_topics = {}, {}
    for name, model in probed.encoders.items():
        if has_words:
            features = word_features(model, probed.heads[name], masked, padding)
            of_words[name] = score(features.numpy(), word, config.probe)
        paragraphs = sequence_features(model, data.tokens, num_places=int, padding=padding)
        of_topics[name] = score(torch.stack([rows.mean(0) for rows in paragraphs]).numpy(), topic, config.probe)
    if has_words:
        of_words[UNIGRAM] = most_frequent(word)
    of_topics[BAG_OF_WORDS] = score(bag_of_words(data.tokens, topic), topic, config.probe)
    reports = {"word": ProbeReport(of_words, config.probe, "masked words")} if has_words else {}
    return ProbeReports({**reports, "topic": ProbeReport(of_topics, config.probe, "topics")})


def word_features(model: Student, head: nn.Module, masked: MaskedWords, padding: int) -> Tensor:
    """Return the features that a masked word is predicted from, fp32 `[S, D]`."""
    if isinstance(model, MaskedTextModel):
        pairs = zip(masked.tokens, masked.places, strict=True)
        return torch.cat([filled_in(model, head, tokens, places) for tokens, places in pairs])
    outputs = sequence_features(model, masked.tokens, num_places=int, padding=padding)
    return torch.cat([output[place] for output, place in zip(outputs, masked.places, strict=True)])


@torch.no_grad()
def filled_in(model: MaskedTextModel, decoder: nn.Module, tokens: Tensor, masked: Tensor) -> Tensor:
    """Encode a block without its masked tokens, and return what the decoder predicts at their places.

    Args:
        model: The encoder, in any mode, which is restored.
        decoder: Its head, likewise. It gets the mean of its noise, 0, so that the result does not depend on a draw.
        tokens: int64 `[T]`; what stands at masked places has no effect.
        masked: int64 `[N]`, masked places, ascending.
    Returns:
        fp32 `[N, D]`, on the CPU.
    """
    device = next(model.parameters()).device
    is_visible = torch.ones(len(tokens), dtype=torch.bool)
    is_visible[masked] = False
    places = Places(is_visible.nonzero().T.to(device), masked.to(device), len(tokens))
    with evaluating(model), evaluating(decoder):
        hidden = model.context(model.embedding(tokens[None].to(device)), None, places).last_hidden
        prediction: Tensor = decoder(hidden, places, hidden.new_zeros(len(masked), hidden.shape[-1]))
    return prediction.float().cpu()


def bag_of_words(tokens: Sequence[Tensor], task: Task) -> NDArray[np.float32]:
    """Return token counts times the logarithm of their inverse frequency among the training samples.

    Args:
        tokens: int64 `[T]` each.
        task: Its `train` selects the training samples.
    Returns:
        fp32 `[S, V]`, rows of length 1, for the V <= `MAX_BAG` tokens that occur in most training samples.
    """
    vocabulary = 1 + max(int(row.max()) for row in tokens)
    counts = np.stack([np.bincount(row.numpy(), minlength=vocabulary) for row in tokens]).astype(np.float32)
    held = (counts[task.train] > 0).sum(0)
    chosen = np.sort(np.argsort(-held, kind="stable")[: min(MAX_BAG, int((held > 0).sum()))])
    weighted = counts[:, chosen] * np.log(len(task.train) / held[chosen]).astype(np.float32)
    lengths = np.linalg.norm(weighted, axis=1, keepdims=True)
    return np.asarray(weighted / np.maximum(lengths, 1e-12), dtype=np.float32)


def _labeled(config: DocumentsConfig) -> Labeled:
    def find(key: str) -> LabeledSet:
        return labeled_texts(config.data, config.probe, key)

    def read(model: Student, found: LabeledSet) -> tuple[Source, Iterator[Sample | str]]:
        tokenizer = tokenizer_of(config.data, config.model)
        source = Lines(model, "", Path(found.root), config.model, config.data, tokenizer, paths=[])
        # cut long texts before tokenizing: tokens average far fewer than 32 characters
        max_characters = 32 * config.model.max_positions
        return source, (source.sample(printable(sample.name), sample.text[:max_characters]) for sample in found.samples)

    def pooled(rows: Rows) -> Rows:
        return np.asarray(rows.mean(0), dtype=np.float32)

    return Labeled("text", find, read, pooled, BAG_OF_WORDS, lambda sample: sample.parts[0], bag_of_words)


def _run(probed: Probed, config: DocumentsConfig) -> ProbeReports:
    return run_text_probe(probed, docs_for_probe(config.data, config.model), config)


PROBING = Probing("docs", _run, _labeled, ("--data", "FILE.jsonl", "--label-field", "label"), "texts with a label each")
