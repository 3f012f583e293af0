"""Metrics equal their formulas, and degenerate inputs get defined values with a note."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest

from d2v_fast.errors import DataError
from d2v_fast.evaluation.metrics import confusion_matrix, f1, macro_f1, matthews, pearson, scores, spearman


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def answers_of(logits: np.ndarray) -> list[dict[str, object]]:
    return [{"classes": np.argsort(-row)[:5].tolist(), "loss": float(row[0])} for row in logits]


def test_two_classes_equal_their_formulas() -> None:
    rng = np.random.default_rng()
    labels = rng.integers(0, 2, 200)
    logits = rng.normal(size=(200, 2)) + 0.7 * np.eye(2)[labels]
    predicted = logits.argmax(1)
    (tn, fp), (fn, tp) = ([int(((labels == r) & (predicted == c)).sum()) for c in (0, 1)] for r in (0, 1))
    assert confusion_matrix(predicted, labels, 2).tolist() == [[tn, fp], [fn, tp]]
    product = float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    of_one = 2 * tp / (2 * tp + fp + fn)
    assert scores("classify", answers_of(logits), labels.tolist(), ["0", "1"]) == pytest.approx(
        {
            "accuracy": (tp + tn) / 200,
            "top5": 1.0,
            "macro_f1": (of_one + 2 * tn / (2 * tn + fp + fn)) / 2,
            "matthews": (tp * tn - fp * fn) / product**0.5,
            "loss": logits[:, 0].mean(),
            "f1": of_one,
        }
    )


def test_many_classes_equal_their_formulas() -> None:
    rng = np.random.default_rng()
    labels = np.concatenate([np.arange(8), rng.integers(0, 8, 300)])
    logits = rng.normal(size=(308, 8)) + np.eye(8)[labels]
    found = scores("classify", answers_of(logits), labels.tolist(), list("abcdefgh"))
    matrix = confusion_matrix(logits.argmax(1), labels, 8)
    assert found["top5"] == pytest.approx((np.argsort(-logits, axis=1)[:, :5] == labels[:, None]).any(1).mean())
    assert found["macro_f1"] == pytest.approx((2 * np.diag(matrix) / (matrix.sum(0) + matrix.sum(1))).mean())
    assert found["f1"] == found["macro_f1"]


def test_regression_equals_its_formulas() -> None:
    rng = np.random.default_rng()
    targets = rng.normal(size=100)
    predicted = targets + rng.normal(size=100)
    answers = [
        {"score": score, "loss": (score - target) ** 2} for score, target in zip(predicted, targets, strict=True)
    ]

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.argsort(np.argsort(values))

    error = ((predicted - targets) ** 2).mean()
    assert scores("regress", answers, targets.tolist()) == pytest.approx(
        {
            "pearson": np.corrcoef(predicted, targets)[0, 1],
            "spearman": np.corrcoef(ranks(predicted), ranks(targets))[0, 1],
            "mse": error,
            "loss": error,
        }
    )


def test_degenerate_inputs_have_defined_values_and_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matthews(ids(1, 1, 1), ids(0, 1, 1)) == (
            0.0,
            "Matthews' correlation is undefined and counts as 0: all predictions are equal",
        )
        assert "all labels are equal" in matthews(ids(0, 1), ids(1, 1)).note
        assert f1(ids(0, 0), ids(0, 0)).value == 0.0
        assert "class 1" in f1(ids(0, 0), ids(0, 0)).note
        # an absent class does not lower the mean
        assert macro_f1(ids(0, 2), ids(0, 2), 4) == (
            1.0,
            "macro F1 leaves out 2 of 4 classes: they are neither labels nor predictions",
        )
        for correlation in (pearson, spearman):
            assert correlation(np.full(3, 0.1), np.arange(3.0)).value == 0.0
            assert "all predictions are equal" in correlation(np.full(3, 0.1), np.arange(3.0)).note
            assert "only one sample" in correlation(np.ones(1), np.ones(1)).note
        close = np.array([1.0, 1.0, 1.0 + 1e-15])
        assert np.isfinite(pearson(close, np.arange(3.0)).value)
        assert "hardly differ" in pearson(close, np.arange(3.0)).note
        with caplog.at_level(logging.WARNING):
            found = scores("classify", [{"classes": [0, 1], "loss": 0.5}] * 2, [0, 0], ["a", "b"])
    assert found == {"accuracy": 1.0, "top5": 1.0, "macro_f1": 1.0, "matthews": 0.0, "loss": 0.5, "f1": 0.0}
    assert len(caplog.messages) == 3


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        scores("classify", [], [], ["a", "b"])
    with pytest.raises(DataError, match=r"1 of 2 are not: the model has diverged"):
        scores("regress", [{"score": 1.0, "loss": 0.1}, {"score": np.nan, "loss": np.nan}], [0.0, 1.0])
