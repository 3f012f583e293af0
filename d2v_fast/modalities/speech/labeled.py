"""Labeled recordings: those that a head is trained on, and those that are held out."""

from __future__ import annotations

import logging
import os
from collections import Counter
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from d2v_fast.data.few import classes_of, few, held_out, held_out_classes, require_trained
from d2v_fast.data.labels import refuse_parts
from d2v_fast.data.listing import Listing, describe_listing
from d2v_fast.data.once import read_once
from d2v_fast.errors import DataError
from d2v_fast.files.reading import printable
from d2v_fast.modalities.speech.audio import AudioDataset, read_manifest
from d2v_fast.modalities.speech.config import SpeechModelSection
from d2v_fast.modalities.speech.config_finetune import (
    ClassifiedConfig,
    LabeledSpeechConfig,
    SpeechClassifyConfig,
    SpeechCtcConfig,
    SpeechFinetuneConfig,
    TranscribedConfig,
)
from d2v_fast.modalities.speech.samples import SpeechSamples, held_out_words, sample_labels
from d2v_fast.modalities.speech.transcripts import (
    Labels,
    folder_labels,
    letter_labels,
    librispeech_labels,
    table_labels,
)
from d2v_fast.modalities.speech.vocabulary import Vocabulary, normalized_text, read_vocabulary, vocabulary_of

__all__ = ["Chosen", "recordings_held_out", "recordings_to_train", "resolved"]

PATH, VALID = "`d2v.data.path`", "`d2v.valid.path`"
# characters outside the vocabulary that a line names
NUM_NAMED = 8
DICTIONARY = "dict.ltr.txt"

_log = logging.getLogger(__name__)

Config = TypeVar("Config", SpeechCtcConfig, SpeechClassifyConfig)


class Chosen(NamedTuple):
    """Recordings and their labels.

    Attributes:
        dataset: the recordings. Its listing says what is left out.
        labels: class or transcript of each.
    """

    dataset: AudioDataset
    labels: list[str]

    def only(self, chosen: npt.NDArray[np.bool_], listing: Listing | None = None) -> Chosen:
        """Return the chosen recordings, with another listing if one is given."""
        dataset = self.dataset.only(np.flatnonzero(chosen))
        dataset.listing = dataset.listing if listing is None else listing
        return Chosen(dataset, [label for label, keep in zip(self.labels, chosen.tolist(), strict=True) if keep])

    def without(self, left_out: npt.NDArray[np.bool_], why: str) -> Chosen:
        """Leave recordings out and say why."""
        return self.only(~left_out, self.dataset.listing.without(int(left_out.sum()), "recording", why))


def recordings_to_train(config: SpeechCtcConfig | SpeechClassifyConfig) -> Chosen:
    """Return the recordings to train on, with transcripts that CTC can write, or so many of each class as asked for.

    Raises:
        DataError: no recording has a usable label, or a class has no recording.
    """
    chosen = _part(config, is_held_out=False)
    if isinstance(config, SpeechCtcConfig):
        chosen = _spelled(chosen, config)
        if not chosen.labels:
            raise DataError(f"{PATH} must hold recordings with transcripts, but every one is left out:{_said(chosen)}")
        return chosen
    labels = config.labels or ()
    classes = classes_of(chosen.labels, labels, PATH)
    kept = few(classes, config.data.labels_per_class, config.data.labels_seed)
    require_trained(classes[kept], labels, PATH)
    is_kept = np.zeros(len(classes), dtype=np.bool_)
    is_kept[kept] = True
    return chosen.only(is_kept)


