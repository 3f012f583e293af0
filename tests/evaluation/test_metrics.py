"""Metrics equal their formulas, and degenerate inputs get defined values with a note."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from d2v_fast.errors import DataError
from d2v_fast.evaluation.metrics import (
    classification_metrics,
    confusion_matrix,
    f1,
    matthews,
    pearson,
    regression_metrics,
    spearman,
)


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_two_classes_equal_their_formulas() -> None:
    rng = np.random.default_rng()
    labels = rng.integers(0, 2, 200)
    scores = rng.normal(size=(200, 2)) + 0.7 * np.eye(2)[labels]
    found = classification_metrics(scores, labels)
    predicted = scores.argmax(1)
    (tn, fp), (fn, tp) = ([int(((labels == r) & (predicted == c)).sum()) for c in (0, 1)] for r in (0, 1))
    assert found.confusion is not None
    assert found.confusion.tolist() == [[tn, fp], [fn, tp]]
    product = float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert found.values == pytest.approx(
        {
            "accuracy": (tp + tn) / 200,
            "f1": 2 * tp / (2 * tp + fp + fn),
            "matthews": (tp * tn - fp * fn) / product**0.5,
        }
    )
    assert found.notes == ()


def test_many_classes_equal_their_formulas() -> None:
    rng = np.random.default_rng()
    labels = np.concatenate([np.arange(8), rng.integers(0, 8, 300)])
    scores = rng.normal(size=(308, 8)) + np.eye(8)[labels]
    found = classification_metrics(scores, labels)
    in_top = (np.argsort(-scores, axis=1)[:, :5] == labels[:, None]).any(1)
    matrix = confusion_matrix(scores.argmax(1), labels, 8)
    of_classes = 2 * np.diag(matrix) / (matrix.sum(0) + matrix.sum(1))
    assert found.values["top_5"] == pytest.approx(in_top.mean())
    assert found.values["f1"] == pytest.approx(of_classes.mean())
    assert found.notes == ()


def test_regression_equals_its_formulas() -> None:
    rng = np.random.default_rng()
    targets = rng.normal(size=100)
    predicted = (targets + rng.normal(size=100)).astype(np.float32)
    found = regression_metrics(predicted, targets)

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.argsort(np.argsort(values))

    assert found.values == pytest.approx(
        {
            "pearson": np.corrcoef(predicted, targets)[0, 1],
            "spearman": np.corrcoef(ranks(predicted), ranks(targets))[0, 1],
            "mse": ((predicted - targets) ** 2).mean(),
        },
        rel=1e-5,
    )
    assert found.notes == ()


def test_degenerate_inputs_have_defined_values_and_a_note() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matthews(ids(1, 1, 1), ids(0, 1, 1)) == (
            0.0,
            "Matthews' correlation is undefined and counts as 0: all predictions are equal",
        )
        assert "all labels are equal" in matthews(ids(0, 1), ids(1, 1)).note
        assert f1(ids(0, 0), ids(0, 0), 2).value == 0.0
        assert "class 1" in f1(ids(0, 0), ids(0, 0), 2).note
        # an absent class does not lower the mean
        assert f1(ids(0, 2), ids(0, 2), 4) == (
            1.0,
            "F1 leaves out 2 of 4 classes: they are neither labels nor predictions",
        )
        for correlation in (pearson, spearman):
            assert correlation(np.full(3, 0.1), np.arange(3.0)).value == 0.0
            assert "all predictions are equal" in correlation(np.full(3, 0.1), np.arange(3.0)).note
            assert "only one sample" in correlation(np.ones(1), np.ones(1)).note
        close = np.array([1.0, 1.0, 1.0 + 1e-15])
        assert np.isfinite(pearson(close, np.arange(3.0)).value)
        assert "hardly differ" in pearson(close, np.arange(3.0)).note
    found = classification_metrics(np.eye(2)[ids(0, 0)], ids(0, 0))
    assert found.values == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}
    assert len(found.notes) == 2


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        classification_metrics(np.empty((0, 2)), ids())
    with pytest.raises(DataError, match="1 of 2 are not"):
        classification_metrics(np.array([[0.0, np.nan], [1.0, 0.0]]), ids(0, 1))
    with pytest.raises(DataError, match="diverged"):
        regression_metrics(np.array([np.inf, 0.0]), np.zeros(2))
