"""Metrics of answers to labeled samples, by scikit-learn and scipy.

A metric that is undefined for its input, such as a correlation with constant predictions, is 0 and has a note.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.errors import DataError
from d2v_fast.evaluation.word_errors import count_errors

__all__ = [
    "TASKS",
    "Metric",
    "accuracy",
    "classification",
    "confusion_matrix",
    "f1",
    "macro_f1",
    "matthews",
    "pearson",
    "recognition",
    "regression",
    "scores",
    "spearman",
]

Answers = Sequence[Mapping[str, Any]]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]

_log = logging.getLogger(__name__)


class Metric(NamedTuple):
    """The value of a metric.

    Attributes:
        value: Always finite.
        note: Why the metric is undefined for this input or differs from its usual definition; "" for neither.
    """

    value: float
    note: str = ""


def scores(
    task: str, answers: Answers, targets: Sequence[Any], labels: Sequence[str] | None = None
) -> dict[str, float]:
    """Return the metrics of a task by name, and log a warning for each that is undefined for these samples.

    Args:
        task: One of `TASKS`.
        answers: One per sample, as `Finetune.answers` returns them.
        targets: One per sample: the number of its class, or its score.
        labels: Names of the classes; None if the task has none.
    Raises:
        DataError: There are no samples, or an answer is not finite.
    """
    if not targets:
        raise DataError("there must be at least one sample to score, but there is none.")
    if len(answers) != len(targets):
        raise ValueError(f"`answers` and `targets` must have one length, but have {len(answers)} and {len(targets)}.")
    found = TASKS[task](answers, targets, labels)
    for metric in found.values():
        if metric.note:
            _log.warning("%s", metric.note)
    return {name: metric.value for name, metric in found.items()}


def classification(answers: Answers, targets: Sequence[int], labels: Sequence[str] | None) -> dict[str, Metric]:
    """Return `accuracy`, `top5`, `f1`, `macro_f1`, `matthews` and `loss`.

    `f1` is that of class 1 of two classes, as in GLUE, and for more classes the same as `macro_f1`.

    Args:
        answers: With `classes`, the numbers of up to five classes, the most probable one first, and `loss`.
        targets: Number of each sample's class.
        labels: Names of the classes.
    """
    known, num_classes = np.asarray(targets, dtype=np.int64), len(labels or ())
    loss = _mean_loss(answers)
    predicted = np.array([answer["classes"][0] for answer in answers], dtype=np.int64)
    in_top = [target in answer["classes"] for answer, target in zip(answers, targets, strict=True)]
    of_classes = macro_f1(predicted, known, num_classes)
    return {
        "accuracy": accuracy(predicted, known),
        "top5": Metric(float(np.mean(in_top))),
        "f1": f1(predicted, known) if num_classes == 2 else Metric(of_classes.value),
        "macro_f1": of_classes,
        "matthews": matthews(predicted, known),
        "loss": loss,
    }


def regression(answers: Answers, targets: Sequence[float], labels: Sequence[str] | None) -> dict[str, Metric]:
    """Return `pearson`, `spearman`, `mse`, and `loss`, which is the same.

    Args:
        answers: With `score` and `loss`.
        targets: Score of each sample.
        labels: Not read.
    """
    known = np.asarray(targets, dtype=np.float64)
    loss = _mean_loss(answers)
    predicted = np.array([answer["score"] for answer in answers], dtype=np.float64)
    found = {"pearson": pearson(predicted, known), "spearman": spearman(predicted, known)}
    return {**found, "mse": Metric(float(np.mean((predicted - known) ** 2))), "loss": loss}


def recognition(answers: Answers, targets: Sequence[str], labels: Sequence[str] | None) -> dict[str, Metric]:
    """Return `wer` and `cer`, the word and character error rates of transcripts, and `loss`.

    Args:
        answers: With `transcript` and `loss`.
        targets: Reference of each sample.
        labels: Not read.
    """
    loss = _mean_loss(answers)
    errors = count_errors((target, answer["transcript"]) for answer, target in zip(answers, targets, strict=True))
    return {"wer": Metric(errors.wer), "cer": Metric(errors.cer), "loss": loss}


TASKS: dict[str, Callable[[Answers, Sequence[Any], Sequence[str] | None], dict[str, Metric]]] = {
    "classify": classification,
    "ctc": recognition,
    "regress": regression,
}


def accuracy(predicted: Ids, labels: Ids) -> Metric:
    """Return the share of correct predictions, both int64 `[S]`."""
    return Metric(float(np.mean(predicted == labels)))


def confusion_matrix(predicted: Ids, labels: Ids, num_classes: int) -> Ids:
    """Return the number of samples by class (row) and prediction (column), int64 `[C, C]`."""
    from sklearn.metrics import confusion_matrix as count

    return np.asarray(count(labels, predicted, labels=np.arange(num_classes)), dtype=np.int64)


def f1(predicted: Ids, labels: Ids) -> Metric:
    """Return F1 of class 1, as GLUE does for two classes; int64 `[S]` each."""
    from sklearn.metrics import f1_score

    if not (predicted == 1).any() and not (labels == 1).any():
        return Metric(0.0, "F1 is undefined and counts as 0: class 1 is neither a label nor a prediction")
    return Metric(float(f1_score(labels, predicted, labels=[1], average="macro", zero_division=0.0)))


def macro_f1(predicted: Ids, labels: Ids, num_classes: int) -> Metric:
    """Return the unweighted mean of the classes' F1.

    Classes that are neither labels nor predictions are left out of the mean, and the note counts them.

    Args:
        predicted, labels: int64 `[S]`.
        num_classes: C.
    """
    from sklearn.metrics import f1_score

    present = np.union1d(predicted, labels)
    missing = num_classes - len(present)
    note = f"macro F1 leaves out {missing} of {num_classes} classes: they are neither labels nor predictions"
    value = f1_score(labels, predicted, labels=present, average="macro", zero_division=0.0)
    return Metric(float(value), note if missing else "")


def matthews(predicted: Ids, labels: Ids) -> Metric:
    """Return Matthews' correlation coefficient of int64 `[S]` each; 0 if all predictions or all labels are equal."""
    from sklearn.metrics import matthews_corrcoef

    if note := _constant("Matthews' correlation", predicted, labels):
        return Metric(0.0, note)
    return Metric(float(matthews_corrcoef(labels, predicted)))


