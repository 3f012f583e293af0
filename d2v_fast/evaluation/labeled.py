"""The probe of a user's own labels, `d2v.probe.path`, for every modality."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_fast.config import PretrainConfig
from d2v_fast.data.files import NUM_NAMED
from d2v_fast.data.labels import MIN_PER_CLASS, PATH_KEY, split
from d2v_fast.data.listing import counted
from d2v_fast.errors import DataError
from d2v_fast.evaluation.classifiers import ProbeReport, Task, most_frequent, score
from d2v_fast.evaluation.inputs import Rows, Sample, encode
from d2v_fast.evaluation.probing import probing_of
from d2v_fast.files.reading import printable
from d2v_fast.models.student import Student

MOST_FREQUENT = "most frequent class"
# samples in memory at a time
_CHUNK = 64


def describe_labeled(config: PretrainConfig) -> list[str]:
    """Return lines that say which samples a probe of `d2v.probe.path` will use and leave out.

    Raises:
        DataError: The samples cannot be probed.
    """
    kind = probing_of(config).labeled(config)
    return kind.find(PATH_KEY).describe(kind.what)


def run_labeled_probe(models: Mapping[str, Student], config: PretrainConfig, key: str = PATH_KEY) -> ProbeReport:
    """Score every model's features of `d2v.probe.path`, and the modality's baseline.

    Args:
        models: Encoders, by their name in the table.
        config: The run's.
        key: The key or option that named the path, for messages.
    Raises:
        DataError: There are fewer than two classes, or too few samples can be read.
    """
    kind = probing_of(config).labeled(config)
    found = kind.find(key)
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
    """Return the positions of usable samples, the task (None if too few are usable), and notes for the user."""
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
            f"(`d2v.probe.labels_per_class`): all of theirs are used"
        )
    return kept, Task(of_kept.astype(np.int64), train, test), notes
