"""Has a run learned anything about a user's own labels? The probe of `d2v.probe.path`, for every modality.

What differs between modalities is how a sample is read and the plain description that features are held against:
pixels, the average of a log-mel spectrum, or a bag of words. The classifiers are those of `probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.commands.embed import encode
from d2v_fast.commands.inputs import Images, Lines, Middles, Sample, Source
from d2v_fast.config import D2VConfig, SpeechConfig, TextConfig, VisionConfig
from d2v_fast.data import DataError
from d2v_fast.data.files import NUM_NAMED
from d2v_fast.data.labels import MIN_PER_CLASS, LabeledSet, labeled_files, split
from d2v_fast.data.listing import counted
from d2v_fast.evaluation.classifiers import PIXELS, ProbeReport, Task, most_frequent, pool, score
from d2v_fast.files.reading import printable
from d2v_fast.modalities.speech.log_mel import log_mel
from d2v_fast.modalities.speech.probe import LOG_MEL
from d2v_fast.modalities.text.probe import BAG_OF_WORDS, bag_of_words
from d2v_fast.models.student import Student

MOST_FREQUENT = "most frequent class"
# side of an image as a baseline: more pixels take long to classify and tell no more
MAX_SIDE = 32
# of a recording, so that encoding thousands of them takes minutes
MAX_SECONDS = 10.0
# samples in memory at a time
_CHUNK = 64

Rows = NDArray[np.float32]


class _Kind(NamedTuple):
    """What the probe needs of a modality.

    Attributes:
        what: A sample, in a word.
        read: From an encoder and the chosen samples to what reads them, and the samples or why one cannot be read.
        pooled: From an encoder's output `[P, D]` to features `[F]`.
        baseline: Its name.
        describe: From a sample to what the baseline needs of it.
        rows: From that of all samples, and the task, to features `[S, F]`.
    """

    what: str
    read: Callable[[Student, LabeledSet], tuple[Source, Iterator[Sample | str]]]
    pooled: Callable[[Rows], Rows]
    baseline: str
    describe: Callable[[Sample], Any]
    rows: Callable[[list[Any], Task], Rows]


def find_labeled(config: D2VConfig, key: str = "`d2v.probe.path`") -> LabeledSet:
    """Choose the samples of `d2v.probe.path` that a probe uses.

    Args:
        config: Of the run.
        key: What named the path, for messages.
    Raises:
        DataError: There are none, or fewer than two classes.
    """
    path, most = str(config.probe.path), config.probe.max_samples
    if isinstance(config, TextConfig):
        from d2v_fast.modalities.text.labels import labeled_texts

        return labeled_texts(config.data, config.probe, key)
    if isinstance(config, SpeechConfig):
        from d2v_fast.modalities.speech.audio import KINDS as recordings

        return labeled_files(path, recordings, most, follow_outside=config.data.follow_outside, key=key)
    assert isinstance(config, VisionConfig)
    from d2v_fast.modalities.vision.images import KINDS as images

    return labeled_files(path, images, most, follow_outside=config.data.follow_outside, key=key)


def describe_labeled(config: D2VConfig) -> list[str]:
    """Say in words, a line each, what a probe of `d2v.probe.path` will use and leave out.

    Raises:
        DataError: It could not be made.
    """
    return find_labeled(config).describe(_kind(config).what)


def run_labeled_probe(models: Mapping[str, Student], config: D2VConfig, key: str = "`d2v.probe.path`") -> ProbeReport:
    """Score every model's features of `d2v.probe.path`, and a baseline of the modality.

    Args:
        models: Encoders, by the name they get in the table.
        config: Of the run.
        key: What named the path, for messages.
    Raises:
        DataError: There are fewer than two classes, or too few samples can be read.
    """
    kind, found = _kind(config), find_labeled(config, key)
    features: dict[str, list[Rows]] = {name: [] for name in models}
    described: list[Any] = []
    labels: list[str] = []
    bad: list[str] = []
    source, samples = kind.read(next(iter(models.values())), found)
    pairs = zip((sample.label for sample in found.samples), samples, strict=True)
    while chunk := list(islice(pairs, _CHUNK)):
        bad += [sample for _, sample in chunk if isinstance(sample, str)]
        readable = [(label, sample) for label, sample in chunk if isinstance(sample, Sample)]
        labels += [label for label, _ in readable]
        described += [kind.describe(sample) for _, sample in readable]
        for name, model in models.items():
            rows = encode(model, source, [sample for _, sample in readable])
            features[name] += [kind.pooled(of_sample) for of_sample in rows]
    notes = [*found.describe(kind.what)]
    if bad:
        more = len(bad) - NUM_NAMED
        named = "".join(f"\n    {text}" for text in bad[:NUM_NAMED]) + (f"\n    and {more} more" if more > 0 else "")
        notes.append(f"left out: {counted(len(bad), f'unreadable {kind.what}')}:{named}")
    if source.num_cut:
        notes.append(f"{counted(source.num_cut, kind.what)} longer than the model reads: only the beginning is used")
    kept, task, more_notes = _task(labels, config.probe.test_fraction, config.probe.labels_per_class, kind.what)
    if task is None:
        must = f"hold at least 2 classes of {MIN_PER_CLASS} or more readable {kind.what}s"
        raise DataError("\n  ".join([f"{key} must {must}, but does not:", *notes]))
    matrices = {name: np.stack([rows[i] for i in kept]) for name, rows in features.items()}
    matrices[kind.baseline] = kind.rows([described[i] for i in kept], task)
    scores = {}
    for name, matrix in matrices.items():
        if np.isfinite(matrix).all():
            scores[name] = score(matrix, task, config.probe)
        else:
            more_notes.append(f"no scores of {name}: some of its features are not finite")
    scores[MOST_FREQUENT] = most_frequent(task)
    first, *others = notes
    what = f"{counted(len(task.test), f'held-out {kind.what}')}"
    lines = [f"probe: {first}, {len(task.train):,} to learn from", *(f"  {note}" for note in (*others, *more_notes))]
    return ProbeReport(scores, config.probe, what, tuple(lines))


def _task(
    labels: list[str], test_fraction: float, labels_per_class: int, what: str
) -> tuple[NDArray[np.int64], Task | None, list[str]]:
    """Positions of the samples that can be used, what is to be told of them, and notes. No task where too few can."""
    names, numbers, counts = np.unique(np.array(labels, dtype=np.str_), return_inverse=True, return_counts=True)
    is_enough = counts >= MIN_PER_CLASS
    kept = np.flatnonzero(is_enough[numbers]) if len(labels) else np.zeros(0, dtype=np.int64)
    if is_enough.sum() < 2:
        return kept, None, []
    notes = []
    if not is_enough.all():
        gone = ", ".join(printable(name) for name in names[~is_enough][:NUM_NAMED].tolist())
        notes.append(f"left out: classes of which fewer than {MIN_PER_CLASS} {what}s can be read ({gone})")
    _, of_kept = np.unique(numbers[kept], return_inverse=True)
    train, test = split(of_kept.astype(np.int64), test_fraction)
    num_train = np.bincount(of_kept[train])
    if (few := int((num_train < labels_per_class).sum())) > 0:
        notes.append(
            f"{few} of {len(num_train)} classes have fewer than {labels_per_class} {what}s to learn from "
            f"(`d2v.probe.labels_per_class`): of them all are used"
        )
    return kept, Task(of_kept.astype(np.int64), train, test), notes


def _kind(config: D2VConfig) -> _Kind:
    if isinstance(config, TextConfig):
        return _text(config)
    if isinstance(config, SpeechConfig):
        return _speech(config)
    assert isinstance(config, VisionConfig)
    return _images(config)


def _images(config: VisionConfig) -> _Kind:
    side = min(config.model.image_size, MAX_SIDE)

    def read(model: Student, found: LabeledSet) -> tuple[Source, Iterator[Sample | str]]:
        paths = [sample.name for sample in found.samples]
        source = Images(model, "", Path(found.root), config.model, config.data, paths)
        return source, source.samples()

    def pooled(patches: Rows) -> Rows:
        return pool(torch.from_numpy(patches)[None], config.probe.grid)[0].numpy()

    def pixels(sample: Sample) -> Rows:
        return F.adaptive_avg_pool2d(sample.parts[0], side).flatten().numpy()

    name = PIXELS if side == config.model.image_size else f"pixels, {side} x {side}"
    return _Kind("image", read, pooled, name, pixels, _stacked)


def _speech(config: SpeechConfig) -> _Kind:
    def read(model: Student, found: LabeledSet) -> tuple[Source, Iterator[Sample | str]]:
        paths = [sample.name for sample in found.samples]
        source = Middles(model, Path(found.root), config.model, config.data, paths, MAX_SECONDS)
        return source, source.samples()

    def spectrum(sample: Sample) -> Rows:
        return log_mel(sample.parts[0], config.model.sample_rate).mean(0).numpy()

    return _Kind("recording", read, _mean, LOG_MEL, spectrum, _stacked)


def _text(config: TextConfig) -> _Kind:
    def read(model: Student, found: LabeledSet) -> tuple[Source, Iterator[Sample | str]]:
        from d2v_fast.modalities.text.tasks import tokenizer_of

        tokenizer = tokenizer_of(config.data, config.model)
        source = Lines(model, "", Path(found.root), config.model, config.data, tokenizer, paths=[])
        # no token has so many letters on average
        most = 32 * config.model.max_positions
        return source, (source.sample(printable(sample.name), sample.text[:most]) for sample in found.samples)

    def tokens(sample: Sample) -> Tensor:
        return sample.parts[0]

    return _Kind("text", read, _mean, BAG_OF_WORDS, tokens, bag_of_words)


def _mean(rows: Rows) -> Rows:
    return np.asarray(rows.mean(0), dtype=np.float32)


def _stacked(rows: list[Rows], task: Task) -> Rows:
    return np.stack(rows)