def pearson(predicted: Floats, targets: Floats) -> Metric:
    """Return Pearson's correlation of `[S]` each; 0 if all predictions or all targets are equal."""
    return _correlation("Pearson", predicted, targets)


def spearman(predicted: Floats, targets: Floats) -> Metric:
    """Return Spearman's rank correlation of `[S]` each; 0 if all predictions or all targets are equal."""
    return _correlation("Spearman", predicted, targets)


def _correlation(name: str, predicted: Floats, targets: Floats) -> Metric:
    from scipy import stats

    what = f"{name}'s correlation"
    if note := _constant(what, predicted, targets):
        return Metric(0.0, note)
    compute = {"Pearson": stats.pearsonr, "Spearman": stats.spearmanr}[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = float(compute(predicted.astype(np.float64), targets.astype(np.float64)).statistic)
    if not np.isfinite(value):
        return Metric(0.0, f"{what} is undefined and counts as 0: the values hardly differ")
    return Metric(value, f"{what} may be inexact: the values hardly differ" if caught else "")


def _constant(what: str, predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> str:
    """Return why a correlation is undefined; "" if both arrays hold more than one value."""
    if len(labels) < 2:
        return f"{what} is undefined and counts as 0: there is only one sample"
    for name, values in (("predictions", predicted), ("labels", labels)):
        if (values == values[0]).all():
            return f"{what} is undefined and counts as 0: all {name} are equal"
    return ""


def _mean_loss(answers: Answers) -> Metric:
    losses = [answer["loss"] for answer in answers]
    if num := sum(not math.isfinite(loss) for loss in losses):
        raise DataError(
            f"the loss of every sample must be finite to be scored, but those of {num} of {len(losses)} are not: the "
            "model has diverged. Lower `optimizer.params.lr`."
        )
    return Metric(math.fsum(losses) / len(losses))
