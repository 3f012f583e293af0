"""Metrics of predictions against labels, by scikit-learn and scipy.

A metric that is undefined for its input, such as a correlation with constant predictions, is 0 and has a note.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.errors import DataError

__all__ = [
    "CLASSIFICATION",
    "REGRESSION",
    "Evaluation",
    "Metric",
    "accuracy",
    "classification_metrics",
    "confusion_matrix",
    "f1",
    "matthews",
    "pearson",
    "regression_metrics",
    "spearman",
    "top_k_accuracy",
]

# names of the metrics of each task; `top_5` is left out where there are at most 5 classes
CLASSIFICATION = ("accuracy", "top_5", "f1", "matthews")
REGRESSION = ("pearson", "spearman", "mse")
TOP_K = 5

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]


class Metric(NamedTuple):
    """The value of a metric.

    Attributes:
        value: Always finite.
        note: Why the metric is undefined for this input or differs from its usual definition; "" for neither.
    """

    value: float
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one task.

    Attributes:
        values: Value by name, one of `CLASSIFICATION` or `REGRESSION`. Shares are in [0, 1], correlations in [-1, 1].
        notes: A line for each value that is undefined for this input.
        confusion: int64 `[C, C]`, see `confusion_matrix`; None for regression.
    """

    values: dict[str, float]
    notes: tuple[str, ...]
    confusion: Ids | None = None


def classification_metrics(scores: Floats, labels: Ids) -> Evaluation:
    """Return accuracy, top-5 accuracy, F1, Matthews correlation and the confusion matrix.

    Args:
        scores: Logits or probabilities, `[S, C]`. The prediction is the class with the highest one.
        labels: int64 `[S]`, in [0, C).
    Raises:
        DataError: There are no samples, or a score is not finite.
    """
    _check(scores, labels)
    num_classes = scores.shape[1]
    predicted = scores.argmax(1).astype(np.int64)
    found = {"accuracy": accuracy(predicted, labels)}
    if num_classes > TOP_K:
        found["top_5"] = top_k_accuracy(scores, labels, TOP_K)
    found["f1"] = f1(predicted, labels, num_classes)
    found["matthews"] = matthews(predicted, labels)
    return _evaluation(found, confusion_matrix(predicted, labels, num_classes))


def regression_metrics(predicted: Floats, targets: Floats) -> Evaluation:
    """Return Pearson's and Spearman's correlation and the mean squared error.

    Args:
        predicted, targets: `[S]`.
    Raises:
        DataError: There are no samples, or a prediction is not finite.
    """
    _check(predicted, targets)
    error = float(np.mean((predicted.astype(np.float64) - targets.astype(np.float64)) ** 2))
    found = {"pearson": pearson(predicted, targets), "spearman": spearman(predicted, targets), "mse": Metric(error)}
    return _evaluation(found)


def accuracy(predicted: Ids, labels: Ids) -> Metric:
    """Return the share of correct predictions, both int64 `[S]`."""
    return Metric(float(np.mean(predicted == labels)))


def top_k_accuracy(scores: Floats, labels: Ids, k: int) -> Metric:
    """Return the share of samples whose label has one of the `k` highest scores.

    As in scikit-learn, the later one of two classes with equal scores counts as the higher one.

    Args:
        scores: `[S, C]`.
        labels: int64 `[S]`.
        k: Less than C.
    """
    from sklearn.metrics import top_k_accuracy_score

    return Metric(float(top_k_accuracy_score(labels, scores, k=k, labels=np.arange(scores.shape[1]))))


def confusion_matrix(predicted: Ids, labels: Ids, num_classes: int) -> Ids:
    """Return the number of samples by class (row) and prediction (column), int64 `[C, C]`."""
    from sklearn.metrics import confusion_matrix as count

    return np.asarray(count(labels, predicted, labels=np.arange(num_classes)), dtype=np.int64)


def f1(predicted: Ids, labels: Ids, num_classes: int) -> Metric:
    """Return F1 of class 1 for two classes, as GLUE does, and the unweighted mean of the classes' F1 for more.

    Classes that are neither labels nor predictions are left out of the mean, and the note counts them.

    Args:
        predicted, labels: int64 `[S]`.
        num_classes: C, at least 2.
    """
    from sklearn.metrics import f1_score

    present = np.union1d(predicted, labels)
    if num_classes == 2:
        if 1 not in present:
            return Metric(0.0, "F1 is undefined and counts as 0: class 1 is neither a label nor a prediction")
        return Metric(float(f1_score(labels, predicted, pos_label=1, average="binary", zero_division=0.0)))
    missing = num_classes - len(present)
    note = f"F1 leaves out {missing} of {num_classes} classes: they are neither labels nor predictions"
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


def _check(predicted: Floats, labels: npt.NDArray[Any]) -> None:
    if len(labels) == 0:
        raise DataError("there must be at least one sample to score, but there is none.")
    if len(predicted) != len(labels):
        raise ValueError(f"`predicted` and `labels` must have one length, but have {len(predicted)} and {len(labels)}.")
    if num := int((~np.isfinite(predicted)).reshape(len(labels), -1).any(1).sum()):
        raise DataError(
            f"every prediction must be finite to be scored, but {num} of {len(labels)} are not: the model has "
            "diverged. Lower `optimizer.params.lr`."
        )


def _evaluation(found: dict[str, Metric], confusion: Ids | None = None) -> Evaluation:
    values = {name: metric.value for name, metric in found.items()}
    return Evaluation(values, tuple(metric.note for metric in found.values() if metric.note), confusion)