def recordings_held_out(config: SpeechCtcConfig | SpeechClassifyConfig) -> Chosen:
    """Return the held-out recordings.

    Raises:
        DataError: there are none, or one is of a class that is not trained on.
    """
    where = PATH if config.valid.path is None else VALID
    chosen = _part(config, is_held_out=True)
    # a share of the training data has the same lines, which are printed already
    known = [] if config.valid.path is not None else describe_listing(chosen.dataset.listing, "")
    if isinstance(config, SpeechCtcConfig):
        chosen = _spelled(chosen, config)
    else:
        held_out_classes(chosen.labels, config.labels or (), where)
    if not chosen.labels:
        raise DataError(
            f"{where} must leave at least one recording to validate on, but leaves none: name a folder or manifest of "
            f"them as {VALID}, or raise `d2v.valid.fraction`.{_said(chosen)}"
        )
    for line in describe_listing(chosen.dataset.listing, "")[1:]:
        if line not in known:
            _log.warning("held-out recordings: %s", line)
    return chosen


def resolved(config: Config) -> Config:
    """Return the section with the letters or classes of the data, if it names none.

    Raises:
        DataError: there are fewer than two classes, no letters, or a file cannot be read.
    """
    if config.labels is not None:
        return config
    if isinstance(config, SpeechCtcConfig):
        return config.model_copy(update={"labels": _letters(config).tokens})
    names = sorted(set(_part(config, is_held_out=False).labels))
    if len(names) < 2:
        raise DataError(
            f"{PATH} must hold recordings of at least 2 classes, but holds {len(names)}. A class is a sub-folder, or a "
            "value of the column `d2v.data.label_field` of the table `d2v.data.labels_path`."
        )
    return config.model_copy(update={"labels": tuple(names)})


def _letters(config: SpeechCtcConfig) -> Vocabulary:
    if config.data.vocabulary is not None:
        return read_vocabulary(config.data.vocabulary)
    path = _letters_beside(str(config.data.path), config.data.labels_path) if config.data.kind == "audio" else None
    beside = None if path is None else os.path.join(os.path.dirname(path), DICTIONARY)
    if beside is not None and os.path.isfile(beside):
        return read_vocabulary(beside)
    return vocabulary_of(_part(config, is_held_out=False).labels)


def _part(config: SpeechFinetuneConfig, *, is_held_out: bool) -> Chosen:
    """Return the labeled recordings to train on, or those that are held out."""
    if config.data.kind == "speech":
        return _samples(config, is_held_out)
    valid = config.valid
    if valid.path is not None and is_held_out:
        return _opened(config, valid.path, valid.labels_path, VALID)
    found = _opened(config, str(config.data.path), config.data.labels_path, PATH)
    if valid.path is not None:
        return found
    # every class has its share; transcripts are all of one class
    names = found.labels if isinstance(config, SpeechClassifyConfig) else [""] * len(found.labels)
    _, numbers = np.unique(np.array(names, dtype=np.str_), return_inverse=True)
    chosen = held_out(numbers.astype(np.int64), valid.fraction, valid.seed)
    return found.only(chosen if is_held_out else ~chosen)


def _samples(config: SpeechFinetuneConfig, is_held_out: bool) -> Chosen:
    """Return the spoken words of voices that pre-training does not use, or for voices those of new words."""
    what = config.data.label if isinstance(config, SpeechClassifyConfig) else "word"
    by_voice = what == "word"
    dataset = _read_samples(config.data, config.model, "test" if is_held_out and by_voice else "train")
    chosen = Chosen(dataset, sample_labels(dataset.names(), what))
    if by_voice:
        return chosen
    return chosen.only(held_out_words(dataset.names()) == is_held_out)


@read_once
def _read_samples(
    data: LabeledSpeechConfig, model: SpeechModelSection, split: Literal["train", "test"]
) -> AudioDataset:
    return SpeechSamples(data, model, split)


def _opened(config: SpeechFinetuneConfig, path: str, labels_path: str | None, where: str) -> Chosen:
    """Return the recordings of a folder or manifest that have labels."""
    data = config.data.model_copy(update={"path": path, "labels_path": labels_path})
    return _read(data, config.model, where)


@read_once
def _read(data: LabeledSpeechConfig, model: SpeechModelSection, where: str) -> Chosen:
    path = str(data.path)
    try:
        dataset = AudioDataset(data, model)
    except DataError as error:
        raise DataError(str(error).replace(PATH, where)) from None
    names = dataset.names()
    labels = _labels_of(data, dataset, where)
    for note in labels.notes:
        dataset.listing = dataset.listing.noted(note)
    chosen = Chosen(dataset, ["" if label is None else label for label in labels.texts])
    if isinstance(data, ClassifiedConfig):
        chosen = Chosen(dataset, [label.strip() for label in chosen.labels])
        missing = np.array([not label for label in chosen.labels], dtype=np.bool_)
        refuse_parts(path, {name.partition(os.sep)[0] for name in names if os.sep in name}, where)
        return chosen.without(missing, "without a class")
    assert isinstance(data, TranscribedConfig)
    texts = [normalized_text(label, data.letter_case) for label in chosen.labels]
    unlisted = np.array([label is None for label in labels.texts], dtype=np.bool_)
    empty = np.array([not text for text in texts], dtype=np.bool_) & ~unlisted
    chosen = Chosen(dataset, texts).without(unlisted, "without a transcript")
    chosen = chosen.without(empty[~unlisted], "with an empty transcript")
    cut = chosen.dataset.is_cut
    return chosen.without(cut, f"longer than `d2v.data.max_seconds` ({data.max_seconds:g} s)")


def _labels_of(data: LabeledSpeechConfig, dataset: AudioDataset, where: str) -> Labels:
    names, path, labels_path = dataset.names(), str(data.path), data.labels_path
    letters = _letters_beside(path, labels_path)
    if letters is not None:
        if not path.lower().endswith(".tsv"):
            raise DataError(
                f"{where} must be fairseq's manifest (.tsv) for the transcripts '{printable(letters)}', which have a "
                f"line for each of its recordings, but is '{printable(path)}' instead."
            )
        _, entries = read_manifest(path)
        return letter_labels(letters, [name for name, _ in entries], names)
    if labels_path is not None:
        return table_labels(labels_path, dataset.root, names, (data.path_field, data.label_field))
    if isinstance(data, ClassifiedConfig):
        return folder_labels(names)
    return librispeech_labels(dataset.root, names)


def _letters_beside(path: str, labels_path: str | None) -> str | None:
    """Return fairseq's transcripts: those that are named, or those beside a manifest."""
    if labels_path is not None:
        return labels_path if labels_path.lower().endswith(".ltr") else None
    beside = os.path.splitext(path)[0] + ".ltr"
    return beside if path.lower().endswith(".tsv") and os.path.isfile(beside) else None


def _spelled(chosen: Chosen, config: SpeechCtcConfig) -> Chosen:
    """Leave out transcripts without a letter of the vocabulary, and those that their frames cannot spell."""
    vocabulary = Vocabulary(config.labels or ())
    letters = [vocabulary.encode(text) for text in chosen.labels]
    # equal neighbors need a blank between them
    needed = [len(one) + sum(a == b for a, b in pairwise(one)) for one in letters]
    frames = [config.model.num_frames(int(length)) for length in chosen.dataset.lengths]
    empty = np.array([not one for one in letters], dtype=np.bool_)
    long = np.array([need > have for need, have in zip(needed, frames, strict=True)], dtype=np.bool_)
    outside: Counter[str] = Counter()
    for text in chosen.labels:
        outside.update(vocabulary.outside(text))
    chosen = chosen.without(empty, "whose transcript has no letter of the vocabulary")
    chosen = chosen.without(long[~empty], "with more letters than CTC can write in their frames")
    named = ", ".join(f"'{printable(letter)}' {count:,}" for letter, count in outside.most_common(NUM_NAMED))
    why = f"of transcripts outside the vocabulary ({named}{', ...' if len(outside) > NUM_NAMED else ''})"
    chosen.dataset.listing = chosen.dataset.listing.without(outside.total(), "character", why)
    return chosen


def _said(chosen: Chosen) -> str:
    left_out = chosen.dataset.listing.left_out
    return "".join(f"\n  {entry.count:,} {entry.what}(s) {entry.why}" for entry in left_out)
